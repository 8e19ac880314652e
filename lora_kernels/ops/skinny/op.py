"""The skinny products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_kernels._checks import check_number, check_tensor, check_written
from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Backend, cpp_refuses, triton_refuses
from lora_kernels.ops._dropout import Dropout, mask_of, to_op_args
from lora_kernels.ops._op import Example, Op, normal, relative_error
from lora_kernels.ops.skinny import _launch, reference

_FEW_RANKS = 16


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _not_built(name: str) -> str | None:
    module, reason = _ext.load()
    if module is None:
        return reason
    return None if hasattr(module, name) else f"not built: the compiled extension has no {name}"


def _no_triton(device: torch.device, dtype: torch.dtype, *_: Any) -> str | None:
    return triton_refuses(device) or ("takes no float64" if dtype == torch.float64 else None)


def _no_cpp(device: torch.device, dtype: torch.dtype, *_: Any) -> str | None:
    name, refusal = _launch.CPP_NAMES.get(dtype), cpp_refuses(device)
    return refusal or (f"takes no {dtype}" if name is None else _not_built(f"lora_shrink{name}"))


def _library_wins(_: torch.device, dtype: torch.dtype, drops: bool, rank: int | None = None) -> bool:
    # Without a mask the three are plain matrix products: in float32 ours are for few columns, in bfloat16 the
    # library may have instructions of the processor that ours do not use. All of a layer of few ranks are one call.
    return not drops and dtype != torch.float32 and (rank is None or rank > _FEW_RANKS)


def product_backends(kernel: str, ask: Callable[..., Any] = lambda *args: args) -> tuple[Backend, ...]:
    """Backends of skinny products; `ask` gives device, dtype, whether anything is dropped, and the rank of a layer."""
    return (
        Backend("triton", lambda *args: _no_triton(*ask(*args)), lambda *args: ask(*args)[0].type == "cpu", kernel),
        Backend("cpp", lambda *args: _no_cpp(*ask(*args)), lambda *args: _library_wins(*ask(*args))),
        Backend("torch", lambda *_: None),
    )


def unit_columns(wide: torch.Tensor) -> torch.Tensor:
    """A matrix whose columns lie side by side: itself, or a copy."""
    return wide if wide.stride(1) == 1 else wide.contiguous()


def _check_pair(names: tuple[str, str], first: torch.Tensor, second: torch.Tensor, axes: tuple[int, int]) -> None:
    check_tensor(names[0], first, shape=(None, None))
    shape: list[int | None] = [None, None]
    shape[axes[1]] = first.shape[axes[0]]
    check_tensor(names[1], second, shape=shape, dtypes=(first.dtype,), device=first.device)


def _backends(product: str) -> tuple[Backend, ...]:
    # The arguments begin with the result and an operand, and end in a threshold, a seed and a stream.
    return product_backends(
        f"skinny.kernel:{product}", lambda _, operand, *rest: (operand.device, operand.dtype, rest[-3] > 0)
    )


def _shrink(
    backend: Backend,
    out: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    scale: float,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
) -> None:
    _launch.shrink(out, unit_columns(x), a, scale, mask_of(threshold, seed, stream), backend.name)


def _tsreduce(
    backend: Backend,
    out: torch.Tensor,
    t: torch.Tensor,
    z: torch.Tensor,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
) -> None:
    _launch.tsreduce(unit_columns(t), unit_columns(z), mask_of(threshold, seed, stream), backend.name, out)


def _expand(
    backend: Backend,
    out: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    accumulate: bool,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
) -> None:
    base, row = out if accumulate else None, None if bias is None else bias.contiguous()
    mask = mask_of(threshold, seed, stream)
    _launch.expand(out, unit_columns(t), b, base=base, bias=row, mask=mask, backend=backend.name)


shrinking = Op("shrink", _shrink, writes=("out",), backends=_backends("shrink"))
reducing = Op("tsreduce", _tsreduce, writes=("out",), backends=_backends("tsreduce"))
expanding = Op("expand", _expand, writes=("out",), backends=_backends("expand"))


def shrink(
    x: torch.Tensor, a: torch.Tensor, *, scale: float = 1.0, dropout: Dropout | None = None, backend: str = "auto"
) -> torch.Tensor:
    """`scale * drop(x) a^T`, summed in float32 and rounded once. Not differentiable: see `lora_linear`.

    Args:
        x: `(tokens, n)` float16, bfloat16 or float32; float64 on the torch backend.
        a: `(r, n)` of x's dtype, any strides.
        scale: a factor.
        dropout: what is dropped of x, or `None`. The mask is computed inside the product and never stored.
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
    drop = to_op_args(dropout, x.device)
    out = x.new_empty(x.shape[0], a.shape[0])
    shrinking(backend, out, x, a, float(scale), *drop)
    return out


@shrinking.self_test(terms=70)
def _shrink_example(device: torch.device) -> Example:
    x, a = normal(device, (97, 70), (8, 70))
    dropout = Dropout(0.1, 1)
    truth = reference.shrink(x.double(), a.double(), 0.5, dropout)
    return {"x": x, "a": a, "scale": 0.5, "dropout": dropout}, lambda result: relative_error([result], [truth])


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
    drop = to_op_args(dropout, z.device)
    out = z.new_empty(t.shape[1], z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
    reducing(backend, out, t, z, *drop)
    return out


@reducing.self_test(terms=97)
def _tsreduce_example(device: torch.device) -> Example:
    t, z = normal(device, (97, 8), (97, 70))
    dropout = Dropout(0.1, 1)
    truth = reference.tsreduce(t.double(), z.double(), dropout)
    return {"t": t, "z": z, "dropout": dropout}, lambda result: relative_error([result], [truth])


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
    drop = to_op_args(dropout, t.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(b.shape[1],), dtypes=(t.dtype,), device=t.device)
    accumulate = out is not None
    if out is None:
        out = t.new_empty(t.shape[0], b.shape[1])
    else:
        if bias is not None:
            raise ValueError("bias cannot be given together with out, which is added to")
        size = (t.shape[0], b.shape[1])
        check_tensor("out", out, shape=size, dtypes=(t.dtype,), device=t.device, contiguous="rows")
        check_written("out", out, t=t, b=b)
    expanding(backend, out, t, b, bias, accumulate, *drop)
    return out


@expanding.self_test(terms=8 + 2)
def _expand_example(device: torch.device) -> Example:
    t, b, out = normal(device, (97, 8), (8, 33), (97, 33))
    dropout = Dropout(0.1, 1)
    truth = reference.expand(t.double(), b.double(), out.double(), dropout)
    return {"t": t, "b": b, "out": out, "dropout": dropout}, lambda result: relative_error([result], [truth])
