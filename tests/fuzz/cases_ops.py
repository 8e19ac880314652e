"""How to call each op, and what its answer must be."""

import torch
from hostile import FLOATS, NARROW, QUIET, VALUES, sizes, tensors, writable
from hypothesis import strategies as st
from outcomes import close
from registry import Case, add

from lora_kernels import ops
from lora_kernels.ops.covariance import reference as covariance
from lora_kernels.ops.gradient_statistics import reference as gradients
from lora_kernels.ops.random_matrix import reference as random_reference
from lora_kernels.ops.sketch import reference as sketch

leading = st.lists(st.sampled_from((0, 1, 2, 3, 7, 13)), min_size=0, max_size=2).map(tuple)
seeds = st.sampled_from((0, 1, -1, 2**63 - 1, 2**64 - 1, -(2**63), 12345))
streams = st.sampled_from((0, 1, 2**32 - 1))
kinds = st.sampled_from(("rademacher", "gaussian"))
scales = st.sampled_from((0.0, 1.0, -2.0, 0.5, 1e3))
SANE = tuple(each for each in VALUES if each != "huge")  # where s x A^T overflows, no answer is the right one
WEIGHT_DTYPES = (torch.bool, *FLOATS)


def magnitude(value):
    """For the scale of a sum: the same without signs, and without what is not finite."""
    return value.abs().nan_to_num(0, 0, 0) if isinstance(value, torch.Tensor) and value.dtype != torch.bool else value


@st.composite
def weights(draw, shape):
    return draw(st.none() | tensors(shape, draw(st.sampled_from(WEIGHT_DTYPES)), ("normal", "zeros", "mixed")))


@st.composite
def dropouts(draw):
    if draw(st.booleans()):
        return None
    seed = draw(seeds | st.integers(0, 2**40).map(lambda seed: torch.tensor([seed])))
    return ops.Dropout(draw(st.sampled_from((0.0, 1e-6, 0.1, 0.5, 0.99999))), seed, draw(streams))


def finite(*values):
    return all(bool(torch.isfinite(each).all()) for each in values if isinstance(each, torch.Tensor))


# Rounding to 16 bits of operands (weights in the Triton backend, say) is not what is fuzzed here.
def slack(*values):
    return 2.0**-6 if any(each is not None and each.dtype in NARROW[1:] for each in values) else 4e-5


@st.composite
def _covariance(draw):
    n, rows, dtype = draw(sizes), draw(leading), draw(st.sampled_from(FLOATS))
    out = torch.float64 if dtype == torch.float64 else draw(st.sampled_from((torch.float32, torch.float64)))
    return {
        "out": draw(writable((n, n), out)),
        "x": draw(tensors((*rows, n), dtype)),
        "weight": draw(weights(rows)),
        "column_sum": draw(st.none() | writable((n,), out)),
    }


def _is_covariance(before, after, _result):
    truth, total = covariance.covariance(before["x"], before["weight"])
    scale, size = covariance.covariance(magnitude(before["x"]), magnitude(before["weight"]))
    old = before["out"]
    close(after["out"].tril(), (old + truth).tril(), (old.abs() + scale).tril(), slack(after["x"], after["weight"]))
    if before["column_sum"] is not None:
        old = before["column_sum"]
        close(after["column_sum"], old + total, old.abs() + size, slack(after["x"], after["weight"]), "column_sum")


add(Case(ops.covariance_, _covariance(), _is_covariance, backends=True, triton=True))


def _is_symmetric(before, after, result):
    lower = before["matrix"].tril()
    close(result, lower + lower.tril(-1).mT, lower.abs() + lower.abs().tril(-1).mT, 1e-6)


add(
    Case(
        ops.symmetrize_,
        sizes.flatmap(lambda n: st.sampled_from(FLOATS).flatmap(lambda d: writable((n, n), d, QUIET))).map(
            lambda matrix: {"matrix": matrix}
        ),
        _is_symmetric,
    )
)


@st.composite
def _gradient_statistics(draw):
    m, n, rows, dtype = draw(sizes), draw(sizes), draw(leading), draw(st.sampled_from(FLOATS))
    other = draw(st.sampled_from(FLOATS))
    what = draw(st.sampled_from(("both", "gradient", "fisher")))
    has_gradient, has_fisher = what != "fisher", what != "gradient"
    wide = dtype == torch.float64 or (has_gradient and other == torch.float64)
    out = torch.float64 if wide else draw(st.sampled_from((torch.float32, torch.float64)))
    return {
        "gradient": draw(writable((m, n), out)) if has_gradient else None,
        "fisher": draw(writable((m,), out)) if has_fisher else None,
        "g": draw(tensors((*rows, m), dtype)),
        "x": draw(tensors((*rows, n), other)) if has_gradient else None,
        "weight": draw(weights(rows)) if has_gradient else None,
        "fisher_weight": draw(weights(rows)) if has_fisher else None,
    }


def _is_gradient_statistics(before, after, _result):
    rounding = slack(*(after[name] for name in ("g", "x", "weight", "fisher_weight")))
    if before["gradient"] is not None:
        names = ("g", "x", "weight")
        truth = gradients.weight_gradient(*(before[name] for name in names))
        scale = gradients.weight_gradient(*(magnitude(before[name]) for name in names))
        old = before["gradient"]
        close(after["gradient"], old + truth, old.abs() + scale, rounding, "gradient")
    if before["fisher"] is not None:
        names = ("g", "fisher_weight")
        truth = gradients.fisher_diagonal(*(before[name] for name in names))
        scale = gradients.fisher_diagonal(*(magnitude(before[name]) for name in names))
        close(after["fisher"], before["fisher"] + truth, before["fisher"].abs() + scale, rounding, "fisher")


