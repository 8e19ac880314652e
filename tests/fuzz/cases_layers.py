"""How to call skinny products, LoRA layers and LoRA-Pro's step, and what their answers must be."""

import math

import torch
from cases_ops import SANE, dropouts, finite, leading, magnitude, scales, seeds
from hostile import FLOATS, QUIET, SIZES, sizes, tensors, writable
from hypothesis import strategies as st
from outcomes import close
from registry import Case, add

from lora_kernels import ops
from lora_kernels.ops._philox import keep_factor, keep_threshold
from lora_kernels.ops.grouped_lora import reference as grouped
from lora_kernels.ops.lora_linear import reference as lora
from lora_kernels.ops.lora_pro_adam import reference as lora_pro
from lora_kernels.ops.skinny import reference as skinny


def dropped_scale(x, dropout):
    factor = 1.0 if dropout is None else keep_factor(keep_threshold(dropout.p))
    return magnitude(x) * factor


def single(dtype):
    """What a product in 16 bits may lose besides the rounding of its result."""
    return {torch.float16: 2e-2, torch.bfloat16: 4e-2, torch.float32: 4e-5, torch.float64: 1e-12}[dtype]


@st.composite
def _shrink(draw):
    n, dtype = draw(sizes), draw(st.sampled_from(FLOATS))
    return {
        "x": draw(tensors((draw(sizes), n), dtype)),
        "a": draw(tensors((draw(sizes), n), dtype, ("normal", "zeros", "mixed"))),
        "scale": draw(scales),
        "dropout": draw(dropouts()),
    }


def _is_shrunk(before, _after, result):
    if before["scale"] in (0, math.inf, -math.inf) and not finite(before["x"], before["a"]):
        return  # zero or NaN: both will do
    truth = skinny.shrink(before["x"], before["a"], before["scale"], before["dropout"])
    scale = (abs(before["scale"]) + 1) * (dropped_scale(before["x"], before["dropout"]) @ magnitude(before["a"]).mT)
    close(result, truth, scale, single(result.dtype))


add(Case(ops.shrink, _shrink(), _is_shrunk, backends=True, triton=True))


@st.composite
def _tsreduce(draw):
    rows, dtype = draw(sizes), draw(st.sampled_from(FLOATS))
    return {
        "t": draw(tensors((rows, draw(sizes)), dtype, ("normal", "zeros", "mixed"))),
        "z": draw(tensors((rows, draw(sizes)), dtype)),
        "dropout": draw(dropouts()),
    }


def _is_reduced(before, after, result):
    truth = skinny.tsreduce(before["t"], before["z"], before["dropout"])
    scale = magnitude(before["t"]).mT @ dropped_scale(before["z"], before["dropout"])
    close(result, truth, scale, single(after["t"].dtype))


add(Case(ops.tsreduce, _tsreduce(), _is_reduced, backends=True, triton=True))


@st.composite
def _expand(draw):
    rows, r, d, dtype = draw(sizes), draw(sizes), draw(sizes), draw(st.sampled_from(FLOATS))
    start = draw(st.sampled_from(("none", "bias", "out")))
    return {
        "t": draw(tensors((rows, r), dtype, ("normal", "zeros", "mixed"))),
        "b": draw(tensors((r, d), dtype)),
        "out": draw(writable((rows, d), dtype)) if start == "out" else None,
        "bias": draw(tensors((d,), dtype)) if start == "bias" else None,
        "dropout": draw(dropouts()),
    }


def _is_expanded(before, _after, result):
    base = before["out"] if before["out"] is not None else before["bias"]
    truth = skinny.expand(before["t"], before["b"], base, before["dropout"])
    scale = dropped_scale(magnitude(before["t"]) @ magnitude(before["b"]), before["dropout"])
    close(result, truth, scale if base is None else scale + magnitude(base), single(result.dtype))


add(Case(ops.expand, _expand(), _is_expanded, backends=True, triton=True))


