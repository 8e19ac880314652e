"""What the commands of `cli` do: functions of their options that return the exit status."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

import lora_kernels as lk
from lora_kernels import cli
from lora_kernels import doctor as checkup
from lora_kernels._checks import check_choice, check_range
from lora_kernels._files import replacing_folder, write_text
from lora_kernels.adapters.folders import read_adapter
from lora_kernels.adapters.loading import new_adapter
from lora_kernels.adapters.view import require_peft
from lora_kernels.api import text_files, transformers
from lora_kernels.api.diagnosis import inspect_folder
from lora_kernels.api.init_page import init_page
from lora_kernels.api.monitor import latest_run, log_summary, read_log
from lora_kernels.init import METHODS
from lora_kernels.landscape import Diagnosis
from lora_kernels.landscape.diagnosis_page import diagnosis_page
from lora_kernels.reports import PREFIX, console
from lora_kernels.runtime.loss import MissingLossError


def init(options: cli.Init, redistribution: dict[str, Any], collection: dict[str, Any]) -> int:
    """Make an adapter."""
    require_peft()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"out is {str(options.out)!r}, but must be a new or empty folder")
    method = _method(options.method, options.set)
    score = options.ranks or (method.own_score if redistribution else None)
    if redistribution and score is None:
        raise ValueError(f"method {method.name} keeps every rank: name a score with --ranks to change them")
    ranks = None
    if score == "keep":
        method = method.keeping_ranks()
    elif score is not None:
        ranks = lk.init.Redistribution(score, **redistribution)
    texts, labels = text_files.read(options.data, options.text_column, options.label_column)
    task = transformers.task_for(options.model, options.task, labels)
    base, tokenizer = transformers.load(options.model, task, labels)
    model = new_adapter(
        base,
        r=options.rank,
        lora_alpha=options.alpha or options.rank,
        target_modules="all-linear" if options.target_modules == ["all-linear"] else options.target_modules,
        task_type=transformers.TASK_TYPES.get(task),
    )
    batches = transformers.task_batches(base, tokenizer, task, texts, labels, options.batch_size, options.max_length)
    training: dict[str, Any] = {"learning_rate": options.learning_rate, "optimizer": options.optimizer}
    training["suggest_rate"] = not options.no_rate
    try:
        report = lk.initialize(model, batches, method, ranks=ranks, **training, **collection)
    except MissingLossError as error:
        raise ValueError(
            f"{options.method} with --ranks {score} reads gradients, but a model loaded as {task} without labels has "
            "no loss: --label-column names the labels, or --task another head"
        ) from error
    with replacing_folder(options.out) as folder:
        model.save_pretrained(folder)
        write_text(folder / "report.json", report.to_json() + "\n")
        write_text(folder / "report.html", init_page(report).to_html())
    frozen = "lora_kernels.load to train it (its start is frozen), or by stock PEFT"
    reader = frozen if method.offsets_base else "stock PEFT"
    lines = [report, f"adapter: {options.out} of the model loaded as {task}, to be loaded with {reader}"]
    if labels is not None and transformers.task_of(options.model) != task:
        count = base.config.num_labels
        lines.append(
            f"The model has no trained head: the adapter's folder has a new one, for {count} labels in "
            f"alphabetical order. Load the base with num_labels={count}."
        )
    console(140).print(*lines, sep="\n")
    return 0


def _method(name: str, settings: Sequence[str]) -> Any:
    """The config of the method of this name; `settings` are `NAME=VALUE`, with Python literals or else plain text."""
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


def plan(options: cli.Plan, collection: dict[str, Any]) -> int:
    """Print a plan."""
    check_range("rank", options.rank, low=1, integer=True)
    model = transformers.empty_model(options.config, transformers.task_for(options.config, options.task))
    bare, experts, targets = model, transformers.expert_parameters(model), transformers.linear_targets(model)
    if experts:
        model = new_adapter(model, r=options.rank, target_modules=targets, target_parameters=experts)
    else:
        collection["targets"] = targets
        if others := [name for name, value in model.named_parameters() if ".experts." in name and value.dim() == 3]:
            what = f"{len(others)} parameters, such as {others[0]}"
            print(f"not in this plan (experts that cannot be observed): {what}", file=sys.stderr)
    size = METHODS[options.method]().sketch_size([options.rank]) if options.method in METHODS else 0
    collection = {"sketch_size": max(64, size), **collection, "world_size": options.world}
    try:
        made = lk.plan(model, options.method, batch=transformers.example_batch(bare), **collection)
    except Exception as error:  # noqa: BLE001  (some models cannot run without numbers, and fail in any way)
        made = lk.plan(model, options.method, **collection)
        reason = " ".join(str(error).split())
        print(f"a forward pass without weights failed ({reason}): inputs are not shared here", file=sys.stderr)
    if options.json:
        print(made.to_json())
    else:
        console(140).print(made, *(transformers.of_experts(model, options.rank) if experts else ()), sep="\n")
    return 0


def verify(options: cli.Verify) -> int:
    """Compare on one batch."""
    require_peft()
    texts, labels = text_files.read(options.data, options.text_column, options.label_column)
    task_type = None if options.adapter is None else read_adapter(options.adapter).config.get("task_type")
    task = transformers.task_for(options.model, options.task, labels, task_type)
    base, tokenizer = transformers.load(options.model, task, labels)
    if options.adapter is not None:
        model = lk.load(base, options.adapter)
    else:
        task_type = transformers.TASK_TYPES.get(task)
        settings: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": task_type}
        model = new_adapter(base, r=options.rank, **settings)
    rows = texts[: options.batch_size], None if labels is None else labels[: options.batch_size]
    (batch,) = transformers.task_batches(base, tokenizer, task, *rows, options.batch_size, options.max_length)
    output, loss = console(), None
    output.print(lk.accelerate(model, guard=False).summary())
    if "labels" not in batch:
        output.print("no labels: the mean square of the model's first output stands for the loss")

        def loss(outputs: Any, _batch: Any) -> torch.Tensor:
            return outputs[0].float().square().mean()  # type: ignore[no-any-return]

    report = lk.verify(model, batch, loss=loss)
    output.print(report)
    return 0 if report.ok else 1


def tune(options: cli.Tune) -> int:
    """Measure, and write the table."""
    if (options.model_config is None) == (options.shapes is None):
        raise ValueError("exactly one of --model-config and --shapes must be given")
    layers: Any = options.model_config
    if layers is None:
        layers = [_shape(text) for text in str(options.shapes).split(",")]
    else:
        layers = transformers.empty_model(layers, transformers.task_for(layers, options.task))
    if options.dtype is not None:
        check_choice("dtype", options.dtype, ("float16", "bfloat16", "float32"))
    report = lk.tune(
        layers,
        tokens=options.tokens,
        rank=options.rank,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        dropout=options.dropout,
        device=options.device,
        rounds=options.rounds,
        out=options.out,
        progress=console(stderr=True).print,
    )
    console().print(report)
    return 0 if report.ok else 1


def _shape(text: str) -> tuple[int, int]:
    inputs, separator, outputs = text.strip().partition("x")
    if not (separator and inputs.isdecimal() and outputs.isdecimal()):
        raise ValueError(f"shapes holds {text!r}, but must hold inputs x outputs, such as 4096x14336")
    return int(inputs), int(outputs)


def inspect(options: cli.Inspect) -> int:
    """Diagnose an adapter."""
    texts, labels = (None, None)
    if options.data is not None:
        texts, labels = text_files.read(options.data, options.text_column, options.label_column)
    log = [] if options.monitor is None else latest_run(read_log(options.monitor))
    diagnosis = _diagnosis(options, texts, labels)
    written = [] if options.out is None else [options.out / "diagnosis.json", options.out / "inspect.html"]
    if written:
        write_text(written[0], diagnosis.to_json() + "\n")
        write_text(written[1], diagnosis_page(diagnosis, log).to_html())
    if options.json:
        print(diagnosis.to_json())
    else:
        output = console()
        output.print(diagnosis)
        if log:
            output.print(log_summary(log))
        for path in written:
            output.print(f"wrote {path}", style="dim")
    return 1 if diagnosis.verdict.kind == "loud_failure" else 0


def _diagnosis(options: cli.Inspect, texts: Sequence[str] | None, labels: Sequence[str] | None) -> Diagnosis:
    """The diagnosis of a folder, with its base model and data if given; a ValueError if that does not fit together."""
    adapter, base, decay = options.adapter, options.base, options.weight_decay
    folder = read_adapter(adapter)
    if base is None:
        if texts is not None or options.intruders:
            raise ValueError(f"{'data' if texts is not None else 'intruders'} was given, but needs base")
        return inspect_folder(folder)
    if (texts is None) != (decay is None):
        raise ValueError("data and weight_decay must be given together: the certificate needs both")
    task = transformers.task_for(base, options.task, labels, folder.config.get("task_type"))
    unread = texts is None
    bare, tokenizer = (transformers.load_model(base, task), None) if unread else transformers.load(base, task, labels)
    layers = dict(bare.named_modules())
    names = dict.fromkeys(layer.module.removeprefix(PREFIX) for layer in folder.layers)
    fit = f"adapter {str(adapter)!r} does not fit base {str(base)!r}"
    if strangers := [name for name in names if name not in layers]:
        what = f"{strangers[0]} ({len(strangers)} in all)"
        raise ValueError(f"{fit} loaded as {task}: that has no layer {what}; --task names another head")
    try:
        model = lk.load(bare, adapter, is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{fit} ({task}): {error}") from error
    settings: dict[str, Any] = {"intruders": options.intruders}
    if texts is not None:
        sizes = options.batch_size, options.max_length
        batches = transformers.task_batches(bare, tokenizer, task, texts, labels, *sizes)
        settings |= {"loader": batches, "weight_decay": decay, "max_batches": options.max_batches}
    diagnosis = lk.diagnose(model, **settings)
    return replace(diagnosis, adapter=str(adapter), notes=(*diagnosis.notes, *folder.notes))


def doctor(_options: cli.Doctor) -> int:
    """Print what is installed, and test every op."""
    return checkup.run()
