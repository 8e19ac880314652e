"""The covariance op."""

from __future__ import annotations

import torch

from lora_kernels._checks import FLOATS, WEIGHTS, check_tensor, check_written
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, normal, relative_error, with_parts
from lora_kernels.ops._rows import Selection, flat_rows, packed, selection
from lora_kernels.ops.covariance import reference

# Block rows: only columns left of a block's end are computed, so the waste is one block in n. Below about 128 the
# matrix product itself slows down (2 cores, 2048 x 1376: full 36.9 ms, blocks of 128 23.6 ms, the floor is 18.5).
_CPU_BLOCK = 128
_GPU_BLOCK = 1024


def _by_blocks(
    out: torch.Tensor, x: torch.Tensor, selected: Selection, column_sum: torch.Tensor | None, cpp: bool = False
) -> None:
    block = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    for _, rows, weighted in packed(x, selected, out.dtype, cpp=cpp, weighted=True, column_sum=column_sum):
        for low in range(0, out.shape[0], block):
            high = min(low + block, out.shape[0])
            out[low:high, :high].addmm_(weighted[:, low:high].mT, rows[:, :high])


def _body(
    backend: Backend, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, column_sum: torch.Tensor | None
) -> None:
    if x.numel() > 0:
        backend(out, flat_rows(x), selection(weight), column_sum)


covariance = Op(
    "covariance_",
    _body,
    writes=("out", "column_sum"),
    accumulates=True,
    backends=with_parts("covariance.kernel:covariance", _by_blocks),
)


def covariance_(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Add `sum_t w_t x_t x_t^T` to the lower triangle of `out`, and `sum_t w_t x_t` to `column_sum`.

    Rows of weight zero are never read into the result: they may hold anything. Gradients do not flow through.

    Args:
        out: `(n, n)` float32 (float64 on the torch backend), rows contiguous. Its lower triangle, diagonal included,
            accumulates; the strict upper triangle is unspecified afterwards. See `symmetrize_`.
        x: `(..., n)` float16, bfloat16 or float32 (float64 into float64).
        weight: `(...)`: bool selects rows; real weights (of any sign) multiply; `None` counts every row once.
        column_sum: `(n,)` of out's dtype, or `None`.
        backend: `auto`, `triton`, `cpp` or `torch`.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, device or stride.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    check_tensor("x", x, form="(..., n)")
    features = x.shape[-1]
    sums = FLOATS[3:] if x.dtype == torch.float64 else FLOATS[2:]
    check_tensor("out", out, shape=(features, features), dtypes=sums, device=x.device, contiguous="rows")
    if weight is not None:
        check_tensor("weight", weight, shape=x.shape[:-1], dtypes=WEIGHTS, device=x.device)
    if column_sum is not None:
        kind = (out.dtype,)
        check_tensor("column_sum", column_sum, shape=(features,), dtypes=kind, device=x.device, contiguous="all")
    covariance(backend, out, x, weight, column_sum)


@covariance.self_test(terms=97)
def _example(device: torch.device) -> Example:
    (x,), out = normal(device, (97, 70)), torch.zeros(70, 70, device=device)
    return {"out": out, "x": x}, lambda _: relative_error([out.tril()], [reference.covariance(x)[0].tril()])


def symmetrize_(matrix: torch.Tensor) -> torch.Tensor:
    """Mirror the lower triangle into the upper one, in place, without a second matrix.

    Args:
        matrix: `(n, n)`; what its strict upper triangle holds does not matter.

    Returns:
        The same tensor.

    Raises:
        TypeError: if it is no tensor of floats.
        ValueError: if it is not a square matrix, or its elements share memory.
    """
    check_tensor("matrix", matrix, shape=(None, None))
    check_written("matrix", matrix)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}, but must be square")
    for low in range(0, matrix.shape[0], _GPU_BLOCK):
        high = min(low + _GPU_BLOCK, matrix.shape[0])
        diagonal = matrix[low:high, low:high].tril()
        matrix[low:high, low:high] = diagonal + diagonal.tril(-1).mT
        matrix[:low, low:high] = matrix[low:high, :low].mT
    return matrix
