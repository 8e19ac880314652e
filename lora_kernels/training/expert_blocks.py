"""Frozen experts with their low-rank parts on a CPU: one node of autograd's graph, a block of rows after another.

Memory of the size of all rows costs more here than what is computed in it: its pages are new at every call, and its
numbers have left the cache when the next step reads them. A block has the rows of some experts, about `ROWS` of them,
and goes through all steps before the next one. Of all rows only z is kept; the rest is made again.

    z = x W1^T + bias + low-rank part           (rows of the block, m)
    h = gate(z)
    y = h W2^T + bias + low-rank part
    out[token] += w y                           w: the weight of a row's expert

    q = g[token] W2 + low-rank part             g: the gradient of out; w q is that of h
    dw = q . h + g[token] . bias                what g[token] . y is: no y is kept
    dz = gate'(z)(w q)
    dx[token] += dz W1 + low-rank part
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lora_kernels.ops._op import is_plain, isolated
from lora_kernels.ops.grouped_lora import op as grouped
from lora_kernels.ops.grouped_lora import passes
from lora_kernels.ops.grouped_lora.passes import Scalars
from lora_kernels.ops.lora_linear.op import TRANSFORMED, TWICE, refuse_other_adapter, with_memory
from lora_kernels.training.description import is_replaced

ROWS = 512  # of a block, at most, if it has more than one expert: experts are not cut


class Term(NamedTuple):
    """The low-rank part of a product, of one adapter."""

    a: torch.Tensor  # of all experts, `(experts, r, n)`
    b: torch.Tensor  # `(experts, m, r)`
    scaling: float
    state: torch.Tensor | None  # differs where the adapter does, for recomputations; `None` under tracing


class _Block(NamedTuple):
    experts: slice
    rows: slice
    offsets: torch.Tensor  # of its experts' rows in it
    bounds: list[int]  # the same


class _Call(NamedTuple):
    """What a call is besides the tensors of autograd's graph."""

    gate: Callable[[torch.Tensor], torch.Tensor]
    transposed: bool
    blocks: list[_Block]
    owners: torch.Tensor  # `(rows,)`, the token of each row
    order: torch.Tensor  # `(rows,)`, its place among the choices
    scalars: tuple[list[Scalars], list[Scalars]]  # of the low-rank parts, by product
    states: list[torch.Tensor | None]
    learns: bool


