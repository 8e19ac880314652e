"""The LoRA layer: checks, the choice of backend, and its one node in autograd's graph.

Eager calls on ordinary tensors run `passes` directly; under tracing (compile, fake tensors, dispatch modes) the
registered operations run, which do the same.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels._checks import FLOATS, check_number, check_tensor, check_type
from lora_kernels.ops import _backend
from lora_kernels.ops._autocast import autocast_dtype
from lora_kernels.ops._dropout import Dropout, to_op_args
from lora_kernels.ops._op import Example, Op, is_plain, isolated, normal, pass_operation, relative_error
from lora_kernels.ops.lora_linear import passes, reference
from lora_kernels.ops.lora_linear.passes import Scalars, rows_of
from lora_kernels.ops.skinny._launch import cast
from lora_kernels.ops.skinny.op import product_backends

_casts, _learns = torch.is_autocast_enabled, torch.is_grad_enabled
_batched = torch._C._functorch.is_legacy_batchedtensor

TWICE = (
    "a fused LoRA layer cannot be differentiated twice (create_graph=True): compute second derivatives inside "
    "`with lora_kernels.training.reference_mode():`, where PEFT's own layers run"
)
TRANSFORMED = (
    "a fused LoRA layer cannot run inside torch.func transforms, nor take batched gradients: call them inside "
    "`with lora_kernels.training.reference_mode():`, where PEFT's own layers run"
)
_OTHER_ADAPTER = (
    "a checkpointed LoRA layer was recomputed with other adapters active, or another scaling or dropout, than when it "
    "was recorded, so its gradients would be wrong: run the backward pass before adapters are switched"
)


def _forward_fake(x: torch.Tensor, _weight: Any, _start: Any, a: Any, b: Any, a0: Any, *others: Any) -> Any:
    ranks = a.shape[0] + (0 if a0 is None else a0.shape[0])
    t = x.new_empty((x.shape[0], ranks), dtype=torch.float32 if others[-1] == "cpp" else None)
    return x.new_empty((x.shape[0], b.shape[0])), t


def backward_fake(g: torch.Tensor, x: Any, t: Any, _: Any, a: Any, b: Any, *others: Any) -> Any:
    """Empty gradients of the input and both factors, of one layer or of many experts."""
    return (
        g.new_empty((g.shape[0], a.shape[-1]) if others[-1] else (0,)),
        g.new_empty(0) if x is None else a.new_empty(a.shape),
        g.new_empty(0) if t is None else b.new_empty(b.shape),
    )


_BACKENDS = product_backends("lora_linear.kernel:linear")
layer = Op("lora_linear", pass_operation("lora_linear", passes.forward, _forward_fake), backends=_BACKENDS)
_backward = pass_operation("lora_linear_backward", passes.backward, backward_fake)
_NOTHING_ELSE = (None, None, None)  # no seed, no frozen pair


class LoraFunction(torch.autograd.Function):
    """The node of a layer. A call may leave out arguments at the end, which are otherwise passed on and saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        start: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scalars: Scalars,
        state: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
        a0: torch.Tensor | None = None,
        b0: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `passes`; `state` stands for what the layer was like, and must be the same in a recomputation."""
        y, t = run_forward(x, weight, start, a, b, a0, b0, seed, scalars)
        needs = ctx.needs_input_grad
        source, projected, right = (
            x if needs[3] or needs[1] else None, t if needs[4] else None, weight if needs[0] else None,
        )  # fmt: skip
        if seed is None and a0 is None:
            ctx.save_for_backward(source, projected, right, a, b, state)
        else:
            ctx.save_for_backward(source, projected, right, a, b, state, seed, a0, b0)
        ctx.scalars, ctx.state = scalars, state
        if needs[1] or needs[2]:
            ctx.dtypes = None if weight is None else weight.dtype, None if start is None else start.dtype
            ctx.is_bias = weight is not None
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x, the weight, the start, A and B."""
        x, t, weight, a, b, state, *others = ctx.saved_tensors
        seed, a0, b0 = others or _NOTHING_ELSE
        need_x, need_weight, need_start, need_a, need_b, *_ = ctx.needs_input_grad
        scalars, plain = ctx.scalars, is_plain(g)
        if plain:
            if _learns():
                raise RuntimeError(TWICE)
            if _batched(g):  # is_grads_batched, jacobian(vectorize=True)
                raise RuntimeError(TRANSFORMED)
            if state is not ctx.state:
                refuse_other_adapter(state, ctx.state)
        else:
            g = with_memory(g)
        rows = g if g.dim() == 2 and g.is_contiguous() else rows_of(g)
        source = x if x is None or (x.dim() == 2 and x.is_contiguous()) else rows_of(x)
        dx = da = db = dw = start = None
        if need_x or need_a or need_b:
            tensors = (rows, source if need_a else None, t, weight, a, b, a0, b0, seed)
            if not plain:
                dx, da, db = _backward(*tensors, *scalars, need_x)
            elif g.is_cpu and not _casts("cpu"):
                dx, da, db = passes.backward(*tensors, scalars, need_x)
            else:
                with isolated(g.device):
                    dx, da, db = passes.backward(*tensors, scalars, need_x)
            if not need_x:
                dx = None
            elif g.dim() != 2:
                dx = dx.view(*g.shape[:-1], a.shape[1])  # type: ignore[union-attr]
            da, db = da if need_a else None, db if need_b else None
        if need_weight:
            dw = cast(torch.mm(rows.mT, source), ctx.dtypes[0])  # type: ignore[arg-type]
        if need_start:
            start = cast(rows.sum(0), ctx.dtypes[1]) if ctx.is_bias else g
        return dx, dw, start, da, db, None, None, None, None, None  # of arguments left out, too


