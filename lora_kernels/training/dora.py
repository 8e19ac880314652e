"""DoRA (arXiv 2402.09353) on the fused path: `y = c * (x W^T + s x A^T B^T) + bias` with `c = m / |W + s B A|` by row.

With dropout PEFT computes `x W^T + bias + (c - 1) * d W^T + c * s d A^T B^T` of the dropped input d. That is
`(x - d) W^T + bias + c * (d W^T + s d A^T B^T)`: one product of the base layer, and one of the fused op.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.base_weight import row_blocks
from lora_kernels.adapters.dora import (
    NORM_BLOCK,
    block_entries,
    block_height,
    caching_enabled,
    extension_for,
    row_norms,
)
from lora_kernels.runtime.modes import is_sharded

# Entries that are scaled at a time: on a CPU by every thread, about what its second-level cache holds.
_SCALE_BLOCK = 2**17
# The key of the norms in the cache of PEFT's magnitude module, which PEFT clears when training begins.
_CACHE_KEY = "lora_kernels"


def magnitude(layer: Any, adapter: str) -> nn.Parameter | None:
    """The magnitudes `(m,)` of an adapter, if it is DoRA on a linear layer."""
    variant = layer.lora_variant.get(adapter)
    if variant is None or getattr(variant, "__name__", type(variant).__name__) != "DoraLinearVariant":
        return None
    magnitudes: nn.Parameter = layer.lora_magnitude_vector[adapter].weight
    return magnitudes


def refusal(layer: Any, adapter: str, active: Sequence[str]) -> str | None:
    """Why an adapter that is DoRA cannot run fused, or `None`; `active` are all active adapters of the layer."""
    if len(active) > 1:
        return "DoRA beside other adapters"
    if layer.lora_B[adapter].bias is not None or is_sharded(layer.lora_magnitude_vector[adapter].weight):
        return "DoRA with a bias of its own, or sharded"
    return None


def norms(layer: Any, adapter: str) -> torch.Tensor:
    """`|W + s B A|` by row, `(m,)` without a graph; zero rows are an error on a CPU, else infinite (see `check`)."""
    # Kept only inside of `peft.helpers.DoraCaching`, as by PEFT: a write to `parameter.data` leaves no trace.
    a, b, s = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    if torch.compiler.is_compiling():
        return _guarded(row_norms(_rows(layer), a, b, s))
    holder = layer.lora_magnitude_vector[adapter]
    store = getattr(holder, "_dora_cache", None)  # PEFT 0.18 has none
    key = None
    if store is not None and not holder.training and caching_enabled():
        tensors, traces = key = _key(layer.get_base_layer(), a, b, s)
        if _CACHE_KEY in store:
            (before, then), kept = store[_CACHE_KEY]
            if then == traces and all(map(operator.is_, before, tensors)):
                return kept  # type: ignore[no-any-return]
    lengths = row_norms(_rows(layer), a, b, s)
    plain = type(lengths) is torch.Tensor and not torch._C._are_functorch_transforms_active()
    if plain and lengths.device.type == "cpu":
        _refuse_zeros(lengths, layer, "")
    else:
        lengths = _guarded(lengths)
    if key is not None and store is not None:
        store[_CACHE_KEY] = (key, lengths)
    elif store:
        store.pop(_CACHE_KEY, None)
    return lengths


def check(layer: Any, adapter: str, name: str) -> None:
    """Refuse a layer with rows of zero norm, by which DoRA divides (PEFT gives NaN there); waits for the device."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    lengths = row_norms(_rows(layer), a, b, layer.scaling[adapter])
    _refuse_zeros(lengths, layer, name)


def _refuse_zeros(lengths: torch.Tensor, layer: Any, name: str) -> None:
    """Says which rows are zero."""
    if bool(lengths.all()):
        return
    rows = (lengths == 0).nonzero().flatten().tolist()
    numbers = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    where = name or f"of shape ({layer.out_features}, {layer.in_features})"
    raise ValueError(
        f"DoRA divides by the norms of the rows of W + s B A, but {len(rows)} of layer {where} are zero "
        f"(rows {numbers}): leave the layer out of target_modules, or set use_dora=False"
    )


def _guarded(lengths: torch.Tensor) -> torch.Tensor:
    return lengths.masked_fill(lengths == 0, math.inf)


