"""The low-rank part of many experts: checks, the choice of backend, and its one node in autograd's graph."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels._checks import check_number, check_tensor
from lora_kernels.ops import _backend
from lora_kernels.ops._autocast import autocast_dtype
from lora_kernels.ops._dropout import Dropout, to_op_args
from lora_kernels.ops._op import (
    Example,
    Op,
    is_plain,
    isolated,
    no_float64,
    normal,
    on_cpp,
    on_torch,
    on_triton,
    pass_operation,
    relative_error,
)
from lora_kernels.ops.grouped_lora import passes, reference
from lora_kernels.ops.grouped_lora.passes import Scalars, bounds_of
from lora_kernels.ops.lora_linear.op import TRANSFORMED, TWICE, backward_fake, refuse_other_adapter, with_memory
from lora_kernels.ops.lora_linear.passes import rows_of


def _no_cpp(x: torch.Tensor) -> str | None:
    return None if x.dtype in (torch.float32, torch.bfloat16) else f"takes no {x.dtype}"


def _forward_fake(y: torch.Tensor, x: torch.Tensor, _offsets: Any, a: Any, *others: Any) -> Any:
    t = x.new_empty((x.shape[0], a.shape[1]), dtype=torch.float32 if others[-1] == "cpp" else None)
    return x.new_empty(y.shape), t


# Asked with x alone.
_BACKENDS = (on_triton("grouped_lora.kernel:shrink", no_float64), on_cpp("", _no_cpp), on_torch(""))
experts = Op("grouped_lora", pass_operation("grouped_lora", passes.forward, _forward_fake), backends=_BACKENDS)
_backward = pass_operation("grouped_lora_backward", passes.backward, backward_fake)


class GroupedLoraFunction(torch.autograd.Function):
    """The node of the low-rank part of many experts."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        offsets: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        seed: torch.Tensor | None,
        state: torch.Tensor | None,
        scalars: Scalars,
        in_place: bool,
    ) -> torch.Tensor:
        """See `passes`; `state` stands for what the layer was like, and must be the same in a recomputation.

        With `in_place`, y is the caller's alone and may be written over.
        """
        base, rows = rows_of(y), rows_of(x)
        if not is_plain(y, x, offsets, a, b):
            out, t = experts.overload(with_memory(base), with_memory(rows), offsets, a, b, seed, *scalars)
        else:
            in_place = in_place and y.is_contiguous() and not y._is_view() and not (y.is_leaf and y.requires_grad)
            with isolated(x.device):
                out, t = passes.forward(y if in_place else base, rows, offsets, a, b, seed, scalars, in_place=in_place)
            if in_place:
                ctx.mark_dirty(y)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[3] else None, t if needs[4] else None, offsets, a, b, seed, state)
        ctx.scalars, ctx.state = scalars, state
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of y, x, A and B."""
        x, t, offsets, a, b, seed, state = ctx.saved_tensors
        need_y, need_x, _, need_a, need_b, *_ = ctx.needs_input_grad
        plain = is_plain(g, offsets, a, b)
        if is_plain(g):
            if torch.is_grad_enabled():
                raise RuntimeError(TWICE)
            if torch._C._functorch.is_legacy_batchedtensor(g):
                raise RuntimeError(TRANSFORMED)
            refuse_other_adapter(state, ctx.state)
        else:
            g = with_memory(g)
        dx = da = db = None
        if need_x or need_a or need_b:
            tensors = (rows_of(g), None if x is None else rows_of(x), t, offsets, a, b, seed)
            if plain:
                with isolated(g.device):
                    dx, da, db = passes.backward(*tensors, ctx.scalars, need_x)
            else:
                dx, da, db = _backward(*tensors, *ctx.scalars, need_x)
        return (
            g if need_y else None, dx if need_x else None, None, da if need_a else None, db if need_b else None,
            None, None, None, None,
        )  # fmt: skip


# `grouped_lora` of arguments that are checked.
run: Any = GroupedLoraFunction.apply


def grouped_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`y + s drop(x) A_e^T B_e^T`: the low-rank part of the linear layers of many experts, added to their products.

    Rows are sorted by expert: `offsets[e]` to `offsets[e + 1] - 1` are those of expert e, which may have none. Rows
    from the last offset on belong to no expert, and keep their y. Nothing of the size of the experts' weights is made.
    The arithmetic is that of `lora_delta`: of x's dtype (or autocast's) with float32 sums; differentiable, once, in y,
    x, A and B. On a GPU the offsets are not waited for, and so not checked: wrong ones give wrong numbers, but touch no
    memory outside of the tensors.

    Args:
        y: `(rows, m)`, the experts' own products; cast to x's dtype if it has another.
        x: `(rows, n)` float16, bfloat16 or float32; float64 on the torch backend.
        offsets: `(experts + 1,)` int32 or int64 on x's device: 0, then where the rows of each expert end.
        a: A `(experts, r, n)`; its gradient is rounded from float32 sums to its own dtype, as that of B is.
        b: B `(experts, m, r)`.
        scaling: s.
        dropout: of x, whose rows are counted as they are sorted, or `None`.
        backend: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`.

    Returns:
        `(rows, m)` in x's dtype, or autocast's.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number, or on offsets (of CPU tensors) that are none.
        RuntimeError: if the backend asked for cannot take the call, or inside a `torch.func` transform; the message
            says why, and what to do.
    """
    check_tensor("x", x, shape=(None, None))
    rows, inputs = x.shape
    check_tensor("a", a, shape=(None, None, inputs), device=x.device)
    check_tensor("b", b, shape=(a.shape[0], None, a.shape[1]), device=x.device)
    check_tensor("y", y, shape=(rows, b.shape[1]), device=x.device)
    kinds = (torch.int32, torch.int64)
    check_tensor("offsets", offsets, shape=(a.shape[0] + 1,), dtypes=kinds, device=x.device)
    check_number("scaling", scaling)
    threshold, seed, stream = to_op_args(dropout, x.device)
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise RuntimeError(TRANSFORMED)
    if offsets.is_cpu and is_plain(offsets):
        bounds_of(offsets, rows)
    dtype = autocast_dtype(x) or x.dtype
    x, y = x.to(dtype), y.to(dtype)
    chosen = _backend.choose("grouped_lora", _BACKENDS, backend, (x,)).name
    scalars = Scalars(float(scaling), threshold, stream, chosen)
    return run(y, x, offsets, a, b, seed, None, scalars, False)  # type: ignore[no-any-return]


@experts.self_test(terms=97 + 70 + 33 + 8)
def _example(device: torch.device) -> Example:
    tensors = normal(device, (97, 33), (97, 70), (3, 8, 70), (3, 33, 8))
    y, x, a, b = leaves = [tensor.requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    offsets = torch.tensor([0, 50, 50, 90], device=device)
    settings: dict[str, Any] = {"scaling": 0.5, "dropout": Dropout(0.1, 1)}
    truth = reference.grouped_lora(exact[0], exact[1], offsets, exact[2], exact[3], **settings)
    truths = (truth, *torch.autograd.grad(truth.sum(), exact))

    def error(out: torch.Tensor) -> float:
        return relative_error((out, *torch.autograd.grad(out.sum(), leaves, retain_graph=True)), truths)

    return {"y": y, "x": x, "offsets": offsets, "a": a, "b": b, **settings}, error
