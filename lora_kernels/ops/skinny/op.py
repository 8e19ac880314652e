"""The skinny products: checks, registration and the choice of backend."""

from __future__ import annotations

import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Backend, Dispatcher, cpp_refuses, triton_refuses
from lora_kernels.ops._checks import check_number, check_tensor, check_written
from lora_kernels.ops._dropout import Dropout, lowered, mask_of
from lora_kernels.ops.skinny import _launch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _not_built(name: str) -> str | None:
    module, reason = _ext.load()
    if module is None:
        return reason
    return None if hasattr(module, name) else f"not built: the compiled extension has no {name}"


def _triton_refuses(device: torch.device, dtype: torch.dtype, _drops: bool) -> str | None:
    return triton_refuses(device) or ("takes no float64" if dtype == torch.float64 else None)


def _cpp_refuses(device: torch.device, dtype: torch.dtype, _drops: bool) -> str | None:
    name = _launch.CPP_NAMES.get(dtype)
    missing: str | None = cpp_refuses(device) or (
        f"takes no {dtype}" if name is None else _not_built(f"lora_shrink{name}")
    )
    return missing


def _on_cpu(device: torch.device, _dtype: torch.dtype, _drops: bool) -> bool:
    return device.type == "cpu"


def _library_wins(_device: torch.device, dtype: torch.dtype, drops: bool) -> bool:
    # Without a mask the three are plain matrix products: in float32 ours are made for few columns, in bfloat16 the
    # library may have instructions of the processor that ours do not use.
    return not drops and dtype != torch.float32


def product_dispatcher(name: str) -> Dispatcher:
    """The dispatcher of an op made of skinny products, asked with a device, a dtype and whether anything is dropped."""
    return Dispatcher(
        name,
        (
            Backend("triton", _triton_refuses, _on_cpu),
            Backend("cpp", _cpp_refuses, _library_wins),
            Backend("torch", lambda *_: None),
        ),
    )


shrink_dispatcher, tsreduce_dispatcher = product_dispatcher("shrink"), product_dispatcher("tsreduce")
expand_dispatcher = product_dispatcher("expand")


def unit_columns(wide: torch.Tensor) -> torch.Tensor:
    """A matrix whose columns lie side by side: itself, or a copy."""
    return wide if wide.stride(1) == 1 else wide.contiguous()


def _check_pair(names: tuple[str, str], first: torch.Tensor, second: torch.Tensor, axes: tuple[int, int]) -> None:
    check_tensor(names[0], first, shape=(None, None))
    shape: list[int | None] = [None, None]
    shape[axes[1]] = first.shape[axes[0]]
    check_tensor(names[1], second, shape=shape, dtypes=(first.dtype,), device=first.device)


@torch.library.custom_op("lora_kernels::shrink", mutates_args=())
def _shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    scale: float,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], a.shape[0])
    with _launch.device_of(x):
        return _launch.shrink(out, unit_columns(x), a, scale, mask_of(threshold, seed, stream), backend)


@_shrink.register_fake
def _(
    x: torch.Tensor,
    a: torch.Tensor,
    scale: float,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> torch.Tensor:
    _check_pair(("x", "a"), x, a, (1, 1))
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("lora_kernels::tsreduce", mutates_args=())
def _tsreduce(
    t: torch.Tensor, z: torch.Tensor, threshold: int, seed: torch.Tensor | None, stream: int, backend: str
) -> torch.Tensor:
    with _launch.device_of(z):
        return _launch.tsreduce(unit_columns(t), unit_columns(z), mask_of(threshold, seed, stream), backend)


@_tsreduce.register_fake
def _(
    t: torch.Tensor, z: torch.Tensor, threshold: int, seed: torch.Tensor | None, stream: int, backend: str
) -> torch.Tensor:
    _check_pair(("t", "z"), t, z, (0, 0))
    return z.new_empty(t.shape[1], z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))


