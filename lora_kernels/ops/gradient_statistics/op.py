"""The gradient statistics, and the scaling of a gradient by its Fisher diagonal."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels._checks import FLOATS, WEIGHTS, check_tensor
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, normal, relative_error, with_parts
from lora_kernels.ops._rows import CHUNK, flat_rows, pack_rows, packed, row_parts, selection, single
from lora_kernels.ops.gradient_statistics import reference


def _by_parts(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
    cpp: bool = False,
) -> None:
    """The narrower operand is weighed, and BLAS multiplies what is in cache; squares are a pass of their own."""
    if gradient is not None and x is not None:
        selected, narrow = selection(weight), g.shape[1] <= x.shape[1]
        # Whole where they are read as they are.
        whole = cpp and selected.rows is None and selected.weight is None and g.dtype == x.dtype == gradient.dtype
        form: dict[str, Any] = {"cpp": cpp, "step": max(g.shape[0], 1) if whole else CHUNK, "plain": False}
        left = packed(g, selected, gradient.dtype, weighted=narrow, **form)
        right = packed(x, selected, gradient.dtype, weighted=not narrow, **form)
        for (*_, one), (*_, two) in zip(left, right, strict=True):
            gradient.addmm_(one.mT, two)
    if fisher is None:
        return
    if cpp:
        squares = None if fisher_weight is None else single(fisher_weight.reshape(-1))
        for part in row_parts(g, None):
            pack_rows(g, None, part, square_weight=squares, square_sum=fisher)
        return
    selected = selection(fisher_weight).to(fisher.dtype)
    for part, rows, _ in packed(g, selected, fisher.dtype, cpp=False):
        squares = rows.square()
        if selected.weight is not None:
            squares *= selected.weight[part].unsqueeze(-1)
        fisher += squares.sum(0)  # not a product with the weights: sum adds in pairs, BLAS one after the other


def _body(
    backend: Backend,
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
) -> None:
    if g.numel() == 0:
        return
    if x is not None and x.shape[-1] == 0:
        gradient, x, weight = None, None, None
    backend(gradient, fisher, flat_rows(g), None if x is None else flat_rows(x), weight, fisher_weight)


gradient_statistics = Op(
    "gradient_statistics_",
    _body,
    writes=("gradient", "fisher"),
    accumulates=True,
    backends=with_parts("gradient_statistics.kernel:both", _by_parts),
)


def gradient_statistics_(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    fisher_weight: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Add `sum_t w_t g_t x_t^T` to `gradient`, and `sum_t v_t g_t^2` to `fisher`.

    Rows of weight zero are never read into the respective result: they may hold anything. Gradients do not flow
    through. `fisher` alone is also the way to column sums of squares of anything.

    Args:
        gradient: `(m, n)` float32 (float64 on the torch backend), rows contiguous, or `None`.
        fisher: `(m,)` of gradient's dtype (float32 or float64), contiguous, or `None`; one of the two must be given.
        g: `(..., m)` float16, bfloat16 or float32 (float64 into float64): derivatives by a layer's output.
        x: `(..., n)`, given exactly when `gradient` is: the layer's input. Its dtype may differ from g's.
        weight: w, `(...)`: bool selects rows; real weights (of any sign) multiply; `None` counts every row once. In
            16-bit dtypes the Triton backend rounds `w x` to the dtype.
        fisher_weight: v, `(...)`, likewise.
        backend: `auto`, `triton`, `cpp` or `torch`.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, device or stride; if an input has no result that it is for, or the other way
            round.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    if gradient is None and fisher is None:
        raise ValueError("gradient and fisher are both None, but at least one must be given")
    for name, given, target, owner in (
        ("weight", weight, gradient, "gradient"),
        ("fisher_weight", fisher_weight, fisher, "fisher"),
        ("x", x, gradient, "gradient"),
    ):
        if given is not None and target is None:
            raise ValueError(f"{name} is given, but {owner}, which it is for, is None")
    if gradient is not None and x is None:
        raise ValueError("x is None, but must be given with gradient")
    check_tensor("g", g, form="(..., m)")
    if x is not None:
        check_tensor("x", x)
    leading, height = g.shape[:-1], g.shape[-1]
    wide = torch.float64 in (g.dtype, None if x is None else x.dtype)
    sums = (torch.float64,) if wide else FLOATS[2:]
    if gradient is not None and x is not None:
        check_tensor("x", x, shape=(*leading, None), device=g.device)
        size = (height, x.shape[-1])
        check_tensor("gradient", gradient, shape=size, dtypes=sums, device=g.device, contiguous="rows")
        sums = (gradient.dtype,)
    if fisher is not None:
        check_tensor("fisher", fisher, shape=(height,), dtypes=sums, device=g.device, contiguous="all")
    for name, rows in (("weight", weight), ("fisher_weight", fisher_weight)):
        if rows is not None:
            check_tensor(name, rows, shape=leading, dtypes=WEIGHTS, device=g.device)
    gradient_statistics(backend, gradient, fisher, g, x, weight, fisher_weight)


@gradient_statistics.self_test(terms=97)
def _example(device: torch.device) -> Example:
    g, x, weight = normal(device, (97, 70), (97, 33), (97,))
    gradient, fisher = torch.zeros(70, 33, device=device), torch.zeros(70, device=device)
    arguments = {"g": g, "x": x, "weight": weight, "fisher_weight": weight > 0}

    def error(_: None) -> float:
        truths = reference.weight_gradient(g, x, weight), reference.fisher_diagonal(g, weight > 0)
        return relative_error((gradient, fisher), truths)

    return {"gradient": gradient, "fisher": fisher, **arguments}, error
