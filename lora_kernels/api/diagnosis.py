"""`lk.diagnose`: what the adapters of a PEFT model say about the landscape they ended in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from lora_kernels import landscape
from lora_kernels._checks import check_range, check_type
from lora_kernels.adapters import parts
from lora_kernels.adapters.base_weight import row_blocks, why_unreadable
from lora_kernels.adapters.experts import ExpertLayer
from lora_kernels.adapters.experts import observed as observed_experts
from lora_kernels.adapters.folders import AdapterFolder
from lora_kernels.adapters.layers import AdapterLayer, AdapterLayers, find_lora_layers
from lora_kernels.adapters.starting import carrier
from lora_kernels.api.start import observed
from lora_kernels.landscape import Adapter, Diagnosis, LayerDiagnosis, Spectrum, Thresholds, WeightNorms
from lora_kernels.landscape.report import rows
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.runtime.feed import model_device, to_device
from lora_kernels.runtime.loss import summed_loss
from lora_kernels.runtime.modes import holding, observation_mode
from lora_kernels.runtime.processes import unwrap, world_size
from lora_kernels.statistics import CollectOptions, Statistics
from lora_kernels.statistics import collect as collect_targets
from lora_kernels.statistics.options import CollectKeywords, read_options
from lora_kernels.statistics.sums import GRADIENT

Factors = tuple[torch.Tensor, torch.Tensor]
# Leading directions of a weight that count as its own, and of an update that are compared with them.
_OF_WEIGHT, _OF_UPDATE = 64, 8


def snapshot(model: nn.Module, adapter_name: str = "default") -> dict[str, Factors]:
    """Copies of an adapter's factors, to measure from later (`diagnose(..., start=)`).

    Args:
        model: a PEFT model.
        adapter_name: the adapter.

    Returns:
        By name of a layer, or of an expert, A `(r, n)` and B `(m, r)`.

    Raises:
        TypeError: if the model is no PEFT model.
        ValueError: if there is no such adapter.
    """
    layers = find_lora_layers(unwrap(model), adapter_name, allow_merged=True, without_experts=None)
    factors = {layer.name: layer.view.factors(adapter_name) for layer in layers.supported}
    return {name: (a.clone(), b.clone()) for name, (a, b) in factors.items()}


def find_adapters(
    layers: AdapterLayers,
    adapter_name: str,
    weights: Mapping[str, WeightNorms | None],
    start: Mapping[str, Factors] | None,
) -> list[Adapter]:
    """The factors of an adapter's layers with norms of base weights; the drift is from `start`, or a frozen start."""
    adapters = []
    for layer in layers.supported:
        name, module = layer.view
        a, b = layer.view.factors(adapter_name)
        if a.is_meta or b.is_meta:
            raise ValueError(f"layer {name} has factors on the meta device: load their values first")
        origin = None if start is None else start.get(name)
        frozen = parts.start(carrier(layer), adapter_name)
        if start is None and frozen is not None:
            origin = (frozen.a, frozen.b)
            if isinstance(module, ExpertLayer):
                origin = module.of(*origin)
        if origin is not None and (origin[0].shape[1:] != a.shape[1:] or origin[1].shape[:1] != b.shape[:1]):
            raise ValueError(
                f"start has factors of shapes {tuple(origin[0].shape)} and {tuple(origin[1].shape)} for layer {name}, "
                f"but must fit {tuple(a.shape)} and {tuple(b.shape)}"
            )
        scaling = float(layer.view.scaling(adapter_name))
        adapters.append(Adapter(name, a, b, scaling, weights.get(name), origin))
    return adapters


def base_norms(layers: AdapterLayers) -> dict[str, WeightNorms | None]:
    """By name, norms of the weights under an adapter; `None` where W cannot be read (merged, meta device, packed)."""
    return {
        layer.name: None if _why_no_weight(layer.module) else landscape.weight_norms(*_rows(layer.module))
        for layer in layers.supported
    }


def _why_no_weight(module: Any) -> str | None:
    """Why the weight under a LoRA layer cannot be read, if so."""
    if module.merged:
        return "merged: the base weight holds the update"
    weight = getattr(module.get_base_layer(), "weight", None)
    if weight is not None and weight.is_meta:
        return "the base weight is on the meta device"
    return why_unreadable(module)


