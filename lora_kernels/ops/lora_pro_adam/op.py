"""The LoRA-Pro Adam op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_kernels._checks import check_number, check_range, check_tensor, check_written, repr_short
from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Backend, provider
from lora_kernels.ops._op import (
    Example,
    Op,
    is_plain,
    isolated,
    no_float64,
    normal,
    on_cpp,
    on_torch,
    on_triton,
    relative_error,
)
from lora_kernels.ops._philox import seed_tensor
from lora_kernels.ops._tiles import int64_on
from lora_kernels.ops.lora_pro_adam.config import RANKS, Adam
from lora_kernels.ops.lora_pro_adam.reference import FIRST_MOMENT, SECOND_MOMENT, lora_pro_adam, stochastic_round

STATES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # dtypes of the moments, and their codes in csrc
# Elements that the torch backend handles at a time: a share of the matrix, so that temporaries are small beside it.
_SHARE, _LEAST, _CPU_MOST, _GPU_MOST = 64, 2**14, 2**18, 2**24


def _check(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
) -> None:
    many = isinstance(exp_avg, torch.Tensor) and exp_avg.dim() == 3
    check_tensor("exp_avg", exp_avg, shape=(None,) * (3 if many else 2), dtypes=tuple(STATES))
    where, (*batch, rows, columns) = exp_avg.device, exp_avg.shape
    check_tensor("exp_avg_sq", exp_avg_sq, shape=(*batch, rows, columns), dtypes=(exp_avg.dtype,), device=where)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.numel() > 1 and (moment.stride(-1) != 1 or (rows > 1 and moment.stride(-2) < columns)):
            raise ValueError(f"{name} has strides {moment.stride()}, but its rows must be contiguous and apart")
    check_tensor("a", a, shape=(*batch, None, columns), device=where)
    rank = a.shape[-2]
    if rank == 0:
        raise ValueError(f"a has shape {tuple(a.shape)}, but must have at least one row")
    check_tensor("b", b, shape=(*batch, rows, rank), device=where)
    check_tensor("grad_a", grad_a, shape=(*batch, rank, columns), device=where)
    check_tensor("grad_b", grad_b, shape=(*batch, rows, rank), device=where)


def _triton_takes(exp_avg: torch.Tensor, _exp_avg_sq: object, a: torch.Tensor, *_: object) -> str | None:
    if exp_avg.stride(-2) >= 2**31:
        return "takes rows that are less than 2^31 elements apart"
    ranks = None if a.shape[-2] <= RANKS[-1] else f"takes ranks up to {RANKS[-1]}, not {a.shape[-2]}"
    return no_float64(exp_avg) or ranks


def _run_torch(
    moments: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[torch.Tensor, ...],
    numbers: Adam,
    seed: torch.Tensor | None,
    bt_h: torch.Tensor,
    h_at: torch.Tensor,
) -> None:
    """By blocks of rows of all matrices, whose gradient and direction are all that is ever stored."""
    wide, device, (batch, rows, columns) = bt_h.dtype, bt_h.device, moments[0].shape
    a, b, grad_a, grad_b = (factor.to(wide) for factor in factors)
    most = _CPU_MOST if device.type == "cpu" else _GPU_MOST
    block = max(1, min(max(moments[0].numel() // _SHARE, _LEAST), most) // (batch * columns))
    seed = None if seed is None else seed.to(device)
    bt_h.zero_()
    for low in range(0, rows, block):
        part = slice(low, min(low + block, rows))
        e = torch.bmm(b[:, part], grad_a).baddbmm_(grad_b[:, part], a).mul_(numbers.scaling)
        # A view where the moments are of the dtype of the arithmetic: then they are updated in place.
        avg, square = (moment[:, part].to(wide) for moment in moments)
        avg.mul_(numbers.beta1).add_(e, alpha=1 - numbers.beta1)
        square.mul_(numbers.beta2).addcmul_(e, e, value=1 - numbers.beta2)
        if seed is not None:
            for state, value, stream in zip(moments, (avg, square), (FIRST_MOMENT, SECOND_MOMENT), strict=True):
                for matrix in range(batch):
                    first = numbers.row_offset + matrix * numbers.row_step + low
                    state[matrix, part] = stochastic_round(
                        value[matrix], seed=seed, stream=stream, step=numbers.step, first_row=first
                    )
        root = torch.sqrt(square, out=e).mul_(numbers.root_factor).add_(numbers.eps)
        h = torch.mul(avg, numbers.avg_factor).div_(root)
        bt_h.baddbmm_(b[:, part].mT, h, alpha=numbers.scaling)
        h_at[:, part].baddbmm_(h, a.mT, beta=0, alpha=numbers.scaling)


def _run_cpp(
    moments: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[torch.Tensor, ...],
    numbers: Adam,
    seed: torch.Tensor | None,
    bt_h: torch.Tensor,
    h_at: torch.Tensor,
) -> None:
    wide = [factor.to(bt_h.dtype) for factor in factors]
    a, b, grad_a, grad_b = (factor if factor.stride(2) == 1 else factor.contiguous() for factor in wide)
    operands = (*moments, a, grad_a, b, grad_b)
    places = [(operand.data_ptr(), operand.stride(1)) for operand in operands]
    _ext.extension().lora_pro_adam(
        *places[0], *places[1], STATES[moments[0].dtype], *places[2], *places[3], *places[4], *places[5],
        bt_h.data_ptr(), h_at.data_ptr(), *moments[0].shape[1:], a.shape[1],
        numbers.scaling, numbers.beta1, numbers.beta2, numbers.eps, numbers.avg_factor, numbers.root_factor,
        0 if seed is None else int(seed) & (2**64 - 1), numbers.step, numbers.row_offset,
        len(a), [operand.stride(0) for operand in operands], numbers.row_step, torch.get_num_threads(),
    )  # fmt: skip


def _body(
    backend: Backend,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    bt_h: torch.Tensor,
    h_at: torch.Tensor,
    scaling: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    seed: torch.Tensor | None,
    row_offset: int,
    row_step: int,
) -> None:
    if exp_avg.numel() == 0:
        bt_h.zero_()
        h_at.zero_()
        return
    tensors = exp_avg, exp_avg_sq, a, b, grad_a, grad_b, bt_h, h_at
    m, v, *factors, bt_h, h_at = tensors if exp_avg.dim() == 3 else [tensor.unsqueeze(0) for tensor in tensors]
    backend((m, v), tuple(factors), Adam(scaling, beta1, beta2, eps, step, row_offset, row_step), seed, bt_h, h_at)


adam = Op(
    "lora_pro_adam_",
    _body,
    writes=("exp_avg", "exp_avg_sq", "bt_h", "h_at"),
    backends=(on_triton("lora_pro_adam.kernel:lora_pro_adam", _triton_takes), on_cpp(_run_cpp), on_torch(_run_torch)),
)


def lora_pro_adam_(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    *,
    scaling: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    step: int,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    row_step: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of Adam on the full gradient that the factors' gradients stand for (LoRA-Pro, arXiv 2407.18242).

        E = s (B dA + dB A)
        M <- beta1 M + (1 - beta1) E,   V <- beta2 V + (1 - beta2) E^2          in place
        H = (M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps)

    One pass over the moments: neither E nor H is ever stored, only what both factors make of H is returned. (The
    `torch` backend stores them for a block of rows at a time.) Same input, same backend: same bits, on the CPU whatever
    the number of threads.

    dA and dB are LoRA-Pro's adjusted gradients without the terms in X: `dA = (B^T B)^{-1} gA / s^2` and
    `dB = (I - B (B^T B)^{-1} B^T) gB (A A^T)^{-1} / s^2`, where gA and gB are the gradients of the loss. X would change
    nothing here: `B (X A) - (B X) A` is zero. What is returned takes the place of gA and gB when the step itself is
    adjusted, and there X counts.

    With an axis more in front of all tensors, a batch of layers of one shape in one call: the experts of a parameter.

    Rows of the moments may be shared out: with a part of the rows of the moments, b and grad_b, the first result is the
    part's share of the sum over all rows, the second one its rows.

    Moments in bfloat16 are rounded stochastically after every step (to the nearest, the second one would stop to decay:
    with beta2 = 0.999 a step changes it by less than half its last digit). Their random bits depend only on the seed,
    the step, which moment it is, the row and the column, and are the same on every backend: `_philox.halves`. Layers
    must take different seeds. H comes from the moments before they are rounded.

    The products are in float32. On a CUDA device they take three tf32 products, which have float32's accuracy, or
    a single one where the user allows it (`torch.backends.cuda.matmul.allow_tf32`).

    Args:
        exp_avg: `(m, n)` or `(layers, m, n)` first moment M, changed in place; float32, float64 (torch and cpp
            backends) or bfloat16. Rows are contiguous.
        exp_avg_sq: `(m, n)` second moment V, likewise.
        a: `(r, n)` A, of any float dtype, as all factors.
        b: `(m, r)` B.
        grad_a: `(r, n)` dA.
        grad_b: `(m, r)` dB.
        scaling: s.
        betas: decay of both moments, in [0, 1).
        eps: added to the root of the second moment; above 0.
        step: t, counted from 1, below 2^32.
        seed: 64-bit key for bfloat16 moments, which need it: an integer, or an int64 tensor of one element on the CPU
            or the moments' device. Ignored for others.
        row_offset: the number of the first row among those of the whole layer, for the random bits.
        row_step: the same from one layer of a batch to the next: the rows of a whole layer. By default, those given.
        backend: `auto`, `triton`, `cpp` or `torch`.

    Returns:
        `s B^T H` `(r, n)` and `s H A^T` `(m, r)` (of each layer), both float32, or float64 for float64 moments.

    Raises:
        TypeError: on a wrong dtype or type.
        ValueError: on a wrong shape, device, stride or number, or bfloat16 moments without a seed.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    _check(exp_avg, exp_avg_sq, a, b, grad_a, grad_b)
    factors = {"a": a, "b": b, "grad_a": grad_a, "grad_b": grad_b}
    check_written("exp_avg", exp_avg, exp_avg_sq=exp_avg_sq, **factors)
    check_written("exp_avg_sq", exp_avg_sq, **factors)
    check_number("scaling", scaling)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas is {repr_short(betas)}, but must be two numbers")
    for index, beta in enumerate(betas):
        check_range(f"betas[{index}]", beta, low=0)
        if beta >= 1:
            raise ValueError(f"betas[{index}] is {beta!r}, but must be below 1")
    check_range("eps", eps, low=0)
    if eps == 0:  # H would be 0 / 0 where no gradient has come yet
        raise ValueError(f"eps is {eps!r}, but must be above 0")
    check_range("step", step, low=1, high=2**32 - 1, integer=True)
    layers, rows = exp_avg.shape[:-2].numel(), exp_avg.shape[-2]
    if row_step is None:
        row_step = rows
    check_range("row_step", row_step, low=0, high=2**32 // max(layers, 1), integer=True)
    last = rows + max(layers - 1, 0) * row_step
    check_range("row_offset", row_offset, low=0, high=max(2**32 - last, 0), integer=True)
    key = None
    if exp_avg.dtype == torch.bfloat16:
        if seed is None:
            raise ValueError("seed is None, but must be given for bfloat16 moments, which are rounded stochastically")
        key = seed_tensor("seed", seed, exp_avg.device)
    wide = torch.promote_types(exp_avg.dtype, torch.float32)
    bt_h, h_at = a.new_empty(a.shape, dtype=wide), b.new_empty(b.shape, dtype=wide)
    adam(
        backend, exp_avg, exp_avg_sq, a, b, grad_a, grad_b, bt_h, h_at,
        float(scaling), float(betas[0]), float(betas[1]), float(eps), step, key, row_offset, row_step,
    )  # fmt: skip
    return bt_h, h_at


def adam_pairs(
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    out: tuple[torch.Tensor, torch.Tensor],
    numbers: dict[str, Any],
    seeds: Sequence[int] | None,
) -> None:
    """`lora_pro_adam_` of pairs of one shape whose moments lie apart; on a GPU one launch updates all moments.

    Each pair of moments is `(k, m, n)` and has one of the `seeds`. Factors (a, b, grad_a and grad_b) and `out`, what
    `lora_pro_adam_` returns, hold the matrices of all pairs in their order.
    """
    first, tensors = moments[0], [tensor for pair in moments for tensor in pair]
    fused = adam.choose("auto", *first, *factors) == "triton" and is_plain(*tensors, *factors, *out)
    if fused and first[0].numel() > 0:
        results = [tensor if tensor.is_contiguous() else tensor.new_empty(tensor.shape) for tensor in out]
        betas, count, device = numbers["betas"], len(first[0]), first[0].device
        values = {key: value for key, value in numbers.items() if key != "betas"}
        keys = None if seeds is None else int64_on(device, tuple(seed for seed in seeds for _ in range(count)))
        with isolated(device):
            run = provider("lora_pro_adam.kernel:adam_pairs")
            run(moments, factors, Adam(beta1=betas[0], beta2=betas[1], **values), keys, *results)
        for tensor, result in zip(out, results, strict=True):
            if tensor is not result:
                tensor.copy_(result)
        torch.autograd.graph.increment_version(tensors)
        return
    for number, pair in enumerate(moments):
        part, seed = slice(number * len(pair[0]), (number + 1) * len(pair[0])), None if seeds is None else seeds[number]
        out[0][part], out[1][part] = lora_pro_adam_(*pair, *(factor[part] for factor in factors), **numbers, seed=seed)


@adam.self_test(terms=70 + 33)
def _example(device: torch.device) -> Example:
    shapes = ((33, 70), (33, 70), (8, 70), (33, 8), (8, 70), (33, 8))
    names = ("exp_avg", "exp_avg_sq", "a", "b", "grad_a", "grad_b")
    tensors: dict[str, Any] = dict(zip(names, normal(device, *shapes), strict=True))
    tensors["exp_avg_sq"].abs_()
    numbers: dict[str, Any] = {"scaling": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "step": 3}
    truths = lora_pro_adam(**tensors, **numbers)

    def error(result: tuple[torch.Tensor, torch.Tensor]) -> float:
        return relative_error((tensors["exp_avg"], tensors["exp_avg_sq"], *result), truths)

    return {**tensors, **numbers}, error