# `LoraFunction.apply` without a walk over its arguments, which looks for what `torch.func` transforms have left behind.
# For calls outside of them, and not under tracing.
apply_directly = super(torch.autograd.Function, LoraFunction).apply


def refuse_other_adapter(state: torch.Tensor | None, recorded: torch.Tensor | None) -> None:
    """Raise if the layer that was recomputed (`state`) is not what it was when it was recorded."""
    if state is not recorded and (state is None or recorded is None or not torch.equal(state, recorded)):
        raise RuntimeError(_OTHER_ADAPTER)


def with_memory(tensor: torch.Tensor) -> torch.Tensor:
    """An argument of the registered operations: torch's zeros without memory become ordinary ones."""
    zeros = not torch.compiler.is_compiling() and torch._is_zerotensor(tensor)
    return tensor.clone() if zeros else tensor


def run_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    start: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    a0: torch.Tensor | None,
    b0: torch.Tensor | None,
    seed: torch.Tensor | None,
    scalars: Scalars,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y `(..., m)` and t `(tokens, r + q)` of arguments that are checked, without autograd."""
    rows = x if x.dim() == 2 and x.is_contiguous() else rows_of(x)
    if start is not None and weight is None:
        start = rows_of(start)
    if not is_plain(x, start):
        y, t = layer.overload(with_memory(rows), weight, start, a, b, a0, b0, seed, *scalars)
    elif x.is_cpu and not _casts("cpu"):
        y, t = passes.forward(rows, weight, start, a, b, a0, b0, seed, scalars)
    else:
        with isolated(x.device):
            y, t = passes.forward(rows, weight, start, a, b, a0, b0, seed, scalars)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]), t


def _checked_pair(
    x: torch.Tensor, b: torch.Tensor, extra: object
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    if extra is None:
        return None, None, 0.0
    if not isinstance(extra, tuple) or len(extra) != 3:
        raise TypeError(f"extra must be None or (a0, b0, scaling), got {type(extra).__name__}")
    a0, b0, scaling = extra
    check_tensor("extra[0]", a0, shape=(None, x.shape[-1]), device=x.device)
    check_tensor("extra[1]", b0, shape=(b.shape[0], a0.shape[0]), device=x.device)
    check_number("extra[2]", scaling)
    return a0.detach(), b0.detach(), float(scaling)  # frozen: no gradient is computed, so none may be waited for


def _run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    start: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dropout: Dropout | None,
    extra: object,
    backend: str,
    name: str,
    start_name: str,
) -> torch.Tensor:
    check_tensor("x", x, form="(..., n)")
    cast, outputs = autocast_dtype(x), None
    if weight is not None:
        dtypes = FLOATS if cast is not None else (x.dtype,)
        check_tensor("weight", weight, shape=(None, x.shape[-1]), device=x.device, dtypes=dtypes)
        outputs = weight.shape[0]
        if start is not None:
            check_tensor(start_name, start, shape=(outputs,), device=x.device, dtypes=dtypes)
    check_tensor("a", a, shape=(None, x.shape[-1]), device=x.device)
    check_tensor("b", b, shape=(outputs, a.shape[0]), device=x.device)
    check_number("scaling", scaling)
    a0, b0, frozen_scaling = _checked_pair(x, b, extra)
    if weight is None and start is not None:
        check_tensor(start_name, start, shape=(*x.shape[:-1], b.shape[0]), device=x.device)
        start = start.to(x.dtype if cast is None else cast)
    threshold, seed, stream = to_op_args(dropout, x.device)
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise RuntimeError(TRANSFORMED)
    x = x if cast is None else x.to(cast)
    rank = a.shape[0] + (0 if a0 is None else a0.shape[0])
    chosen = _backend.choose(name, _BACKENDS, backend, (x.device, x.dtype, threshold > 0, rank)).name
    scalars = Scalars(float(scaling), frozen_scaling, threshold, stream, chosen)
    y: torch.Tensor = LoraFunction.apply(x, weight, start, a, b, scalars, None, seed, a0, b0)  # type: ignore[no-untyped-call]
    return y


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
    to their own dtype. (PEFT casts x up instead.) Works with `torch.compile` and checkpointing; it cannot be
    differentiated twice, nor run inside `torch.func` transforms.

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
        RuntimeError: if the backend asked for cannot take the call, or inside a `torch.func` transform; the message
            says why, and what to do.
    """
    check_type("weight", weight, torch.Tensor, "a torch.Tensor")
    return _run(x, weight, bias, a, b, scaling, dropout, extra, backend, "lora_linear", "bias")


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
        RuntimeError: if the backend asked for cannot take the call, or inside a `torch.func` transform; the message
            says why, and what to do.
    """
    check_tensor("y", y)
    return _run(x, None, y, a, b, scaling, dropout, extra, backend, "lora_delta", "y")


@layer.self_test(terms=97 + 70 + 33 + 8)
def _example(device: torch.device) -> Example:
    tensors = normal(device, (97, 70), (33, 70), (33,), (8, 70), (33, 8))
    x, weight, bias, a, b = leaves = [tensor.requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    settings: dict[str, Any] = {"scaling": 0.5, "dropout": Dropout(0.1, 1)}
    truth = reference.lora_linear(*exact, **settings)
    truths = (truth, *torch.autograd.grad(truth.sum(), exact))

    def error(y: torch.Tensor) -> float:
        return relative_error((y, *torch.autograd.grad(y.sum(), leaves, retain_graph=True)), truths)

    return {"x": x, "weight": weight, "bias": bias, "a": a, "b": b, **settings}, error
