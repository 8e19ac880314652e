"""How to call each op, and what its answer must be."""

import math

import torch
from hostile import FLOATS, NARROW, QUIET, SIZES, VALUES, sizes, tensors, writable
from hypothesis import strategies as st
from registry import Case, add
from outcomes import close

from lora_kernels import ops
from lora_kernels.ops._philox import keep_factor, keep_threshold
from lora_kernels.ops.covariance import reference as covariance
from lora_kernels.ops.gradient_statistics import reference as gradients
from lora_kernels.ops.lora_linear import reference as lora
from lora_kernels.ops.lora_pro_adam import reference as lora_pro
from lora_kernels.ops.random_matrix import reference as random_reference
from lora_kernels.ops.sketch import reference as sketch
from lora_kernels.ops.skinny import reference as skinny

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
def _fisher_scaled(draw):
    m, n, dtype = draw(sizes), draw(sizes), draw(st.sampled_from((torch.float32, torch.float64)))
    return {
        "gradient": draw(tensors((m, n), dtype)),
        "fisher": draw(tensors((m,), dtype, QUIET)).detach().abs(),
        "scale": draw(scales),
        "damping": draw(st.sampled_from((0.0, 1e-3, 1.0))),
        "power": draw(st.sampled_from((1.0, 0.5, 2, 0.0, -1.0))),
        "out": draw(st.none() | writable((m, n), dtype)),
    }


def _is_fisher_scaled(before, _after, result):
    numbers = {name: before[name] for name in ("scale", "damping", "power")}
    truth = gradients.fisher_scaled(before["gradient"], before["fisher"], **numbers)
    close(result, truth, truth.abs().nan_to_num(0, math.inf, math.inf), 1e-5)


add(Case(ops.fisher_scaled, _fisher_scaled(), _is_fisher_scaled, backends=True, triton=True))  # fmt: skip


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


@st.composite
def _square(draw, batch, n, dtype, values=(*QUIET, "nan", "infinite", "huge")):
    made = draw(tensors((*batch, n, n), dtype, values))
    return made


@st.composite
def _eigh(draw):
    n = draw(sizes | st.just(33))
    return {"matrices": draw(_square(draw(leading), n, draw(st.sampled_from((torch.float32, torch.float64)))))}


def _symmetric(matrix):
    return matrix.tril() + matrix.tril(-1).mT


def _is_eigen(before, _after, result):
    values, vectors = (each.to(torch.float64) for each in result)
    matrix = _symmetric(before["matrices"])
    if matrix.numel() == 0:
        return
    size = matrix.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    if bool((size * matrix.shape[-1] > torch.finfo(result[0].dtype).max / 8).any()):
        return  # the values may be beyond the dtype
    tolerance = 1e-11 if result[0].dtype == torch.float64 else 1e-4
    n = matrix.shape[-1]
    left, right = (matrix / size) @ vectors, vectors * (values / size.squeeze(-1)).unsqueeze(-2)
    close(left, right, torch.full_like(left, n), tolerance, "M V - V w")
    close(vectors.mT @ vectors, torch.eye(n, dtype=torch.float64).expand_as(matrix), torch.ones_like(matrix), tolerance)
    assert bool((values.diff(dim=-1) >= -tolerance * n * size.squeeze(-1)).all()), "values are not ascending"


def _lower_not_finite(*names):
    def refused(before):
        return not finite(*(before[name].tril() for name in names))

    return refused


add(Case(ops.eigh, _eigh(), _is_eigen, backends=("auto", "cpp", "torch"), refused=_lower_not_finite("matrices"),
         may_refuse=lambda before: before["matrices"].numel() > 0 and float(before["matrices"].abs().max()) > 1e36))  # fmt: skip


@st.composite
def _definite(draw, batch, n, dtype):
    root = draw(tensors((*batch, n, n), dtype, ("normal", "zeros", "tiny"), ("plain",)))
    made = root @ root.mT + torch.eye(n, dtype=dtype)
    layout = draw(st.sampled_from(("plain", "transposed", "sliced", "gradient", "view", "negated")))
    from hostile import lay_out

    return lay_out(made.to(torch.float64), dtype, layout)


@st.composite
def _cholesky(draw):
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    return {"matrices": draw(_definite(draw(leading), draw(sizes | st.just(40)), dtype))}


def _is_cholesky(before, _after, result):
    matrix = _symmetric(before["matrices"])
    wide = result.to(torch.float64)
    scale = matrix.abs().amax() if matrix.numel() else matrix.sum()
    close(wide @ wide.mT, matrix, scale.expand_as(matrix) * 20, 1e-11 if result.dtype == torch.float64 else 1e-5)
    assert not bool(result.triu(1).any())


add(Case(ops.cholesky, _cholesky(), _is_cholesky, backends=("auto", "cpp", "torch")))


@st.composite
def _cholesky_solve(draw):
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    batch, n = draw(leading), draw(sizes)
    rhs = draw(tensors((*batch, n, draw(sizes)), dtype, QUIET))
    return {"matrices": draw(_definite(batch, n, dtype)), "rhs": rhs}


def _is_solution(before, _after, result):
    matrix, rhs = _symmetric(before["matrices"]), before["rhs"]
    product = matrix @ result.to(torch.float64)
    if rhs.numel():
        scale = (matrix.abs().amax() * result.abs().amax() + rhs.abs().amax()).expand_as(rhs) * 20
        close(product, rhs, scale, 1e-11 if result.dtype == torch.float64 else 1e-4)
    assert result.shape == rhs.shape