@st.composite
def _factors(draw, n, m, dtype):
    r = draw(sizes)
    values = ("normal", "zeros", "tiny")
    return draw(tensors((r, n), draw(st.sampled_from((dtype, torch.float32))), values)), draw(
        tensors((m, r), draw(st.sampled_from((dtype, torch.float32))), values)
    )


@st.composite
def _extra(draw, n, m, dtype):
    if draw(st.booleans()):
        return None
    a0, b0 = draw(_factors(n, m, dtype))
    return a0, b0, draw(scales)


@st.composite
def _layer(draw, weight):
    n, m, rows = draw(sizes), draw(sizes), draw(leading)
    dtype = draw(st.sampled_from(FLOATS))
    a, b = draw(_factors(n, m, dtype))
    found = {"x": draw(tensors((*rows, n), dtype, SANE))}
    if weight:
        found["weight"] = draw(tensors((m, n), dtype, ("normal", "zeros")))
        found["bias"] = draw(st.none() | tensors((m,), dtype, ("normal",)))
    else:
        found["y"] = draw(tensors((*rows, m), draw(st.sampled_from((dtype, torch.float32))), SANE))
    return {
        **found, "a": a, "b": b, "scaling": draw(scales), "dropout": draw(dropouts()),
        "extra": draw(_extra(n, m, dtype)),
    }  # fmt: skip


def layer_truth(x, weight, start, a, b, scaling, dropout, extra):
    if extra is not None:
        extra = (*(each.detach().to(torch.float64) for each in extra[:2]), extra[2])
    start = (
        start
        if start is None or start.dim() == 1 and weight is not None
        else start.reshape(x.shape[:-1].numel(), -1)
        if start.numel()
        else None
    )
    truth = lora.lora_linear(x, weight, start, a, b, scaling=scaling, dropout=dropout, extra=extra)
    factor = 1.0 if dropout is None else keep_factor(keep_threshold(dropout.p))
    rows = magnitude(x).reshape(x.shape[:-1].numel(), x.shape[-1])
    scale = (abs(scaling) + 1) * factor * (rows @ a.abs().mT @ b.abs().mT)
    scale = scale if weight is None else scale + rows @ weight.abs().mT
    if extra is not None:
        scale = scale + (abs(extra[2]) + 1) * (rows @ extra[0].abs().mT @ extra[1].abs().mT)
    scale = scale.reshape(truth.shape)
    return truth, scale if start is None else scale + magnitude(start).reshape(-1 if start.dim() == 1 else scale.shape)


def _is_layer(before, _after, result):
    if result.dtype == torch.float16 and abs(before["scaling"]) > 100:
        return  # s x A^T is beyond the dtype
    if not math.isfinite(before["scaling"]) or before["scaling"] == 0 and not finite(before["x"]):
        return  # zero or NaN: both will do
    start = before.get("bias", before.get("y"))
    numbers = (before["scaling"], before["dropout"], before["extra"])
    truth, scale = layer_truth(before["x"], before.get("weight"), start, before["a"], before["b"], *numbers)
    close(result, truth, scale, single(result.dtype) * 2)


add(Case(ops.lora_linear, _layer(True), _is_layer, backends=True, triton=True))
add(Case(ops.lora_delta, _layer(False), _is_layer, backends=True, triton=True))


@st.composite
def _grouped(draw):
    n, m, r, dtype = draw(sizes), draw(sizes), draw(sizes), draw(st.sampled_from(FLOATS))
    lengths, rest = draw(st.lists(sizes, max_size=4)), draw(sizes)
    experts, rows = len(lengths), sum(lengths) + rest
    kinds, values = st.sampled_from((dtype, torch.float32)), ("normal", "zeros", "tiny")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "y": draw(tensors((rows, m), draw(kinds), SANE)),
        "x": draw(tensors((rows, n), dtype, SANE)),
        "offsets": offsets.to(draw(st.sampled_from((torch.int32, torch.int64)))),
        "a": draw(tensors((experts, r, n), draw(kinds), values)),
        "b": draw(tensors((experts, m, r), draw(kinds), values)),
        "scaling": draw(scales),
        "dropout": draw(dropouts()),
    }


