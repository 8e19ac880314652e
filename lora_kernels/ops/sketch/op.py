"""The sketch ops: checks, registration and the choice of backend."""

from __future__ import annotations

import contextlib

import torch

from lora_kernels.ops._backend import Backend, Dispatcher, cpp_refuses, triton_refuses
from lora_kernels.ops._checks import FLOATS, WEIGHTS, check_choice, check_range, check_tensor, check_written
from lora_kernels.ops._rows import CPP_DTYPES, pack_rows, selection
from lora_kernels.ops.random_matrix import reference as random_reference
from lora_kernels.ops.random_matrix.op import check_key, draw_cpp
from lora_kernels.ops.random_matrix.reference import KINDS

# Rows handled at a time on the CPU, and the bytes of their float32 copy: the second product finds it in the cache.
_CHUNK, _CHUNK_BYTES = 2048, 2**23


def _check(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
) -> None:
    check_tensor("left", left)
    if left.dim() < 1:
        raise ValueError("left has shape (), but must be (..., p)")
    wide = left.dtype == torch.float64
    check_tensor("right", right, dtypes=FLOATS[3:] if wide else FLOATS[:3], device=left.device)
    if right.dim() < 1 or right.shape[:-1] != left.shape[:-1]:
        expected = ", ".join(map(str, (*left.shape[:-1], "*")))
        raise ValueError(f"right has shape {tuple(right.shape)}, but must have shape ({expected}), as left has")
    check_tensor(
        "out", out, shape=(left.shape[-1], None), dtypes=FLOATS[3:] if wide else FLOATS[2:3], device=left.device
    )
    if out.shape[1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out has strides {out.stride()}, but its rows must be contiguous")
    if weight is not None:
        check_tensor("weight", weight, shape=left.shape[:-1], dtypes=WEIGHTS, device=left.device)
    if column_sum is not None:
        check_tensor("column_sum", column_sum, shape=(left.shape[-1],), dtypes=(out.dtype,), device=left.device)
        if not column_sum.is_contiguous():
            raise ValueError(f"column_sum has strides {column_sum.stride()}, but must be contiguous")


def _narrow_only(*tensors: torch.Tensor) -> str | None:
    wide = any(each.dtype not in CPP_DTYPES for each in tensors)
    return "takes no torch.float64" if wide else None


def _triton_refuses(a: torch.Tensor, *_: object) -> str | None:
    return triton_refuses(a.device) or _narrow_only(a)


def _cpp_refuses(a: torch.Tensor, *_: object) -> str | None:
    return cpp_refuses(a.device) or _narrow_only(a)


def _on_cpu(a: torch.Tensor, *_: object) -> bool:
    return a.device.type == "cpu"


_IMPLEMENTATIONS = (
    Backend("triton", _triton_refuses, slower=_on_cpu),
    Backend("cpp", _cpp_refuses),
    Backend("torch", lambda *_: None),
)
dispatcher = Dispatcher("sketch_", _IMPLEMENTATIONS)
project_dispatcher = Dispatcher("project", _IMPLEMENTATIONS)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two arguments are one tensor, so that its rows are read (and widened) once."""
    return (
        left.data_ptr() == right.data_ptr()
        and left.dtype == right.dtype
        and left.shape == right.shape
        and left.stride() == right.stride()
    )


def _flat(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: there may be no features
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _draw(x: torch.Tensor, k: int, dtype: torch.dtype, kind: str, seed: int, stream: int) -> torch.Tensor:
    made = random_reference.random_matrix(x.shape[-1], k, kind, seed=seed, stream=stream, dtype=dtype)
    return made.to(x.device)


def _chunk_for(tokens: int, *tensors: torch.Tensor) -> int:
    if tensors[0].device.type != "cpu":
        return max(tokens, 1)
    widest = max(each.shape[1] for each in tensors)
    return max(min(_CHUNK, _CHUNK_BYTES // (4 * max(widest, 1))), 256)


def _run_torch(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    omega: torch.Tensor,
) -> None:
    tokens = left.shape[0] if index is None else index.shape[0]
    chunk = _chunk_for(tokens, left, right)
    for low in range(0, tokens, chunk):
        part = slice(low, min(low + chunk, tokens))
        picked = part if index is None else index[part]
        two = right[picked].to(out.dtype)
        one = two if left is right else left[picked].to(out.dtype)
        weights = None if weight is None else weight[part].to(out.dtype).unsqueeze(-1)
        p = two @ omega
        out.addmm_(one.mT, p if weights is None else p * weights)
        if column_sum is not None:
            column_sum += (one if weights is None else one * weights).sum(0)


def _pack(
    x: torch.Tensor,
    low: int,
    count: int,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    panel: torch.Tensor | None,
    column_sum: torch.Tensor | None,
) -> torch.Tensor:
    """Rows `low` on of the selection in float32, in `panel` unless they already are so, and their weighted sum."""
    if panel is not None or column_sum is not None:
        pack_rows(x, index, low, count, weight=weight, panel=panel, column_sum=column_sum)
    return x[low : low + count] if panel is None else panel[:count]


def _panel(x: torch.Tensor, rows: int, index: torch.Tensor | None) -> torch.Tensor | None:
    direct = index is None and x.dtype == torch.float32
    return None if direct else torch.empty(rows, x.shape[1], dtype=torch.float32)


def _run_cpp(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    omega: torch.Tensor,
) -> None:
    """One pass selects, widens and sums a chunk of rows; BLAS multiplies what it leaves in cache. P is weighed."""
    tokens = left.shape[0] if index is None else index.shape[0]
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    rows = min(_chunk_for(tokens, left, right), tokens)
    left_panel = _panel(left, rows, index)
    right_panel = left_panel if left is right else _panel(right, rows, index)
    p = torch.empty(rows, out.shape[1], dtype=torch.float32)
    for low in range(0, tokens, rows):
        count = min(rows, tokens - low)
        one = _pack(left, low, count, index, weight, left_panel, column_sum)
        two = one if left is right else _pack(right, low, count, index, None, right_panel, None)
        part = torch.mm(two, omega, out=p[:count])
        if weight is not None:
            part *= weight[low : low + count].unsqueeze(-1)
        out.addmm_(one.mT, part)


@torch.library.custom_op("lora_kernels::sketch_", mutates_args=("out", "column_sum"))
def _sketch(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    kind: str,
    seed: int,
    stream: int,
    backend: str,
) -> None:
    if left.numel() == 0:
        return
    one = _flat(left)
    two = one if _same(left, right) else _flat(right)
    index, weights = selection(weight)
    if backend == "torch":
        omega = _draw(two, out.shape[1], out.dtype, kind, seed, stream)
        _run_torch(out, one, two, index, weights, column_sum, omega)
    elif backend == "cpp":
        if index is None or index.numel():
            omega = draw_cpp(two.shape[1], out.shape[1], kind, seed, stream)
            _run_cpp(out, one, two, index, weights, column_sum, omega)
    else:
        # Imported here: without Triton the other backends still work.
        from lora_kernels.ops.sketch import _launch  # noqa: PLC0415

        weights = None if weights is None else weights.to(torch.float32)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(left.device) if left.is_cuda else contextlib.nullcontext():
            _launch.sketch(out, one, two, index, weights, column_sum, kind=kind, seed=seed, stream=stream)


@_sketch.register_fake
def _(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    kind: str,
    seed: int,
    stream: int,
    backend: str,
) -> None:
    _check(out, left, right, weight, column_sum)


def sketch_(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    seed: int,
    stream: int = 0,
    kind: str = "rademacher",
    column_sum: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Add `sum_t w_t left_t (right_t^T Omega)` to `out`, and `sum_t w_t left_t` to `column_sum`.

    With `left` and `right` the same tensor x this is the sketch `M Omega` of the second moment
    `M = sum_t w_t x_t x_t^T`;
    with gradients g on the left and inputs x on the right, that of the weight gradient, `G Omega`; with roles
    exchanged, of its transpose. Neither M nor G is formed (Halko, Martinsson and Tropp, SIAM Review 53, 2011).

    `Omega` is `random_matrix(q, k, kind=kind, seed=seed, stream=stream)`, not scaled: E[Omega Omega^T] = k I. It is
    made anew by every call, so sums over batches and processes agree if their keys do. Rows of weight zero are never
    read into the result: they may hold anything. Gradients do not flow through.

    Args:
        out: `(p, k)` float32 (float64 on the torch backend), rows contiguous; accumulates.
        left: `(..., p)` float16, bfloat16 or float32 (float64 into float64).
        right: `(..., q)` of such a dtype; may be the same tensor as `left`, which is then read once.
        weight: `(...)`: bool selects rows; real weights (of any sign) multiply; `None` counts every row once.
        seed: 64-bit key of Omega, signed or unsigned.
        stream: which matrix (a layer, say), in [0, 2^32).
        kind: `rademacher` (the cheaper) or `gaussian`.
        column_sum: `(p,)` of out's dtype, or `None`.
        backend: `auto`, `triton`, `cpp` or `torch`.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, device, stride, key or kind.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    _check(out, left, right, weight, column_sum)
    check_written("out", out, left=left, right=right, weight=weight, column_sum=column_sum)
    if column_sum is not None:
        check_written("column_sum", column_sum, left=left, right=right, weight=weight)
    check_choice("kind", kind, KINDS)
    key = check_key(seed, stream)
    chosen = dispatcher.choose(backend, left)
    one = left.detach()
    two = one if left is right else right.detach()
    _sketch(out, one, two, None if weight is None else weight.detach(), column_sum, kind, key, stream, chosen)


@torch.library.custom_op("lora_kernels::project", mutates_args=())
def _project(a: torch.Tensor, k: int, kind: str, seed: int, stream: int, backend: str) -> torch.Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    shape = (*a.shape[:-1], k)
    if a.numel() == 0 or k == 0:
        return torch.zeros(shape, dtype=dtype, device=a.device)
    rows = _flat(a)
    if backend == "triton":
        # Imported here: without Triton the other backends still work.
        from lora_kernels.ops.sketch import _launch  # noqa: PLC0415

        out = torch.empty(rows.shape[0], k, dtype=dtype, device=a.device)
        with torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext():
            _launch.project(out, rows, kind=kind, seed=seed, stream=stream)
        return out.reshape(shape)
    cpp = backend == "cpp"
    omega = draw_cpp(rows.shape[1], k, kind, seed, stream) if cpp else _draw(rows, k, dtype, kind, seed, stream)
    if rows.dtype == dtype:
        return (rows @ omega).reshape(shape)
    out = torch.empty(rows.shape[0], k, dtype=dtype, device=a.device)
    chunk = min(_chunk_for(rows.shape[0], rows), rows.shape[0])
    panel = _panel(rows, chunk, None) if cpp else None
    for low in range(0, rows.shape[0], chunk):
        part = out[low : low + chunk]
        wide = _pack(rows, low, part.shape[0], None, None, panel, None) if cpp else rows[low : low + chunk].to(dtype)
        torch.mm(wide, omega, out=part)
    return out.reshape(shape)


@_project.register_fake
def _(a: torch.Tensor, k: int, kind: str, seed: int, stream: int, backend: str) -> torch.Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((*a.shape[:-1], k), dtype=dtype)


def project(
    a: torch.Tensor,
    k: int,
    *,
    seed: int,
    stream: int = 0,
    kind: str = "rademacher",
    backend: str = "auto",
) -> torch.Tensor:
    """`a @ Omega`, without Omega: the Omega of `sketch_` for the same key. Not differentiable.

    Args:
        a: `(..., q)` float16, bfloat16, float32 or float64.
        k: number of columns of Omega, `(q, k)`.
        seed: 64-bit key of Omega, signed or unsigned.
        stream: which matrix, in [0, 2^32).
        kind: `rademacher` or `gaussian`.
        backend: `auto`, `triton`, `cpp` or `torch` (the only one for float64).

    Returns:
        `(..., k)` float32, or float64 for float64.

    Raises:
        TypeError: on a wrong type.
        ValueError: on a wrong shape, key or kind.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    check_tensor("a", a)
    if a.dim() < 1:
        raise ValueError("a has shape (), but must be (..., q)")
    check_range("k", k, low=0, high=2**31 - 1, integer=True)
    check_choice("kind", kind, KINDS)
    key = check_key(seed, stream)
    chosen = project_dispatcher.choose(backend, a)
    projected: torch.Tensor = _project(a.detach(), k, kind, key, stream, chosen)
    return projected
