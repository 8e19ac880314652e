"""Which core directions of a weight an adapter has changed most, relative to their size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lora_kernels.adapters.base_weight import check_readable, dense_weight, whole
from lora_kernels.adapters.parts import start
from lora_kernels.linalg import core_basis
from lora_kernels.linalg.randomized_svd import fix_pair
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.runtime.processes import raise_together, rank, share_out, world_size

# A and B of an adapter `(r, n)`, `(m, r)`, and its scaling.
Factors = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True)
class Selection:
    """The chosen directions of one layer, by descending rate.

    Attributes:
        left: the `u_i` `(m, k)`.
        right: the `v_i^T` `(k, n)`.
        indices: their places `(k,)` in the order of descending singular values.
        sigma: their singular values `(k,)`.
        rates: their change rates `(k,)`.
        largest: the largest singular value of the weight.
        share: of the squares of what the update changes along core directions, the part along the chosen ones.
    """

    left: torch.Tensor
    right: torch.Tensor
    indices: torch.Tensor
    sigma: torch.Tensor
    rates: torch.Tensor
    largest: float
    share: float


def along_directions(u: torch.Tensor, vh: torch.Tensor, factors: Iterable[Factors]) -> torch.Tensor:
    """`u_i^T (sum s B A) v_i` for all i, by row sums of `(U^T B) * (A V)^T`: no product `B A` is formed.

    Args:
        u: `(m, q)`.
        vh: `(q, n)`.
        factors: of adapters.

    Returns:
        `(q,)` float64.
    """
    wide = torch.float64
    u, vh = u.to(wide), vh.to(wide)
    found = torch.zeros(u.shape[1], dtype=wide, device=u.device)
    for a, b, scaling in factors:
        found += scaling * ((u.mT @ b.to(wide)) * (vh @ a.to(wide).mT)).sum(1)
    return found


def select(weight: torch.Tensor, factors: Iterable[Factors], k: int, epsilon: float, cache: str | None) -> Selection:
    """The k core directions with the largest change rates `|u_i^T dW v_i| / (sigma_i + eps sigma_1)`.

    Args:
        weight: W `(m, n)`.
        factors: whose products `s B A` add up to dW.
        k: at most `min(m, n)`.
        epsilon: eps.
        cache: see `linalg.core_basis`.

    Returns:
        The directions; of equal rates, that of the larger singular value comes first.

    Raises:
        ValueError: if an entry of a factor is NaN or infinite.
    """
    factors = list(factors)
    if not all(bool(torch.isfinite(each).all()) for a, b, _ in factors for each in (a, b)):
        raise ValueError("the factors of the adapter hold NaN or infinite entries")
    u, s, vh = core_basis(weight, cache)
    sizes = along_directions(u, vh, factors).abs()
    bottom = s.to(sizes) + epsilon * float(s[0])
    # sigma = 0 and eps = 0: the rate is infinite for a nonzero change, and 0 otherwise.
    rates = torch.where(sizes > 0, sizes / bottom, torch.zeros_like(sizes))
    chosen = rates.argsort(descending=True, stable=True)[:k]
    left, right = fix_pair(u[:, chosen], vh[chosen].mT)
    total = float(sizes.square().sum())
    share = float(sizes[chosen].square().sum()) / total if total > 0 else 0.0
    return Selection(left, right.mT.contiguous(), chosen, s[chosen], rates[chosen], float(s[0]), share)


def factors_of(layer: Any, adapter: str) -> list[Factors]:
    """What an adapter has changed: its product, less that of its frozen start.

    Args:
        layer: the LoRA layer.
        adapter: the adapter's name.

    Returns:
        Whole factors, gathered where they are sharded.
    """
    scaling, began = layer.scaling[adapter], start(layer, adapter)
    found = [(whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight), scaling)]
    return found if began is None else [*found, (began.a, began.b, began.sign * scaling)]


def for_layers(layers: Mapping[str, Any], compute: Any, adapter: str, *, progress: bool) -> dict[str, Any]:
    """Compute something of the weight and the factors of each layer, one after the other.

    The processes of a distributed run share the layers out; all get all answers, the same bits.

    Args:
        layers: by name.
        compute: called with the weight and the factors of a layer.
        adapter: the adapter's name.
        progress: show a bar.

    Returns:
        The answers.

    Raises:
        ValueError: what `compute` raised, with the layer's name.
        RuntimeError: if it failed on another process.
    """
    found: dict[str, Any] = {}
    error: Exception | None = None
    names = list(layers)
    for name in names:  # on all processes alike, before they share the work out
        check_readable(layers[name], name)
    shown = not progress or rank() > 0
    for number, name in enumerate(tqdm(names, desc="core directions", unit="layer", disable=shown, leave=False)):
        layer = layers[name]
        mine = number % world_size() == rank()
        gathered = any(is_sharded(each) for each in layer.parameters())  # by all processes together
        if not mine and not gathered:
            continue
        weight, factors = dense_weight(layer), factors_of(layer, adapter)
        if not mine or error is not None:
            continue
        try:
            found[name] = compute(weight, factors)
        except Exception as caught:
            error = ValueError(f"layer {name}: {caught}") if isinstance(caught, ValueError) else caught
    raise_together(error)
    device = next(iter(layers.values())).lora_A[adapter].weight.device
    return share_out(names, found.__getitem__, device)