add(Case(ops.gradient_statistics_, _gradient_statistics(), _is_gradient_statistics, backends=True, triton=True))


@st.composite
def _sketch(draw):
    p, q, k, rows = draw(sizes), draw(sizes), draw(sizes), draw(leading)
    wide = draw(st.booleans())
    dtypes = (torch.float64,) if wide else NARROW
    left = draw(tensors((*rows, p), draw(st.sampled_from(dtypes))))
    right = left if draw(st.booleans()) else draw(tensors((*rows, q), draw(st.sampled_from(dtypes))))
    out = torch.float64 if wide else torch.float32
    return {
        "out": draw(writable((p, k), out)),
        "left": left,
        "right": right,
        "weight": draw(weights(rows)),
        "seed": draw(seeds),
        "stream": draw(streams),
        "kind": draw(kinds),
        "column_sum": draw(st.none() | writable((p,), out)),
    }


def _is_sketch(before, after, _result):
    k = before["out"].shape[1]
    key = {name: before[name] for name in ("seed", "stream", "kind")}
    truth, total = sketch.sketch(before["left"], before["right"], k, before["weight"], **key)
    parts = [magnitude(before[name]) for name in ("left", "right", "weight")]
    tokens = parts[0].shape[:-1].numel()
    one, two = (each.reshape(tokens, each.shape[-1]) for each in parts[:2])
    factor = torch.ones(tokens, dtype=torch.float64) if parts[2] is None else parts[2].reshape(-1).to(torch.float64)
    scale = (one * factor.unsqueeze(-1)).mT @ two.sum(-1, keepdim=True).expand(-1, k) * 6
    rounding = slack(after["left"], after["right"], after["weight"])
    close(after["out"], before["out"] + truth, before["out"].abs() + scale, rounding)
    if before["column_sum"] is not None:
        scale = (one * factor.unsqueeze(-1)).sum(0) + before["column_sum"].abs()
        close(after["column_sum"], before["column_sum"] + total, scale, rounding, "column_sum")


add(Case(ops.sketch_, _sketch(), _is_sketch, backends=True, triton=True))


@st.composite
def _project(draw):
    dtype = draw(st.sampled_from(FLOATS))
    return {
        "a": draw(tensors((*draw(leading), draw(sizes)), dtype)),
        "k": draw(st.sampled_from((0, 1, 5, 16, 130))),
        "seed": draw(seeds),
        "stream": draw(streams),
        "kind": draw(kinds),
    }


def _is_projection(before, after, result):
    if result.numel() == 0:
        return
    truth = sketch.project(before["a"], before["k"], **{name: before[name] for name in ("seed", "stream", "kind")})
    scale = magnitude(before["a"]).sum(-1, keepdim=True).expand(truth.shape) * 6
    close(result, truth, scale, slack(after["a"]))


add(Case(ops.project, _project(), _is_projection, backends=True, triton=True))


@st.composite
def _random_matrix(draw):
    return {
        "rows": draw(sizes),
        "columns": draw(sizes | st.just(300)),
        "kind": draw(kinds),
        "seed": draw(seeds),
        "stream": draw(streams),
        "step": draw(streams),
        "dtype": draw(st.sampled_from(FLOATS)),
        "device": draw(st.sampled_from(("cpu", torch.device("cpu")))),
    }


def _is_random(before, _after, result):
    if result.device.type == "meta":
        return
    key = {name: before[name] for name in ("seed", "stream", "step")}
    truth = random_reference.random_matrix(before["rows"], before["columns"], before["kind"], **key)
    close(result, truth, truth.abs() + 1, 0.01 if result.dtype in NARROW[1:] else 2e-6)


add(Case(ops.random_matrix, _random_matrix(), _is_random, backends=True, triton=True))


@st.composite
def _orthonormalize(draw):
    n, k = sorted((draw(sizes), draw(sizes)), reverse=True)
    return {"y": draw(tensors((*draw(leading), n, k), draw(st.sampled_from(FLOATS))))}


def _is_orthonormal(before, _after, result):
    y, (q, r) = before["y"], result
    tolerance = 1e-12 if q.dtype == torch.float64 else 1e-5
    eye = torch.eye(q.shape[-1], dtype=torch.float64).expand(*q.shape[:-2], -1, -1)
    wide = q.to(torch.float64)
    close(wide.mT @ wide, eye, torch.ones_like(eye), tolerance, "Q^T Q")
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) if y.numel() else y.new_zeros(())
    if y.numel() and bool((norm > 1e-30).all()) and bool((norm < 1e30).all()):
        close(wide @ r.to(torch.float64) / norm, y / norm, torch.ones_like(y), tolerance * 10, "Q R")
    assert bool((r.diagonal(dim1=-2, dim2=-1) >= 0).all())


def needs_finite(*names):
    return lambda before: not finite(*(before[name] for name in names))


add(Case(ops.orthonormalize, _orthonormalize(), _is_orthonormal, backends=("auto", "torch"), refused=needs_finite("y")))
