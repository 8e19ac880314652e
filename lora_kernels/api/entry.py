"""`lk.collect`, `lk.plan` and `lk.initialize`: the user's calls before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from lora_kernels._checks import check_type
from lora_kernels.adapters.experts import observed as observed_experts
from lora_kernels.adapters.layers import base_model_only, find_lora_layers, is_peft_model
from lora_kernels.api.plain import find_linear_layers, skipped_modules
from lora_kernels.api.report import InitReport
from lora_kernels.api.start import Start, observed
from lora_kernels.init import InitMethod, Redistribution, resolve_method
from lora_kernels.init.method import named_wants
from lora_kernels.runtime import processes
from lora_kernels.runtime.modes import observation_mode
from lora_kernels.runtime.processes import check_same, together, unwrap
from lora_kernels.statistics import Plan, Statistics, Target, parse_budget
from lora_kernels.statistics import collect as collect_targets
from lora_kernels.statistics.options import (
    CollectKeywords,
    CollectOptions,
    Forward,
    PlanKeywords,
    Wants,
    read_options,
    resolve_wants,
)
from lora_kernels.statistics.sharing import find_groups


def _targets(
    model: nn.Module, targets: Sequence[str] | None, adapter_name: str
) -> tuple[Sequence[Target], Mapping[str, str]]:
    if targets is None and is_peft_model(model):
        return observed(find_lora_layers(model, adapter_name, without_experts=None))
    return find_linear_layers(model, targets), skipped_modules(model) if targets is None else {}


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    wants: Wants = None,
    *,
    targets: Sequence[str] | None = None,
    adapter_name: str = "default",
    **options: Unpack[CollectKeywords],
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
        return chosen, resolve_wants(named_wants(wants)), *_targets(model, targets, adapter_name)

    chosen, resolved, layers, skipped = together(check) if options.get("distributed", True) else check()
    with base_model_only(model), observed_experts(layer.module for layer in layers):
        return collect_targets(model, loader, layers, resolved, chosen, skipped_modules=skipped)


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
    **options: Unpack[PlanKeywords],
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
    if unknown := sorted(set(options) - set(PlanKeywords.__annotations__)):
        raise TypeError(f"plan has no option {', '.join(unknown)}")
    chosen = read_options(options)
    model = unwrap(model)
    layers, _ = _targets(model, targets, adapter_name)
    groups = None
    if batch is not None and share_inputs:
        modules = (layer.module for layer in layers)
        with base_model_only(model), observed_experts(modules), observation_mode(model, gradients=False):
            groups = find_groups(model, layers, batch, forward)
    devices = (parameter.device for parameter in model.parameters())
    device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    world = processes.world_size() if world_size is None else world_size
    return chosen.plan(layers, resolve_wants(named_wants(wants)), groups, parse_budget(chosen.budget, device), world)


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
    suggest_rate: bool = False,
    optimizer: str = "adamw",
    unreached: str = "warn",
    force: bool = False,
    **options: Unpack[CollectKeywords],
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
            `intact`: a frozen copy of it in the adapter's own layers cancels it, and the base weights stay as they
            are (`save_pretrained` and `export` write both as one stock adapter). `mutate`: it is subtracted from the
            base weights, as PEFT does; not possible on quantized ones.
        ranks: redistribute the ranks by a score of their components, whatever the method (EVA's own redistribution
            then rests). By default they are kept, unless the method's config says otherwise.
        learning_rate: that you are going to train with: the report (and a warning) says where it does not suit the
            start.
        suggest_rate: measure a learning rate from the new start on the loader's first batches, which are read again
            (eight of them: about forty forward and four to eight backward passes; see `suggest_learning_rate`). Without
            a loss, a loader that can be read again, or memory for a backward pass the report says why there is none.
        optimizer: that you are going to train with, for that rate: `adamw`, `lora_pro` or `lora_pro_full`.
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
            min(m, n) in all layers, a change of ranks under DistributedDataParallel or FSDP, or base weights that the
            method reads and that are sharded over processes.
        RuntimeError: if another process failed.
    """

    def check() -> Start:
        check_type("loader", loader, (Iterable, type(None)), "an iterable of batches")
        check_type("statistics", statistics, (Statistics, type(None)), "Statistics from `collect`")
        start = Start(
            model,
            resolve_method(method),
            adapter=adapter_name,
            base=base,
            ranks=ranks,
            learning_rate=learning_rate,
            suggest_rate=suggest_rate,
            optimizer=optimizer,
            unreached=unreached,
            force=force,
        )
        if start.wants and (loader is None) == (statistics is None):
            raise ValueError("exactly one of loader and statistics must be given")
        if start.wants and statistics is None:
            read_options(options)
        start.check()
        return start

    start = together(check)
    ranks_now = {layer.name: layer.rank for layer in start.layers.supported}
    check_same(method=repr(start.method), ranks=repr(ranks), r=ranks_now, base=base, statistics=statistics is not None)
    start.collect(loader, statistics, options)
    start.solve(progress=bool(options.get("progress", True)))
    together(start.write)
    start.measure_rate(loader, options)
    return start.report()
