"""The LoRA layer: checks and the choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kernels.ops._backend import Dispatcher
from lora_kernels.ops._checks import FLOATS, check_number, check_tensor, check_type, shown
from lora_kernels.ops._dropout import Dropout, lowered
from lora_kernels.ops.lora_linear import _function
from lora_kernels.ops.lora_linear._function import Numbers
from lora_kernels.ops.skinny.op import product_dispatcher

linear_dispatcher, delta_dispatcher = product_dispatcher("lora_linear"), product_dispatcher("lora_delta")


@dataclass(frozen=True)
class LoraMember:
    """One of the layers that read the same input; see `lora_linear` on each.

    Attributes:
        weight: W `(m, n)`, or `None` where the base layer works out its own product.
        start: what is added: the bias `(m,)`, or, without a weight, the base layer's result `(..., m)`; or `None`.
        a: A `(r, n)`.
        b: B `(m, r)`.
        scaling: s.
        dropout: of the adapter's input, each layer's own.
        extra: a frozen pair `(A0, B0, e)`.
    """

    weight: torch.Tensor | None
    start: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: Dropout | None = None
    extra: tuple[torch.Tensor, torch.Tensor, float] | None = None


def _check_factors(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, extra: object, outputs: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    check_tensor("a", a, shape=(None, x.shape[-1]), device=x.device)
    check_tensor("b", b, shape=(outputs, a.shape[0]), device=x.device)
    check_number("scaling", scaling)
    if extra is None:
        return None, None, 0.0
    if not isinstance(extra, tuple) or len(extra) != 3:
        raise TypeError(f"extra must be None or (a0, b0, scaling), got {type(extra).__name__}")
    a0, b0, extra_scaling = extra
    check_tensor("extra[0]", a0, shape=(None, x.shape[-1]), device=x.device)
    check_tensor("extra[1]", b0, shape=(b.shape[0], a0.shape[0]), device=x.device)
    check_number("extra[2]", extra_scaling)
    # Frozen: no gradient is worked out, so none may be waited for.
    return a0.detach(), b0.detach(), float(extra_scaling)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast asks for, as in `torch.nn.functional.linear`; `None` where it asks for nothing."""
    kind = x.device.type
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if not known or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _lowered(
    x: torch.Tensor, member: LoraMember, cast: torch.dtype | None, start: str
) -> tuple[tuple[torch.Tensor | None, ...], Numbers]:
    """A layer as autograd's function takes it, checked; `start` is what the caller calls that argument."""
    weight, first, outputs = member.weight, member.start, None
    if weight is not None:
        dtypes = FLOATS if cast is not None else (x.dtype,)
        check_tensor("weight", weight, shape=(None, x.shape[-1]), device=x.device, dtypes=dtypes)
        outputs = weight.shape[0]
        if first is not None:
            check_tensor(start, first, shape=(outputs,), device=x.device, dtypes=dtypes)
    a0, b0, extra_scaling = _check_factors(x, member.a, member.b, member.scaling, member.extra, outputs)
    if weight is None:
        if first is None:
            raise ValueError(f"{start} must be the base layer's result (..., m) where weight is None")
        check_tensor(start, first, shape=(*x.shape[:-1], member.b.shape[0]), device=x.device)
        first = first.to(x.dtype if cast is None else cast)
    threshold, seed, stream = lowered(member.dropout, x.device)
    numbers = Numbers(float(member.scaling), extra_scaling, threshold, stream)
    return (weight, first, member.a, member.b, a0, b0, seed), numbers


