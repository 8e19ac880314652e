"""Well and ill conditioned, repeated, clustered and rank-deficient problems with float64 answers by LAPACK."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.ops.small_linalg.op import cholesky, cholesky_solve, eigh, sylvester
from lora_kernels.ops.small_linalg.reference import fix_signs
from lora_kernels.ops.small_linalg.spectrum import factor_spectrum
from tests.conftest import relative_error
from tests.ops.linalg_cases import DTYPES, EPSILON, RUNS

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "small_linalg.safetensors")


def cases(op, *kinds):
    names = sorted({name.rsplit(".", 1)[0] for name in GOLDEN if name.startswith(f"{op}.")})
    return [name for name in names if not kinds or name.rsplit(".", 1)[1] in kinds]


def parts(case, device):
    found = {name.rsplit(".", 1)[1]: each for name, each in GOLDEN.items() if name.rsplit(".", 1)[0] == case}
    return {name: each.to(device) for name, each in found.items()}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("eigh"))
def test_eigh(case, dtype, run):
    backend, device = run
    golden = parts(case, device)
    values, vectors = eigh(golden["M"].to(dtype), backend=backend)
    n, wide = golden["M"].shape[-1], golden["M"].double()
    scale, bound = golden["w"].abs().amax(-1)[:, None], (20 + n / 4) * EPSILON[dtype]
    assert float(((values.double() - golden["w"]).abs() / scale).max()) <= bound
    w, v = values.double(), vectors.double()
    assert float(((wide @ v - v * w.unsqueeze(-2)) / scale[..., None]).abs().max()) <= bound
    assert float((v.mT @ v - torch.eye(n, device=device)).abs().max()) <= (20 + n) * EPSILON[dtype]  # n rotations each
    assert torch.equal(fix_signs(vectors), vectors)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("chol", "well", "ill"))
def test_cholesky(case, dtype, run):
    backend, device = run
    golden = parts(case, device)
    a, wide = golden["M"].to(dtype), golden["M"].double()
    factor = cholesky(a, backend=backend).double()
    assert relative_error(factor @ factor.mT, wide) <= 4 * EPSILON[dtype]
    condition = float(torch.linalg.cond(wide).max())
    if "L" in golden:
        assert relative_error(factor, golden["L"]) <= 2 * condition * EPSILON[dtype]
    inverse = cholesky_solve(a, torch.eye(a.shape[-1], device=device, dtype=dtype).expand_as(a), backend=backend)
    assert relative_error(inverse, torch.linalg.inv(wide)) <= 2 * condition * EPSILON[dtype]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("chol", "not_pd"))
def test_indefinite_matrices_are_named(case, dtype, run):
    backend, device = run
    golden = parts(case, device)
    for matrix, info in zip(golden["M"].to(dtype), golden["info"].tolist(), strict=True):
        eye = torch.eye(matrix.shape[-1], device=device, dtype=dtype)
        batch = torch.stack([eye, eye, matrix])
        message = rf"matrix 2 is not positive definite \(its leading minor of order {info} is not\)"
        for call in (cholesky, lambda each, backend: cholesky_solve(each, each, backend=backend)):
            with pytest.raises(ValueError, match=message):
                call(batch, backend=backend)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("sylv"))
def test_sylvester(case, dtype, run):
    backend, device = run
    golden = parts(case, device)
    a, b, c = (golden[name].double() for name in "ABC")
    p, q = b.mT @ b, a @ a.mT
    found = sylvester(p.to(dtype), q.to(dtype), c.to(dtype), backend=backend)
    # The rounding of P and Q alone moves the solution by the condition of the operator, up to 2e3 here; in float64 that
    # of the golden one, too.
    sums = torch.linalg.eigvalsh(p).unsqueeze(-1) + torch.linalg.eigvalsh(q).unsqueeze(-2)
    condition = float((sums.amax((-2, -1)) / sums.amin((-2, -1))).max())
    both = 2 if dtype == torch.float64 else 1
    assert relative_error(found, golden["X"]) <= both * (10 + 2 * condition) * EPSILON[dtype]
    assert relative_error(0.5 * found, golden["X"]) > 0.4


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("sv"))
def test_factor_spectrum(case, dtype, run):
    backend, device = run
    golden = parts(case, device)
    a, b, truth = golden["A"].to(dtype), golden["B"].to(dtype), golden["s_core"]
    found = factor_spectrum(a, b, 2.0, backend=backend).double()
    norms = torch.linalg.matrix_norm(a.double(), 2) * torch.linalg.matrix_norm(b.double(), 2)
    scale = 2 * norms.clamp_min(1e-300).unsqueeze(-1)
    assert float(((found - truth).abs() / scale).max()) <= (10 if dtype == torch.float64 else 1) * EPSILON[dtype]
    if case.endswith("graded") and dtype == torch.float64:  # small values keep digits of their own
        assert float(((found - truth).abs() / truth).max()) <= 1e-6
