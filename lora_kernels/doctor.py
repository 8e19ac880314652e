"""`lora-kernels doctor`: what is installed, which backends can run and why not, and a self-test of each op."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_kernels._version import __version__
from lora_kernels.ops import _ext
from lora_kernels.ops._backend import cpp_refuses, triton_refuses
from lora_kernels.ops._dropout import Dropout
from lora_kernels.ops.covariance import covariance_
from lora_kernels.ops.covariance import op as covariance_op
from lora_kernels.ops.covariance import reference as covariance_reference
from lora_kernels.ops.gradient_statistics import fisher_scaled, gradient_statistics_
from lora_kernels.ops.gradient_statistics import op as gradient_op
from lora_kernels.ops.gradient_statistics import reference as gradient_reference
from lora_kernels.ops.gradient_statistics.scaling import scaling_dispatcher
from lora_kernels.ops.lora_linear import forms, lora_linear, table, use_form
from lora_kernels.ops.lora_linear import op as lora_linear_op
from lora_kernels.ops.lora_linear import reference as lora_linear_reference
from lora_kernels.ops.orthonormalize import op as orthonormalize_op
from lora_kernels.ops.orthonormalize import orthonormalize
from lora_kernels.ops.sketch import op as sketch_op
from lora_kernels.ops.sketch import project, sketch_
from lora_kernels.ops.sketch import reference as sketch_reference
from lora_kernels.ops.small_linalg import cholesky_solve, eigh, factor_spectrum, sylvester
from lora_kernels.ops.small_linalg import op as eigh_op
from lora_kernels.ops.small_linalg import solve as solve_op
from lora_kernels.ops.small_linalg import spectrum as spectrum_op

PACKAGES = ("torch", "triton", "peft", "transformers", "matplotlib", "rich", "tqdm")


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


def _versions() -> Iterator[tuple[str, str]]:
    yield "lora_kernels", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"
    yield "gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    module, reason = _ext.load()
    yield "extension", str(reason) if module is None else ", ".join(f"{k}={v}" for k, v in module.build_info().items())


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


def _eigh_error(device: torch.device, backend: str) -> float:
    a = torch.randn(20, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    a = a + a.mT
    values, vectors = eigh(a, backend=backend)
    return float(torch.linalg.norm(a @ vectors - vectors * values.unsqueeze(-2)) / torch.linalg.norm(a))


def _solve_problem(device: torch.device) -> list[torch.Tensor]:
    """Two batches of symmetric positive definite matrices and right-hand sides."""
    generator = torch.Generator().manual_seed(0)
    p, q, rhs = (
        torch.randn(20, *size, dtype=torch.float64, generator=generator).to(device)
        for size in ((12, 12), (7, 7), (12, 7))
    )
    return [each @ each.mT + torch.eye(each.shape[-1], device=device) for each in (p, q)] + [rhs]


def _cholesky_solve_error(device: torch.device, backend: str) -> float:
    p, _, rhs = _solve_problem(device)
    return float(torch.linalg.norm(p @ cholesky_solve(p, rhs, backend=backend) - rhs) / torch.linalg.norm(rhs))


def _sylvester_error(device: torch.device, backend: str) -> float:
    p, q, rhs = _solve_problem(device)
    found = sylvester(p, q, rhs, backend=backend)
    return float(torch.linalg.norm(p @ found + found @ q - rhs) / torch.linalg.norm(rhs))


def _factor_spectrum_error(device: torch.device, backend: str) -> float:
    p, _, rhs = _solve_problem(device)
    truth = 2 * torch.linalg.svdvals(p @ rhs)
    found = factor_spectrum(rhs, p, 2.0, backend=backend)[:, : truth.shape[-1]]
    return float(torch.linalg.norm(found - truth) / torch.linalg.norm(truth))


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


def self_tests() -> list[SelfTest]:
    """Run every op on every backend of every device at hand.

    Returns:
        The outcomes.
    """
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    runs: list[tuple[str, Callable[[torch.device, str], float], Callable[[torch.device], dict[str, str | None]], float]]
    runs = [
        (
            "covariance_",
            _covariance_error,
            lambda device: covariance_op.dispatcher.explain(
                torch.zeros(2, 2, device=device), torch.zeros(2, 2, device=device)
            ),
            1e-5,
        ),
        (
            "gradient_statistics_",
            _gradient_statistics_error,
            lambda device: gradient_op.dispatcher.explain(*(torch.zeros(2, 2, device=device) for _ in range(4))),
            1e-5,
        ),
        (
            "fisher_scaled",
            _fisher_scaled_error,
            lambda device: scaling_dispatcher.explain(torch.zeros(2, 2, device=device)),
            1e-6,
        ),
        (
            "sketch_",
            _sketch_error,
            lambda device: sketch_op.dispatcher.explain(torch.zeros(2, 2, device=device)),
            1e-5,
        ),
        (
            "project",
            _project_error,
            lambda device: sketch_op.project_dispatcher.explain(torch.zeros(2, 2, device=device)),
            1e-5,
        ),
        (
            "orthonormalize",
            _orthonormalize_error,
            lambda device: orthonormalize_op.dispatcher.explain(torch.zeros(2, 2, device=device)),
            1e-5,
        ),
        (
            "eigh",
            _eigh_error,
            lambda device: eigh_op.dispatcher.explain(*_solve_problem(device)[:1]),
            1e-12,
        ),
        (
            "cholesky_solve",
            _cholesky_solve_error,
            lambda device: solve_op.solve_dispatcher.explain(*_solve_problem(device)[::2]),
            1e-12,
        ),
        (
            "sylvester",
            _sylvester_error,
            lambda device: solve_op.sylvester_dispatcher.explain(*_solve_problem(device)),
            1e-12,
        ),
        (
            "factor_spectrum",
            _factor_spectrum_error,
            lambda device: spectrum_op.dispatcher.explain(*_solve_problem(device)[::-2]),
            1e-12,
        ),
        (
            "lora_linear",
            _lora_linear_error,
            lambda device: lora_linear_op.linear_dispatcher.explain(device, torch.float32, True),
            1e-5,
        ),
        (
            "lora_linear gemm",
            _gemm_error,
            lambda device: {"triton": forms.gemm_refuses(device, torch.float32)},
            1e-5,
        ),
    ]
    outcomes = []
    for name, run, explain, bound in runs:
        for device in devices:
            for backend, reason in explain(device).items():
                if reason is not None:
                    outcomes.append(SelfTest(name, backend, device.type, None, bound, reason))
                    continue
                try:
                    outcomes.append(SelfTest(name, backend, device.type, run(device, backend), bound))
                except Exception as error:
                    outcomes.append(SelfTest(name, backend, device.type, None, bound, f"failed: {error!r}"))
    return outcomes


def _measured_forms() -> Table:
    """What `lora-kernels tune` has written, and the table that ships: how much of it counts here."""
    shown = Table("table", "used", "other versions", "other chips", "problem", title="measured forms of LoRA layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the problem is shown
        found = forms.tables()
    for path, counts in found.found.items():
        shown.add_row(str(path), *map(str, counts), "")
    for path, problem in found.problems.items():
        shown.add_row(str(path), "0", "", "", problem)
    mine = table.cache_file()
    if mine not in found.found and mine not in found.problems:
        shown.add_row(str(mine), "0", "", "", "not there: `lora-kernels tune` writes it")
    return shown


def run() -> int:
    """Print the findings.

    Returns:
        0 if every backend that says it can run gives right answers, else 1.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    versions = Table("what", "version", title="installation")
    for name, version in _versions():
        versions.add_row(name, version)
    console.print(versions)
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    backends = Table("backend", *(f"on {device.type}" for device in devices), title="backends")
    backends.add_row("triton", *(triton_refuses(device) or "usable" for device in devices))
    backends.add_row("cpp", *(cpp_refuses(device) or "usable" for device in devices))
    backends.add_row("torch", *("usable" for _ in devices))
    console.print(backends)
    console.print(_measured_forms())
    outcomes = self_tests()
    tests = Table("op", "backend", "device", "error", "verdict", title="self-test against float64")
    for each in outcomes:
        verdict = "BROKEN" if each.broken else "ok" if each.error is not None else "not run"
        error = "" if each.error is None else f"{each.error:.1e}"
        tests.add_row(each.op, each.backend, each.device, error, f"{verdict} {each.reason}".strip())
    console.print(tests)
    return 1 if any(each.broken for each in outcomes) else 0
