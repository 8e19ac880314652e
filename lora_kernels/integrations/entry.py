"""`lk.collect`, `lk.plan` and `lk.initialize`: the user's calls before training."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.init import InitMethod, LayerFactors, resolve_method
from lora_kernels.integrations import peft as peft_layers
from lora_kernels.integrations.plain import find_linear_layers, skipped_modules
from lora_kernels.integrations.report import InitReport, LayerReport
from lora_kernels.ops._checks import check_choice
from lora_kernels.statistics import CollectOptions, Plan, Statistics, Target, distributed, make_plan, parse_budget
from lora_kernels.statistics import collect as collect_targets
from lora_kernels.statistics.distributed import unwrap
from lora_kernels.statistics.observe import observation_mode
from lora_kernels.statistics.options import Forward
from lora_kernels.statistics.probe import find_groups
from lora_kernels.statistics.wants import Wants, resolve_wants


def _options(options: Mapping[str, Any]) -> CollectOptions:
    unknown = sorted(set(options) - {each.name for each in fields(CollectOptions)})
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}; see statistics.CollectOptions for those there are")
    return CollectOptions(**options)


def _targets(
    model: nn.Module, targets: Sequence[str] | None, adapter_name: str
) -> tuple[Sequence[Target], Mapping[str, str]]:
    if targets is None and peft_layers.is_peft_model(model):
        layers = peft_layers.find_lora_layers(model, adapter_name)
        return [each.target for each in layers.supported], {name: why for name, _, why in layers.unsupported}
    return find_linear_layers(model, targets), skipped_modules(model) if targets is None else {}


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    wants: Wants = None,
    *,
    targets: Sequence[str] | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> Statistics:
    """Collect statistics of a model's linear layers, adapters switched off.

    Args:
        model: a PEFT model or any `nn.Module`, quantized ones included (only inputs and output gradients are read);
            DistributedDataParallel and FSDP2 (`fully_shard`) models too.
        loader: yields batches.
        wants: what to collect: a method (`"eva"`, `"lora_da"`, a config), names out of `statistics.STATISTICS`, or
            `None` for the input second moments.
        targets: full names of the layers; by default the LoRA layers of a PEFT model, all linear layers otherwise.
        adapter_name: whose layers are observed by default.
        options: fields of `statistics.CollectOptions`: masks, the loss and what it is a mean over, bounds, memory
            budget and sketches, checkpoint, and so on.

    Returns:
        The statistics by layer name, added up over all processes.
    """
    chosen = _options(options)
    model = unwrap(model)
    found, skipped = _targets(model, targets, adapter_name)
    with peft_layers.base_model_only(model):
        return collect_targets(model, loader, found, wants, chosen, skipped_modules=skipped)


def plan(
    model: nn.Module,
    wants: Wants = None,
    *,
    batch: Any = None,
    targets: Sequence[str] | None = None,
    adapter_name: str = "default",
    world_size: int | None = None,
    forward: Forward | None = None,
    share_inputs: bool = True,
    **options: Any,
) -> Plan:
    """What a collection would keep and cost, before any data is read; the model may be on the meta device.

    Args:
        model: as for `collect`.
        wants: as for `collect`.
        batch: an example batch on the model's device: one forward pass without gradients finds which layers read the
            same tensor. Without it every layer is counted by itself.
        targets: as for `collect`.
        adapter_name: as for `collect`.
        world_size: number of processes; by default that of the process group.
        forward: as for `collect`.
        share_inputs: as for `collect`.
        options: `budget`, `form`, `sketch_size`, `dtype` of `statistics.CollectOptions`.

    Returns:
        The plan; it prints as a table.

    Raises:
        TypeError: if an option is none of these.
    """
    unknown = sorted(set(options) - {"budget", "form", "sketch_size", "dtype"})
    if unknown:
        raise TypeError(f"plan has no option {', '.join(unknown)}")
    chosen = _options(options)
    model = unwrap(model)
    found, _ = _targets(model, targets, adapter_name)
    groups = None
    if batch is not None and share_inputs:
        with peft_layers.base_model_only(model), observation_mode(model, gradients=False):
            groups = find_groups(model, found, batch, forward)
    device = next((each.device for each in model.parameters() if each.device.type != "meta"), torch.device("cpu"))
    return make_plan(
        found,
        resolve_wants(wants),
        groups=groups,
        budget=parse_budget(chosen.budget, device),
        form=chosen.form,
        sketch_size=chosen.sketch_size,
        world_size=distributed.world_size() if world_size is None else world_size,
        dtype=chosen.dtype,
    )


def initialize(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    method: str | InitMethod = "eva",
    *,
    statistics: Statistics | None = None,
    adapter_name: str = "default",
    unreached: str = "warn",
    force: bool = False,
    **options: Any,
) -> InitReport:
    """Give a PEFT adapter a data-aware start. Call it before the optimizer is created.

    Base weights are never touched. Ranks may change (see the method's config); the adapter's `rank_pattern`,
    `alpha_pattern` and `target_modules` follow, so that the saved adapter loads in stock PEFT. If anything fails
    before the factors are written, the model is as it was.

    Args:
        model: a PEFT model.
        loader: yields batches; not needed with `statistics`.
        method: `"eva"`, `"lora_da"` or a config such as `EVA(rho=1.0)`.
        statistics: from `collect` on the same model, instead of a new pass.
        adapter_name: the adapter.
        unreached: what to do about layers that the data never reached: `warn` (they keep their stock values) or
            `raise`.
        force: overwrite an adapter whose `lora_B` is not zero.
        options: fields of `statistics.CollectOptions` for the collection; `progress` also for the decompositions. The
            default `sketch_size` follows the ranks, and the method sets others (its `collect_options`).

    Returns:
        What was done, layer by layer.

    Raises:
        ValueError: on bad arguments or data, a trained adapter, or an optimizer that holds parameters to be replaced.
        RuntimeError: if another process failed.
    """
    started = time.perf_counter()
    resolved = resolve_method(method)
    check_choice("unreached", unreached, ("warn", "raise"))
    if (loader is None) == (statistics is None):
        raise ValueError("exactly one of loader and statistics must be given")
    model = unwrap(model)
    layers = peft_layers.find_lora_layers(model, adapter_name)
    if not force:
        peft_layers.check_untrained(layers, adapter_name)
    if statistics is None:
        assert loader is not None  # one of both was given
        sizes = {"sketch_size": max(64, resolved.sketch_size([each.rank for each in layers.supported]))}
        defaults = {**sizes, **resolved.collect_options}
        statistics = collect(model, loader, resolved, adapter_name=adapter_name, **{**defaults, **options})
    elif set(options) - {"progress"}:
        names = ", ".join(sorted(set(options) - {"progress"}))
        raise TypeError(f"{names}: options of a collection, but statistics are given")
    collected = time.perf_counter()
    ranks = _ranks(layers, statistics, unreached)
    found = resolved.factors(statistics, ranks, progress=bool(options.get("progress", True)))
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
