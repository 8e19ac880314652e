"""The command line: `lora-kernels init | plan | verify | tune | inspect | doctor`."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels._options import add_options, default_of
from lora_kernels._version import __version__


class Config(NamedTuple):
    """Fields of another dataclass that are options of a command, too: passed on as keywords where they are given."""

    kind: type
    leave_out: Collection[str] = ()
    defaults: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are its options, its first docstring line its help; `run` returns the exit status."""

    @classmethod
    def configs(cls) -> tuple[Config, ...]:
        """Further options, in groups; `lora-kernels --help` does without them."""
        return ()

    @classmethod
    def epilog(cls) -> str | None:
        """Text at the end of the command's help."""
        return None


@dataclass(frozen=True, kw_only=True)
class _TextCommand(Command):
    """A command that reads text.

    Attributes:
        text_column: column of the text
        label_column: column of the labels, for a classifier
        task: causal-lm, sequence-classification or base (default: the adapter's, or with labels a classifier, or as the
            config says)
        batch_size: texts per batch
        max_length: tokens at which a text is cut
    """

    text_column: str = "text"
    label_column: str | None = None
    task: str | None = None
    batch_size: int = 8
    max_length: int = 256

    def read(self, data: Path) -> tuple[list[str], list[str] | None]:
        """The texts of a file, and their labels if there is a column of them."""
        from lora_kernels.api import text_files  # noqa: PLC0415

        return text_files.read(data, self.text_column, self.label_column)


@dataclass(frozen=True, kw_only=True)
class Init(_TextCommand):
    """Make a PEFT adapter with a data-aware start from a model folder and a text file.

    Attributes:
        model: folder of a transformers model
        data: .csv or .jsonl file with text
        out: folder for the adapter, report.json and report.html, new or empty
        method: name of the method; the names and their settings are listed below
        set: settings of the method, NAME=VALUE, such as gamma=64
        ranks: redistribute ranks by explained_variance, gradient_energy or fisher_energy; or keep (default: keep)
        rank: r of every layer
        alpha: lora_alpha (default: the rank)
        learning_rate: that you will train with; the report judges it
        optimizer: adamw, lora_pro or lora_pro_full, for the rate suggested
        no_rate: measure no learning rate
        target_modules: names as in PEFT
    """

    model: Path
    data: Path
    out: Path
    method: str = "eva"
    set: list[str] = field(default_factory=list)
    ranks: str | None = None
    rank: int = 16
    alpha: float | None = None
    learning_rate: float | None = None
    optimizer: str = "adamw"
    no_rate: bool = False
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])

    @classmethod
    def configs(cls) -> tuple[Config, ...]:
        """The redistribution of ranks, and the collection."""
        from lora_kernels.init import Redistribution  # noqa: PLC0415
        from lora_kernels.statistics import CollectOptions  # noqa: PLC0415

        own = ("sketch_size", "distributed")  # follow the ranks and the process group
        return Config(Redistribution, ("score", "seed")), Config(CollectOptions, own, {"max_batches": 64})

    @classmethod
    def epilog(cls) -> str:
        """The settings of the methods."""
        from lora_kernels.init import METHODS  # noqa: PLC0415

        lines = [
            f"  {name}: {', '.join(f'{setting.name}={default_of(setting)!r}' for setting in fields(kind))}"
            for name, kind in METHODS.items()
        ]
        return "\n".join(["methods and their settings (--set NAME=VALUE), with defaults:", *lines])

    def run(self, redistribution: dict[str, Any], collection: dict[str, Any]) -> int:
        """Make the adapter."""
        from lora_kernels.adapters.versions import require_peft  # noqa: PLC0415

        require_peft()
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (needs the peft extra)

        import lora_kernels as lk  # noqa: PLC0415
        from lora_kernels._files import replacing_folder, write_text  # noqa: PLC0415
        from lora_kernels.api import transformers  # noqa: PLC0415
        from lora_kernels.api.init_page import init_page  # noqa: PLC0415
        from lora_kernels.reports import console  # noqa: PLC0415
        from lora_kernels.runtime.loss import MissingLossError  # noqa: PLC0415

        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"out is {str(self.out)!r}, but must be a new or empty folder")
        method = _method(self.method, self.set)
        score = self.ranks or (method.own_score if redistribution else None)
        if redistribution and score is None:
            raise ValueError(f"method {method.name} keeps every rank: name a score with --ranks to change them")
        ranks = None
        if score == "keep":
            method = method.keeping_ranks()
        elif score is not None:
            ranks = lk.init.Redistribution(score, **redistribution)
        texts, labels = self.read(self.data)
        task = transformers.task_for(self.model, self.task, labels)
        model, tokenizer = transformers.load(self.model, task, labels)
        new_head = labels is not None and transformers.task_of(self.model) != task
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or self.rank,
            target_modules=self.target_modules[0] if self.target_modules == ["all-linear"] else self.target_modules,
            task_type=transformers.TASK_TYPES.get(task),  # type: ignore[arg-type]
        )
        peft_model = get_peft_model(model, config)
        batches = transformers.task_batches(model, tokenizer, task, texts, labels, self.batch_size, self.max_length)
        try:
            report = lk.initialize(
                peft_model,
                batches,
                method,
                ranks=ranks,
                learning_rate=self.learning_rate,
                suggest_rate=not self.no_rate,
                optimizer=self.optimizer,
                **collection,
            )
        except MissingLossError as error:
            raise ValueError(
                f"{self.method} with --ranks {score} reads gradients, but a model loaded as {task} without labels has "
                "no loss: --label-column names the labels, or --task another head"
            ) from error
        with replacing_folder(self.out) as folder:
            peft_model.save_pretrained(folder)
            write_text(folder / "report.json", report.to_json() + "\n")
            write_text(folder / "report.html", init_page(report).to_html())
        frozen = "lora_kernels.load to train it (its start is frozen), or by stock PEFT"
        reader = frozen if method.offsets_base else "stock PEFT"
        lines = [report, f"adapter: {self.out} of the model loaded as {task}, to be loaded with {reader}"]
        if new_head:
            count = model.config.num_labels
            lines.append(
                f"The model has no trained head: the adapter's folder has a new one, for {count} labels in "
                f"alphabetical order. Load the base with num_labels={count}."
            )
        console(140).print(*lines, sep="\n")
        return 0


