"""`lora-kernels doctor`: what is installed, which backends can run and why not, and a self-test of every op."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

from lora_kernels._version import __version__
from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Refused, cpp_refuses, triton_refuses
from lora_kernels.ops._op import OPS
from lora_kernels.ops.lora_linear import forms, table
from lora_kernels.ops.lora_linear.forms import use_form
from lora_kernels.reports import Table, console

PACKAGES = ("torch", "triton", "peft", "transformers", "rich", "tqdm")


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
    if module is not None:
        try:
            vectors = f"{module.lane_bytes()} bytes in the extension"
        except ValueError as error:  # of $LORA_KERNELS_LANE_BYTES
            vectors = str(error)
        yield "cpu vectors", f"{torch.backends.cpu.get_cpu_capability()} in torch, {vectors}"


def _measured_forms() -> Table:
    """What `lora-kernels tune` has written, and the table that ships: how much of it counts here."""
    rows = Table("table", "used", "other versions", "other chips", "problem", title="measured forms of LoRA layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the problem is in the table
        tables = forms.tables()
    for path, counts in tables.counts.items():
        rows.add_row(str(path), *map(str, counts), "")
    for path, problem in tables.problems.items():
        rows.add_row(str(path), "0", "", "", problem)
    mine = table.cache_file()
    if mine not in tables.counts and mine not in tables.problems:
        rows.add_row(str(mine), "0", "", "", "not there: `lora-kernels tune` writes it")
    return rows


@dataclass(frozen=True)
class SelfTest:
    """The outcome of running one op on one backend."""

    op: str  # the op's name
    backend: str  # the backend
    device: str  # where
    error: float | None  # relative error against float64, or `None` if it did not run
    bound: float  # the error allowed
    reason: str = ""  # why it did not run, or what went wrong

    @property
    def broken(self) -> bool:
        """Whether a backend that says it can run gave a wrong answer or failed."""
        return (self.error is None and self.reason.startswith("failed")) or (
            self.error is not None and not self.error <= self.bound
        )


def _self_test(name: str, backend: str, device: torch.device, form: str = "auto") -> SelfTest:
    op, error, reason = OPS[name], None, ""
    refusal = forms.gemm_refuses(device, torch.float32) if form == "gemm" else None
    try:
        if refusal is not None:
            raise Refused(refusal, {backend: refusal})
        with use_form(form):
            error = op.error(device, backend)
    except Refused as refused:
        reason = refused.reasons.get(backend, str(refused))
    except Exception as problem:
        reason = f"failed: {problem!r}"
    return SelfTest(name if form == "auto" else f"{name} {form}", backend, device.type, error, op.bound, reason)


def self_tests() -> list[SelfTest]:
    """The outcomes of every op on every backend of every device at hand."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    cases = [(op.name, backend.name) for op in OPS.values() for backend in op.backends]
    plain = [_self_test(*case, device) for case in cases for device in devices]
    return [*plain, *(_self_test("lora_linear", "triton", device, "gemm") for device in devices)]


def run() -> int:
    """Print the findings; 0 if every backend that says it can run gives right answers, else 1."""
    output = console(140)
    versions = Table("what", "version", title="installation")
    for name, version in _versions():
        versions.add_row(name, version)
    output.print(versions)
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    backends = Table("backend", *(f"on {device.type}" for device in devices), title="backends")
    backends.add_row("triton", *(triton_refuses(device) or "usable" for device in devices))
    backends.add_row("cpp", *(cpp_refuses(device) or "usable" for device in devices))
    backends.add_row("torch", *("usable" for _ in devices))
    output.print(backends)
    output.print(_measured_forms())
    outcomes = self_tests()
    tests = Table("op", "backend", "device", "error", "verdict", title="self-test against float64")
    for test in outcomes:
        verdict = "BROKEN" if test.broken else "ok" if test.error is not None else "not run"
        error = "" if test.error is None else f"{test.error:.1e}"
        tests.add_row(test.op, test.backend, test.device, error, f"{verdict} {test.reason}".strip())
    output.print(tests)
    return 1 if any(test.broken for test in outcomes) else 0
