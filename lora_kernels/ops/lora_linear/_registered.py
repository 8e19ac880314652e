"""The LoRA layer as a registered operation: what `torch.compile`, fake tensors and dispatch modes see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_kernels.ops._dropout import mask_of
from lora_kernels.ops.lora_linear import _passes
from lora_kernels.ops.lora_linear._passes import Factors, Gradients, Member, Needs


@torch.library.custom_op("lora_kernels::lora_linear", mutates_args=())
def linear(
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


@linear.register_fake
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


# What `linear` takes, and which gradients there are, by position.
_X, _WEIGHT, _START, _A, _B = range(5)


@torch.library.custom_op("lora_kernels::lora_linear_backward", mutates_args=())
def linear_backward(
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


@linear_backward.register_fake
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
        found = linear_backward(
            g, x, weight, t, a, b, a0, b0, scaling, extra_scaling, threshold, seed, stream, *flags, backend
        )
        grads = [each if flag else None for each, flag in zip(found, flags, strict=True)]
    if base:
        grads[_START] = g
    for place, dtype in ((_WEIGHT, ctx.dtypes[0]), (_START, ctx.dtypes[1])):
        grad = grads[place]
        grads[place] = grad if grad is None else grad.to(dtype)
    return (*grads, *nothing[5:])


linear.register_autograd(_backward, setup_context=_setup_context)


def backward(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    members: Sequence[Member],
    need_x: bool,
    needs: Sequence[Needs],
    backend: str,
) -> tuple[torch.Tensor | None, list[Gradients]]:
    """`_passes.backward` by registered operations, layer by layer.

    Args:
        grads: see there, as all others.
        x: see there.
        t: see there.
        members: see there.
        need_x: see there.
        needs: see there.
        backend: see there.

    Returns:
        The gradients.
    """
    total, found, low = None, [], 0
    for g, member, need in zip(grads, members, needs, strict=True):
        factors, mask, rank = member.factors, member.mask, member.factors.a.shape[0]
        own = t if t is None else t[:, low : low + rank]
        low += rank
        flags = (need_x, need.weight, need.bias, need.a, need.b)
        if not any(flags):
            found.append(Gradients(None, None, None, None))
            continue
        made = linear_backward(
            g, x, member.weight, own, factors.a, factors.b, factors.a0, factors.b0, factors.scaling,
            factors.extra_scaling, 0 if mask is None else mask.threshold, None if mask is None else mask.seed,
            0 if mask is None else mask.stream, *flags, backend,
        )  # fmt: skip
        dx, *rest = (each if flag else None for each, flag in zip(made, flags, strict=True))
        total = dx if total is None or dx is None else total + dx
        found.append(Gradients(*rest))
    return total, found


def one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule: one call per element of the batch. Elements share a mask unless their seeds are a batch, too.

    Args:
        op: what is called; it returns a tuple.

    Returns:
        The rule.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        outputs = [
            op(*(each if dim is None else each.select(dim, i) for each, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(each) for each in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


linear.register_vmap(one_by_one(linear))
linear_backward.register_vmap(one_by_one(linear_backward))
