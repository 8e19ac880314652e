"""How to call the small dense algebra, and what its answers must be."""

import torch
from cases_ops import finite, leading, scales
from hostile import QUIET, lay_out, sizes, tensors
from hypothesis import strategies as st
from outcomes import close
from registry import Case, add

from lora_kernels import ops
from lora_kernels.ops.small_linalg import reference


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


def _may_overflow(before):
    return before["matrices"].numel() > 0 and float(before["matrices"].abs().max()) > 1e36


add(Case(ops.eigh, _eigh(), _is_eigen, backends=("auto", "cpp", "torch"), refused=_lower_not_finite("matrices"),
         may_refuse=_may_overflow))  # fmt: skip


@st.composite
def _definite(draw, batch, n, dtype):
    root = draw(tensors((*batch, n, n), dtype, ("normal", "zeros", "tiny"), ("plain",)))
    made = root @ root.mT + torch.eye(n, dtype=dtype)
    layout = draw(st.sampled_from(("plain", "transposed", "sliced", "gradient", "view", "negated")))
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


def _sylvester_refused(before):
    whole = finite(before["rhs"], before["p"].tril(), before["q"].tril())
    return before["rhs"].numel() > 0 and not whole


add(Case(ops.sylvester, _sylvester(), _is_sylvester, backends=("auto", "cpp", "torch"), refused=_sylvester_refused))


@st.composite
def _factor_spectrum(draw):
    batch, r, dtype = draw(leading), draw(sizes), draw(st.sampled_from((torch.float32, torch.float64)))
    return {
        "a": draw(tensors((*batch, r, draw(sizes)), dtype, (*QUIET, "nan", "infinite"))),
        "b": draw(tensors((*batch, draw(sizes), r), dtype, (*QUIET, "nan"))),
        "scaling": draw(scales),
    }


def _is_spectrum(before, _after, result):
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
