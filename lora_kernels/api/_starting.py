"""The steps of `initialize`: which layers, from what statistics, solved, written and reported."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import parts
from lora_kernels.adapters.base_weight import PLAIN, base_weight, weight_kind, why_unreadable
from lora_kernels.adapters.view import LoraView
from lora_kernels.api import guidance
from lora_kernels.api import peft as peft_layers
from lora_kernels.api.report import LayerReport
from lora_kernels.init import InitMethod, LayerFactors, Redistribution
from lora_kernels.init.factors import BaseLayer, LoraFactors
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.runtime.processes import world_size
from lora_kernels.statistics import Statistics, Target


def untrained_layers(
    model: nn.Module, method: InitMethod, adapter_name: str, base: str, *, force: bool
) -> peft_layers.LoraLayers:
    """The layers of an adapter that may be given a start.

    Args:
        model: a PEFT model.
        method: the method.
        adapter_name: the adapter.
        base: as for `initialize`.
        force: also where `lora_B` is not zero.

    Returns:
        The layers; those that are too narrow for their rank are not supported, and keep their values.

    Raises:
        ValueError: if the adapter is trained, has LoRA-Dash's coordinates, cannot be offset, or has no layer that is
            wide enough, or if the method reads base weights that cannot be read or are sharded over processes.
    """
    layers = peft_layers.find_lora_layers(model, adapter_name)
    if any(parts.directions(each.view.module, adapter_name) is not None for each in layers.supported):
        raise ValueError(f"adapter {adapter_name!r} has LoRA-Dash's coordinates: initialise first, attach afterwards")
    offloaded = [layer.view.name for layer in layers.supported if _is_offloaded(layer.view.module, adapter_name)]
    if offloaded:
        raise ValueError(
            f"the factors of layer {', '.join(offloaded)} are on the meta device, offloaded by accelerate, which would "
            "put the old values back: initialise before the model is offloaded"
        )
    if not force:
        peft_layers.check_untrained(layers, adapter_name)
    else:
        _check_biases(model, layers, adapter_name)
    layers = _wide_enough(layers)
    _check_base(model, adapter_name)
    if method.reads_base:
        _check_readable(layers.supported)
        if world_size() > 1:
            _refuse_sharded(layers, method.name)
    if method.offsets_base:
        _check_offset(model, layers, adapter_name, base)
    elif force or method.moves_function:
        # DoRA's magnitudes are made anew, from the weight.
        dora = (
            layer for layer in layers.supported if peft_layers.magnitudes(layer.target.module, adapter_name) is not None
        )
        _check_readable(dora)
    return layers


def _is_offloaded(module: Any, adapter: str) -> bool:
    factor = module.lora_A[adapter]
    return hasattr(factor, "_hf_hook") and factor.weight.is_meta


def _check_readable(layers: Iterable[peft_layers.LoraTarget]) -> None:
    """Refuse base weights that cannot be read, naming all such layers."""
    reasons = {layer.view.name: why_unreadable(layer.view.module) for layer in layers}
    bad = {name: why for name, why in reasons.items() if why is not None}
    if bad:
        raise ValueError(
            f"the base weight of layer {', '.join(bad)} cannot be read: {'; '.join(dict.fromkeys(bad.values()))} "
            "(exclude_modules leaves layers out; eva, lora_ga and lora_one read no base weight)"
        )


def _wide_enough(layers: peft_layers.LoraLayers) -> peft_layers.LoraLayers:
    """The layers, those whose rank exceeds min(m, n) (heads, routers, gates) among the unsupported ones."""
    narrow = [layer for layer in layers.supported if layer.rank > layer.limit]
    if len(narrow) == len(layers.supported):
        names = ", ".join(f"{layer.view.name} (r = {layer.rank}, min(m, n) = {layer.limit})" for layer in narrow)
        raise ValueError(
            "no layer has room for its rank, which must be at most min(m, n): lower r or set ranks by rank_pattern, "
            f"or leave layers out by exclude_modules: {names}"
        )
    why = "rank {} exceeds min(m, n) = {}: it keeps its values (rank_pattern gives it a rank of its own)"
    reasons = [(layer.view.name, layer.rank, why.format(layer.rank, layer.limit)) for layer in narrow]
    wide = tuple(layer for layer in layers.supported if layer not in narrow)
    return replace(layers, supported=wide, unsupported=(*reasons, *layers.unsupported))


def check_ranks(layers: peft_layers.LoraLayers, method: InitMethod, ranks: Redistribution | None) -> None:
    """Refuse a redistribution of ranks that cannot be met, before any data is read.

    Args:
        layers: of the adapter.
        method: the method.
        ranks: a redistribution.

    Raises:
        ValueError: if so.
    """
    rule = method.redistribution if ranks is None else ranks
    if rule is not None:
        asked = {layer.view.name: layer.rank for layer in layers.supported}
        rule.check(asked, {layer.view.name: layer.limit for layer in layers.supported})


def _norm(target: Target) -> float:
    return float(torch.linalg.vector_norm(base_weight(target.module, target.name)))


def _check_base(model: nn.Module, adapter: str) -> None:
    from lora_kernels.adapters.config import changed_base  # noqa: PLC0415  (imports peft)

    why = changed_base(model.peft_config[adapter])  # type: ignore[index, union-attr, operator]
    if why is not None:
        raise ValueError(
            f"adapter {adapter!r} cannot start again: {why}, which would stay changed; make the model anew, with "
            "init_lora_weights=True"
        )


def _check_biases(model: nn.Module, layers: peft_layers.LoraLayers, adapter: str) -> None:
    """Refuse to overwrite a trained adapter whose `bias=` has trained biases of the base, too: those are gone."""
    config: Any = model.peft_config[adapter]  # type: ignore[index, union-attr, operator]
    if config.bias == "none":
        return
    if config.bias == "all":
        names = [name for name, _ in model.named_parameters() if name.endswith("bias") and ".lora_" not in name]
    else:
        names = [
            f"{layer.target.name}.bias"
            for layer in layers.supported
            if getattr(layer.target.module.get_base_layer(), "bias", None) is not None  # type: ignore[operator]
        ]
    if not names:
        return
    try:
        peft_layers.check_untrained(layers, adapter)
    except ValueError as error:
        raise ValueError(
            f"adapter {adapter!r} cannot start again: it was trained with bias={config.bias!r}, and what {names[0]} "
            f"was before ({len(names)} such) is not known; make the model anew"
        ) from error


def _check_offset(model: nn.Module, layers: peft_layers.LoraLayers, adapter: str, base: str) -> None:
    """Refuse a start away from zero that could not be taken off again, before anything is read or written."""
    from lora_kernels.adapters.config import check  # noqa: PLC0415  (imports peft)

    config: Any = model.peft_config[adapter]  # type: ignore[index, union-attr, operator]
    check(config)
    if config.use_dora:
        raise ValueError(f"adapter {adapter!r} uses DoRA, which cannot start away from zero and keep the function")
    counts = peft_layers.places(model)
    for layer in layers.supported:
        name, module = layer.view
        why = parts.refusal(module, adapter)
        if why is not None:
            raise ValueError(f"layer {name} cannot start away from zero and keep the function: {why}")
        if base == "mutate" and weight_kind(module) != PLAIN:
            raise ValueError(
                f"layer {name} has a quantized base, or one whose weight is no plain tensor: only "
                'base="intact" is possible'
            )
        if base == "mutate" and peft_layers.is_tied(module.get_base_layer().weight, counts):  # type: ignore[operator, union-attr]
            raise ValueError(
                f'layer {name} has a base weight that another layer has, too: only base="intact" is possible'
            )


def _refuse_sharded(layers: peft_layers.LoraLayers, method: str) -> None:
    """Layers are shared out over the processes, but a shard is only gathered by all of them together."""
    for each in layers.supported:
        weight = getattr(each.view.module.get_base_layer(), "weight", None)  # type: ignore[operator]
        if weight is not None and is_sharded(weight):
            raise ValueError(
                f"the base weight of layer {each.view.name} is sharded (FSDP), and {method} reads it: initialise "
                "before sharding, for instance from statistics that were collected on the sharded model"
            )


def defaults(method: InitMethod, ranks: Redistribution | None, layers: peft_layers.LoraLayers) -> dict[str, Any]:
    """The options of a collection for a method, where the user leaves them open.

    Args:
        method: the method.
        ranks: a redistribution.
        layers: of the adapter.

    Returns:
        Options by name.
    """
    asked = [each.rank for each in layers.supported]
    size = max(64, method.sketch_size(asked), 0 if ranks is None else ranks.sketch_size(asked))
    return {"sketch_size": size, **method.collect_options}


@without_autocast()
def solve(
    layers: peft_layers.LoraLayers,
    statistics: Statistics,
    given: Mapping[str, int],
    method: InitMethod,
    ranks: Redistribution | None,
    adapter_name: str,
) -> tuple[dict[str, LayerFactors], bool]:
    """The factors of all layers that data reached.

    Args:
        layers: of the adapter.
        statistics: of these layers.
        given: the ranks that they have.
        method: the method.
        ranks: a redistribution.
        adapter_name: the adapter.

    Returns:
        The answers by name, empty factors where no component won a rank; and whether alpha follows the rank.
    """
    assigned = given if ranks is None else ranks.assign(statistics, given)
    rule = method.redistribution if ranks is None else ranks
    adjust = rule is not None and rule.adjust_scaling_factors
    kept = {name: rank for name, rank in assigned.items() if rank > 0}
    by_name = {each.view.name: each for each in layers.supported}
    # The scaling that a layer will have is what its factors are made for.
    under = {
        name: _under(peft_layers.with_rank(by_name[name], rank, adjust=adjust), adapter_name)
        for name, rank in kept.items()
    }
    found = method.factors(statistics, kept, base=under)
    found |= {name: _no_adapter(by_name[name].target) for name in assigned if name not in kept}
    return found, adjust


@without_autocast()
def write(
    model: nn.Module,
    layers: peft_layers.LoraLayers,
    found: Mapping[str, LayerFactors],
    method: InitMethod,
    adapter_name: str,
    base: str,
    *,
    adjust: bool,
    force: bool = False,
) -> None:
    """Put factors into the adapter, and take off again what the start must not change.

    Args:
        model: a PEFT model.
        layers: of the adapter.
        found: the answers, by name.
        method: the method.
        adapter_name: the adapter.
        base: as for `initialize`.
        adjust: whether alpha follows the rank.
        force: the adapter may have been trained: DoRA's magnitudes are made anew.
    """
    from lora_kernels.adapters.config import describe, tidy_up  # noqa: PLC0415  (imports peft)

    for name in found:  # a layer that keeps its values keeps its start
        parts.remove(model.get_submodule(name), adapter_name, parts.START)
    factors = {name: each.factors for name, each in found.items()}
    peft_layers.write(model, layers, factors, adapter_name, adjust_scaling_factors=adjust)
    for name, each in factors.items():
        # A fresh magnitude is |W| already, to the bits by which PEFT divides it.
        if each.rank and (force or bool(each.B.any())):
            peft_layers.reset_magnitudes(model.get_submodule(name), adapter_name)
    if method.offsets_base:
        describe(model, adapter_name)
        with torch.no_grad():
            for name, each in factors.items():
                if each.rank:
                    _take_off(LoraView(name, model.get_submodule(name)), adapter_name, base)
        if base == "mutate":
            model.peft_config[adapter_name].mutated = True  # type: ignore[index, union-attr, operator]
    tidy_up(model, adapter_name)


def _take_off(layer: LoraView, adapter: str, base: str) -> None:
    """Take what the factors of a layer are now off its function."""
    if base == "intact":
        parts.add_start(layer.module, adapter, *(factor.clone() for factor in layer.factors(adapter)))
    else:
        module = layer.module
        weight, delta = module.get_base_layer().weight, module.get_delta_weight(adapter)
        weight.copy_(weight.to(delta.dtype) - delta)


def advice(
    method: InitMethod,
    found: Mapping[str, LayerFactors],
    reports: Sequence[LayerReport],
    statistics: Statistics,
    learning_rate: float | None,
) -> tuple[str, ...]:
    """What is to be said about training from this start.

    Args:
        method: the method.
        found: the answers, by name.
        reports: of the layers.
        statistics: that were read.
        learning_rate: that training will have.

    Returns:
        Sentences.
    """
    change = math.fsum(layer.start_change or 0.0 for layer in reports)
    moved = f"{method.name} moves the model's function at the start: the loss is predicted to change by {change:.2g}"
    said = guidance.advice(
        method.name,
        [each.step_ratio for each in reports if each.step_ratio is not None],
        starts_away=any(bool(each.factors.B.any()) for each in found.values()),
        full_rate=method.full_rate,
        learning_rate=learning_rate,
    )
    return (*([moved] if method.moves_function else []), *method.remarks(statistics), *said)


def settings(method: InitMethod, ranks: Redistribution | None) -> dict[str, Any]:
    """What the report says of the settings.

    Args:
        method: the method.
        ranks: a redistribution.

    Returns:
        Values by name.
    """
    return {
        **(asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}),
        **({} if ranks is None else {"ranks": asdict(ranks)}),
    }


def with_wants(wants: Mapping[str, bool], ranks: Redistribution | None) -> dict[str, bool]:
    """What a method and a redistribution read together.

    Args:
        wants: of the method.
        ranks: the redistribution.

    Returns:
        Statistic names; true where one of them needs the exact sums.
    """
    more = {} if ranks is None else ranks.wants
    return {name: bool(wants.get(name)) or bool(more.get(name)) for name in (*wants, *more)}


def _status(answer: LayerFactors) -> str:
    if not answer.factors.rank:
        return "removed"
    return "stock" if answer.solver == "stock" else "initialised"


def _no_adapter(target: Target) -> LayerFactors:
    empty = LoraFactors(torch.zeros(0, target.in_features), torch.zeros(target.out_features, 0))
    return LayerFactors(empty, notes=("no component won a rank",))


def _under(layer: peft_layers.LoraTarget, adapter: str) -> BaseLayer:
    name, module = layer.view
    return BaseLayer(
        functools.partial(base_weight, module, name),
        layer.scaling,
        lambda: LoraFactors(*(factor.to(torch.float32, copy=True) for factor in layer.view.factors(adapter))),
        (layer.target.out_features, layer.target.in_features),
    )


def for_dataset(method: InitMethod, loader: Iterable[Any] | None) -> InitMethod:
    """A method that depends on the size of the training set, and was not told it, takes that of the loader's dataset.

    Args:
        method: the method.
        loader: as for `initialize`.

    Returns:
        The method.
    """
    dataset = getattr(loader, "dataset", None)
    return method.for_samples(len(dataset)) if isinstance(dataset, Sized) and len(dataset) > 0 else method


def reached_ranks(
    layers: peft_layers.LoraLayers, statistics: Statistics, wants: Mapping[str, bool], unreached: str
) -> dict[str, int]:
    """The layers that data reached, with their ranks; all of them for a method that reads no data.

    Args:
        layers: of the adapter.
        statistics: of these layers.
        wants: what the method reads.
        unreached: `warn` or `raise`.

    Returns:
        Ranks by name.

    Raises:
        ValueError: if the statistics are of another model, or a layer was not reached and `unreached` says so.
    """
    if not wants:
        return {each.view.name: each.rank for each in layers.supported}
    ranks, missed = {}, []
    for each in layers.supported:
        name = each.view.name
        if name not in statistics:
            raise ValueError(f"statistics have no entry for layer {name}: they come from another model or adapter")
        seen = statistics[name]
        if (seen.in_features, seen.out_features) != (each.target.in_features, each.target.out_features):
            raise ValueError(f"statistics of layer {name} are of another shape: they come from another model")
        if not seen.reached(wants):
            missed.append(name)
        else:
            ranks[name] = each.rank
    if missed:
        message = f"the data, or its loss, does not reach {len(missed)} LoRA layers (first: {missed[0]})"
        if unreached == "raise":
            raise ValueError(message)
        warnings.warn(f"{message}; they keep their stock initialisation", RuntimeWarning, stacklevel=3)
    return ranks


def factor_sizes(layers: peft_layers.LoraLayers, ranks: dict[str, int]) -> int:
    """The number of entries of all factors.

    Args:
        layers: of the adapter.
        ranks: by name, where they are not what the layer has.

    Returns:
        The number.
    """
    return sum(
        ranks.get(each.view.name, each.rank) * (each.target.in_features + each.target.out_features)
        for each in layers.supported
    )


def _product_norm(factors: LoraFactors, scaling: float) -> float:
    """`|s B A|` (Frobenius), from the Gram matrices of the factors."""
    a, b = factors.A.detach().to(torch.float64), factors.B.detach().to(torch.float64)
    return abs(scaling) * math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))


@without_autocast()
def layer_reports(
    layers: peft_layers.LoraLayers,
    statistics: Statistics,
    found: dict[str, LayerFactors],
    *,
    offset_base: bool,
    adjust: bool,
) -> tuple[LayerReport, ...]:
    """What the report says of every layer.

    Args:
        layers: of the adapter.
        statistics: of these layers.
        found: the answers, by name.
        offset_base: whether `s B A` of the start is taken off again.
        adjust: whether alpha follows the rank.

    Returns:
        One report per layer, those that are not supported last.
    """
    reports = []
    for each in layers.supported:
        name = each.view.name
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
            start = _product_norm(answer.factors, scaling)
        unreadable = why_unreadable(each.view.module) if start > 0 else None
        if unreadable is not None:
            notes = (*notes, f"start not compared with the weight: {unreadable}")
        share = start / _norm(each.target) if start > 0 and unreadable is None else 0.0
        explained = None if math.isnan(answer.explained_variance) else answer.explained_variance
        skipped = statistics.skipped_rows.get(name, 0)
        reports.append(
            LayerReport(
                name,
                _status(answer),
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
