"""`lk.collect`, `lk.plan` and `lk.initialize`: the user's calls before training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import check_choice, check_range, check_type
from lora_kernels.api import _starting, guidance
from lora_kernels.api import peft as peft_layers
from lora_kernels.api.plain import find_linear_layers, skipped_modules
from lora_kernels.api.report import InitReport
from lora_kernels.init import InitMethod, Redistribution, resolve_method
from lora_kernels.init.method import named_wants
from lora_kernels.runtime import processes
from lora_kernels.runtime.modes import observation_mode
from lora_kernels.runtime.processes import check_same, together, unwrap
from lora_kernels.runtime.progress import progress_bars
from lora_kernels.statistics import (
    Plan,
    Statistics,
    Target,
    make_plan,
    parse_budget,
)
from lora_kernels.statistics import collect as collect_targets
from lora_kernels.statistics.options import CollectOptions, Forward, read_options
from lora_kernels.statistics.probe import find_groups
from lora_kernels.statistics.wants import Wants, resolve_wants


def _targets(
    model: nn.Module, targets: Sequence[str] | None, adapter_name: str
) -> tuple[Sequence[Target], Mapping[str, str]]:
    if targets is None and peft_layers.is_peft_model(model):
        return _observed(peft_layers.find_lora_layers(model, adapter_name))
    return find_linear_layers(model, targets), skipped_modules(model) if targets is None else {}


def _observed(layers: peft_layers.LoraLayers) -> tuple[Sequence[Target], Mapping[str, str]]:
    return [each.target for each in layers.supported], {name: why for name, _, why in layers.unsupported}


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
        RuntimeError: if another process failed.
    """
    model = unwrap(model)

    def check() -> tuple[CollectOptions, Mapping[str, bool], Sequence[Target], Mapping[str, str]]:
        chosen = read_options(options)
        check_type("loader", loader, Iterable, "an iterable of batches")
        check_type("adapter_name", adapter_name, str, "a name")
        return chosen, resolve_wants(named_wants(wants)), *_targets(model, targets, adapter_name)

    chosen, resolved, observed, skipped = together(check) if options.get("distributed", True) else check()
    with peft_layers.base_model_only(model):
        return collect_targets(model, loader, observed, resolved, chosen, skipped_modules=skipped)


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
    """What a collection would keep and send, before any data is read; the model may be on the meta device.

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
        resolve_wants(named_wants(wants)),
        groups=groups,
        budget=parse_budget(chosen.budget, device),
        form=chosen.form,
        sketch_size=chosen.sketch_size,
        world_size=processes.world_size() if world_size is None else world_size,
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
            `intact`: a frozen copy of it in the adapter's own layers takes it off, and the base weights stay as they
            are (`save_pretrained` and `export` write both as one stock adapter). `mutate`: it is taken off the base
            weights, as PEFT does; not possible on quantized ones.
        ranks: redistribute the ranks by a score of their components, whatever the method (EVA's own redistribution
            then rests). By default they are kept, unless the method's config says otherwise.
        learning_rate: that you are going to train with: the report (and a warning) says where it does not suit the
            start.
        unreached: what to do about layers that the data never reached, or that its loss does not depend on: `warn`
            (they keep their stock values) or `raise`.
        force: overwrite an adapter whose `lora_B` is not zero; DoRA's magnitudes become |W + s B A| of the new start,
            and a `lora_bias` zero. What `modules_to_save` trained stays; with `bias=` it is refused.
        options: fields of `statistics.CollectOptions` for the collection; `progress` also for the decompositions. The
            default `sketch_size` follows the ranks, and the method sets others (its `collect_options`).

    Returns:
        What was done, layer by layer.

    Raises:
        TypeError: on an argument of another type, or an unknown option.
        ValueError: on bad arguments or data, a trained adapter, one with LoRA-Dash's coordinates or whose ranks exceed
            min(m, n) in all layers, an optimizer that holds parameters to be replaced, or base weights that the method
            reads and that are sharded over processes.
        RuntimeError: if another process failed.
    """
    started = time.perf_counter()
    model = unwrap(model)

    def check() -> tuple[InitMethod, dict[str, bool], peft_layers.LoraLayers, CollectOptions | None]:
        check_type("loader", loader, (Iterable, type(None)), "an iterable of batches")
        check_type("statistics", statistics, (Statistics, type(None)), "Statistics from `collect`")
        check_type("ranks", ranks, (Redistribution, type(None)), "a Redistribution")
        check_type("adapter_name", adapter_name, str, "a name")
        resolved = _starting.for_dataset(resolve_method(method), loader)
        check_choice("unreached", unreached, ("warn", "raise"))
        check_choice("base", base, ("intact", "mutate"))
        if learning_rate is not None:
            check_range("learning_rate", learning_rate, low=0.0)
        if ranks is not None:
            resolved = resolved.keeping_ranks()
        wants = _starting.with_wants(resolved.wants, ranks)
        if wants and (loader is None) == (statistics is None):
            raise ValueError("exactly one of loader and statistics must be given")
        layers = _starting.untrained_layers(model, resolved, adapter_name, base, force=force)
        _starting.check_ranks(layers, resolved, ranks)
        if not wants or statistics is not None:
            if wants and set(options) - {"progress"}:
                names = ", ".join(sorted(set(options) - {"progress"}))
                raise TypeError(f"{names}: options of a collection, but statistics are given")
            return resolved, wants, layers, None
        return resolved, wants, layers, read_options({**_starting.defaults(resolved, ranks, layers), **options})

    resolved, wants, layers, chosen = together(check)
    asked = {layer.view.name: layer.rank for layer in layers.supported}
    # As given: what follows from the loader may differ, as the loaders do.
    as_given = _starting.settings(resolve_method(method), ranks)
    check_same(method=resolved.name, settings=as_given, r=asked, base=base, statistics=statistics is not None)
    if chosen is not None:
        assert loader is not None  # checked
        observed, skipped = _observed(layers)
        with peft_layers.base_model_only(model):
            statistics = collect_targets(model, loader, observed, wants, chosen, skipped_modules=skipped)
    statistics = statistics or Statistics()
    collected = time.perf_counter()
    given = _starting.reached_ranks(layers, statistics, wants, unreached)
    with progress_bars(bool(options.get("progress", True))):
        found, adjust = _starting.solve(layers, statistics, given, resolved, ranks, adapter_name)
    # Before the base weights may change: the report compares the start with what they were.
    reports = _starting.layer_reports(layers, statistics, found, offset_base=resolved.offsets_base, adjust=adjust)
    decomposed = time.perf_counter()
    before = _starting.factor_sizes(layers, {})
    together(lambda: _starting.write(model, layers, found, resolved, adapter_name, base, adjust=adjust, force=force))
    written = time.perf_counter()
    advice = _starting.advice(resolved, found, reports, statistics, learning_rate)
    for sentence in filter(guidance.is_warning, advice):
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    return InitReport(
        method=resolved.name,
        settings=_starting.settings(resolved, ranks),
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
        trainable=_starting.factor_sizes(layers, {name: each.factors.rank for name, each in found.items()}),
        advice=advice,
    )
