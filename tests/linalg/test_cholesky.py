import pytest
import torch

from lora_kernels.linalg.cholesky import damped_cholesky


def test_each_matrix_gets_the_damping_that_it_needs():
    good = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    bad = torch.diag(torch.tensor([3.0, 2.0, -0.5], dtype=torch.float64))
    matrices = torch.stack((good, bad))
    lower, damping = damped_cholesky(matrices, 1e-3)
    assert damping.tolist() == [1e-3, pytest.approx(1.0)]  # to the bit where nothing failed
    expected = torch.stack((good + 1e-3 * torch.eye(3), bad + torch.eye(3)))
    torch.testing.assert_close(matrices, expected)
    torch.testing.assert_close(lower @ lower.mT, expected)


def test_one_matrix_without_damping_and_one_that_is_hopeless():
    matrix = torch.ones(2, 2, dtype=torch.float64) - 1e-9 * torch.eye(2)
    lower, damping = damped_cholesky(matrix, 0.0, least=1e-12)
    assert damping.shape == () and 1e-9 < float(damping) <= 1e-8 and bool(torch.isfinite(lower).all())
    with pytest.raises(ValueError, match=r"the moment is not positive definite, even with damping 1000"):
        damped_cholesky(-1e9 * torch.eye(2), 1.0, attempts=4, what="the moment")
