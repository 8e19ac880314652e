"""A self-test of each op on each backend that says it can run, against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.ops._dropout import Dropout
from lora_kernels.ops.covariance import covariance_
from lora_kernels.ops.covariance import op as covariance_op
from lora_kernels.ops.covariance import reference as covariance_reference
from lora_kernels.ops.gradient_statistics import fisher_scaled, gradient_statistics_
from lora_kernels.ops.gradient_statistics import op as gradient_op
from lora_kernels.ops.gradient_statistics import reference as gradient_reference
from lora_kernels.ops.lora_linear import forms, lora_linear, use_form
from lora_kernels.ops.lora_linear import op as lora_linear_op
from lora_kernels.ops.lora_linear import reference as lora_linear_reference
from lora_kernels.ops.lora_pro_adam import lora_pro_adam_
from lora_kernels.ops.lora_pro_adam import op as lora_pro_op
from lora_kernels.ops.orthonormalize import op as orthonormalize_op
from lora_kernels.ops.orthonormalize import orthonormalize
from lora_kernels.ops.sketch import op as sketch_op
from lora_kernels.ops.sketch import project, sketch_
from lora_kernels.ops.sketch import reference as sketch_reference


@dataclass(frozen=True)
class SelfTest:
    """The outcome of running one op on one backend.

    Attributes:
        op: the op's name.
        backend: the backend.
        device: where.
        error: relative error against float64, or `None` if it did not run.
        bound: the error allowed.
        reason: why it did not run, or what went wrong.
    """

    op: str
    backend: str
    device: str
    error: float | None
    bound: float
    reason: str = ""

    @property
    def broken(self) -> bool:
        """Whether a backend that says it can run gave a wrong answer or failed."""
        return (self.error is None and self.reason.startswith("failed")) or (
            self.error is not None and not self.error <= self.bound
        )


@dataclass(frozen=True)
class Check:
    """How an op is tested.

    Attributes:
        op: its name.
        error: its relative error on a device and a backend.
        explain: by backend, why it cannot run on a device, or `None`.
        bound: the error allowed.
    """

    op: str
    error: Callable[[torch.device, str], float]
    explain: Callable[[torch.device], Mapping[str, str | None]]
    bound: float


def _covariance_error(device: torch.device, backend: str) -> float:
    x = torch.randn(97, 70, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.zeros(70, 70, device=device)
    covariance_(out, x, backend=backend)
    truth, _ = covariance_reference.covariance(x)
    return float(torch.linalg.norm(out.double().tril() - truth.tril()) / torch.linalg.norm(truth.tril()))


def _gradient_statistics_error(device: torch.device, backend: str) -> float:
    generator = torch.Generator().manual_seed(0)
    g, x, weight = (torch.randn(97, *size, generator=generator).to(device) for size in ((70,), (33,), ()))
    gradient, fisher = torch.zeros(70, 33, device=device), torch.zeros(70, device=device)
    gradient_statistics_(gradient, fisher, g, x, weight, weight > 0, backend=backend)
    found = torch.cat((gradient, fisher.unsqueeze(-1)), -1).double()
    truths = gradient_reference.weight_gradient(g, x, weight), gradient_reference.fisher_diagonal(g, weight > 0)
    truth = torch.cat((truths[0], truths[1].unsqueeze(-1)), -1)
    return float(torch.linalg.norm(found - truth) / torch.linalg.norm(truth))


def _fisher_scaled_error(device: torch.device, backend: str) -> float:
    generator = torch.Generator().manual_seed(0)
    gradient, fisher = (torch.rand(70, *size, generator=generator).to(device) for size in ((33,), ()))
    settings: dict[str, Any] = {"scale": -1.0, "damping": 1e-3, "power": 0.7}
    truth = gradient_reference.fisher_scaled(gradient, fisher, **settings)
    found = fisher_scaled(gradient, fisher, **settings, backend=backend)
    return float(torch.linalg.norm(found.double() - truth) / torch.linalg.norm(truth))


def _sketch_error(device: torch.device, backend: str) -> float:
    generator = torch.Generator().manual_seed(0)
    left, right, weight = (torch.randn(97, *size, generator=generator).to(device) for size in ((70,), (33,), ()))
    out, total = torch.zeros(70, 20, device=device), torch.zeros(70, device=device)
    sketch_(out, left, right, weight, seed=1, stream=2, column_sum=total, backend=backend)
    truths = sketch_reference.sketch(left, right, 20, weight, seed=1, stream=2)
    found, truth = (torch.cat((a, b.unsqueeze(-1)), -1).double() for a, b in ((out, total), truths))
    return float(torch.linalg.norm(found - truth) / torch.linalg.norm(truth))


def _project_error(device: torch.device, backend: str) -> float:
    a = torch.randn(97, 70, generator=torch.Generator().manual_seed(0)).to(device)
    found = project(a, 20, kind="gaussian", seed=1, stream=2, backend=backend)
    truth = sketch_reference.project(a, 20, kind="gaussian", seed=1, stream=2)
    return float(torch.linalg.norm(found.double() - truth) / torch.linalg.norm(truth))


def _orthonormalize_error(device: torch.device, backend: str) -> float:
    y = torch.randn(3, 97, 20, generator=torch.Generator().manual_seed(0)).to(device)
    q, r = (each.double() for each in orthonormalize(y, backend=backend))
    eye = torch.eye(20, dtype=torch.float64, device=device)
    return float(torch.linalg.norm(q @ r - y) / torch.linalg.norm(y) + (q.mT @ q - eye).abs().max())


def _gemm_error(device: torch.device, backend: str) -> float:
    with use_form("gemm"):
        return _lora_linear_error(device, backend)


def _lora_linear_error(device: torch.device, backend: str) -> float:
    generator = torch.Generator().manual_seed(0)
    sizes = ((97, 70), (33, 70), (33,), (8, 70), (33, 8))
    leaves = [torch.randn(*size, generator=generator).to(device).requires_grad_() for size in sizes]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    settings: dict[str, Any] = {"scaling": 0.5, "dropout": Dropout(0.1, 1)}
    y, truth = lora_linear(*leaves, **settings, backend=backend), lora_linear_reference.lora_linear(*exact, **settings)
    found = (y, *torch.autograd.grad(y.sum(), leaves))
    truths = (truth, *torch.autograd.grad(truth.sum(), exact))
    pairs = zip(found, truths, strict=True)
    return max(float(torch.linalg.norm(one.double() - two) / torch.linalg.norm(two)) for one, two in pairs)


def _lora_pro_problem(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 70), (33, 70), (8, 70), (33, 8), (8, 70), (33, 8))
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    tensors[1] = tensors[1].abs()  # second moments
    return [each.to(device, dtype) for each in tensors]


def _lora_pro_adam_error(device: torch.device, backend: str) -> float:
    settings: dict[str, Any] = {"scaling": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "step": 3}
    given, exact = (_lora_pro_problem(device, dtype) for dtype in (torch.float32, torch.float64))
    found = (*lora_pro_adam_(*given, **settings, backend=backend), *given[:2])
    truths = (*lora_pro_adam_(*exact, **settings, backend="torch"), *exact[:2])
    pairs = zip(found, truths, strict=True)
    return max(float(torch.linalg.norm(one.double() - two) / torch.linalg.norm(two)) for one, two in pairs)


CHECKS = (
    Check(
        "covariance_",
        _covariance_error,
        lambda device: covariance_op.covariance.explain(
            torch.zeros(2, 2, device=device), torch.zeros(2, 2, device=device)
        ),
        1e-5,
    ),
    Check(
        "gradient_statistics_",
        _gradient_statistics_error,
        lambda device: gradient_op.gradient_statistics.explain(*(torch.zeros(2, 2, device=device) for _ in range(4))),
        1e-5,
    ),
    Check(
        "fisher_scaled",
        _fisher_scaled_error,
        lambda device: gradient_op.scaling.explain(torch.zeros(2, 2, device=device)),
        1e-6,
    ),
    Check(
        "sketch_",
        _sketch_error,
        lambda device: sketch_op.sketch.explain(torch.zeros(2, 2, device=device)),
        1e-5,
    ),
    Check(
        "project",
        _project_error,
        lambda device: sketch_op.projection.explain(torch.zeros(2, 2, device=device)),
        1e-5,
    ),
    Check(
        "orthonormalize",
        _orthonormalize_error,
        lambda device: orthonormalize_op.columns.explain(torch.zeros(2, 2, device=device)),
        1e-5,
    ),
    Check(
        "lora_linear",
        _lora_linear_error,
        lambda device: lora_linear_op.linear_dispatcher.explain(device, torch.float32, True),
        1e-5,
    ),
    Check(
        "lora_linear gemm",
        _gemm_error,
        lambda device: {"triton": forms.gemm_refuses(device, torch.float32)},
        1e-5,
    ),
    Check(
        "lora_pro_adam_",
        _lora_pro_adam_error,
        lambda device: lora_pro_op.dispatcher.explain(_lora_pro_problem(device, torch.float32)[0], 8),
        1e-5,
    ),
)


def self_tests() -> list[SelfTest]:
    """Run every op on every backend of every device at hand.

    Returns:
        The outcomes.
    """
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    outcomes = []
    for check in CHECKS:
        for device in devices:
            for backend, reason in check.explain(device).items():
                error = None
                if reason is None:
                    try:
                        error = check.error(device, backend)
                    except Exception as problem:
                        reason = f"failed: {problem!r}"
                outcomes.append(SelfTest(check.op, backend, device.type, error, check.bound, reason or ""))
    return outcomes
