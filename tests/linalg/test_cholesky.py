import pytest
import torch

from lora_kernels.linalg.cholesky import damped_cholesky


@pytest.mark.parametrize(("least_value", "used"), [(1.0, 1e-3), (-0.5, 1.0)])
def test_a_matrix_gets_the_damping_that_it_needs(least_value, used):
    matrix = torch.diag(torch.tensor([3.0, 2.0, least_value], dtype=torch.float64))
    expected = matrix + used * torch.eye(3)
    lower, damping = damped_cholesky(matrix, 1e-3)
    assert damping == pytest.approx(used)
    torch.testing.assert_close(matrix, expected)
    torch.testing.assert_close(lower @ lower.mT, expected)


def test_one_matrix_without_damping_and_one_that_is_hopeless():
    matrix = torch.ones(2, 2, dtype=torch.float64) - 1e-9 * torch.eye(2)
    lower, damping = damped_cholesky(matrix, 0.0, least=1e-12)
    assert 1e-9 < damping <= 1e-8 and bool(torch.isfinite(lower).all())
    with pytest.raises(ValueError, match=r"the moment is not positive definite, even with damping 1000"):
        damped_cholesky(-1e9 * torch.eye(2), 1.0, attempts=4, what="the moment")
