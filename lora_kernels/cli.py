"""The command line: `lora-kernels init | plan | verify | tune | inspect | doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_kernels._files import replacing_folder, write_text
from lora_kernels._version import __version__
from lora_kernels.adapters.versions import require_peft
from lora_kernels.reports import console


def _head_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label-column", help="labels, for a classifier")
    _task_argument(parser)


def _task_argument(parser: argparse.ArgumentParser) -> None:
    about = "causal-lm, sequence-classification or base (default: with labels a classifier; else as the config says)"
    parser.add_argument("--task", help=about)


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    from lora_kernels.init import METHODS  # noqa: PLC0415

    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--data", type=Path, required=True, help=".csv or .jsonl file with text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter and report.json")
    parser.add_argument("--text-column", default="text")
    _head_arguments(parser)
    parser.add_argument("--method", default="eva", help=", ".join(METHODS))
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method, such as gamma=64"
    )
    parser.add_argument(
        "--ranks",
        metavar="SCORE",
        help="redistribute ranks by explained_variance, gradient_energy or fisher_energy; or keep (the default)",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, help="lora_alpha (default: the rank)")
    parser.add_argument("--rho", type=float, help="how far a redistributed rank may grow (default: 2)")
    parser.add_argument("--min-rank", type=int, default=1)
    parser.add_argument("--max-rank", type=int)
    parser.add_argument("--multiple-of", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, help="that you will train with; the report judges it")
    parser.add_argument("--optimizer", default="adamw", help="adamw, lora_pro or lora_pro_full, for the rate suggested")
    parser.add_argument("--no-rate", dest="suggest_rate", action="store_false", help="measure no learning rate")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], help="names as in PEFT")
    parser.add_argument("--batch-size", type=int, default=8, help="texts per batch; best that of training")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-batches", type=int, default=64)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--budget", help='memory for the statistics of one pass, such as 4GB, or "auto"')
    parser.add_argument("--form", default="auto", help="auto, exact or sketch")
    parser.add_argument("--checkpoint", type=Path, help="file for partial statistics; a killed run goes on from it")


def _init(options: argparse.Namespace) -> int:
    require_peft()
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (needs the peft extra)

    import lora_kernels as lk  # noqa: PLC0415
    from lora_kernels.api import text_files, transformers  # noqa: PLC0415
    from lora_kernels.init.from_text import method_from_text  # noqa: PLC0415
    from lora_kernels.runtime.loss import MissingLossError  # noqa: PLC0415

    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"out was {str(options.out)!r}, must be a new or empty folder")
    method = method_from_text(options.method, options.set)
    limits = (options.min_rank, options.max_rank, options.multiple_of)
    moves = options.rho is not None or limits != (1, None, 1)
    score = options.ranks or (method.own_score if moves else None)
    if moves and score is None:
        raise ValueError(f"method {method.name} keeps every rank: name a score with --ranks to change them")
    ranks = None
    if score is not None and score != "keep":
        ranks = lk.Redistribution(score, 2.0 if options.rho is None else options.rho, *limits)
    elif score == "keep":
        method = method.keeping_ranks()
    texts, labels = text_files.read(options.data, options.text_column, options.label_column)
    task = transformers.task_for(options.model, options.task, labels)
    model, tokenizer = transformers.load(options.model, task, labels)
    new_head = labels is not None and transformers.task_of(options.model) != task
    targets = options.target_modules[0] if options.target_modules == ["all-linear"] else options.target_modules
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or options.rank,
        target_modules=targets,
        task_type=transformers.TASK_TYPES.get(task),  # type: ignore[arg-type]
    )
    peft_model = get_peft_model(model, config)
    sizes = options.batch_size, options.max_length
    batches = transformers.task_batches(model, tokenizer, task, texts, labels, *sizes)
    names = ["max_batches", "max_tokens", "budget", "form", "checkpoint", "learning_rate", "suggest_rate", "optimizer"]
    chosen = {name: getattr(options, name) for name in names}
    try:
        report = lk.initialize(peft_model, batches, method, ranks=ranks, **chosen)
    except MissingLossError as error:
        raise ValueError(
            f"{options.method} with --ranks {score} reads gradients, but a model loaded as {task} without labels has "
            "no loss: --label-column names the labels, or --task another head"
        ) from error
    with replacing_folder(options.out) as folder:
        peft_model.save_pretrained(folder)
        write_text(folder / "report.json", report.to_json() + "\n")
    how = (
        "lora_kernels.load to train it (its start is frozen), or by stock PEFT" if method.offsets_base else "stock PEFT"
    )
    lines = [report, f"adapter: {options.out} of the model loaded as {task}, to be loaded with {how}"]
    if new_head:
        lines.append(
            f"The model has no trained head: the adapter's folder has a new one, for {model.config.num_labels} labels "
            f"in alphabetical order. Load the base with num_labels={model.config.num_labels}."
        )
    console(140).print(*lines, sep="\n")
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="config.json of a transformers model; no weights")
    _task_argument(parser)
    parser.add_argument("--method", required=True, help="a method (eva, lora_da, ...) or a statistic (gradient, ...)")
    parser.add_argument("--budget", help='memory for the sums of one pass, such as 40GB, or "auto" (default: no limit)')
    parser.add_argument("--world", type=int, default=1, help="number of processes")
    parser.add_argument("--form", default="auto", help="auto, exact or sketch")
    parser.add_argument("--sketch-size", type=int, default=64, help="columns of a sketch")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def _plan(options: argparse.Namespace) -> int:
    import lora_kernels as lk  # noqa: PLC0415
    from lora_kernels.api import transformers  # noqa: PLC0415

    model = transformers.empty_model(options.config, transformers.task_for(options.config, options.task))
    settings: dict[str, Any] = {
        "targets": transformers.linear_targets(model),
        "world_size": options.world,
        "budget": options.budget,
        "form": options.form,
        "sketch_size": options.sketch_size,
    }
    batch = transformers.example_batch(model)
    try:
        plan = lk.plan(model, options.method, batch=batch, **settings)
    except (RuntimeError, NotImplementedError) as error:  # some models cannot run without numbers
        print(f"a forward pass without weights failed ({error}): inputs are not shared in this plan", file=sys.stderr)
        plan = lk.plan(model, options.method, **settings)
    if options.json:
        print(plan.to_json())
    else:
        console(140).print(plan)
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter (default: a random one of --rank)")
    parser.add_argument(
        "--data", type=Path, required=True, help=".csv or .jsonl file with text: the first batch is run"
    )
    parser.add_argument("--text-column", default="text")
    _head_arguments(parser)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)


def _mean_square(outputs: Any, _batch: Any) -> Any:
    return outputs[0].float().square().mean()


def _verify(options: argparse.Namespace) -> int:
    require_peft()
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (needs the peft extra)

    import lora_kernels as lk  # noqa: PLC0415
    from lora_kernels.api import text_files, transformers  # noqa: PLC0415
    from lora_kernels.api.adapter_files import read_adapter  # noqa: PLC0415

    texts, labels = text_files.read(options.data, options.text_column, options.label_column)
    kind = None if options.adapter is None else read_adapter(options.adapter).config.get("task_type")
    task = transformers.task_for(options.model, options.task, labels, kind)
    base, tokenizer = transformers.load(options.model, task, labels)
    if options.adapter is not None:
        model = lk.load(base, options.adapter)
    else:
        kind = transformers.TASK_TYPES.get(task)
        model = get_peft_model(
            base, LoraConfig(r=options.rank, target_modules="all-linear", init_lora_weights=False, task_type=kind)
        )
    few = slice(0, options.batch_size)
    some = texts[few], None if labels is None else labels[few]
    (batch,) = transformers.task_batches(base, tokenizer, task, *some, options.batch_size, options.max_length)
    output = console()
    output.print(lk.accelerate(model, guard=False).summary())
    loss = None
    if "labels" not in batch:
        output.print("no labels: the mean square of the model's first output stands for the loss")
        loss = _mean_square
    report = lk.verify(model, batch, loss=loss)
    output.print(report)
    return 0 if report.ok else 1


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    layers = parser.add_mutually_exclusive_group(required=True)
    layers.add_argument("--model-config", type=Path, help="config.json of a transformers model; no weights")
    layers.add_argument("--shapes", help="inputs x outputs of layers, such as 4096x4096,4096x14336")
    _task_argument(parser)
    parser.add_argument("--tokens", type=int, nargs="+", help="batch size times length (default: 8192; 1024 on a CPU)")
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", help="float16, bfloat16 or float32 (default: bfloat16; float32 on a CPU)")
    parser.add_argument("--dropout", action="store_true", help="the adapter's input is dropped")
    parser.add_argument("--device", help="such as cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each form")
    parser.add_argument("--out", type=Path, help="the table (default: the one that LoRA layers read)")


def _pair(text: str) -> tuple[int, int]:
    inputs, separator, outputs = text.strip().partition("x")
    if not (separator and inputs.isdecimal() and outputs.isdecimal()):
        raise ValueError(f"shapes holds {text!r}, but must hold inputs x outputs, such as 4096x14336")
    return int(inputs), int(outputs)


def _tune(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415

    import lora_kernels as lk  # noqa: PLC0415
    from lora_kernels._checks import check_choice  # noqa: PLC0415

    if options.shapes is not None:
        layers: Any = [_pair(each) for each in options.shapes.split(",")]
    else:
        from lora_kernels.api import transformers  # noqa: PLC0415

        task = transformers.task_for(options.model_config, options.task)
        layers = transformers.empty_model(options.model_config, task)
    dtype = None
    if options.dtype is not None:
        check_choice("dtype", options.dtype, ("float16", "bfloat16", "float32"))
        dtype = getattr(torch, options.dtype)
    try:
        device = None if options.device is None else torch.device(options.device)
    except RuntimeError as error:
        raise ValueError(f"device is {options.device!r}: {error}") from error
    names = ("tokens", "rank", "dropout", "rounds", "out")
    chosen = {name: getattr(options, name) for name in names}
    progress = console(stderr=True).print
    report = lk.tune(layers, dtype=dtype, device=device, progress=progress, **chosen)
    console().print(report)
    return 0 if report.ok else 1


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of a PEFT adapter")
    parser.add_argument("--base", type=Path, help="folder of its base model, to compare with the weights")
    parser.add_argument("--data", type=Path, help=".csv or .jsonl file with training text, for the certificate")
    parser.add_argument("--weight-decay", type=float, help="lambda of training, for the certificate")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help="for sequence-classification")
    parser.add_argument("--task", help="causal-lm, sequence-classification or base (default: as the adapter says)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-batches", type=int)
    parser.add_argument("--intruders", action="store_true", help="compare directions with those of the base weights")
    parser.add_argument("--monitor", type=Path, help=".jsonl file of a LandscapeMonitor")
    parser.add_argument("--out", type=Path, help="folder for inspect.html, pictures and diagnosis.json")
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")


def _inspect(options: argparse.Namespace) -> int:
    from lora_kernels.api import inspection, text_files  # noqa: PLC0415
    from lora_kernels.api.monitor import latest_run, read_log  # noqa: PLC0415

    texts = labels = None
    if options.data is not None:
        texts, labels = text_files.read(options.data, options.text_column, options.label_column)
    log = None if options.monitor is None else latest_run(read_log(options.monitor))
    names = ("base", "task", "weight_decay", "intruders", "batch_size", "max_length", "max_batches")
    chosen = {name: getattr(options, name) for name in names}
    diagnosis = inspection.inspect(options.adapter, texts=texts, labels=labels, **chosen)
    written = [] if options.out is None else inspection.write(diagnosis, options.out, options.monitor)
    if options.json:
        print(diagnosis.to_json())
    else:
        output = console()
        output.print(diagnosis)
        if log is not None:
            output.print(inspection.log_summary(log))
        for path in written:
            output.print(f"wrote {path}", style="dim")
    return 1 if diagnosis.verdict.kind == "loud_failure" else 0


def _doctor(_options: argparse.Namespace) -> int:
    from lora_kernels.doctor import run  # noqa: PLC0415

    return run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-kernels", description="Data-aware LoRA on fused kernels.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    described: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None] | None, Callable[..., int]], ...] = (
        (
            "init",
            "make a PEFT adapter with a data-aware start from a model folder and a text file",
            _init_arguments,
            _init,
        ),
        ("plan", "what a collection would keep and cost, from a config alone", _plan_arguments, _plan),
        (
            "verify",
            "compare the fused LoRA layers with PEFT's and with float64 on your model and text",
            _verify_arguments,
            _verify,
        ),
        (
            "tune",
            "measure the forms of the LoRA layers' products on this device, for later runs to use the fastest",
            _tune_arguments,
            _tune,
        ),
        (
            "inspect",
            "spectra, balance and verdict of a trained adapter, from its folder alone or with its base and data; "
            "the exit status is 1 on a loud failure",
            _inspect_arguments,
            _inspect,
        ),
        ("doctor", "what is installed, which backends run, and a self-test of each op", None, _doctor),
    )
    for name, text, arguments, call in described:
        command = commands.add_parser(name, help=text, description=text)
        if arguments is not None:
            arguments(command)
        command.set_defaults(call=call)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: of the command line; `sys.argv` by default.

    Returns:
        The exit status: 0, or 1 where a check failed, or 2 where the input was bad.
    """
    options = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return int(options.call(options))
    except ModuleNotFoundError as error:
        print(
            f"lora-kernels {options.command}: {error}; pip install 'lora_kernels[peft,plots]' has it", file=sys.stderr
        )
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"lora-kernels {options.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