def _is_grouped(before, _after, result):
    if result.dtype == torch.float16 and abs(before["scaling"]) > 100:
        return  # s x A^T is beyond the dtype
    if not math.isfinite(before["scaling"]) or before["scaling"] == 0 and not finite(before["x"]):
        return  # zero or NaN: both will do
    names, dropout = ("y", "x", "offsets", "a", "b"), before["dropout"]
    y, x, offsets, a, b = (before[name] for name in names)
    offsets = offsets.long()
    truth = grouped.grouped_lora(y, x, offsets, a, b, scaling=before["scaling"], dropout=dropout)
    factor = 1.0 if dropout is None else keep_factor(keep_threshold(dropout.p))
    factor *= abs(before["scaling"]) + 1
    scale = grouped.grouped_lora(magnitude(y), magnitude(x), offsets, a.abs(), b.abs(), scaling=factor)
    close(result, truth, scale, single(result.dtype) * 2)


add(Case(ops.grouped_lora, _grouped(), _is_grouped, backends=True, triton=True))


@st.composite
def _lora_pro(draw):
    rows, columns, rank = draw(sizes), draw(sizes), draw(st.sampled_from(SIZES[1:]))
    batch = draw(st.sampled_from(((), (), (1,), (3,))))
    state = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    factor = st.sampled_from(FLOATS)
    return {
        "exp_avg": draw(writable((*batch, rows, columns), state)),
        "exp_avg_sq": draw(writable((*batch, rows, columns), state)).abs(),
        "a": draw(tensors((*batch, rank, columns), draw(factor), QUIET)),
        "b": draw(tensors((*batch, rows, rank), draw(factor), QUIET)),
        "grad_a": draw(tensors((*batch, rank, columns), draw(factor), QUIET)),
        "grad_b": draw(tensors((*batch, rows, rank), draw(factor), QUIET)),
        "scaling": draw(scales),
        "betas": draw(st.sampled_from(((0.9, 0.999), (0.0, 0.0), (0.5, 0.99)))),
        "eps": draw(st.sampled_from((1e-8, 1e-3))),
        "step": draw(st.sampled_from((1, 2, 1000, 2**32 - 1))),
        "seed": draw(seeds),
        "row_offset": draw(st.sampled_from((0, 5, 2**31))),
    }


def _is_lora_pro(before, after, result):
    names = ("exp_avg", "exp_avg_sq", "a", "b", "grad_a", "grad_b")
    numbers = {name: before[name] for name in ("scaling", "betas", "eps", "step")}
    truths = lora_pro.lora_pro_adam(*(before[name] for name in names), **numbers)
    rounding = (
        2e-2 if after["exp_avg"].dtype == torch.bfloat16 else 1e-4 if after["exp_avg"].dtype == torch.float32 else 1e-9
    )
    e = abs(before["scaling"]) * (
        before["b"].abs() @ before["grad_a"].abs() + before["grad_b"].abs() @ before["a"].abs()
    )
    close(after["exp_avg"], truths[0], before["exp_avg"].abs() + e, rounding, "exp_avg")
    close(after["exp_avg_sq"], truths[1], before["exp_avg_sq"].abs() + e * e, rounding, "exp_avg_sq")
    assert [tuple(each.shape) for each in result] == [tuple(before["a"].shape), tuple(before["b"].shape)]


add(Case(ops.lora_pro_adam_, _lora_pro(), _is_lora_pro, backends=True, triton=True))
add(Case(ops.use_backend, st.sampled_from(ops.BACKENDS).map(lambda name: {"name": name}), enter=True))
add(
    Case(
        ops.use_form,
        st.sampled_from(("auto", "expand_first", "expand_add", "gemm")).map(lambda name: {"name": name}),
        enter=True,
    )
)
