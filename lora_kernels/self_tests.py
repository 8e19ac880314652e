"""The self-test of every op on every backend that says it can run, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops._backend import Refused
from lora_kernels.ops._op import OPS
from lora_kernels.ops.lora_linear import forms, use_form


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


def _run(name: str, backend: str, device: torch.device, form: str = "auto") -> SelfTest:
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
    plain = [_run(*case, device) for case in cases for device in devices]
    return [*plain, *(_run("lora_linear", "triton", device, "gemm") for device in devices)]
