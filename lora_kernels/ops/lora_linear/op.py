"""The LoRA layer: checks, registration with autograd, and the choice of backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_kernels.ops._checks import check_number, check_tensor
from lora_kernels.ops._dropout import Dropout, lowered, mask_of
from lora_kernels.ops.lora_linear import _passes
from lora_kernels.ops.lora_linear._passes import Factors, Member, Needs
from lora_kernels.ops.skinny.op import product_dispatcher

linear_dispatcher, delta_dispatcher = product_dispatcher("lora_linear"), product_dispatcher("lora_delta")


@torch.library.custom_op("lora_kernels::lora_linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    start: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    a0: torch.Tensor | None,
    b0: torch.Tensor | None,
    scaling: float,
    extra_scaling: float,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    factors, mask = Factors(a, b, scaling, a0, b0, extra_scaling), mask_of(threshold, seed, stream)
    outputs, t = _passes.forward(x, (Member(factors, weight, start, mask),), backend)
    return outputs[0], t


@_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    start: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    a0: torch.Tensor | None,
    b0: torch.Tensor | None,
    scaling: float,
    extra_scaling: float,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(math.prod(x.shape[:-1]), a.shape[0])


# What `_linear` takes, and which gradients there are, by position.
_X, _WEIGHT, _START, _A, _B = range(5)


@torch.library.custom_op("lora_kernels::lora_linear_backward", mutates_args=())
def _linear_backward(
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    t: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    a0: torch.Tensor | None,
    b0: torch.Tensor | None,
    scaling: float,
    extra_scaling: float,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_a: bool,
    need_b: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    factors, mask = Factors(a, b, scaling, a0, b0, extra_scaling), mask_of(threshold, seed, stream)
    member, needs = Member(factors, weight, None, mask), Needs(need_weight, need_bias, need_a, need_b)
    dx, (own,) = _passes.backward((g,), x, t, (member,), need_x, (needs,), backend)
    # What an op returns must be memory of its own, the empty ones too.
    made = (dx, own.weight, own.bias, own.a, own.b)
    return tuple(g.new_empty(0) if each is None else each for each in made)  # type: ignore[return-value]


@_linear_backward.register_fake
def _(
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    t: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    a0: torch.Tensor | None,
    b0: torch.Tensor | None,
    scaling: float,
    extra_scaling: float,
    threshold: int,
    seed: torch.Tensor | None,
    stream: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_a: bool,
    need_b: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs, features = b.shape[0], a.shape[1]
    return (
        g.new_empty(*g.shape[:-1], features) if need_x else g.new_empty(0),
        g.new_empty(outputs, features) if need_weight else g.new_empty(0),
        g.new_empty(outputs) if need_bias else g.new_empty(0),
        torch.empty_like(a, memory_format=torch.contiguous_format) if need_a else g.new_empty(0),
        torch.empty_like(b, memory_format=torch.contiguous_format) if need_b else g.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, start, a, b, a0, b0, *numbers = inputs
    scaling, extra_scaling, threshold, seed, stream, backend = numbers
    needs = ctx.needs_input_grad
    ctx.set_materialize_grads(False)  # nobody differentiates t
    ctx.save_for_backward(
        x if needs[_A] or needs[_WEIGHT] else None,
        weight if needs[_X] else None,
        output[1] if needs[_B] else None,
        a,
        b,
        a0,
        b0,
        seed,
    )
    ctx.numbers = scaling, extra_scaling, threshold, stream, backend
    ctx.row_start = start is not None and start.dim() == 1
    ctx.dtypes = weight if weight is None else weight.dtype, start if start is None else start.dtype


def _backward(ctx: Any, g: torch.Tensor | None, _t: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    nothing: list[torch.Tensor | None] = [None] * 13
    if g is None:
        return tuple(nothing)
    x, weight, t, a, b, a0, b0, seed = ctx.saved_tensors
    scaling, extra_scaling, threshold, stream, backend = ctx.numbers
    needs = list(ctx.needs_input_grad[:5])
    base = needs[_START] and not ctx.row_start
    flags = [needs[_X], needs[_WEIGHT], needs[_START] and ctx.row_start, needs[_A], needs[_B]]
    grads: list[torch.Tensor | None] = [None] * 5
    if any(flags):
        found = _linear_backward(
            g, x, weight, t, a, b, a0, b0, scaling, extra_scaling, threshold, seed, stream, *flags, backend
        )
        grads = [each if flag else None for each, flag in zip(found, flags, strict=True)]
    if base:
        grads[_START] = g
    for place, dtype in ((_WEIGHT, ctx.dtypes[0]), (_START, ctx.dtypes[1])):
        grad = grads[place]
        grads[place] = grad if grad is None else grad.to(dtype)
    return (*grads, *nothing[5:])


_linear.register_autograd(_backward, setup_context=_setup_context)


def _one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule: one call per element of the batch. Elements share a mask unless their seeds are a batch, too."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        outputs = [
            op(*(each if dim is None else each.select(dim, i) for each, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(each) for each in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


_linear.register_vmap(_one_by_one(_linear))
_linear_backward.register_vmap(_one_by_one(_linear_backward))


class _Transformed(torch.autograd.Function):
    """The same op inside `torch.func.grad` and the like, which registered ops cannot be differentiated by."""

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = _linear(*args)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _setup_context(ctx, inputs, output)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        found: tuple[Any, Any] = _one_by_one(_Transformed.apply)(info, in_dims, *args)
        return found


def in_transform() -> bool:
    """Whether a `torch.func` transform is active."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _run(*args: Any) -> torch.Tensor:
    run: Callable[..., Any] = _Transformed.apply if in_transform() else _linear
    y: torch.Tensor = run(*args)[0]
    return y


def check_factors(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, extra: object, outputs: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """Check a layer's input and factors.

    Args:
        x: `(..., n)`.
        a: `(r, n)`.
        b: `(outputs, r)`.
        scaling: s.
        extra: `None` or `(a0, b0, e)`.
        outputs: m, or `None` if b tells.

    Returns:
        The frozen pair, detached, and its scaling.

    Raises:
        TypeError: on a wrong type.
        ValueError: on a wrong shape or device.
    """
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x has shape (), but must be (..., n)")
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


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast asks for, as in `torch.nn.functional.linear`; `None` where it asks for nothing."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


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
            the library's.

    Returns:
        `(..., m)`.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    check_tensor("weight", weight, shape=(None, None))
    tail = check_factors(x, a, b, scaling, extra, weight.shape[0])
    cast = autocast_dtype(x)
    allowed = {} if cast is not None else {"dtypes": (x.dtype,)}
    check_tensor("weight", weight, shape=(None, x.shape[-1]), device=x.device, **allowed)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), device=x.device, **allowed)
    x = x if cast is None else x.to(cast)
    drop = lowered(dropout, x.device)
    chosen = linear_dispatcher.choose(backend, x.device, x.dtype, drop[0] > 0)
    return _run(x, weight, bias, a, b, *tail[:2], float(scaling), tail[2], *drop, chosen)


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
    tail = check_factors(x, a, b, scaling, extra, None)
    check_tensor("y", y, shape=(*x.shape[:-1], b.shape[0]), device=x.device)
    cast = autocast_dtype(x)
    x = x if cast is None else x.to(cast)
    drop = lowered(dropout, x.device)
    chosen = delta_dispatcher.choose(backend, x.device, x.dtype, drop[0] > 0)
    start = y.to(x.dtype)
    return _run(x, None, start, a, b, *tail[:2], float(scaling), tail[2], *drop, chosen)
