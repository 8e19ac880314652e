"""LoRA layers of one input as one node of autograd's graph.

Plain eager calls run here, without the dispatcher between them and the products; where something looks on (a compiler,
fake tensors, a dispatch mode) the registered operation runs in its place, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lora_kernels.ops._dropout import mask_of
from lora_kernels.ops.lora_linear import _passes, _registered
from lora_kernels.ops.lora_linear._passes import Factors, Member, Needs
from lora_kernels.ops.skinny._launch import cast

# A layer's tensors, in the order in which everything here takes them.
_WEIGHT, _START, _A, _B, _A0, _B0, _SEED = range(7)
_TENSORS = 7
Tensors = Sequence[torch.Tensor | None]


class Numbers(NamedTuple):
    """What a layer is besides its tensors.

    Attributes:
        scaling: s.
        extra_scaling: e.
        threshold: of its dropout; 0 for none.
        stream: of its dropout.
    """

    scaling: float
    extra_scaling: float
    threshold: int
    stream: int

    def member(self, tensors: Sequence[Any]) -> Member:
        """The layer as the passes take it.

        Args:
            tensors: its seven.

        Returns:
            The layer.
        """
        weight, start, a, b, a0, b0, seed = tensors
        mask = mask_of(self.threshold, seed, self.stream)
        return Member(Factors(a, b, self.scaling, a0, b0, self.extra_scaling), weight, start, mask)


class _Plan:
    """All that is no tensor, in one object: `torch.func` takes tuples apart."""

    __slots__ = ("backend", "numbers")

    def __init__(self, numbers: tuple[Numbers, ...], backend: str) -> None:
        self.numbers, self.backend = numbers, backend


def _split(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    return [tensors[low : low + _TENSORS] for low in range(0, len(tensors), _TENSORS)]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether memory can be worked on directly: an ordinary tensor, and nobody who looks on."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type != "meta"
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _resolved(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """With its numbers in memory: kernels see addresses, not that a view negates, or stands for zeros."""
    if tensor is None or not (tensor.is_neg() or torch._is_zerotensor(tensor)):
        return tensor
    return tensor.resolve_neg() if tensor.is_neg() else tensor.clone()


def _in_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


def _forward(x: torch.Tensor, plan: _Plan, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    members = [each.member(own) for each, own in zip(plan.numbers, _split(tensors), strict=True)]
    outputs, t = _passes.forward(x, members, plan.backend)
    return (*outputs, t)


def _save(ctx: Any, x: torch.Tensor, plan: _Plan, tensors: Tensors, t: torch.Tensor) -> None:
    ctx.set_materialize_grads(False)  # a layer whose output nobody uses costs nothing
    needs, given = _split(ctx.needs_input_grad[2:]), _split(tensors)
    kept: list[torch.Tensor | None] = []
    for weight, _, a, b, a0, b0, seed in given:
        kept += (weight if ctx.needs_input_grad[0] else None, a, b, a0, b0, seed)
    keep_x = any(need[_A] or need[_WEIGHT] for need in needs)
    ctx.save_for_backward(x if keep_x else None, t if any(need[_B] for need in needs) else None, *kept)
    ctx.plan = plan
    ctx.rows = [start is not None and start.dim() == 1 for _, start, *_ in given]
    ctx.dtypes = [tuple(None if each is None else each.dtype for each in own[: _START + 1]) for own in given]


def _backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    x, t, *kept = ctx.saved_tensors
    needs, size = _split(ctx.needs_input_grad[2:]), _TENSORS - 1
    used, members, wanted, columns, low = [], [], [], [], 0
    for i, (g, numbers) in enumerate(zip(grads, ctx.plan.numbers, strict=True)):
        weight, a, *others = kept[size * i : size * (i + 1)]
        rank = a.shape[0]
        if g is not None:
            need = needs[i]
            used.append(i)
            members.append(numbers.member((weight, None, a, *others)))
            wanted.append(Needs(need[_WEIGHT], need[_START] and ctx.rows[i], need[_A], need[_B]))
            columns.append(slice(low, low + rank))
        low += rank
    results: list[list[torch.Tensor | None]] = [[None] * _TENSORS for _ in ctx.plan.numbers]
    dx = None
    if used:
        if t is not None and len(used) < len(results):
            t = torch.cat([t[:, each] for each in columns], 1)
        gs = [each for each in map(_resolved, grads) if each is not None]
        run = _passes.backward if _is_plain(gs[0]) and not _in_transform() else _registered.backward
        dx, found = run(gs, x, t, members, ctx.needs_input_grad[0], wanted, ctx.plan.backend)
        for i, made, g in zip(used, found, gs, strict=True):
            start = g if needs[i][_START] and not ctx.rows[i] else made.bias
            for place, grad in ((_WEIGHT, made.weight), (_START, start)):
                results[i][place] = None if grad is None else grad.to(ctx.dtypes[i][place])
            results[i][_A], results[i][_B] = made.a, made.b
    return dx, None, *(each for result in results for each in result)


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: _Plan, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        *outputs, t = _forward(x, plan, tensors)
        _save(ctx, x, plan, tensors, t)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _backward(ctx, grads)


class _Layer(torch.autograd.Function):
    """The same for one layer, which most calls are, without the bookkeeping of several."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: _Plan, *tensors: torch.Tensor | None) -> torch.Tensor:
        (y,), t = _passes.forward(x, (plan.numbers[0].member(tensors),), plan.backend)
        weight, start, a, b, *others = tensors
        need_x, _, need_weight, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_a or need_weight else None, t if need_b else None, weight if need_x else None, a, b, *others
        )
        ctx.plan, ctx.row_start = plan, start is not None and start.dim() == 1
        ctx.dtypes = None if weight is None else weight.dtype, None if start is None else start.dtype
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, t, weight, *others = ctx.saved_tensors
        g: Any = _resolved(grad)
        need_x, _, need_weight, need_start, need_a, need_b, *_ = ctx.needs_input_grad
        plan = ctx.plan
        needs = Needs(need_weight, need_start and ctx.row_start, need_a, need_b)
        member = plan.numbers[0].member((weight, None, *others))
        run = _passes.backward if _is_plain(g) and not _in_transform() else _registered.backward
        dx, (own,) = run((g,), x, t, (member,), need_x, (needs,), plan.backend)
        dw, start = own.weight, g if need_start and not ctx.row_start else own.bias
        dw = None if dw is None else cast(dw, ctx.dtypes[0])
        start = None if start is None else cast(start, ctx.dtypes[1])
        return dx, None, dw, start, own.a, own.b, None, None, None


