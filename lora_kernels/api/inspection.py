"""What `lora-kernels inspect` does with a folder alone, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kernels._files import write_text
from lora_kernels.adapters.folders import AdapterFolder
from lora_kernels.landscape import Adapter, Diagnosis, LayerDiagnosis, Thresholds, judge, measure, overall
from lora_kernels.landscape.diagnosis_page import diagnosis_page
from lora_kernels.landscape.report import rows


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