def _rows(module: Any) -> tuple[Any, tuple[int, int], torch.device]:
    blocks = row_blocks(module)
    return blocks, (module.out_features, module.in_features), next(iter(blocks())).device


@without_autocast()
def diagnose(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    weight_decay: float | None = None,
    statistics: Statistics | None = None,
    adapter_name: str = "default",
    start: Mapping[str, Factors] | None = None,
    weights: bool = True,
    intruders: bool = False,
    thresholds: Thresholds | None = None,
    **options: Unpack[CollectKeywords],
) -> Diagnosis:
    """Tell how training ended: spectra and balance of every layer and expert, with data a certificate and a verdict.

    Under weight decay a second-order stationary point is either of low rank and small, and then a minimum, or of high
    rank and large (arXiv 2502.09376). The model is run in evaluation mode with its adapters on; nothing is changed.

    Args:
        model: a PEFT model; quantized, DistributedDataParallel and FSDP2 models too.
        loader: yields batches with labels, the more of the training set the better: the gradient of the mean loss over
            them is what is certified. Without it there are no certificates.
        weight_decay: lambda of training, as given to the optimizer. The certificate is for decay in the loss, see
            `landscape.certificate.OBJECTIVE`. Without it, or with 0, there are no certificates.
        statistics: from `collect(...)` with the adapters on, instead of a pass over the loader.
        adapter_name: the adapter.
        start: from `snapshot`, to measure the drift from.
        weights: compare with the norms of the base weights, which takes some products with them.
        intruders: compare the directions of the update with the leading ones of the base weight.
        thresholds: of the verdict.
        options: fields of `statistics.CollectOptions` for the pass over the data; by default `budget="auto"`, so that
            gradients which do not fit into half of the free memory are sketched.

    Returns:
        The diagnosis; it prints as a table, and `to_json` has everything.

    Raises:
        TypeError: if the model is no PEFT model, or an option is unknown.
        ValueError: on bad arguments or data, an adapter that is not active where data is given, or factors on the meta
            device.
    """
    check_type("thresholds", thresholds, (Thresholds, type(None)), "Thresholds or None")
    check_type("weights", weights, bool, "true or false")
    limits = thresholds or Thresholds()
    check_range("weight_decay", weight_decay, low=0.0, optional=True)
    if loader is not None and statistics is not None:
        raise ValueError("at most one of loader and statistics can be given")
    if options and loader is None:
        raise TypeError(f"{', '.join(sorted(options))}: options of a pass over data, but no loader is given")
    chosen = read_options({"budget": "auto", **options})
    model = unwrap(model)
    layers = find_lora_layers(model, adapter_name, allow_merged=True, without_experts=None)
    adapters = find_adapters(layers, adapter_name, base_norms(layers) if weights else {}, start)
    spectra = landscape.measure(adapters, rank_tolerance=limits.rank_tolerance)
    gain: float | None = None
    broken = any(spectrum.status == "not_finite" for spectrum in spectra.values())
    for layer in layers.supported if loader is not None else ():
        if (module := carrier(layer)).disable_adapters or adapter_name not in module.active_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} is not active in layer {layer.name}: its gradient would be that of another "
                "point; call model.set_adapter, or enable the adapters"
            )
    if loader is not None and not broken:
        targets, _ = observed(layers)
        with observed_experts(target.module for target in targets):
            statistics = collect_targets(model, loader, targets, GRADIENT, chosen)
        gain = None if not weight_decay else _gain(model, layers, adapter_name, loader, chosen, statistics)
    note = None
    if broken and loader is not None:
        note = "the data was not read: with factors that are not finite the loss is not finite either"
    elif statistics is None:
        note = "no data was given: no certificates"
    elif not weight_decay:
        note = "no weight decay was given: no certificates, since every low loss is then as good as another"
    diagnoses = tuple(
        _layer(layer, adapter, spectra[adapter.name], statistics, weight_decay, gain, limits, intruders)
        for layer, adapter in zip(layers.supported, adapters, strict=True)
    )
    return Diagnosis(
        adapter=adapter_name,
        layers=diagnoses,
        verdict=landscape.overall(row.verdict for row in rows(diagnoses)),
        thresholds=limits,
        weight_decay=weight_decay,
        batches=0 if statistics is None else statistics.batches,
        tokens=0.0 if statistics is None else statistics.tokens,
        unsupported=tuple((name, why) for name, _, why in layers.unsupported),
        notes=() if note is None else (note,),
    )