def _rows(layer: Any) -> Any:
    """W `(m, n)`, or its rows in blocks where it has to be dequantized or turned."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    plain = type(base) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor)
    if plain and weight.is_floating_point() and weight.element_size() > 1:  # type: ignore[union-attr]
        return weight
    device = next(iter(layer.lora_A.values())).weight.device
    return row_blocks(layer, entries=block_entries(device, NORM_BLOCK))()


def _key(base: Any, a: torch.Tensor, b: torch.Tensor, scaling: Any) -> tuple[Any, ...]:
    """What norms depend on: tensors with the versions and places of their values, and the scaling."""
    weight = getattr(base, "weight", None)
    tensors = (base.W_q if weight is None else weight, a, b)
    traces = tuple((0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for tensor in tensors)
    return tensors, (*traces, float(scaling))


def rescaled(
    product: torch.Tensor,
    magnitudes: torch.Tensor,
    norms: torch.Tensor,
    *,
    inner: torch.Tensor | None = None,
    outer: torch.Tensor | None = None,
) -> torch.Tensor:
    """`m / norms * (product - inner) + outer`, in one pass over the product, and two in the backward."""
    # The product `x W^T + s x A^T B^T + inner`, `(..., m)`, is kept for the gradient of the magnitudes `(m,)`; norms
    # `(m,)` are constants (section 4.3 of the paper). `inner` `(m,)` is the bias, where a base layer that computes its
    # own product has added it already; `outer`, `(m,)` or `(..., m)`, is what is not scaled, such as the bias.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        scaled = (product if inner is None else product - inner) * (magnitudes / norms)
        return (scaled if outer is None else scaled + outer).to(product.dtype)
    y: torch.Tensor = _Rescaled.apply(product, magnitudes, norms, inner, outer)  # type: ignore[no-untyped-call]
    return y


class _Rescaled(torch.autograd.Function):
    """`rescaled`, eager."""

    @staticmethod
    def forward(
        product: torch.Tensor,
        magnitudes: torch.Tensor,
        norms: torch.Tensor,
        inner: torch.Tensor | None,
        outer: torch.Tensor | None,
    ) -> torch.Tensor:
        scale = magnitudes / norms
        shift = outer
        if inner is not None:
            shift = -scale * inner if outer is None else outer - scale * inner
        rows = product.reshape(-1, product.shape[-1])
        by_element = shift is not None and shift.dim() == product.dim() > 1
        shift = shift.reshape(rows.shape) if by_element else shift  # type: ignore[union-attr]
        y = torch.empty_like(rows)
        # Operands of one dtype need no copies; others are widened a block at a time.
        for cut in _cuts(rows, whole=rows.dtype == scale.dtype):
            if shift is None:
                torch.mul(rows[cut], scale, out=y[cut])
            else:
                torch.addcmul(shift[cut] if by_element else shift, rows[cut], scale, out=y[cut])
        return y.view(product.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG004
        product, magnitudes, norms, inner, outer = inputs
        ctx.save_for_backward(product, magnitudes, norms, inner)
        ctx.outer = None if outer is None else (outer.dtype, outer.dim() == 1)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        product, magnitudes, norms, inner = ctx.saved_tensors
        needs, scale = ctx.needs_input_grad, magnitudes / norms
        rows, gs = product.reshape(-1, product.shape[-1]), g.reshape(-1, g.shape[-1])
        row = ctx.outer is not None and ctx.outer[1]
        sums = gs.sum(0, dtype=scale.dtype) if needs[3] or (needs[4] and row) else None
        d_inner = -(scale * sums).to(inner.dtype) if needs[3] else None  # type: ignore[operator]
        d_outer = (sums if row else g).to(ctx.outer[0]) if needs[4] else None  # type: ignore[union-attr]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # what is differentiated or traced itself
            d_product = (g * scale).to(product.dtype)
            terms = gs * (rows if inner is None else rows - inner)
            return d_product, (terms.sum(0) / norms).to(magnitudes.dtype), None, d_inner, d_outer
        d_product, total = _gradients(rows, gs, scale, inner, needs[0], needs[1])
        return (
            None if d_product is None else d_product.view(product.shape),
            (total / norms).to(magnitudes.dtype) if total is not None else None,
            None,
            d_inner,
            d_outer,
        )


def _gradients(
    rows: torch.Tensor, gs: torch.Tensor, scale: torch.Tensor, inner: torch.Tensor | None, first: bool, second: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of `scale * (rows - inner)`, from `gs`: `first` that of the rows, `second` the sums over rows for the scale."""
    d_rows, total = torch.empty_like(rows) if first else None, torch.zeros_like(scale) if second else None
    uniform = rows.dtype == gs.dtype and scale.dtype == torch.float32 and rows.is_contiguous()
    if uniform and (extension := extension_for(rows, gs)) is not None:
        shift = None if inner is None else inner.to(scale.dtype).contiguous()
        extension.rescaled_backward(
            rows.dtype == torch.bfloat16, rows.data_ptr(), gs.data_ptr(), gs.stride(0), scale.data_ptr(),
            *(0 if each is None else each.data_ptr() for each in (shift, d_rows, total)), *rows.shape,
            torch.get_num_threads(),
        )  # fmt: skip
        return d_rows, total
    cuts = _cuts(rows, whole=False)
    buffer = scale.new_empty(rows[: cuts[0].stop].shape if cuts else 0)
    ones = scale.new_ones(len(buffer))
    for cut in cuts:
        part = gs[cut]
        if d_rows is not None:
            torch.mul(part, scale, out=d_rows[cut])
        if total is not None:
            terms = buffer[: len(part)]
            if inner is None and part.dtype == rows.dtype == terms.dtype:
                torch.mul(rows[cut], part, out=terms)
            else:
                terms.copy_(rows[cut])
                (terms if inner is None else terms.sub_(inner)).mul_(part)
            total.addmv_(terms.mT, ones[: len(part)])  # faster than `sum(0)`
    return d_rows, total


def _cuts(rows: torch.Tensor, *, whole: bool) -> list[slice]:
    """Blocks of rows that stay in the cache, or one block."""
    height = len(rows) if whole else block_height(rows.device, rows.shape[1], _SCALE_BLOCK)
    return [slice(low, low + height) for low in range(0, len(rows), max(1, height))]
