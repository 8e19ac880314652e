"""Fisher scaling of a gradient: checks, registration and the choice of backend."""

from __future__ import annotations

import contextlib

import torch

from lora_kernels.ops._backend import Backend, Dispatcher, triton_refuses
from lora_kernels.ops._checks import FLOATS, check_range, check_tensor, check_written


def _check(out: torch.Tensor, gradient: torch.Tensor | None, fisher: torch.Tensor) -> None:
    check_tensor("out", out, shape=(None, None), dtypes=FLOATS[2:])
    if out.shape[1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out has strides {out.stride()}, but its rows must be contiguous")
    if gradient is not None:
        check_tensor("gradient", gradient, shape=tuple(out.shape), dtypes=(out.dtype,), device=out.device)
    check_tensor("fisher", fisher, shape=(out.shape[0],), dtypes=(out.dtype,), device=out.device)


def _triton_refuses(out: torch.Tensor, *_: object) -> str | None:
    return triton_refuses(out.device) or (None if out.dtype == torch.float32 else f"takes no {out.dtype}")


scaling_dispatcher = Dispatcher(
    "fisher_scaled",
    (
        Backend("triton", _triton_refuses, slower=lambda out, *_: out.device.type == "cpu"),
        Backend("torch", lambda *_: None),
    ),
)


@torch.library.custom_op("lora_kernels::fisher_scaled_", mutates_args=("out",))
def _fisher_scaled(
    out: torch.Tensor,
    gradient: torch.Tensor | None,
    fisher: torch.Tensor,
    scale: float,
    damping: float,
    power: float,
    backend: str,
) -> None:
    source = out if gradient is None else gradient
    if backend == "torch":
        # The row factors in float64: they are few, and their power then costs no accuracy.
        factor = scale * (fisher.to(torch.float64) + damping).pow(-power)
        torch.mul(source, factor.to(out.dtype).unsqueeze(-1), out=out)
        return
    # Imported here: without Triton the other backend still works.
    from lora_kernels.ops.gradient_statistics import kernel  # noqa: PLC0415

    source = source if source.stride(-1) == 1 else source.contiguous()
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        kernel.scale_rows(out, source, fisher.contiguous(), scale, damping, power)


@_fisher_scaled.register_fake
def _(
    out: torch.Tensor,
    gradient: torch.Tensor | None,
    fisher: torch.Tensor,
    scale: float,
    damping: float,
    power: float,
    backend: str,
) -> None:
    _check(out, gradient, fisher)


def fisher_scaled(
    gradient: torch.Tensor,
    fisher: torch.Tensor,
    *,
    scale: float,
    damping: float,
    power: float = 1.0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`scale * gradient[i, :] / (fisher[i] + damping) ** power`, in one pass over the gradient.

    Gradients do not flow through.

    Args:
        gradient: `(m, n)` float32 or float64.
        fisher: `(m,)` of the same dtype, not negative.
        scale: any number.
        damping: not negative. Where `fisher + damping` is zero the result is not finite.
        power: any number; 1 and 0.5 are quickest.
        out: `(m, n)` of the same dtype, rows contiguous, for the result; may be `gradient` itself. New by default.
        backend: `auto`, `triton` or `torch`.

    Returns:
        The result, `(m, n)`: `out` if given.

    Raises:
        TypeError: on a wrong dtype, or where a number is none.
        ValueError: on a wrong shape, device, stride or range.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    check_tensor("gradient", gradient, shape=(None, None), dtypes=FLOATS[2:])
    check_range("scale", scale)
    check_range("damping", damping, low=0.0)
    check_range("power", power)
    if out is None:
        out = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    else:
        check_tensor("out", out, shape=tuple(gradient.shape), dtypes=(gradient.dtype,), device=gradient.device)
    _check(out, gradient, fisher)
    check_written("out", out, gradient=None if out is gradient else gradient, fisher=fisher)
    chosen = scaling_dispatcher.choose(backend, out)
    # An operator that writes one of its arguments must not be given it a second time.
    source = None if out is gradient else gradient.detach()
    _fisher_scaled(out, source, fisher.detach(), float(scale), float(damping), float(power), chosen)
    return out
