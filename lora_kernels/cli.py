"""The command line, `lora-kernels init | plan | verify | tune | inspect | doctor`: what `commands` is told."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import types
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from lora_kernels._version import __version__

# What a field can be given as, by preference where its type is a union.
_TEXTUAL = (Path, str, float, int, bool)


def _option(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field that the command line describes by a text; required without a default."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


_TASK = "causal-lm, sequence-classification or base (default: "


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a command reads of text files."""

    text_column: str = _option("column of the text", "text")
    label_column: str | None = _option("column of the labels, for a classifier", None)
    task: str | None = _option(f"{_TASK}the adapter's, or with labels a classifier, or as the config says)", None)
    batch_size: int = _option("texts per batch", 8)
    max_length: int = _option("tokens at which a text is cut", 256)


@dataclass(frozen=True, kw_only=True)
class Init(Texts):
    """Make a PEFT adapter with a data-aware start from a model folder and a text file."""

    model: Path = _option("folder of a transformers model")
    data: Path = _option(".csv or .jsonl file with text")
    out: Path = _option("folder for the adapter, report.json and report.html, new or empty")
    method: str = _option("name of the method; the names and their settings are listed below", "eva")
    set: list[str] = _option("settings of the method, NAME=VALUE, such as gamma=64", [])
    ranks: str | None = _option(
        "redistribute ranks by explained_variance, gradient_energy or fisher_energy; or keep (default: keep)", None
    )
    rank: int = _option("r of every layer", 16)
    alpha: float | None = _option("lora_alpha (default: the rank)", None)
    learning_rate: float | None = _option("that you will train with; the report judges it", None)
    optimizer: str = _option("adamw, lora_pro or lora_pro_full, for the rate suggested", "adamw")
    no_rate: bool = _option("measure no learning rate", False)
    target_modules: list[str] = _option("names as in PEFT", ["all-linear"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Print what a collection would keep and cost, from a config alone."""

    config: Path = _option("config.json of a transformers model; no weights are needed")
    method: str = _option("a method (eva, lora_da, ...) or a statistic (gradient, ...)")
    rank: int = _option("r of every layer and expert, which a method's sketches follow", 16)
    task: str | None = _option(f"{_TASK}as the config says)", None)
    world: int = _option("number of processes", 1)
    json: bool = _option("print the plan as JSON", False)


@dataclass(frozen=True, kw_only=True)
class Verify(Texts):
    """Compare the fused LoRA layers with PEFT's and with float64 on your model and text."""

    model: Path = _option("folder of a transformers model")
    data: Path = _option(".csv or .jsonl file with text; the first batch is run")
    adapter: Path | None = _option("folder of a PEFT adapter (default: a random one of --rank)", None)
    rank: int = _option("r of the random adapter", 16)
    batch_size: int = _option("texts per batch", 4)
    max_length: int = _option("tokens at which a text is cut", 128)


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Measure the forms of the LoRA layers' products on this device, for later runs to use the fastest."""

    model_config: Path | None = _option(
        "config.json of a transformers model, whose layers are measured; no weights are needed", None
    )
    shapes: str | None = _option("or inputs x outputs of layers, such as 4096x4096,4096x14336", None)
    task: str | None = _option(f"{_TASK}as the config says)", None)
    tokens: list[int] | None = _option("batch size times length, one or more (default: 8192; 1024 on a CPU)", None)
    rank: list[int] = _option("r, one or more", [16])
    dtype: str | None = _option("float16, bfloat16 or float32 (default: bfloat16; float32 on a CPU)", None)
    dropout: bool = _option("the adapter's input is dropped", False)
    device: str | None = _option("such as cuda:1 (default: the GPU if there is one)", None)
    rounds: int = _option("timed calls of each form", 20)
    out: Path | None = _option("file for the table (default: the one that LoRA layers read)", None)


@dataclass(frozen=True, kw_only=True)
class Inspect(Texts):
    """Print spectra, balance and verdict of a trained adapter; the exit status is 1 on a loud failure."""

    adapter: Path = _option("folder of a PEFT adapter", positional=True)
    base: Path | None = _option("folder of its base model, to compare with the weights", None)
    data: Path | None = _option(
        ".csv or .jsonl file with training text, for the certificate; needs --base and --weight-decay", None
    )
    weight_decay: float | None = _option("lambda of training, for the certificate", None)
    max_batches: int | None = _option("read at most so many batches", None)
    intruders: bool = _option("compare directions with those of the base weights", False)
    monitor: Path | None = _option(".jsonl file of a LandscapeMonitor", None)
    out: Path | None = _option("folder for inspect.html (grids of module x block) and diagnosis.json", None)
    json: bool = _option("print the diagnosis as JSON", False)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print what is installed and which backends run, and test every op."""


COMMANDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Init, Plan, Verify, Tune, Inspect, Doctor)}


def _descriptions(kind: type) -> dict[str, str]:
    """What a dataclass says of its fields: their metadata, or `Attributes:` or `Args:` in its docstring."""
    texts = {option.name: option.metadata["help"] for option in fields(kind) if "help" in option.metadata}
    section = re.search(r"^(?:Attributes|Args):\n((?:    .*\n?)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE):
        texts[name] = " ".join(text.split()).replace("`", "")
    return texts


def default_of(option: Field[Any]) -> Any:
    """The default of a field, or `MISSING`."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def add_options(
    parser: Any, kind: type, *, leave_out: Container[str] = (), defaults: Mapping[str, Any] = types.MappingProxyType({})
) -> None:
    """Add an option for every field that text can give (positional with that metadata, a bool as a switch)."""
    # Those that the user leaves out stay out of the namespace.
    texts, hints = _descriptions(kind), get_type_hints(kind)
    for option in fields(kind):
        value_type, many = _value_type(hints[option.name])
        if value_type is None or option.name in leave_out:
            continue
        default = defaults.get(option.name, default_of(option))
        text = texts[option.name].removesuffix(".").replace("%", "%%")
        if default is not MISSING and default is not None and default != [] and value_type is not bool:
            shown = " ".join(map(str, default)) if many else default
            text += f" (default: {shown})"
        settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if option.metadata.get("positional"):
            parser.add_argument(option.name, type=value_type, **settings)
            continue
        if value_type is bool:
            settings["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif many:
            settings |= {"type": value_type, "nargs": "+", "action": "extend"}
        else:
            settings["type"] = value_type
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, dest=option.name, required=default is MISSING, **settings)


def _value_type(hint: Any) -> tuple[type | None, bool]:
    """The type of one value, `None` where text cannot give it, and whether there may be several."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is list:
            return get_args(kind)[0], True
    return next((kind for kind in _TEXTUAL if kind in kinds), None), False


class Config(NamedTuple):
    """Fields of another dataclass that are options of a command, too: passed on as keywords where they are given."""

    kind: type
    leave_out: Collection[str] = ()
    defaults: Mapping[str, Any] = {}


def _configs(name: str | None) -> tuple[tuple[Config, ...], str | None]:
    """Further options of a command, in groups, and what its help ends with; `lora-kernels --help` does without them."""
    if name not in ("init", "plan"):
        return (), None
    from lora_kernels.init import METHODS, Redistribution  # noqa: PLC0415
    from lora_kernels.statistics import CollectOptions  # noqa: PLC0415
    from lora_kernels.statistics.options import PlanKeywords  # noqa: PLC0415

    if name == "plan":
        others = {option.name for option in fields(CollectOptions)} - {*PlanKeywords.__annotations__}
        return (Config(CollectOptions, others),), None
    own = ("sketch_size", "distributed")  # follow the ranks and the process group
    lines = ["methods and their settings (--set NAME=VALUE), with defaults:"]
    for method, kind in METHODS.items():
        lines.append(f"  {method}: {', '.join(f'{each.name}={default_of(each)!r}' for each in fields(kind))}")
    configs = Config(Redistribution, ("score", "seed")), Config(CollectOptions, own, {"max_batches": 64})
    return configs, "\n".join(lines)


def _parser(name: str | None) -> tuple[argparse.ArgumentParser, tuple[Config, ...]]:
    """The parser, with the options of one command, and that command's configs."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="Data-aware LoRA on fused kernels.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    configs, epilog = _configs(name)
    for key, kind in COMMANDS.items():
        summary = str(kind.__doc__).partition("\n")[0]
        command = commands.add_parser(
            key, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if key == name:
            command.epilog = epilog
            add_options(command, kind)
            for config in configs:
                group = command.add_argument_group(str(config.kind.__doc__).partition("\n")[0])
                add_options(group, config.kind, leave_out=config.leave_out, defaults=config.defaults)
    return parser, configs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default): 0, or 1 where a check failed, or 2 where the input was bad."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser, configs = _parser(words[0] if words else None)
    given = vars(parser.parse_args(words))
    name = given.pop("command")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    groups = [{**config.defaults} for config in configs]
    for group, config in zip(groups, configs, strict=True):
        group |= {option.name: given.pop(option.name) for option in fields(config.kind) if option.name in given}
    try:
        commands = import_module("lora_kernels.commands")  # slow to import
        return int(getattr(commands, name)(COMMANDS[name](**given), *groups))
    except ModuleNotFoundError as error:
        print(f"lora-kernels {name}: {error}; pip install 'lora_kernels[peft]' has it", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"lora-kernels {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
