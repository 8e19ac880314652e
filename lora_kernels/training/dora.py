"""DoRA (arXiv 2402.09353) on the fused path: `y = c * (x W^T + s x A^T B^T) + bias`.

c is `m / |W + s B A|`, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.statistics.modes import is_sharded


def magnitude(layer: Any, adapter: str) -> nn.Parameter | None:
    """The magnitudes `(m,)` of an adapter, if it is DoRA on a linear layer."""
    variant = layer.lora_variant.get(adapter)
    if variant is None:
        return None
    name = getattr(variant, "__name__", type(variant).__name__)
    if name != "DoraLinearVariant":
        return None
    found: nn.Parameter = layer.lora_magnitude_vector[adapter].weight
    return found


def refusal(layer: Any, adapter: str, active: Sequence[str], base_is_fused: bool) -> str | None:
    """Why an adapter that is DoRA cannot run fused, or `None`.

    Args:
        layer: the LoRA layer.
        adapter: its name.
        active: the names of all active adapters of the layer.
        base_is_fused: whether the base product is part of the fused op.

    Returns:
        The reason, in words.
    """
    dropout = layer.lora_dropout[adapter]
    if len(active) > 1:
        return "DoRA beside other adapters"
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return "DoRA with dropout, which has a base product of the dropped input of its own"
    if not base_is_fused:
        return "DoRA on a base that computes its own product"
    if layer.lora_B[adapter].bias is not None or is_sharded(layer.lora_magnitude_vector[adapter].weight):
        return "DoRA with a bias of its own, or sharded"
    return None


def row_scale(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, magnitudes: torch.Tensor
) -> torch.Tensor:
    """`m / |W + s B A|` by row; the norm counts as a constant (section 4.3 of the paper).

    `|w + s b A|^2 = |w|^2 + 2 s <w A^T, b> + s^2 <b A A^T, b>`: W is read, and no matrix of its size is made.

    Args:
        weight: W `(m, n)`.
        a: A `(r, n)`.
        b: B `(m, r)`.
        scaling: s.
        magnitudes: `(m,)`.

    Returns:
        `(m,)`, differentiable in the magnitudes.
    """
    with torch.no_grad():
        wide = torch.promote_types(weight.dtype, torch.float32)
        left, right = b.to(wide), a.to(wide)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        squares += 2 * scaling * ((weight @ a.to(weight.dtype).mT).to(wide) * left).sum(1)
        squares += scaling**2 * ((left @ (right @ right.mT)) * left).sum(1)
        norms = squares.sqrt()
    scale: torch.Tensor = magnitudes / norms.to(magnitudes.dtype)
    return scale


def scaled(y: torch.Tensor, layer: Any, adapter: Any) -> torch.Tensor:
    """The layer's output from the product that DoRA scales.

    Args:
        y: `x W^T + s x A^T B^T`, `(..., m)`.
        layer: the LoRA layer.
        adapter: its active adapter.

    Returns:
        `(..., m)`.
    """
    base = layer.base_layer
    y = y * row_scale(base.weight, adapter.a, adapter.b, adapter.scaling, adapter.magnitude).to(y.dtype)
    return y if base.bias is None else y + base.bias.to(y.dtype)