def _names(module: Any) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def can_run(module: Any, x: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether a module of experts can take x `(tokens, n)` by blocks: on a CPU, frozen, in one dtype, unobserved."""
    if x.device.type != "cpu" or not is_plain(x, weights, *module.parameters()) or torch.is_autocast_enabled("cpu"):
        return False
    if getattr(module, "has_post_expert_norm", False) or any(map(is_replaced, module.children())):
        return False
    return all(each.dtype == x.dtype and not each.requires_grad for each in module.parameters())


def run(
    module: Any,
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    terms: dict[str, list[Term]],
) -> torch.Tensor:
    """What the experts of a module make of x `(tokens, n)`, weighted by `(tokens, k)`: `(tokens, n)` of x's dtype.

    `order` holds the places of the rows, sorted by expert, among the choices; `offsets` is that of their experts.
    """
    names = _names(module)
    by_product = [terms.get(name, []) for name in names]
    backend = grouped.experts.choose("auto", x)
    first, second = ([Scalars(term.scaling, 0, 0, backend) for term in each] for each in by_product)
    states = [term.state for each in by_product for term in each]
    gate = module._apply_gate if module.has_gate else module.act_fn
    call = _Call(
        gate, module.is_transposed, _cut(offsets), order // weights.shape[1], order,
        (first, second), states, torch.is_grad_enabled(),
    )  # fmt: skip
    operands = [getattr(module, f"{name}{kind}", None) for name in names for kind in ("", "_bias")]
    factors = [factor for each in by_product for term in each for factor in (term.a, term.b)]
    out: torch.Tensor = _Blocks.apply(call, x, weights, *operands, *factors)  # type: ignore[no-untyped-call]
    return out


def _cut(offsets: torch.Tensor) -> list[_Block]:
    """Blocks of consecutive experts, all of them."""
    blocks, bounds = [], offsets.tolist()
    first, experts = 0, len(bounds) - 1
    for last in range(1, experts + 1):
        if last == experts or bounds[last + 1] - bounds[first] > ROWS:
            begin = bounds[first]
            mine = [bound - begin for bound in bounds[first : last + 1]]
            rows = slice(begin, bounds[last])
            blocks.append(_Block(slice(first, last), rows, offsets[first : last + 1] - begin, mine))
            first = last
    return blocks


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: _Block) -> torch.Tensor:
    """`x W_e^T` with the bias, of the rows of a block and weights `(experts, m, n)`."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, (low, high) in enumerate(itertools.pairwise(block.bounds), block.experts.start):
        if low < high and bias is None:
            torch.mm(x[low:high], weight[expert].mT, out=out[low:high])
        elif low < high and bias is not None:
            torch.addmm(bias[expert], x[low:high], weight[expert].mT, out=out[low:high])
    return out


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _Factors:
    """The low-rank parts of one product, forward and backward, block by block."""

    def __init__(self, scalars: list[Scalars], factors: Sequence[torch.Tensor], needs: Sequence[bool]) -> None:
        self.terms = list(zip(factors[::2], factors[1::2], scalars, strict=True))
        self.needs = list(zip(needs[::2], needs[1::2], strict=True))
        self.gradients: list[list[torch.Tensor]] = [[] for _ in needs]

    def add(self, y: torch.Tensor, x: torch.Tensor, block: _Block) -> list[torch.Tensor]:
        """Add to y; what `gradient` needs again."""
        experts, kept = block.experts, []
        for a, b, scalars in self.terms:
            kept.append(passes.forward(y, x, block.offsets, a[experts], b[experts], None, scalars, in_place=True)[1])
        return kept

    def gradient(
        self, dx: torch.Tensor, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor | None, t: Any, block: _Block
    ) -> None:
        """Add to the gradient of x, and keep those of the factors, of rows that count w times."""
        experts = block.experts
        for number, ((a, b, scalars), (need_a, need_b)) in enumerate(zip(self.terms, self.needs, strict=True)):
            mine = None if not need_b else t[number] if w is None else t[number] * w.to(t[number].dtype)
            parts = passes.backward(
                g, x if need_a else None, mine, block.offsets, a[experts], b[experts], None, scalars, True, into=dx
            )
            for place, part in enumerate(parts[1:], 2 * number):
                if part is not None:
                    self.gradients[place].append(part)

    def joined(self) -> list[torch.Tensor | None]:
        """The gradients of all experts' factors."""
        return [torch.cat(parts) if parts else None for parts in self.gradients]


class _Blocks(torch.autograd.Function):
    """The node; see the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        x: torch.Tensor,
        weights: torch.Tensor,
        w1: torch.Tensor,
        bias1: torch.Tensor | None,
        w2: torch.Tensor,
        bias2: torch.Tensor | None,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with isolated(x.device):
            first, second = _split(call, factors, ctx.needs_input_grad[7:])
            wide = _wide(x, weights)
            in_rows = weights.reshape(-1)[call.order].unsqueeze(1)
            one, two = (weight.mT if call.transposed else weight for weight in (w1, w2))
            out = torch.zeros(x.shape[0], two.shape[1], dtype=wide)
            for block in call.blocks:
                owners = call.owners[block.rows]
                rows = x.index_select(0, owners)
                z = _product(rows, one, bias1, block)
                of_first = first.add(z, rows, block)
                h = call.gate(z).to(x.dtype).contiguous()
                y = _product(h, two, bias2, block)
                of_second = second.add(y, h, block)
                out.index_add_(0, owners, y.to(wide).mul_(in_rows[block.rows]))
                if call.learns:
                    kept += [z, *of_first, *of_second]
        ctx.save_for_backward(x, weights, w1, bias1, w2, bias2, *factors, *call.states, *kept)
        ctx.call = call
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call: _Call = ctx.call
        x, weights, w1, _, w2, bias2, *rest = ctx.saved_tensors
        terms = len(call.states)
        factors, states, kept = rest[: 2 * terms], rest[2 * terms : 3 * terms], rest[3 * terms :]
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        if torch._C._functorch.is_legacy_batchedtensor(g):
            raise RuntimeError(TRANSFORMED)
        for state, recorded in zip(states, call.states, strict=True):
            refuse_other_adapter(state, recorded)
        g = with_memory(g)
        _, need_x, need_weights, *_ = ctx.needs_input_grad
        with isolated(g.device):
            first, second = _split(call, factors, ctx.needs_input_grad[7:])
            in_rows = weights.reshape(-1)[call.order].unsqueeze(1)
            back = [weight if call.transposed else weight.mT for weight in (w1, w2)]
            wide = _wide(x, weights)
            dx = torch.zeros(x.shape, dtype=wide) if need_x else None
            dw = torch.zeros(call.order.shape, dtype=wide)
            need_z = need_x or any(map(any, first.needs))
            for number, block in enumerate(call.blocks):
                z, *t = kept[number * (1 + terms) : (number + 1) * (1 + terms)]
                owners, w = call.owners[block.rows], in_rows[block.rows]
                rows = g.index_select(0, owners)
                z = z.detach().requires_grad_(need_z)
                with torch.set_grad_enabled(need_z):
                    gated = call.gate(z).to(x.dtype)
                h = gated.detach().contiguous()
                q = _product(rows, back[1], None, block)
                second.gradient(q, rows, (h * w).to(x.dtype), w, t[len(first.terms) :], block)
                if need_weights:
                    dw[block.rows] = torch.linalg.vecdot(q.to(wide), h.to(wide))
                    if bias2 is not None:
                        each = bias2[block.experts].repeat_interleave(block.offsets.diff(), 0)
                        dw[block.rows] += torch.linalg.vecdot(rows.to(wide), each.to(wide))
                if need_z:
                    (dz,) = torch.autograd.grad(gated, z, q.mul_(w))
                    of_rows = _product(dz, back[0], None, block)
                    first.gradient(of_rows, dz, x.index_select(0, owners), None, t, block)
                    if dx is not None:
                        dx.index_add_(0, owners, of_rows.to(wide))
            of_weights = torch.empty_like(dw)
            of_weights[call.order] = dw
        return (
            None, None if dx is None else dx.to(x.dtype),
            of_weights.view(weights.shape).to(weights.dtype) if need_weights else None,
            None, None, None, None, *first.joined(), *second.joined(),
        )  # fmt: skip


def _split(call: _Call, factors: Sequence[torch.Tensor], needs: Sequence[bool]) -> tuple[_Factors, _Factors]:
    """The low-rank parts of both products."""
    count = 2 * len(call.scalars[0])
    halves = (slice(count), slice(count, None))
    first, second = (_Factors(call.scalars[i], factors[half], needs[half]) for i, half in enumerate(halves))
    return first, second