def _run(
    x: torch.Tensor, members: Sequence[LoraMember], backend: str, dispatcher: Dispatcher, start: str
) -> tuple[torch.Tensor, ...]:
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x has shape (), but must be (..., n)")
    cast = _autocast_dtype(x)
    tensors, numbers = zip(*(_lowered(x, each, cast, start) for each in members), strict=True)
    x = x if cast is None else x.to(cast)
    drops = any(each.threshold > 0 for each in numbers)
    return _function.run(x, tensors, numbers, dispatcher.choose(backend, x.device, x.dtype, drops))


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
    extra: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`x W^T + bias + s drop(x) A^T B^T`, differentiable in x, W, bias, A and B.

    Neither the dropout mask nor a dropped copy of x is stored, the mask is made anew in the backward pass: what
    autograd keeps is x, the weights and a `(tokens, r)` matrix. The arithmetic is that of x's dtype with float32 sums
    (under autocast, of autocast's dtype, as in `torch.nn.functional.linear`); A and B may have another dtype, float32
    masters of a bfloat16 model, say: they are cast for the products, and their gradients are rounded from float32 sums
    to their own dtype. (PEFT casts x up instead.) Works with `torch.compile`, checkpointing, `torch.func.grad`, `vjp`
    and `vmap` (one element of the batch at a time); it cannot be differentiated twice.

    Args:
        x: `(..., n)` float16, bfloat16 or float32; float64 on the torch backend.
        weight: W `(m, n)` of x's dtype (any dtype under autocast).
        bias: `(m,)` likewise, or `None`.
        a: A `(r, n)`.
        b: B `(m, r)`.
        scaling: s.
        dropout: of the adapter's input, or `None`; rows are counted over all leading sizes of x. See `Dropout` on where
            seeds come from.
        extra: a frozen pair `(A0, B0, e)`, `(q, n)` and `(m, q)`: `+ e x A0^T B0^T`, not dropped and without gradients
            of its own. With `e = -s` it takes off what an adapter started from, and the base weight stays as it was.
        backend: of the skinny products: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`. The product with W is
            the library's, unless `lora_kernels.tune` found the Triton kernel for both faster, and the backend is
            `triton`; see `use_form`.

    Returns:
        `(..., m)`.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    check_type("weight", weight, torch.Tensor, "a torch.Tensor")
    member = LoraMember(weight, bias, a, b, scaling, dropout, extra)
    return _run(x, (member,), backend, linear_dispatcher, "bias")[0]


def lora_delta(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
    extra: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`y + s drop(x) A^T B^T`, for a base layer that works out y by itself, a quantised one, say.

    The result is a new tensor: y is left as it is, since whatever made it may have saved it for its backward pass, and
    may share it. Reading y and writing the sum is one pass, as an addition in place would be; what it costs is memory
    for the sum, and y's own can be freed as soon as the caller lets go of it. (Where nothing needs a gradient, `expand`
    adds in place.)

    Args:
        y: `(..., m)`, the base layer's result; differentiable. It is cast to x's dtype if it has another.
        x: `(..., n)` with the same leading sizes.
        a: A `(r, n)`.
        b: B `(m, r)`.
        scaling: s.
        dropout: of the adapter's input; see `lora_linear`.
        extra: a frozen pair; see `lora_linear`.
        backend: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`.

    Returns:
        `(..., m)` in x's dtype, or autocast's.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    check_tensor("y", y)
    member = LoraMember(None, y, a, b, scaling, dropout, extra)
    return _run(x, (member,), backend, delta_dispatcher, "y")[0]


def lora_linear_group(
    x: torch.Tensor, members: Sequence[LoraMember], *, backend: str = "auto"
) -> tuple[torch.Tensor, ...]:
    """LoRA layers that read the same x (query, key and value; gate and up), their products side by side.

    The same numbers as `lora_linear` or `lora_delta` of each, up to rounding. x is read once for the `(tokens, r)`
    matrices of all layers and once for all gradients of A, and the gradient of x is accumulated in place instead of
    being made by every layer and added up. Where a layer has dropout its mask is its own, so the products that see the
    mask are taken layer by layer; x's gradient is accumulated in place all the same. Inside `torch.compile` and
    `torch.func` transforms the layers are taken one by one.

    Args:
        x: `(..., n)`, see `lora_linear`.
        members: at least one layer.
        backend: of the skinny products: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`.

    Returns:
        `(..., m)` of each layer.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number, or if there is no layer.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    if not isinstance(members, Sequence) or not all(isinstance(each, LoraMember) for each in members):
        raise TypeError(f"members must be a sequence of LoraMember, got {type(members).__name__} {shown(members)}")
    if not members:
        raise ValueError("members must hold at least one layer")
    return _run(x, members, backend, linear_dispatcher, "start")