add(Case(ops.cholesky_solve, _cholesky_solve(), _is_solution, backends=("auto", "cpp", "torch")))


@st.composite
def _sylvester(draw):
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    batch, r, k = draw(leading), draw(sizes), draw(sizes)
    return {
        "p": draw(_definite(batch, r, dtype)),
        "q": draw(_definite(batch, k, dtype)),
        "rhs": draw(tensors((*batch, r, k), dtype, (*QUIET, "nan"))),
    }


def _is_sylvester(before, _after, result):
    p, q, rhs = _symmetric(before["p"]), _symmetric(before["q"]), before["rhs"]
    assert result.shape == rhs.shape
    if rhs.numel():
        x = result.to(torch.float64)
        scale = (p.abs().amax() + q.abs().amax()) * x.abs().amax() + rhs.abs().amax()
        close(p @ x + x @ q, rhs, scale.expand_as(rhs) * 50, 1e-10 if result.dtype == torch.float64 else 1e-4)


add(Case(ops.sylvester, _sylvester(), _is_sylvester, backends=("auto", "cpp", "torch"),
         refused=lambda before: before["rhs"].numel() > 0 and not (finite(before["rhs"]) and finite(before["p"].tril(), before["q"].tril()))))  # fmt: skip


@st.composite
def _factor_spectrum(draw):
    batch, r, dtype = draw(leading), draw(sizes), draw(st.sampled_from((torch.float32, torch.float64)))
    return {
        "a": draw(tensors((*batch, r, draw(sizes)), dtype, (*QUIET, "nan", "infinite"))),
        "b": draw(tensors((*batch, draw(sizes), r), dtype, (*QUIET, "nan"))),
        "scaling": draw(scales),
    }


def _is_spectrum(before, _after, result):
    from lora_kernels.ops.small_linalg import reference

    a, b = before["a"], before["b"]
    assert result.shape == a.shape[:-1]
    if a.numel() == 0 or b.numel() == 0:
        assert not bool(result.any())
        return
    truth = reference.factor_spectrum(a, b, before["scaling"])
    size = abs(before["scaling"]) * torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    close(result, truth, size.unsqueeze(-1).expand_as(truth), 1e-11 if result.dtype == torch.float64 else 1e-5)


def _spectrum_refused(before):
    return before["a"].numel() > 0 and before["b"].numel() > 0 and not finite(before["a"], before["b"])


add(Case(ops.factor_spectrum, _factor_spectrum(), _is_spectrum, backends=("auto", "cpp", "torch"),
         refused=_spectrum_refused))  # fmt: skip


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
        **found, "a": a, "b": b, "scaling": draw(scales), "dropout": draw(dropouts()), "extra": draw(_extra(n, m, dtype)),
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
    start = before.get("bias", before.get("y"))
    numbers = (before["scaling"], before["dropout"], before["extra"])
    truth, scale = layer_truth(before["x"], before.get("weight"), start, before["a"], before["b"], *numbers)
    close(result, truth, scale, single(result.dtype) * 2)


add(Case(ops.lora_linear, _layer(True), _is_layer, backends=True, triton=True))
add(Case(ops.lora_delta, _layer(False), _is_layer, backends=True, triton=True))


@st.composite
def _group(draw):
    n, rows, dtype = draw(sizes), draw(leading), draw(st.sampled_from(FLOATS))
    members = []
    for _ in range(draw(st.integers(1, 3))):
        m = draw(sizes)
        a, b = draw(_factors(n, m, dtype))
        weight = draw(st.none() | tensors((m, n), dtype, ("normal", "zeros")))
        start = draw(tensors((*rows, m), dtype, SANE) if weight is None else st.none() | tensors((m,), dtype, SANE))
        members.append(ops.LoraMember(weight, start, a, b, draw(scales), draw(dropouts()), draw(_extra(n, m, dtype))))
    return {"x": draw(tensors((*rows, n), dtype, SANE)), "members": members}


def _is_group(before, _after, result):
    for member, found in zip(before["members"], result, strict=True):
        parts = [None if each is None else each.detach().resolve_neg().to(torch.float64)
                 for each in (member.weight, member.start, member.a, member.b)]  # fmt: skip
        truth, scale = layer_truth(before["x"], *parts, member.scaling, member.dropout, member.extra)
        close(found, truth, scale, single(found.dtype) * 2)


add(Case(ops.lora_linear_group, _group(), _is_group, backends=True))


@st.composite
def _lora_pro(draw):
    rows, columns, rank = draw(sizes), draw(sizes), draw(st.sampled_from(SIZES[1:]))
    state = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    factor = st.sampled_from(FLOATS)
    return {
        "exp_avg": draw(writable((rows, columns), state)),
        "exp_avg_sq": draw(writable((rows, columns), state)).abs(),
        "a": draw(tensors((rank, columns), draw(factor), QUIET)),
        "b": draw(tensors((rows, rank), draw(factor), QUIET)),
        "grad_a": draw(tensors((rank, columns), draw(factor), QUIET)),
        "grad_b": draw(tensors((rows, rank), draw(factor), QUIET)),
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
