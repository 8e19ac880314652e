"""What `lora-kernels inspect` does: a folder in, a diagnosis, pictures and a page out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kernels._files import replacing, write_text
from lora_kernels.api.adapter_files import AdapterFolder, read_adapter
from lora_kernels.api.monitor import latest_run, read_log
from lora_kernels.landscape import Diagnosis, LayerDiagnosis, Thresholds, judge, measure, overall
from lora_kernels.reports import PREFIX


def inspect_folder(folder: AdapterFolder, thresholds: Thresholds | None = None) -> Diagnosis:
    """Diagnose an adapter from its files alone.

    Args:
        folder: from `read_adapter`.
        thresholds: of the verdict.

    Returns:
        Spectra and balance; no layer is compared with its weight.
    """
    limits = thresholds or Thresholds()
    spectra = measure(folder.adapters, rank_tolerance=limits.rank_tolerance)
    layers = tuple(LayerDiagnosis(name, each, judge(each, None, limits)) for name, each in spectra.items())
    verdict = overall(each.verdict for each in layers)
    notes = ("the base model was not read: nothing is compared with its weights", *folder.notes)
    return Diagnosis(str(folder.path), layers, verdict, limits, unsupported=folder.unsupported, notes=notes)


def inspect(
    adapter: Path,
    *,
    base: Path | None = None,
    task: str | None = None,
    texts: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    weight_decay: float | None = None,
    intruders: bool = False,
    batch_size: int = 8,
    max_length: int = 256,
    max_batches: int | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Diagnose an adapter folder, with its base model and data if they are given.

    Args:
        adapter: a stock PEFT folder.
        base: folder of the base model.
        task: which head; by default what the adapter's config says, or else the base model's.
        texts: data for the certificate; needs the base.
        labels: of the texts, for a classifier.
        weight_decay: lambda of training.
        intruders: compare directions with those of the base weights.
        batch_size: texts per batch.
        max_length: tokens at which a text is cut.
        max_batches: read at most so many.
        progress: show a bar.

    Returns:
        The diagnosis.

    Raises:
        ValueError: if the folder is malformed, or data, intruders or a weight decay are given without what they need.
    """
    folder = read_adapter(adapter)
    if base is None:
        if texts is not None or intruders:
            raise ValueError(f"{'data' if texts is not None else 'intruders'} was given, but needs base")
        return inspect_folder(folder)
    if (texts is None) != (weight_decay is None):
        raise ValueError("data and weight_decay must be given together: the certificate needs both")
    from lora_kernels.api import transformers  # noqa: PLC0415  (an optional dependency)
    from lora_kernels.api.diagnosis import diagnose  # noqa: PLC0415
    from lora_kernels.api.saved import load  # noqa: PLC0415

    task = transformers.task_for(base, task, labels, folder.config.get("task_type"))
    if texts is None:
        bare, tokenizer = transformers.load_model(base, task), None
    else:
        bare, tokenizer = transformers.load(base, task, labels)
    layers = dict(bare.named_modules())
    names = (each.name.removeprefix(PREFIX) for each in folder.adapters)
    strangers = [name for name in names if name not in layers]
    if strangers:
        raise ValueError(
            f"adapter {str(adapter)!r} does not fit base {str(base)!r} loaded as {task}: that has no layer "
            f"{strangers[0]} ({len(strangers)} in all); --task names another head"
        )
    try:
        model = load(bare, adapter, is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"adapter {str(adapter)!r} does not fit base {str(base)!r} ({task}): {error}") from error
    settings: dict[str, Any] = {"intruders": intruders}
    if texts is not None:
        batches = transformers.task_batches(bare, tokenizer, task, texts, labels, batch_size, max_length)
        settings |= {"loader": batches, "weight_decay": weight_decay, "max_batches": max_batches, "progress": progress}
    found = diagnose(model, **settings)
    return replace(found, adapter=str(adapter), notes=(*found.notes, *folder.notes))


def write(diagnosis: Diagnosis, out: Path, monitor: Path | None = None) -> list[Path]:
    """Write diagnosis.json, the pictures and inspect.html.

    Args:
        diagnosis: what to show.
        out: the folder; it is made.
        monitor: a monitor's file, for the picture over training.

    Returns:
        The files.
    """
    from lora_kernels.landscape import page, plots  # noqa: PLC0415

    log = None if monitor is None else latest_run(read_log(monitor))
    pictures = {"spectra": out / "spectra.png", "ranks": out / "ranks.png"}
    with replacing(pictures["spectra"]) as file:
        plots.plot_spectra(diagnosis, file)
    with replacing(pictures["ranks"]) as file:
        plots.plot_ranks(diagnosis, file)
    if log is not None:
        pictures["training"] = out / "training.png"
        with replacing(pictures["training"]) as file:
            plots.plot_training(log, file)
    data, page_file = out / "diagnosis.json", out / "inspect.html"
    write_text(data, diagnosis.to_json() + "\n")
    write_text(page_file, page.render(diagnosis, pictures))
    return [data, *pictures.values(), page_file]


def log_summary(log: Sequence[dict[str, Any]]) -> str:
    """One line on how the numbers moved between the first and the last measurement."""
    first, last = log[0], log[-1]
    parts = []
    for key in ("nuclear", "share", "rank", "balance"):
        if isinstance(first.get(key), (int, float)) and isinstance(last.get(key), (int, float)):
            parts.append(f"{key} {first[key]:.3g} -> {last[key]:.3g}")
    broken = last.get("not_finite") or 0
    if isinstance(broken, (int, float)) and not math.isnan(broken) and broken > 0:
        parts.append(f"{int(broken)} layers not finite")
    return f"{len(log)} measurements, steps {first['step']} to {last['step']}: {', '.join(parts)}"
