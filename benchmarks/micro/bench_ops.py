"""One benchmark per op and backend: `python -m pytest benchmarks/micro --benchmark-only` (`make micro`).

On a CPU the backends are C++ and torch, on a GPU Triton, CUDA (`cpp`) and torch; what a backend refuses is skipped with
its reason. Each backend's numbers are compared with those of torch before its time is taken. These are for work on a
kernel (`--benchmark-autosave`, `--benchmark-compare`); what is quoted comes from `benchmarks.compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lora_kernels import ops

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BACKENDS = ("triton", "cpp", "torch") if GPU else ("cpp", "torch")
# Tokens, inputs, outputs, rank; matrices in a batch and their order.
TOKENS, N, M, RANK = (8192, 4096, 4096, 16) if GPU else (1024, 512, 768, 16)
BATCH, ORDER = 224, 16
BOUND = 1e-3


@dataclass(frozen=True)
class Bench:
    """A call of an op, and how to see what it did.

    Attributes:
        call: runs on the backend of `ops.use_backend`.
        sums: results that are added to; zero before the numbers are looked at.
        shown: of what the call returned, the tensors that every backend must agree on; by default all, or `sums`.
    """

    call: Callable[[], Any]
    sums: Sequence[torch.Tensor] = ()
    shown: Callable[[Any], Sequence[torch.Tensor]] | None = None

    def answer(self, backend: str) -> list[torch.Tensor]:
        """The numbers of a backend.

        Raises:
            RuntimeError: if the backend refuses.
        """
        for tensor in self.sums:
            tensor.zero_()
        with ops.use_backend(backend):
            outputs = self.call()
        if self.shown is not None:
            outputs = self.shown(outputs)
        elif outputs is None:
            outputs = self.sums
        return [tensor.detach().double() for tensor in ((outputs,) if isinstance(outputs, torch.Tensor) else outputs)]


def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
    """Random float32 numbers on the device."""
    return torch.randn(*size, device=DEVICE) * scale


def definite() -> torch.Tensor:
    """A batch of positive definite matrices."""
    root = normal(BATCH, ORDER, 2 * ORDER)
    return root @ root.mT / (2 * ORDER)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    """A and B."""
    return normal(RANK, N, scale=N**-0.5), normal(M, RANK)


def _covariance() -> Bench:
    x, out = normal(TOKENS, N), normal(N, N)
    return Bench(lambda: ops.covariance_(out, x), (out,), lambda _: [out.tril()])


def _symmetrize() -> Bench:
    x = normal(N, N)
    return Bench(lambda: ops.symmetrize_(x))


def _gradient_statistics() -> Bench:
    x, g, gradient, fisher = normal(TOKENS, N), normal(TOKENS, M), normal(M, N), normal(M)
    return Bench(lambda: ops.gradient_statistics_(gradient, fisher, g, x), (gradient, fisher))


def _sketch() -> Bench:
    x, out = normal(TOKENS, N), normal(N, 2 * RANK)
    return Bench(lambda: ops.sketch_(out, x, x, seed=1), (out,))


def _project() -> Bench:
    x = normal(TOKENS, N)
    return Bench(lambda: ops.project(x, 2 * RANK, seed=1))


def _random_matrix() -> Bench:
    return Bench(lambda: ops.random_matrix(N, 2 * RANK, kind="gaussian", seed=1, device=DEVICE))


def _orthonormalize() -> Bench:
    y = normal(N, 2 * RANK)
    return Bench(lambda: ops.orthonormalize(y))


def _shrink() -> Bench:
    x, (a, _) = normal(TOKENS, N), factors()
    return Bench(lambda: ops.shrink(x, a))


def _expand() -> Bench:
    t, (_, b) = normal(TOKENS, RANK), factors()
    return Bench(lambda: ops.expand(t, b.mT))


def _tsreduce() -> Bench:
    t, z = normal(TOKENS, RANK), normal(TOKENS, N)
    return Bench(lambda: ops.tsreduce(t, z))


def _layer(call: Callable[..., Any]) -> Bench:
    """Forward and backward of a call of x, W, A and B: all gradients."""
    leaves = [tensor.requires_grad_() for tensor in (normal(TOKENS, N), *factors())]
    weight = normal(M, N, scale=N**-0.5)

    def run() -> Sequence[torch.Tensor]:
        x, a, b = leaves
        y = call(x, weight, a, b)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    return Bench(run)


def _lora_linear() -> Bench:
    return _layer(lambda x, w, a, b: ops.lora_linear(x, w, None, a, b, scaling=2.0))


def _lora_delta() -> Bench:
    y = normal(TOKENS, M)
    return _layer(lambda x, w, a, b: ops.lora_delta(y, x, a, b, scaling=2.0))


def _grouped_lora() -> Bench:
    """Forward and backward over experts of unequal load, one of them without rows: all gradients."""
    shares = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1])
    offsets = torch.cat((torch.zeros(1), shares.cumsum(0) * TOKENS)).round().long().to(DEVICE)
    experts = len(shares)
    x, y = normal(TOKENS, N), normal(TOKENS, M)
    a, b = normal(experts, RANK, N, scale=N**-0.5), normal(experts, M, RANK)
    leaves = [leaf.requires_grad_() for leaf in (x, a, b)]

    def run() -> Sequence[torch.Tensor]:
        out = ops.grouped_lora(y, x, offsets, a, b, scaling=2.0)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return Bench(run)


def _lora_pro_adam() -> Bench:
    (a, b), (grad_a, grad_b), avg, square = factors(), factors(), normal(M, N), normal(M, N)
    return Bench(
        lambda: ops.lora_pro_adam_(avg, square, a, b, grad_a, grad_b, scaling=2.0, step=1),
        (avg, square),
        lambda outputs: [avg, square, *outputs],
    )


def _cholesky() -> Bench:
    p = definite()
    return Bench(lambda: ops.cholesky(p))


def _cholesky_solve() -> Bench:
    p, rhs = definite(), normal(BATCH, ORDER, N)
    return Bench(lambda: ops.cholesky_solve(p, rhs))


def _eigh() -> Bench:
    p = definite()
    return Bench(lambda: ops.eigh(p), shown=lambda outputs: [outputs[0]])  # vectors have a sign of their own


def _factor_spectrum() -> Bench:
    a, b = normal(BATCH, RANK, N), normal(BATCH, N, RANK)
    return Bench(lambda: ops.factor_spectrum(a, b, 2.0))


def _sylvester() -> Bench:
    p, q, rhs = definite(), definite(), normal(BATCH, ORDER, ORDER)
    return Bench(lambda: ops.sylvester(p, q, rhs))


OPS: dict[str, Callable[[], Bench]] = {
    "cholesky": _cholesky,
    "cholesky_solve": _cholesky_solve,
    "covariance_": _covariance,
    "eigh": _eigh,
    "expand": _expand,
    "factor_spectrum": _factor_spectrum,
    "gradient_statistics_": _gradient_statistics,
    "grouped_lora": _grouped_lora,
    "lora_delta": _lora_delta,
    "lora_linear": _lora_linear,
    "lora_pro_adam_": _lora_pro_adam,
    "orthonormalize": _orthonormalize,
    "project": _project,
    "random_matrix": _random_matrix,
    "shrink": _shrink,
    "sketch_": _sketch,
    "sylvester": _sylvester,
    "symmetrize_": _symmetrize,
    "tsreduce": _tsreduce,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_op(benchmark: Any, name: str, backend: str) -> None:
    """Check an op against torch, then time it."""
    benchmark.group = name
    torch.manual_seed(0)
    bench = OPS[name]()
    truth = bench.answer("torch")
    try:
        answer = bench.answer(backend)
    except RuntimeError as error:
        if "cannot run on backend" in str(error) or "has no" in str(error):
            pytest.skip(str(error))
        raise
    for one, other in zip(answer, truth, strict=True):
        assert float((one - other).abs().max()) <= BOUND * float(other.abs().max()), name

    def run() -> None:
        bench.call()
        if GPU:
            torch.cuda.synchronize()

    with ops.use_backend(backend):
        benchmark(run)
