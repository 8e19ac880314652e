"""The sketch ops."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels._checks import FLOATS, WEIGHTS, check_choice, check_range, check_tensor
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, normal, relative_error, with_parts
from lora_kernels.ops._rows import ALL, Selection, flat_rows, packed, selection
from lora_kernels.ops.random_matrix import reference as random_reference
from lora_kernels.ops.random_matrix.op import check_key, draw_cpp
from lora_kernels.ops.random_matrix.reference import KINDS, Omega
from lora_kernels.ops.sketch import reference

# Rows handled at a time on the CPU, and the bytes of their float32 copy: the second product finds it in the cache.
_CHUNK, _CHUNK_BYTES = 2048, 2**23


def _draw(x: torch.Tensor, out: torch.Tensor, omega: Omega, cpp: bool) -> torch.Tensor:
    if cpp:
        return draw_cpp(torch.empty(x.shape[1], out.shape[1]), *omega)
    return random_reference.random_matrix(x.shape[1], out.shape[1], *omega, dtype=out.dtype).to(x.device)


def _chunk_for(*tensors: torch.Tensor) -> int:
    widest = max(tensor.shape[1] for tensor in tensors)
    return max(min(_CHUNK, _CHUNK_BYTES // (4 * max(widest, 1))), 256)


def _by_parts(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    selected: Selection,
    column_sum: torch.Tensor | None,
    omega: Omega,
    cpp: bool = False,
) -> None:
    """The narrow P is weighed, not the rows; BLAS multiplies what is in the cache."""
    drawn, selected = _draw(right, out, omega, cpp), selected.to(out.dtype)
    step = _chunk_for(left, right)
    others = packed(right, selected, out.dtype, cpp=cpp, step=step)
    for part, one, _ in packed(left, selected, out.dtype, cpp=cpp, step=step, column_sum=column_sum):
        p = (one if left is right else next(others)[1]) @ drawn
        if selected.weight is not None:
            p *= selected.weight[part].unsqueeze(-1)
        out.addmm_(one.mT, p)


def _body(
    backend: Backend,
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    kind: str,
    seed: int,
    stream: int,
) -> None:
    if left.numel() == 0:
        return
    one = flat_rows(left)
    first, second = ((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (left, right))
    two = one if first == second else flat_rows(right)  # the rows of one tensor are read (and widened) once
    backend(out, one, two, selection(weight), column_sum, Omega(kind, seed, stream))


sketch = Op(
    "sketch_",
    _body,
    writes=("out", "column_sum"),
    accumulates=True,
    backends=with_parts("sketch.kernel:sketch", _by_parts),
)


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
    drawn anew by every call, so sums over batches and processes agree if their keys do. Rows of weight zero are never
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
    check_tensor("left", left, form="(..., p)")
    wide = left.dtype == torch.float64
    check_tensor("right", right, dtypes=FLOATS[3:] if wide else FLOATS[:3], device=left.device)
    if right.dim() < 1 or right.shape[:-1] != left.shape[:-1]:
        expected = ", ".join(map(str, (*left.shape[:-1], "*")))
        raise ValueError(f"right has shape {tuple(right.shape)}, but must have shape ({expected}), as left has")
    sums = FLOATS[3:] if wide else FLOATS[2:3]
    check_tensor("out", out, shape=(left.shape[-1], None), dtypes=sums, device=left.device, contiguous="rows")
    if weight is not None:
        check_tensor("weight", weight, shape=left.shape[:-1], dtypes=WEIGHTS, device=left.device)
    if column_sum is not None:
        size = left.shape[-1:]
        check_tensor("column_sum", column_sum, shape=size, dtypes=sums, device=left.device, contiguous="all")
    check_choice("kind", kind, KINDS)
    sketch(backend, out, left, right, weight, column_sum, kind, check_key(seed, stream), stream)


@sketch.self_test(terms=97 + 33)
def _example(device: torch.device) -> Example:
    left, right, weight = normal(device, (97, 70), (97, 33), (97,))
    out, total = torch.zeros(70, 20, device=device), torch.zeros(70, device=device)
    arguments = {"out": out, "left": left, "right": right, "weight": weight, "column_sum": total, "seed": 1}
    truths = reference.sketch(left, right, 20, weight, seed=1)
    return arguments, lambda _: relative_error((out, total), truths)


def _project(out: torch.Tensor, rows: torch.Tensor, omega: Omega, cpp: bool = False) -> None:
    drawn = _draw(rows, out, omega, cpp)
    step = rows.shape[0] if rows.dtype == out.dtype else _chunk_for(rows)
    for part, wide, _ in packed(rows, ALL, out.dtype, cpp=cpp, step=step):
        torch.mm(wide, drawn, out=out[part])


def _project_body(backend: Backend, out: torch.Tensor, a: torch.Tensor, kind: str, seed: int, stream: int) -> None:
    if a.numel() == 0 or out.numel() == 0:
        out.zero_()
        return
    rows = flat_rows(a)
    backend(out.view(rows.shape[0], out.shape[-1]), rows, Omega(kind, seed, stream))


projection = Op("project", _project_body, writes=("out",), backends=with_parts("sketch.kernel:project", _project))


def project(
    a: torch.Tensor, k: int, *, seed: int, stream: int = 0, kind: str = "rademacher", backend: str = "auto"
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
    check_tensor("a", a, form="(..., q)")
    check_range("k", k, low=0, high=2**31 - 1, integer=True)
    check_choice("kind", kind, KINDS)
    key = check_key(seed, stream)
    out = a.new_empty((*a.shape[:-1], k), dtype=torch.promote_types(a.dtype, torch.float32))
    projection(backend, out, a, kind, key, stream)
    return out


@projection.self_test(terms=70)
def _projected(device: torch.device) -> Example:
    (a,) = normal(device, (97, 70))
    arguments: dict[str, Any] = {"a": a, "k": 20, "kind": "gaussian", "seed": 1, "stream": 2}
    return arguments, lambda result: relative_error([result], [reference.project(**arguments)])
