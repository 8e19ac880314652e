"""Which core directions of a weight an adapter has changed most, relative to their size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tqdm import tqdm

from lora_kernels.adapters.base_weight import check_readable, dense_weight, whole
from lora_kernels.adapters.parts import start
from lora_kernels.linalg.basis import Selection, changed_most, core_basis
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.runtime.processes import raise_together, rank, share_out, world_size

# A and B of an adapter `(r, n)`, `(m, r)`, and its scaling.
Factors = tuple[torch.Tensor, torch.Tensor, float]


def along_directions(u: torch.Tensor, vh: torch.Tensor, factors: Iterable[Factors]) -> torch.Tensor:
    """`u_i^T (sum s B A) v_i` `(q,)` in float64, of u `(m, q)` and vh `(q, n)`, without forming a product `B A`."""
    wide = torch.float64
    u, vh = u.to(wide), vh.to(wide)
    changes = torch.zeros(u.shape[1], dtype=wide, device=u.device)
    for a, b, scaling in factors:
        changes += scaling * ((u.mT @ b.to(wide)) * (vh @ a.to(wide).mT)).sum(1)
    return changes


def select(weight: torch.Tensor, factors: Iterable[Factors], k: int, epsilon: float, cache: str | None) -> Selection:
    """The k core directions of W `(m, n)` that the sum of products `s B A` changes most."""
    factors = list(factors)
    if not all(bool(torch.isfinite(factor).all()) for a, b, _ in factors for factor in (a, b)):
        raise ValueError("the factors of the adapter hold NaN or infinite entries")
    u, s, vh = core_basis(weight, cache)
    return changed_most((u, s, vh), along_directions(u, vh, factors), k, epsilon)


def factors_of(layer: Any, adapter: str) -> list[Factors]:
    """The adapter's change: its own product, and minus that of its frozen start; whole where they are sharded."""
    scaling, frozen = layer.scaling[adapter], start(layer, adapter)
    factors = [(whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight), scaling)]
    return factors if frozen is None else [*factors, (frozen.a, frozen.b, frozen.sign * scaling)]


def for_layers(layers: Mapping[str, Any], compute: Any, adapter: str, *, progress: bool) -> dict[str, Any]:
    """By layer, the result of `compute(weight, factors)`; processes share the layers out, and all get all results."""
    # A `ValueError` of `compute` is raised with the layer's name; a failure on another process is a `RuntimeError`.
    results: dict[str, Any] = {}
    error: Exception | None = None
    names = list(layers)
    for name in names:  # on all processes alike, before they share the work out
        check_readable(layers[name], name)
    hidden = not progress or rank() > 0
    for number, name in enumerate(tqdm(names, desc="core directions", unit="layer", disable=hidden, leave=False)):
        layer = layers[name]
        mine = number % world_size() == rank()
        gathered = any(is_sharded(parameter) for parameter in layer.parameters())  # by all processes together
        if not mine and not gathered:
            continue
        weight, factors = dense_weight(layer), factors_of(layer, adapter)
        if not mine or error is not None:
            continue
        try:
            results[name] = compute(weight, factors)
        except Exception as caught:
            error = ValueError(f"layer {name}: {caught}") if isinstance(caught, ValueError) else caught
    raise_together(error)
    device = next(iter(layers.values())).lora_A[adapter].weight.device
    return share_out(names, results.__getitem__, device)
