"""Watching the landscape while a model trains: a few numbers every so many steps, into a file and back to the loop."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_kernels._checks import check_range
from lora_kernels._files import append_line, parse_json
from lora_kernels.adapters.layers import AdapterLayers, find_lora_layers
from lora_kernels.api.diagnosis import Factors, base_norms, find_adapters, snapshot
from lora_kernels.landscape import Spectrum, WeightNorms, measure
from lora_kernels.landscape.spectra import RANK_TOLERANCE
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.reports import plain
from lora_kernels.runtime.processes import unwrap

# What a line of the file has of every layer, and of the experts of a parameter together.
_LARGEST = ("spectral", "numerical_rank", "balance", "spectral_share")  # of the experts: the largest
LAYER_FIELDS = (*_LARGEST, "nuclear", "frobenius", "entropy_rank", "drift")


def _finite(spectra: Iterable[Spectrum]) -> list[Spectrum]:
    return [spectrum for spectrum in spectra if spectrum.status != "not_finite"]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def _known(spectra: Iterable[Spectrum], name: str) -> list[float]:
    """A number of spectra, of those that have it."""
    return [value for spectrum in spectra if (value := getattr(spectrum, name)) is not None]


def summarize(spectra: Mapping[str, Spectrum], parameters: Mapping[str, str] | None = None) -> dict[str, float]:
    """The numbers of all layers: means of `rank` and `entropy_rank`, the sum `nuclear`, the largest `balance`."""
    # `share` is the largest `|s B A|_2 / |W|_2`; `drift` is the root of the sum of squares. Layers that are
    # `not_finite` are only counted; without others the numbers are NaN. In means a parameter of experts, by name of the
    # expert in `parameters`, counts as one layer.
    finite = _finite(spectra.values())
    rows = [row for members in _rows(spectra, parameters or {}).values() if (row := _finite(members))]
    numbers = {
        "rank": _mean(_mean(spectrum.numerical_rank for spectrum in row) for row in rows),
        "entropy_rank": _mean(_mean(spectrum.entropy_rank for spectrum in row) for row in rows),
        "nuclear": math.fsum(spectrum.nuclear for spectrum in finite) if finite else math.nan,
        "balance": max((spectrum.balance for spectrum in finite), default=math.nan),
    }
    if shares := _known(finite, "spectral_share"):
        numbers["share"] = max(shares)
    if drifts := _known(finite, "drift"):
        numbers["drift"] = math.hypot(*drifts)
    return {**numbers, "not_finite": float(len(spectra) - len(finite))}


def _rows(spectra: Mapping[str, Spectrum], parameters: Mapping[str, str]) -> dict[str, list[Spectrum]]:
    rows: dict[str, list[Spectrum]] = {}
    for name, spectrum in spectra.items():
        rows.setdefault(parameters.get(name, name), []).append(spectrum)
    return rows


def _of_experts(spectra: Sequence[Spectrum]) -> dict[str, float | None]:
    """What a line has of the experts of a parameter: norms of all together, the median entropy, else the largest."""
    finite = _finite(spectra) or spectra
    known = {name: _known(finite, name) for name in LAYER_FIELDS}
    return {
        **{name: max(known[name], default=None) for name in _LARGEST},
        "nuclear": math.fsum(known["nuclear"]),
        "frobenius": math.hypot(*known["frobenius"]),
        "smallest_rank": min(known["numerical_rank"]),
        "entropy_rank": statistics.median(known["entropy_rank"]),
        "drift": math.hypot(*known["drift"]) if known["drift"] else None,
        "experts": len(spectra),
        "not_finite": len(spectra) - len(_finite(spectra)),
    }


class LandscapeMonitor:
    """Measures the adapters of a model every so many steps; for plain loops and for Lightning.

        monitor = lk.api.LandscapeMonitor(every=50, path="landscape.jsonl")
        for batch in loader:
            ...
            optimizer.step()
            numbers = monitor.step(model)  # a dict every 50th time, otherwise None

    In Lightning call it from `on_train_batch_end` and hand the numbers to `self.log_dict`. With sharded adapters (FSDP)
    every process must call it; give the path to one of them. Each expert of a parameter (`target_parameters`) is
    measured; those of one parameter are one entry in the file, and one layer in the means.

    Args:
        every: steps between two measurements.
        path: file to append to, if any, one JSON object per line; its folder is created.
        adapter_name: the adapter.
        weights: compare with the norms of the base weights, which are computed once, at the first step.
        drift: keep the factors of the first step and measure the distance from them.
        rank_tolerance: see `landscape.Spectrum`.

    Attributes:
        count: steps so far.
        latest: the last spectra, by name of a layer or an expert.
        unsupported: LoRA layers that are not measured, and why.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if one is out of range.
    """

    def __init__(
        self,
        every: int = 50,
        path: str | Path | None = None,
        *,
        adapter_name: str = "default",
        weights: bool = True,
        drift: bool = False,
        rank_tolerance: float = RANK_TOLERANCE,
    ) -> None:
        check_range("every", every, low=1, integer=True)
        check_range("rank_tolerance", rank_tolerance, low=0.0, high=1.0)
        self.every, self.adapter_name = every, adapter_name
        self.path = None if path is None else Path(path).absolute()  # also after a change of directory
        self.count = 0
        self.latest: dict[str, Spectrum] = {}
        self.unsupported: tuple[tuple[str, str], ...] = ()
        self._weights, self._drift, self._rank_tolerance = weights, drift, rank_tolerance
        self._norms: dict[str, WeightNorms | None] | None = None
        self._start: dict[str, Factors] | None = None

    def begin(self, model: nn.Module) -> None:
        """Compute what stays: norms of the base weights, and the start. Otherwise the first measurement does it."""
        model = unwrap(model)
        self._norms = base_norms(self._layers(model)) if self._weights else {}
        self._start = snapshot(model, self.adapter_name) if self._drift else None
        self._started = time.perf_counter()

    def _layers(self, model: nn.Module) -> AdapterLayers:
        layers = find_lora_layers(unwrap(model), self.adapter_name, allow_merged=True, without_experts=None)
        self.unsupported = tuple((name, why) for name, _, why in layers.unsupported)
        return layers

    @without_autocast()
    def step(self, model: nn.Module, step: int | None = None) -> dict[str, float] | None:
        """Count a step, and measure where it is time to.

        Args:
            model: the PEFT model.
            step: the step's number, counted from 1; one more than at the last call by default.

        Returns:
            The numbers of `summarize`, or `None` between two measurements.
        """
        if self._norms is None:
            self.begin(model)
        self.count = self.count + 1 if step is None else step
        return self.measure(model) if self.count % self.every == 0 else None

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure a PEFT model now, and write a line; returns the numbers of all layers."""
        if self._norms is None:
            self.begin(model)
        layers = self._layers(model)
        adapters = find_adapters(layers, self.adapter_name, self._norms or {}, self._start)
        self.latest = measure(adapters, rank_tolerance=self._rank_tolerance)
        parameters = {layer.name: layer.parameter for layer in layers.supported if layer.parameter is not None}
        numbers = summarize(self.latest, parameters)
        if self.path is not None:
            experts = set(parameters.values())
            by_layer = {
                name: _of_experts(row) if name in experts else {key: getattr(row[0], key) for key in LAYER_FIELDS}
                for name, row in _rows(self.latest, parameters).items()
            }
            line = {"step": self.count, "seconds": time.perf_counter() - self._started, **numbers, "layers": by_layer}
            if self.unsupported:
                line["unsupported"] = dict(self.unsupported)
            append_line(self.path, json.dumps(plain(line), allow_nan=False))
        return numbers


def latest_run(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements of a log by step, without those that a run which was resumed at an earlier step repeated."""
    latest: list[dict[str, Any]] = []
    for entry in log:
        while latest and latest[-1]["step"] >= entry["step"]:
            latest.pop()
        latest.append(entry)
    return latest


def read_log(path: Path) -> list[dict[str, Any]]:
    """The measurements in a monitor's file, without a last line that was cut off (a killed run).

    Raises:
        ValueError: if the file is missing, or a line was not written by a monitor.
    """
    if not path.is_file():
        raise ValueError(f"monitor is {str(path)!r}, but must be a .jsonl file that a LandscapeMonitor wrote")
    entries: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, f"line {number} of {path}")
        except ValueError:
            if number == len(lines):
                break
            raise
        step, layers = (entry.get("step"), entry.get("layers")) if isinstance(entry, dict) else (None, None)
        is_number = isinstance(step, (int, float)) and not isinstance(step, bool) and abs(step) < 2**63  # and not NaN
        if not (is_number and isinstance(layers, dict)):
            raise ValueError(f"line {number} of {path} was not written by a LandscapeMonitor")
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path} holds no measurement")
    return entries


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
