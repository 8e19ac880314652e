"""The gradient statistics op: checks, registration and the choice of backend."""

from __future__ import annotations

import contextlib

import torch

from lora_kernels.ops._backend import Backend, Dispatcher, cpp_refuses, triton_refuses
from lora_kernels.ops._checks import FLOATS, check_tensor, check_written
from lora_kernels.ops._rows import CHUNK, CPP_DTYPES, pack_rows, selection

_WEIGHTS = (torch.bool, *FLOATS)


def _check(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
) -> None:
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
    check_tensor("g", g)
    if x is not None:
        check_tensor("x", x)
    if g.dim() < 1:
        raise ValueError("g has shape (), but must be (..., m)")
    leading, height = g.shape[:-1], g.shape[-1]
    wide = torch.float64 in (g.dtype, None if x is None else x.dtype)
    sums = (torch.float64,) if wide else FLOATS[2:]
    if gradient is not None and x is not None:
        check_tensor("x", x, shape=(*leading, None), device=g.device)
        check_tensor("gradient", gradient, shape=(height, x.shape[-1]), dtypes=sums, device=g.device)
        if gradient.shape[1] > 1 and gradient.stride(-1) != 1:
            raise ValueError(f"gradient has strides {gradient.stride()}, but its rows must be contiguous")
        sums = (gradient.dtype,)
    if fisher is not None:
        check_tensor("fisher", fisher, shape=(height,), dtypes=sums, device=g.device)
        if not fisher.is_contiguous():
            raise ValueError(f"fisher has strides {fisher.stride()}, but must be contiguous")
    for name, each in (("weight", weight), ("fisher_weight", fisher_weight)):
        if each is not None:
            check_tensor(name, each, shape=leading, dtypes=_WEIGHTS, device=g.device)


def _narrow_only(
    gradient: torch.Tensor | None, fisher: torch.Tensor | None, g: torch.Tensor, x: torch.Tensor | None
) -> str | None:
    for out in (gradient, fisher):
        for rows in (g, x):
            if out is not None and rows is not None and (out.dtype != torch.float32 or rows.dtype not in CPP_DTYPES):
                return f"takes no {rows.dtype} into {out.dtype}"
    return None


def _triton_refuses(
    gradient: torch.Tensor | None, fisher: torch.Tensor | None, g: torch.Tensor, x: torch.Tensor | None, *_: object
) -> str | None:
    return triton_refuses(g.device) or _narrow_only(gradient, fisher, g, x)


def _cpp_refuses(
    gradient: torch.Tensor | None, fisher: torch.Tensor | None, g: torch.Tensor, x: torch.Tensor | None, *_: object
) -> str | None:
    return cpp_refuses(g.device) or _narrow_only(gradient, fisher, g, x)


def _on_cpu(_gradient: object, _fisher: object, g: torch.Tensor, *_: object) -> bool:
    return g.device.type == "cpu"


dispatcher = Dispatcher(
    "gradient_statistics_",
    (
        Backend("triton", _triton_refuses, slower=_on_cpu),
        Backend("cpp", _cpp_refuses),
        Backend("torch", lambda *_: None),
    ),
)


def _parts(tokens: int, device: torch.device) -> list[tuple[int, int]]:
    step = CHUNK if device.type == "cpu" else max(tokens, 1)
    return [(low, min(step, tokens - low)) for low in range(0, tokens, step)]