class _Transformed(torch.autograd.Function):
    """The same for `torch.func`, whose form costs every call an inspection of its signature."""

    @staticmethod
    def forward(x: torch.Tensor, plan: _Plan, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return _forward(x, plan, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, plan, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        _save(ctx, x, plan, tensors, output[-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _backward(ctx, grads[:-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        found: tuple[Any, Any] = _registered.one_by_one(_Transformed.apply)(info, in_dims, *args)
        return found


def run(
    x: torch.Tensor, tensors: Sequence[Tensors], numbers: Sequence[Numbers], backend: str
) -> tuple[torch.Tensor, ...]:
    """The outputs of layers, differentiable.

    Args:
        x: `(..., n)`, in the dtype of the arithmetic.
        tensors: of each layer: weight, start, A, B, A0, B0 and seed, each a tensor or `None`.
        numbers: of each layer.
        backend: `triton`, `cpp` or `torch`.

    Returns:
        `(..., m)` of each layer.
    """
    if not _is_plain(x):
        outputs = []
        for own, each in zip(tensors, numbers, strict=True):
            *first, seed = own
            outputs.append(
                _registered.linear(
                    x, *first, each.scaling, each.extra_scaling, each.threshold, seed, each.stream, backend
                )[0]
            )
        return tuple(outputs)
    plan, flat = _Plan(tuple(numbers), backend), [_resolved(each) for own in tensors for each in own]
    x = _resolved(x)  # type: ignore[assignment]
    if not _in_transform():
        if len(numbers) == 1:
            return (_Layer.apply(x, plan, *flat),)  # type: ignore[no-untyped-call]
        found: tuple[torch.Tensor, ...] = _Layers.apply(x, plan, *flat)  # type: ignore[no-untyped-call]
        return found
    transformed: tuple[torch.Tensor, ...] = _Transformed.apply(x, plan, *flat)  # type: ignore[no-untyped-call]
    return transformed[:-1]
