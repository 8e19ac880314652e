"""`lk.collect`, `lk.plan` and `lk.initialize`: the user's calls before training."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_kernels.init import EVA, InitMethod, LayerFactors, Redistribution, resolve_method
from lora_kernels.init.factors import BaseLayer, LoraFactors
from lora_kernels.integrations import guidance, offset
from lora_kernels.integrations import peft as peft_layers
from lora_kernels.integrations.plain import find_linear_layers, skipped_modules
from lora_kernels.integrations.report import InitReport, LayerReport
from lora_kernels.ops._checks import check_choice, check_range, check_type
from lora_kernels.statistics import CollectOptions, Plan, Statistics, Target, distributed, make_plan, parse_budget
from lora_kernels.statistics import collect as collect_targets
from lora_kernels.statistics.distributed import unwrap
from lora_kernels.statistics.modes import observation_mode
from lora_kernels.statistics.options import Forward
from lora_kernels.statistics.probe import find_groups
from lora_kernels.statistics.store import LayerStatistics
from lora_kernels.statistics.wants import OF_GRADIENTS, Wants, resolve_wants
from lora_kernels.training.dash.module import directions as dash_directions


def read_options(options: Mapping[str, Any]) -> CollectOptions:
    """The options of a collection, given as keywords.

    Args:
        options: by name.

    Returns:
        The options.

    Raises:
        TypeError: if a name is unknown.
    """
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

    Raises:
        TypeError: on an argument of another type, or an unknown option.
        ValueError: on an argument out of range, a layer that is not there, an empty loader, a batch without any counted
            token, an input, gradient or loss that is not finite, or a checkpoint of something else.
        RuntimeError: if the sharing of inputs changes between batches, or another process failed.
    """
    chosen = read_options(options)
    model = unwrap(model)
    check_type("loader", loader, Iterable, "an iterable of batches")
    check_type("adapter_name", adapter_name, str, "a name")
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
        TypeError: on an argument of another type, or an unknown option.
        ValueError: on an argument out of range, a layer that is not there, or a budget that one layer exceeds.
    """
    unknown = sorted(set(options) - {"budget", "form", "sketch_size", "dtype"})
    if unknown:
        raise TypeError(f"plan has no option {', '.join(unknown)}")
    chosen = read_options(options)
    model = unwrap(model)
    check_type("adapter_name", adapter_name, str, "a name")
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
    base: str = "intact",
    ranks: Redistribution | None = None,
    learning_rate: float | None = None,
    unreached: str = "warn",
    force: bool = False,
    **options: Any,
) -> InitReport:
    """Give a PEFT adapter a data-aware start. Call it before the optimizer is created.

    Base weights are not touched unless `base="mutate"` asks for it. Ranks may change (see the method's config); the
    adapter's `rank_pattern`, `alpha_pattern` and `target_modules` follow, so that the saved adapter loads in stock
    PEFT. If anything fails before the factors are written, the model is as it was.

    Args:
        model: a PEFT model.
        loader: yields batches; not needed with `statistics`, or by a method that reads no data.
        method: a name such as `"eva"`, or a config such as `EVA(rho=1.0)`; see `init.METHODS`.
        statistics: from `collect` on the same model, instead of a new pass.
        adapter_name: the adapter.
        base: what methods that start away from zero but keep the model's function do about `s B A` of the start.
            `intact`: a frozen adapter `<adapter_name>_offset` beside this one takes it off; the base weights stay as
            they are (`export` writes both as one stock adapter). `mutate`: it is taken off the base weights, as PEFT
            does; not possible on quantized ones.
        ranks: redistribute the ranks by a score of their components, whatever the method (EVA's own redistribution
            then rests). By default the method decides: all but EVA keep them.
        learning_rate: that you are going to train with: the report (and a warning) says where it does not suit the
            start.
        unreached: what to do about layers that the data never reached, or that its loss does not depend on: `warn`
            (they keep their stock values) or `raise`.
        force: overwrite an adapter whose `lora_B` is not zero.
        options: fields of `statistics.CollectOptions` for the collection; `progress` also for the decompositions. The
            default `sketch_size` follows the ranks, and the method sets others (its `collect_options`).

    Returns:
        What was done, layer by layer.

    Raises:
        TypeError: on an argument of another type, or an unknown option.
        ValueError: on bad arguments or data, a trained adapter, one with LoRA-Dash's coordinates, or an optimizer that
            holds parameters to be replaced.
        RuntimeError: if another process failed.
    """
    started = time.perf_counter()
    model = unwrap(model)
    check_type("loader", loader, (Iterable, type(None)), "an iterable of batches")
    check_type("statistics", statistics, (Statistics, type(None)), "Statistics from `collect`")
    check_type("ranks", ranks, (Redistribution, type(None)), "a Redistribution")
    check_type("adapter_name", adapter_name, str, "a name")
    resolved = _with_population(resolve_method(method), loader)
    check_choice("unreached", unreached, ("warn", "raise"))
    check_choice("base", base, ("intact", "mutate"))
    if learning_rate is not None:
        check_range("learning_rate", learning_rate, low=0.0)
    if ranks is not None and isinstance(resolved, EVA):
        resolved = resolved.keeping_ranks()
    wants = _with_wants(resolved.wants, ranks)
    if wants and (loader is None) == (statistics is None):
        raise ValueError("exactly one of loader and statistics must be given")
    model = unwrap(model)
    layers = peft_layers.find_lora_layers(model, adapter_name)
    if any(dash_directions(each.target.module, adapter_name) is not None for each in layers.supported):
        raise ValueError(f"adapter {adapter_name!r} has LoRA-Dash's coordinates: initialise first, attach afterwards")
    if not force:
        peft_layers.check_untrained(layers, adapter_name)
    if resolved.offsets_base:
        offset.check(model, layers, adapter_name, base)
    if not wants:
        statistics = statistics or Statistics({}, 0, 0.0, 0.0)
    elif statistics is None:
        assert loader is not None  # one of both was given
        asked = [each.rank for each in layers.supported]
        size = max(64, resolved.sketch_size(asked), 0 if ranks is None else ranks.sketch_size(asked))
        defaults = {"sketch_size": size, **resolved.collect_options}
        statistics = collect(model, loader, wants, adapter_name=adapter_name, **{**defaults, **options})
    elif set(options) - {"progress"}:
        names = ", ".join(sorted(set(options) - {"progress"}))
        raise TypeError(f"{names}: options of a collection, but statistics are given")
    collected = time.perf_counter()
    progress = bool(options.get("progress", True))
    given = _ranks(layers, statistics, wants, unreached)
    assigned = given if ranks is None else ranks.assign(statistics, given, progress=progress)
    adjust = (resolved if ranks is None else ranks).adjust_scaling_factors
    kept = {name: rank for name, rank in assigned.items() if rank > 0}
    by_name = {each.target.name: each for each in layers.supported}
    # The scaling that a layer will have is what its factors are made for.
    under = {
        name: _under(peft_layers.with_rank(by_name[name], rank, adjust=adjust), adapter_name)
        for name, rank in kept.items()
    }
    found = resolved.factors(statistics, kept, base=under, progress=progress)
    found |= {name: _no_adapter(by_name[name].target) for name in assigned if name not in kept}
    # Before the base weights may change: the report compares the start with what they were.
    reports = _layer_reports(layers, statistics, found, offset_base=resolved.offsets_base, adjust=adjust)
    decomposed = time.perf_counter()
    before = _factor_sizes(layers, {})
    offset.remove(model, adapter_name)
    peft_layers.write(
        model,
        layers,
        {name: each.factors for name, each in found.items()},
        adapter_name,
        adjust_scaling_factors=adjust,
    )
    if resolved.offsets_base:
        take_off = offset.attach if base == "intact" else offset.subtract
        take_off(model, adapter_name, [name for name, each in found.items() if each.factors.rank])
    written = time.perf_counter()
    advice = guidance.advice(
        resolved.name,
        [each.step_ratio for each in reports if each.step_ratio is not None],
        starts_away=any(bool(each.factors.B.any()) for each in found.values()),
        full_rate=resolved.full_rate,
        learning_rate=learning_rate,
    )
    for sentence in filter(guidance.is_warning, advice):
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    return InitReport(
        method=resolved.name,
        settings={
            **(asdict(resolved) if is_dataclass(resolved) and not isinstance(resolved, type) else {}),
            **({} if ranks is None else {"ranks": asdict(ranks)}),
        },
        adapter=adapter_name,
        layers=reports,
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
        advice=advice,
    )


def _with_wants(wants: Mapping[str, bool], ranks: Redistribution | None) -> dict[str, bool]:
    """What a method and a redistribution read together; exact where one of them needs it so."""
    more = {} if ranks is None else ranks.wants
    return {name: bool(wants.get(name)) or bool(more.get(name)) for name in (*wants, *more)}


def _no_adapter(target: Target) -> LayerFactors:
    empty = LoraFactors(torch.zeros(0, target.in_features), torch.zeros(target.out_features, 0))
    return LayerFactors(empty, math.nan, 0.0, "", ("no component won a rank",))


def _under(layer: peft_layers.LoraTarget, adapter: str) -> BaseLayer:
    module = layer.target.module
    return BaseLayer(
        functools.partial(offset.base_weight, module),
        layer.scaling,
        functools.partial(peft_layers.read_factors, module, adapter),
    )


def _with_population(method: InitMethod, loader: Iterable[Any] | None) -> InitMethod:
    """A method that weighs by the size of the training set, and was not told it, takes that of the loader's dataset."""
    dataset = getattr(loader, "dataset", None)
    if getattr(method, "population_size", 0) is None and isinstance(dataset, Sized) and len(dataset) > 0:
        return replace(method, population_size=len(dataset))  # type: ignore[type-var]
    return method


def _reached(layer: LayerStatistics, wants: Mapping[str, bool]) -> bool:
    needs_gradients = any(name in OF_GRADIENTS for name in wants)
    if layer.tokens <= 0 or not needs_gradients:
        return layer.tokens > 0
    return layer.output is not None and float(layer.output.calls) > 0 and not layer.output.is_zero


def _ranks(
    layers: peft_layers.LoraLayers, statistics: Statistics, wants: Mapping[str, bool], unreached: str
) -> dict[str, int]:
    """The layers that data reached, with their ranks; all of them for a method that reads no data."""
    if not wants:
        return {each.target.name: each.rank for each in layers.supported}
    ranks, missed = {}, []
    for each in layers.supported:
        name = each.target.name
        if name not in statistics:
            raise ValueError(f"statistics have no entry for layer {name}: they come from another model or adapter")
        seen = statistics[name]
        if (seen.in_features, seen.out_features) != (each.target.in_features, each.target.out_features):
            raise ValueError(f"statistics of layer {name} are of another shape: they come from another model")
        if not _reached(seen, wants):
            missed.append(name)
        else:
            ranks[name] = each.rank
    if missed:
        message = f"the data, or its loss, does not reach {len(missed)} LoRA layers (first: {missed[0]})"
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
    layers: peft_layers.LoraLayers,
    statistics: Statistics,
    found: dict[str, LayerFactors],
    *,
    offset_base: bool,
    adjust: bool,
) -> tuple[LayerReport, ...]:
    reports = []
    for each in layers.supported:
        name = each.target.name
        seen = statistics.get(name)
        notes = () if seen is None else seen.notes
        if name not in found:
            reports.append(LayerReport(name, "not_reached", each.rank, each.rank, notes=notes))
            continue
        answer = found[name]
        view, start = None, 0.0
        if answer.factors.rank:
            scaling = peft_layers.with_rank(each, answer.factors.rank, adjust=adjust).scaling
            view = guidance.outlook(answer.factors, scaling, statistics, name, offset=offset_base)
            start = offset.product_norm(answer.factors, scaling)
        share = start / float(torch.linalg.vector_norm(offset.base_weight(each.target.module))) if start > 0 else 0.0
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
                0.0 if seen is None else seen.tokens,
                () if seen is None else seen.shared_with,
                answer.residual,
                answer.solver,
                share,
                None if view is None else view.start_change,
                None if view is None else view.first_step,
                None if view is None else view.step_ratio,
                (*notes, *answer.notes, *((f"{skipped} non-finite rows skipped",) if skipped else ())),
            )
        )
    reports += [LayerReport(name, "unsupported", rank, rank, notes=(why,)) for name, rank, why in layers.unsupported]
    return tuple(reports)