def _gain(
    model: nn.Module,
    layers: AdapterLayers,
    adapter: str,
    loader: Iterable[Any],
    options: CollectOptions,
    statistics: Statistics,
) -> float | None:
    """Mean loss without the adapter's linear updates less that with them, over the batches of the statistics."""
    # `None` where it cannot be had: the loader can be read once, several processes share the data, updates are merged,
    # or a mean over samples is not that over batches.
    modules = list(dict.fromkeys(carrier(layer) for layer in layers.supported))
    unknown = isinstance(loader, Iterator) or world_size() > 1 or options.weighting != "token"
    if unknown or any(module.merged for module in modules):
        return None
    device, weights = model_device(model), [module.lora_B[adapter].weight for module in modules]
    totals, items = [0.0, 0.0], 0.0
    with observation_mode(model, gradients=False):
        for batch in itertools.islice(loader, statistics.batches):
            batch = to_device(batch, device)
            for place in (0, 1):
                moved = weights if place == 0 else []  # to B = 0; a frozen start stays
                with holding(moved, (torch.zeros_like(weight.data) for weight in moved)):
                    total, count = summed_loss(model, batch, options.forward, options.loss, options.reduction)
                totals[place] += float(total)
            items += count
    return (totals[0] - totals[1]) / items if items > 0 else None


def _layer(
    place: AdapterLayer,
    adapter: Adapter,
    spectrum: Spectrum,
    statistics: Statistics | None,
    weight_decay: float | None,
    gain: float | None,
    limits: Thresholds,
    intruders: bool,
) -> LayerDiagnosis:
    notes: list[str] = []
    module, carries, certificate = place.module, carrier(place), None
    layer = None if statistics is None else statistics.get(adapter.name)
    tokens = None if layer is None else layer.tokens
    if (unreadable := _why_no_weight(module)) is not None:
        notes.append(f"not compared with the weight: {unreadable}")
    if spectrum.status == "not_finite":
        notes.append("the factors hold NaN or infinite entries")
    elif statistics is not None and weight_decay:
        variants = {name: carries.lora_variant.get(name) for name in carries.active_adapters}
        starts = [name for name, variant in variants.items() if isinstance(variant, parts.PartsVariant)]
        starts = [name for name in starts if parts.directions(carries, name) is None]  # a frozen start is no more
        if any(variant is not None and name not in starts for name, variant in variants.items()):
            notes.append("no certificate: with DoRA or another variant the update is more than s B A")
        elif isinstance(module, ExpertLayer) and tokens == 0:
            pass  # the summary of the experts names it
        elif layer is None or not layer.has_gradient:
            notes.append("no certificate: the data, or its loss, never reached this layer")
        elif adapter.scaling == 0:
            notes.append("no certificate: the scaling is zero")
        else:
            certificate = landscape.certify(adapter, spectrum, layer.gradient_operator(), weight_decay, gain)
    compared = None
    if intruders and spectrum.status == "ok" and unreadable is None:
        blocks, shape, device = _rows(module)
        weight = landscape.leading_directions(blocks, shape, _OF_WEIGHT, device)
        compared = landscape.overlap(landscape.directions(adapter, min(_OF_UPDATE, spectrum.numerical_rank)), weight)
    verdict = landscape.judge(spectrum, certificate, limits)
    return LayerDiagnosis(adapter.name, spectrum, verdict, certificate, compared, tuple(notes), place.parameter, tokens)


def inspect_folder(folder: AdapterFolder) -> Diagnosis:
    """Spectra and balance of an adapter from its files alone; no layer is compared with its weight."""
    limits = Thresholds()
    adapters = [Adapter(layer.name, layer.a, layer.b, layer.scaling, start=layer.start) for layer in folder.layers]
    spectra = landscape.measure(adapters, rank_tolerance=limits.rank_tolerance)
    layers = tuple(
        LayerDiagnosis(name, spectrum, landscape.judge(spectrum, None, limits), parameter=layer.parameter)
        for layer, (name, spectrum) in zip(folder.layers, spectra.items(), strict=True)
    )
    verdict = landscape.overall(row.verdict for row in rows(layers))
    notes = ("the base model was not read: nothing is compared with its weights", *folder.notes)
    return Diagnosis(str(folder.path), layers, verdict, limits, unsupported=folder.unsupported, notes=notes)
