"""`lk.collect` and `lk.initialize`: the user's two calls before training."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.init import InitMethod, LayerFactors, resolve_method
from lora_kernels.integrations import peft as peft_layers
from lora_kernels.integrations.plain import find_linear_layers
from lora_kernels.integrations.report import InitReport, LayerReport
from lora_kernels.ops._checks import check_choice
from lora_kernels.statistics import Statistics, Target
from lora_kernels.statistics import collect as collect_targets
from lora_kernels.statistics.collector import Forward
from lora_kernels.statistics.masks import Mask


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    targets: Sequence[str] | None = None,
    adapter_name: str = "default",
    mask: Mask = "attention",
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_tokens: int | None = None,
    share_inputs: bool = True,
    nonfinite: str = "raise",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Statistics:
    """Collect input moments of a model's linear layers in one pass, adapters switched off.

    Args:
        model: a PEFT model or any `nn.Module`.
        loader: yields batches.
        targets: full names of the layers; by default the LoRA layers of a PEFT model, all linear layers otherwise.
        adapter_name: whose layers are observed by default.
        mask: which tokens count; see `statistics.token_weights`.
        forward: called as `forward(model, batch)`; by default a mapping batch is passed as keywords.
        max_batches: read at most this many batches.
        max_tokens: stop after the batch that reaches this many counted tokens.
        share_inputs: layers that read the same tensor share one set of sums.
        nonfinite: `raise`, or `skip` rows with NaN or infinity.
        dtype: dtype of the sums, float32 or float64.
        progress: show a progress bar.

    Returns:
        The statistics by layer name.
    """
    if targets is None and peft_layers.is_peft_model(model):
        found: Sequence[Target] = [each.target for each in peft_layers.find_lora_layers(model, adapter_name).supported]
    else:
        found = find_linear_layers(model, targets)
    with peft_layers.base_model_only(model):
        return collect_targets(
            model,
            loader,
            found,
            mask=mask,
            forward=forward,
            max_batches=max_batches,
            max_tokens=max_tokens,
            share_inputs=share_inputs,
            nonfinite=nonfinite,
            dtype=dtype,
            progress=progress,
        )


def initialize(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    method: str | InitMethod = "eva",
    *,
    statistics: Statistics | None = None,
    adapter_name: str = "default",
    mask: Mask = "attention",
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_tokens: int | None = None,
    share_inputs: bool = True,
    nonfinite: str = "raise",
    unreached: str = "warn",
    force: bool = False,
    progress: bool = True,
) -> InitReport:
    """Give a PEFT adapter a data-aware start. Call it before the optimizer is created.

    Base weights are never touched. Ranks may change (see the method's config); the adapter's `rank_pattern`,
    `alpha_pattern` and `target_modules` follow, so that the saved adapter loads in stock PEFT. If anything fails
    before the factors are written, the model is as it was.

    Args:
        model: a PEFT model.
        loader: yields batches; not needed with `statistics`.
        method: `"eva"` or a config such as `EVA(rho=1.0)`.
        statistics: from `collect` on the same model, instead of a new pass.
        adapter_name: the adapter.
        mask: which tokens count; see `statistics.token_weights`.
        forward: called as `forward(model, batch)`; by default a mapping batch is passed as keywords.
        max_batches: read at most this many batches.
        max_tokens: stop after the batch that reaches this many counted tokens.
        share_inputs: layers that read the same tensor share one set of sums and one decomposition.
        nonfinite: `raise`, or `skip` rows with NaN or infinity.
        unreached: what to do about layers that the data never reached: `warn` (they keep their stock values) or
            `raise`.
        force: overwrite an adapter whose `lora_B` is not zero.
        progress: show progress bars.

    Returns:
        What was done, layer by layer.

    Raises:
        ValueError: on bad arguments or data, a trained adapter, or an optimizer that holds parameters to be replaced.
        RuntimeError: if several processes run: statistics are not reduced across them yet.
    """
    started = time.perf_counter()
    resolved = resolve_method(method)
    check_choice("unreached", unreached, ("warn", "raise"))
    if (loader is None) == (statistics is None):
        raise ValueError("exactly one of loader and statistics must be given")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "initialize runs on one process for now: call it before the process group starts, from one process, "
            "save the adapter and load it on every rank"
        )
    layers = peft_layers.find_lora_layers(model, adapter_name)
    if not force:
        peft_layers.check_untrained(layers, adapter_name)
    if statistics is None:
        assert loader is not None  # one of both was given
        statistics = collect(
            model,
            loader,
            adapter_name=adapter_name,
            mask=mask,
            forward=forward,
            max_batches=max_batches,
            max_tokens=max_tokens,
            share_inputs=share_inputs,
            nonfinite=nonfinite,
            progress=progress,
        )
    collected = time.perf_counter()
    ranks = _ranks(layers, statistics, unreached)
    found = resolved.factors(statistics, ranks, progress=progress)
    decomposed = time.perf_counter()
    before = _factor_sizes(layers, {})
    peft_layers.write(
        model,
        layers,
        {name: each.factors for name, each in found.items()},
        adapter_name,
        adjust_scaling_factors=resolved.adjust_scaling_factors,
    )
    written = time.perf_counter()
    return InitReport(
        method=resolved.name,
        settings=asdict(resolved) if is_dataclass(resolved) and not isinstance(resolved, type) else {},
        adapter=adapter_name,
        layers=_layer_reports(layers, statistics, found),
        seconds={
            "collect": collected - started,
            "decompose": decomposed - collected,
            "write": written - decomposed,
            "total": written - started,
        },
        batches=statistics.batches,
        tokens=statistics.tokens,
        trainable_before=before,
        trainable=_factor_sizes(layers, {name: each.factors.rank for name, each in found.items()}),
    )


def _ranks(layers: peft_layers.LoraLayers, statistics: Statistics, unreached: str) -> dict[str, int]:
    """The layers that data reached, with their ranks."""
    ranks, missed = {}, []
    for each in layers.supported:
        name = each.target.name
        if name not in statistics:
            raise ValueError(f"statistics have no entry for layer {name}: they come from another model or adapter")
        seen = statistics[name]
        if (seen.in_features, seen.out_features) != (each.target.in_features, each.target.out_features):
            raise ValueError(f"statistics of layer {name} are of another shape: they come from another model")
        if seen.input is None or seen.input.tokens <= 0:
            missed.append(name)
        else:
            ranks[name] = each.rank
    if missed:
        message = f"the data reached no token of {len(missed)} LoRA layers (first: {missed[0]})"
        if unreached == "raise":
            raise ValueError(message)
        warnings.warn(f"{message}; they keep their stock initialisation", RuntimeWarning, stacklevel=3)
    return ranks


def _factor_sizes(layers: peft_layers.LoraLayers, ranks: dict[str, int]) -> int:
    return sum(
        ranks.get(each.target.name, each.rank) * (each.target.in_features + each.target.out_features)
        for each in layers.supported
    )


def _layer_reports(
    layers: peft_layers.LoraLayers, statistics: Statistics, found: dict[str, LayerFactors]
) -> tuple[LayerReport, ...]:
    reports = []
    for each in layers.supported:
        name, seen = each.target.name, statistics[each.target.name]
        if name not in found:
            reports.append(LayerReport(name, "not_reached", each.rank, each.rank, notes=seen.notes))
            continue
        answer = found[name]
        explained = None if math.isnan(answer.explained_variance) else answer.explained_variance
        skipped = statistics.skipped_rows.get(name, 0)
        reports.append(
            LayerReport(
                name,
                "initialised" if answer.factors.rank else "removed",
                each.rank,
                answer.factors.rank,
                explained,
                None if explained is None else max(0.0, 1.0 - explained),
                seen.input.tokens if seen.input else 0.0,
                seen.shared_with,
                answer.residual,
                answer.solver,
                (*seen.notes, *answer.notes, *((f"{skipped} non-finite rows skipped",) if skipped else ())),
            )
        )
    reports += [LayerReport(name, "unsupported", rank, rank, notes=(why,)) for name, rank, why in layers.unsupported]
    return tuple(reports)