def _method(name: str, settings: Sequence[str]) -> Any:
    """The config of the method of this name; `settings` are `NAME=VALUE`, with Python literals or else plain text."""
    from lora_kernels._checks import check_choice  # noqa: PLC0415
    from lora_kernels.init import METHODS  # noqa: PLC0415

    check_choice("method", name, tuple(METHODS))
    known = {setting.name for setting in fields(METHODS[name])}
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or key not in known:
            must = f"NAME=VALUE with a name out of {', '.join(sorted(known))}"
            raise ValueError(f"set is {setting!r}, but must be {must}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return METHODS[name](**values)


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Print what a collection would keep and cost, from a config alone.

    Attributes:
        config: config.json of a transformers model; no weights are needed
        method: a method (eva, lora_da, ...) or a statistic (gradient, ...)
        rank: r of every layer and expert, which a method's sketches follow
        task: causal-lm, sequence-classification or base (default: as the config says)
        world: number of processes
        json: print the plan as JSON
    """

    config: Path
    method: str
    rank: int = 16
    task: str | None = None
    world: int = 1
    json: bool = False

    @classmethod
    def configs(cls) -> tuple[Config, ...]:
        """What a plan depends on."""
        from lora_kernels.statistics import CollectOptions  # noqa: PLC0415
        from lora_kernels.statistics.options import PlanKeywords  # noqa: PLC0415

        others = {option.name for option in fields(CollectOptions)} - set(PlanKeywords.__annotations__)
        return (Config(CollectOptions, others),)

    def run(self, collection: dict[str, Any]) -> int:
        """Print the plan."""
        import lora_kernels as lk  # noqa: PLC0415
        from lora_kernels._checks import check_range  # noqa: PLC0415
        from lora_kernels.adapters.experts import with_experts  # noqa: PLC0415
        from lora_kernels.api import transformers  # noqa: PLC0415
        from lora_kernels.init import METHODS  # noqa: PLC0415
        from lora_kernels.reports import console  # noqa: PLC0415

        check_range("rank", self.rank, low=1, integer=True)
        model = transformers.empty_model(self.config, transformers.task_for(self.config, self.task))
        bare, experts = model, transformers.expert_parameters(model)
        if experts:
            model = with_experts(model, transformers.linear_targets(model), experts, self.rank)
        else:
            collection["targets"] = transformers.linear_targets(model)
            if others := [name for name, value in model.named_parameters() if ".experts." in name and value.dim() == 3]:
                what = f"{len(others)} parameters, such as {others[0]}"
                print(f"not in this plan (experts that cannot be observed): {what}", file=sys.stderr)
        size = METHODS[self.method]().sketch_size([self.rank]) if self.method in METHODS else 0
        collection = {"sketch_size": max(64, size), **collection, "world_size": self.world}
        try:
            plan = lk.plan(model, self.method, batch=transformers.example_batch(bare), **collection)
        except Exception as error:  # noqa: BLE001  (some models cannot run without numbers, and fail in any way)
            plan = lk.plan(model, self.method, **collection)
            reason = " ".join(str(error).split())
            print(f"a forward pass without weights failed ({reason}): inputs are not shared here", file=sys.stderr)
        if self.json:
            print(plan.to_json())
        else:
            console(140).print(plan)
            for line in transformers.of_experts(model, self.rank) if experts else ():
                console(140).print(line)
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify(_TextCommand):
    """Compare the fused LoRA layers with PEFT's and with float64 on your model and text.

    Attributes:
        model: folder of a transformers model
        data: .csv or .jsonl file with text; the first batch is run
        adapter: folder of a PEFT adapter (default: a random one of --rank)
        rank: r of the random adapter
    """

    model: Path
    data: Path
    adapter: Path | None = None
    rank: int = 16
    batch_size: int = 4
    max_length: int = 128

    def run(self) -> int:
        """Run both on one batch."""
        from lora_kernels.adapters.versions import require_peft  # noqa: PLC0415

        require_peft()
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (needs the peft extra)

        import lora_kernels as lk  # noqa: PLC0415
        from lora_kernels.adapters.folders import read_adapter  # noqa: PLC0415
        from lora_kernels.api import transformers  # noqa: PLC0415
        from lora_kernels.reports import console  # noqa: PLC0415

        texts, labels = self.read(self.data)
        task_type = None if self.adapter is None else read_adapter(self.adapter).config.get("task_type")
        task = transformers.task_for(self.model, self.task, labels, task_type)
        base, tokenizer = transformers.load(self.model, task, labels)
        if self.adapter is not None:
            model = lk.load(base, self.adapter)
        else:
            task_type = transformers.TASK_TYPES.get(task)
            config = LoraConfig(r=self.rank, target_modules="all-linear", init_lora_weights=False, task_type=task_type)
            model = get_peft_model(base, config)
        first = slice(0, self.batch_size)
        rows = texts[first], None if labels is None else labels[first]
        (batch,) = transformers.task_batches(base, tokenizer, task, *rows, self.batch_size, self.max_length)
        output = console()
        output.print(lk.accelerate(model, guard=False).summary())
        settings: dict[str, Any] = {}
        if "labels" not in batch:
            output.print("no labels: the mean square of the model's first output stands for the loss")
            settings["loss"] = lambda outputs, _batch: outputs[0].float().square().mean()
        report = lk.verify(model, batch, **settings)
        output.print(report)
        return 0 if report.ok else 1


@dataclass(frozen=True, kw_only=True)
class Tune(Command):
    """Measure the forms of the LoRA layers' products on this device, for later runs to use the fastest.

    Attributes:
        model_config: config.json of a transformers model, whose layers are measured; no weights are needed
        shapes: or inputs x outputs of layers, such as 4096x4096,4096x14336
        task: causal-lm, sequence-classification or base (default: as the config says)
        tokens: batch size times length, one or more (default: 8192; 1024 on a CPU)
        rank: r, one or more
        dtype: float16, bfloat16 or float32 (default: bfloat16; float32 on a CPU)
        dropout: the adapter's input is dropped
        device: such as cuda:1 (default: the GPU if there is one)
        rounds: timed calls of each form
        out: file for the table (default: the one that LoRA layers read)
    """

    model_config: Path | None = None
    shapes: str | None = None
    task: str | None = None
    tokens: list[int] | None = None
    rank: list[int] = field(default_factory=lambda: [16])
    dtype: str | None = None
    dropout: bool = False
    device: str | None = None
    rounds: int = 20
    out: Path | None = None

    def run(self) -> int:
        """Measure, and write the table."""
        if (self.model_config is None) == (self.shapes is None):
            raise ValueError("exactly one of --model-config and --shapes must be given")
        import torch  # noqa: PLC0415

        import lora_kernels as lk  # noqa: PLC0415
        from lora_kernels._checks import check_choice  # noqa: PLC0415
        from lora_kernels.reports import console  # noqa: PLC0415

        layers: Any
        if self.model_config is None:
            layers = [_shape(text) for text in str(self.shapes).split(",")]
        else:
            from lora_kernels.api import transformers  # noqa: PLC0415

            layers = transformers.empty_model(self.model_config, transformers.task_for(self.model_config, self.task))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("float16", "bfloat16", "float32"))
        report = lk.tune(
            layers,
            tokens=self.tokens,
            rank=self.rank,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            dropout=self.dropout,
            device=self.device,
            rounds=self.rounds,
            out=self.out,
            progress=console(stderr=True).print,
        )
        console().print(report)
        return 0 if report.ok else 1


def _shape(text: str) -> tuple[int, int]:
    inputs, separator, outputs = text.strip().partition("x")
    if not (separator and inputs.isdecimal() and outputs.isdecimal()):
        raise ValueError(f"shapes holds {text!r}, but must hold inputs x outputs, such as 4096x14336")
    return int(inputs), int(outputs)


@dataclass(frozen=True, kw_only=True)
class Inspect(_TextCommand):
    """Print spectra, balance and verdict of a trained adapter; the exit status is 1 on a loud failure.

    Attributes:
        adapter: folder of a PEFT adapter
        base: folder of its base model, to compare with the weights
        data: .csv or .jsonl file with training text, for the certificate; needs --base and --weight-decay
        weight_decay: lambda of training, for the certificate
        max_batches: read at most so many batches
        intruders: compare directions with those of the base weights
        monitor: .jsonl file of a LandscapeMonitor
        out: folder for inspect.html (grids of module x block) and diagnosis.json
        json: print the diagnosis as JSON
    """

    adapter: Path = field(metadata={"positional": True})
    base: Path | None = None
    data: Path | None = None
    weight_decay: float | None = None
    max_batches: int | None = None
    intruders: bool = False
    monitor: Path | None = None
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Diagnose the adapter."""
        from lora_kernels.api import inspection  # noqa: PLC0415
        from lora_kernels.api.monitor import latest_run, read_log  # noqa: PLC0415
        from lora_kernels.reports import console  # noqa: PLC0415

        texts, labels = (None, None) if self.data is None else self.read(self.data)
        log = [] if self.monitor is None else latest_run(read_log(self.monitor))
        diagnosis = inspection.inspect(
            self.adapter,
            base=self.base,
            task=self.task,
            texts=texts,
            labels=labels,
            weight_decay=self.weight_decay,
            intruders=self.intruders,
            batch_size=self.batch_size,
            max_length=self.max_length,
            max_batches=self.max_batches,
        )
        written = [] if self.out is None else inspection.write(diagnosis, self.out, log)
        if self.json:
            print(diagnosis.to_json())
        else:
            output = console()
            output.print(diagnosis)
            if log:
                output.print(inspection.log_summary(log))
            for path in written:
                output.print(f"wrote {path}", style="dim")
        return 1 if diagnosis.verdict.kind == "loud_failure" else 0


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Print what is installed and which backends run, and test every op."""

    def run(self) -> int:
        """Print the findings."""
        from lora_kernels.doctor import run  # noqa: PLC0415

        return run()


COMMANDS: dict[str, Any] = {
    "init": Init,
    "plan": Plan,
    "verify": Verify,
    "tune": Tune,
    "inspect": Inspect,
    "doctor": Doctor,
}


def _parser(name: str | None) -> tuple[argparse.ArgumentParser, tuple[Config, ...]]:
    """The parser, with the options of one command, and that command's configs."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="Data-aware LoRA on fused kernels.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    configs: tuple[Config, ...] = ()
    for key, kind in COMMANDS.items():
        summary = str(kind.__doc__).partition("\n")[0]
        command = commands.add_parser(
            key, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if key == name:
            configs, command.epilog = kind.configs(), kind.epilog()
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
    groups = [
        {
            **config.defaults,
            **{option.name: given.pop(option.name) for option in fields(config.kind) if option.name in given},
        }
        for config in configs
    ]
    try:
        return int(COMMANDS[name](**given).run(*groups))
    except ModuleNotFoundError as error:
        print(f"lora-kernels {name}: {error}; pip install 'lora_kernels[peft]' has it", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"lora-kernels {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