def _taken(rows: torch.Tensor, index: torch.Tensor | None, low: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    part = slice(low, low + count)
    return (rows[part] if index is None else rows[index[part]]).to(dtype)


def _run_torch(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
) -> None:
    if gradient is not None and x is not None:
        index, factor = selection(weight)
        factor = None if factor is None else factor.to(gradient.dtype).unsqueeze(-1)
        for low, count in _parts(g.shape[0] if index is None else index.shape[0], g.device):
            left, right = (_taken(rows, index, low, count, gradient.dtype) for rows in (g, x))
            if factor is not None and g.shape[1] <= x.shape[1]:
                left = left * factor[low : low + count]
            elif factor is not None:
                right = right * factor[low : low + count]
            gradient.addmm_(left.mT, right)
    if fisher is not None:
        index, factor = selection(fisher_weight)
        for low, count in _parts(g.shape[0] if index is None else index.shape[0], g.device):
            squares = _taken(g, index, low, count, fisher.dtype).square()
            if factor is not None:
                squares *= factor[low : low + count].to(fisher.dtype).unsqueeze(-1)
            fisher += squares.sum(0)  # not a product with the weights: sum adds in pairs, BLAS one after the other


def _fisher_places(
    index: torch.Tensor | None, weight: torch.Tensor | None, fisher_weight: torch.Tensor | None
) -> tuple[bool, torch.Tensor | None]:
    """Whether the rows that the gradient takes are all that the Fisher needs, and the Fisher's weights of these."""
    if fisher_weight is None:
        return index is None, None
    flat = fisher_weight.reshape(-1)
    if index is None or weight is None:
        return True, flat
    same = weight.data_ptr() == fisher_weight.data_ptr() and weight.stride() == fisher_weight.stride()
    # Most often the Fisher's rows are some of the gradient's; if not, a pass of their own is cheaper than a union.
    if not (same and weight.dtype == fisher_weight.dtype) and bool(((weight.reshape(-1) == 0) & (flat != 0)).any()):
        return False, None
    return True, flat[index]


def _narrow(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.to(torch.float32).contiguous()


def _square_sum(fisher: torch.Tensor, g: torch.Tensor, fisher_weight: torch.Tensor | None) -> None:
    weight = None if fisher_weight is None else _narrow(fisher_weight.reshape(-1))
    for low, count in _parts(g.shape[0], g.device):
        pack_rows(g, None, low, count, square_weight=weight, square_sum=fisher)


def _run_cpp(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
) -> None:
    """One pass selects, widens, weighs and squares a chunk of rows; BLAS multiplies what it leaves in cache."""
    if gradient is None or x is None:
        if fisher is not None:
            _square_sum(fisher, g, fisher_weight)
        return
    index, factor = selection(weight)
    factor, squared = _narrow(factor), None
    if fisher is not None:
        together, squared = _fisher_places(index, weight, fisher_weight)
        if not together:
            _square_sum(fisher, g, fisher_weight)
            fisher = None
    squared = _narrow(squared)
    tokens = g.shape[0] if index is None else index.shape[0]
    if fisher is None and index is None and factor is None and g.dtype == x.dtype == torch.float32:
        gradient.addmm_(g.mT, x)
        return
    # The narrower operand is weighed. What is float32 and taken as it is needs no copy.
    weighs_g = g.shape[1] <= x.shape[1]
    weights = (factor if weighs_g else None, None if weighs_g else factor)
    copies = [
        None
        if index is None and each is None and rows.dtype == torch.float32
        else torch.empty(min(CHUNK, tokens), rows.shape[1], dtype=torch.float32)
        for rows, each in zip((g, x), weights, strict=True)
    ]
    for low, count in _parts(tokens, g.device):
        operands = []
        for rows, each, copy, total in zip((g, x), weights, copies, (fisher, None), strict=True):
            if copy is not None or total is not None:
                pack_rows(
                    rows, index, low, count, weight=each,
                    panel=copy if each is None else None, weighted=None if each is None else copy,
                    square_weight=None if total is None else squared, square_sum=total,
                )  # fmt: skip
            operands.append(rows[low : low + count] if copy is None else copy[:count])
        gradient.addmm_(operands[0].mT, operands[1])


def _run_triton(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
) -> None:
    # Imported here: without Triton the other backends still work.
    from lora_kernels.ops.gradient_statistics import kernel  # noqa: PLC0415

    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(g.device) if g.is_cuda else contextlib.nullcontext():
        if gradient is not None and x is not None:
            index, factor = selection(weight)
            kernel.gradient_statistics(gradient, g, x, index, _narrow(factor))
        if fisher is not None:
            # The kernel skips rows of weight zero by itself: counting them would stall the device.
            kernel.square_sums(fisher, g, None if fisher_weight is None else _narrow(fisher_weight.reshape(-1)))


def _flat(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.reshape(-1, rows.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("lora_kernels::gradient_statistics_", mutates_args=("gradient", "fisher"))
def _gradient_statistics(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
    backend: str,
) -> None:
    tokens = g.shape[:-1].numel()
    if tokens == 0 or g.shape[-1] == 0:
        return
    if x is not None and x.shape[-1] == 0:
        gradient, x, weight = None, None, None
    runs = {"torch": _run_torch, "cpp": _run_cpp, "triton": _run_triton}
    runs[backend](gradient, fisher, _flat(g), None if x is None else _flat(x), weight, fisher_weight)


@_gradient_statistics.register_fake
def _(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
    backend: str,
) -> None:
    _check(gradient, fisher, g, x, weight, fisher_weight)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


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
    """Add `sum_t w_t g_t x_t^T` to `gradient`, and `sum_t v_t g_t^2` to `fisher`, in one pass over g.

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
    _check(gradient, fisher, g, x, weight, fisher_weight)
    inputs = {"g": g, "x": x, "weight": weight, "fisher_weight": fisher_weight}
    for name, each, more in (("gradient", gradient, {"fisher": fisher}), ("fisher", fisher, {})):
        if each is not None:
            check_written(name, each, **inputs, **more)
    chosen = dispatcher.choose(backend, gradient, fisher, g, x)
    detached = (g.detach(), _detached(x), _detached(weight), _detached(fisher_weight))
    _gradient_statistics(gradient, fisher, *detached, chosen)