@torch.library.custom_op("lora_kernels::expand", mutates_args=())
def _expand(
    t: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> torch.Tensor:
    out, row = t.new_empty(t.shape[0], b.shape[1]), None if bias is None else bias.contiguous()
    with _launch.device_of(out):
        return _launch.expand(out, unit_columns(t), b, bias=row, mask=mask_of(threshold, seed, stream), backend=backend)


@_expand.register_fake
def _(
    t: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> torch.Tensor:
    _check_pair(("t", "b"), t, b, (1, 0))
    return t.new_empty(t.shape[0], b.shape[1])


@torch.library.custom_op("lora_kernels::expand_", mutates_args=("out",))
def _expand_(
    out: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> None:
    with _launch.device_of(out):
        _launch.expand(out, unit_columns(t), b, base=out, mask=mask_of(threshold, seed, stream), backend=backend)


@_expand_.register_fake
def _(
    out: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> None:
    _check_pair(("t", "b"), t, b, (1, 0))


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    *,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`scale * drop(x) a^T`, summed in float32 and rounded once. Not differentiable: see `lora_linear`.

    Args:
        x: `(tokens, n)` float16, bfloat16 or float32; float64 on the torch backend.
        a: `(r, n)` of x's dtype, any strides.
        scale: a factor.
        dropout: what is dropped of x, or `None`. The mask is made inside the product and never stored.
        backend: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`.

    Returns:
        `(tokens, r)` in x's dtype.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    _check_pair(("x", "a"), x, a, (1, 1))
    check_number("scale", scale)
    drop = lowered(dropout, x.device)
    chosen = shrink_dispatcher.choose(backend, x.device, x.dtype, drop[0] > 0)
    made: torch.Tensor = _shrink(x.detach(), a.detach(), float(scale), *drop, chosen)
    return made


def tsreduce(
    t: torch.Tensor, z: torch.Tensor, *, dropout: Dropout | None = None, backend: str = "auto"
) -> torch.Tensor:
    """`t^T drop(z)`: a sum over tokens, in fixed order (same input, same bits). Not differentiable.

    Args:
        t: `(tokens, r)` float16, bfloat16 or float32; float64 on the torch backend.
        z: `(tokens, d)` of the same dtype.
        dropout: what is dropped of z, or `None`.
        backend: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`.

    Returns:
        `(r, d)` float32; float64 for float64.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    _check_pair(("t", "z"), t, z, (0, 0))
    drop = lowered(dropout, z.device)
    chosen = tsreduce_dispatcher.choose(backend, z.device, z.dtype, drop[0] > 0)
    made: torch.Tensor = _tsreduce(t.detach(), z.detach(), *drop, chosen)
    return made


def expand(
    t: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`drop(t b)`, or `bias + drop(t b)`, or `out += drop(t b)`. Not differentiable.

    Args:
        t: `(tokens, r)` float16, bfloat16 or float32; float64 on the torch backend.
        b: `(r, d)` of the same dtype, any strides.
        out: `(tokens, d)` of the same dtype with contiguous rows, added to in place; it must need no gradient.
        bias: `(d,)` of the same dtype.
        dropout: what is dropped of the product, or `None`.
        backend: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`.

    Returns:
        `(tokens, d)`: `out` if it was given.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number, or if both `out` and `bias` are given.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    _check_pair(("t", "b"), t, b, (1, 0))
    drop = lowered(dropout, t.device)
    chosen = expand_dispatcher.choose(backend, t.device, t.dtype, drop[0] > 0)
    if bias is not None:
        check_tensor("bias", bias, shape=(b.shape[1],), dtypes=(t.dtype,), device=t.device)
    if out is None:
        row = None if bias is None else bias.detach()
        made: torch.Tensor = _expand(t.detach(), b.detach(), row, *drop, chosen)
        return made
    if bias is not None:
        raise ValueError("bias cannot be given together with out, which is added to")
    check_tensor("out", out, shape=(t.shape[0], b.shape[1]), dtypes=(t.dtype,), device=t.device)
    check_written("out", out, t=t, b=b)
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}, but its rows must be contiguous")
    _expand_(out, t.detach(), b.detach(), *drop, chosen)
    return out
