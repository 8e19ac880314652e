"""What `lora-kernels inspect` does: a folder in, a diagnosis and a page out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kernels._files import write_text
from lora_kernels.adapters.folders import AdapterFolder, read_adapter
from lora_kernels.landscape import Adapter, Diagnosis, LayerDiagnosis, Thresholds, judge, measure, overall
from lora_kernels.landscape.diagnosis_page import diagnosis_page
from lora_kernels.landscape.experts import rows
from lora_kernels.reports import PREFIX


def inspect_folder(folder: AdapterFolder) -> Diagnosis:
    """Spectra and balance of an adapter from its files alone; no layer is compared with its weight."""
    limits = Thresholds()
    adapters = [Adapter(layer.name, layer.a, layer.b, layer.scaling, start=layer.start) for layer in folder.layers]
    spectra = measure(adapters, rank_tolerance=limits.rank_tolerance)
    layers = tuple(
        LayerDiagnosis(name, spectrum, judge(spectrum, None, limits), parameter=layer.parameter)
        for layer, (name, spectrum) in zip(folder.layers, spectra.items(), strict=True)
    )
    verdict = overall(row.verdict for row in rows(layers))
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
) -> Diagnosis:
    """Diagnose an adapter folder, with its base model and data if given; a ValueError if that does not fit together."""
    folder = read_adapter(adapter)
    if base is None:
        if texts is not None or intruders:
            raise ValueError(f"{'data' if texts is not None else 'intruders'} was given, but needs base")
        return inspect_folder(folder)
    if (texts is None) != (weight_decay is None):
        raise ValueError("data and weight_decay must be given together: the certificate needs both")
    from lora_kernels.api import transformers  # noqa: PLC0415  (an optional dependency)
    from lora_kernels.api.diagnosis import diagnose  # noqa: PLC0415
    from lora_kernels.api.loading import load  # noqa: PLC0415

    task = transformers.task_for(base, task, labels, folder.config.get("task_type"))
    if texts is None:
        bare, tokenizer = transformers.load_model(base, task), None
    else:
        bare, tokenizer = transformers.load(base, task, labels)
    layers = dict(bare.named_modules())
    names = dict.fromkeys(layer.module.removeprefix(PREFIX) for layer in folder.layers)
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
        settings |= {"loader": batches, "weight_decay": weight_decay, "max_batches": max_batches}
    diagnosis = diagnose(model, **settings)
    return replace(diagnosis, adapter=str(adapter), notes=(*diagnosis.notes, *folder.notes))


def write(diagnosis: Diagnosis, out: Path, log: Sequence[Mapping[str, Any]] = ()) -> list[Path]:
    """Write diagnosis.json and inspect.html (the history of training, too, from a monitor's lines) into a folder."""
    data, page = out / "diagnosis.json", out / "inspect.html"
    write_text(data, diagnosis.to_json() + "\n")
    write_text(page, diagnosis_page(diagnosis, log).to_html())
    return [data, page]


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
