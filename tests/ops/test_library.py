"""Large sums over all rows are the library's, on a GPU; here its product is replaced by one that the CPU has."""

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.ops import _library, _tiles
from lora_kernels.ops._rows import Selection
from lora_kernels.ops.covariance import kernel as covariance
from lora_kernels.ops.gradient_statistics import kernel as gradients


@pytest.fixture
def products(monkeypatch):
    """The shapes of the library's products, which are wide from 24 features or 24 * 40 elements on."""
    shapes = []

    def add_product(out, left, right):
        shapes.append((*left.shape, right.shape[1]))
        out += left.float() @ right.float()

    for module in (covariance, gradients):
        monkeypatch.setattr(module, "adds", lambda device, dtype: dtype != torch.float32)
        monkeypatch.setattr(module, "add_product", add_product)
    monkeypatch.setattr(covariance, "_LIBRARY_FROM", 24)
    monkeypatch.setattr(covariance, "_LIBRARY_ROWS", 16)
    monkeypatch.setattr(gradients, "_LIBRARY_FROM", 24 * 40)
    return shapes


def half(*shape):
    return torch.randn(*shape).half()


@pytest.mark.parametrize("features", [24, 32, 41])
def test_covariance_by_blocks_of_rows(products, features):
    x, out, total = half(30, 2 * features)[:, :features], torch.ones(features, features), torch.ones(features)
    covariance.covariance(out, x, column_sum=total)
    assert torch.allclose(out.tril(), (1 + x.float().T @ x.float()).tril(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(total, 1 + x.float().sum(0), rtol=1e-4, atol=1e-4)
    heights = [height for height, _, _ in products]
    assert heights[0] == 16 and sum(heights) == features
    assert [width for _, _, width in products] == [min(low + 16, features) for low in range(0, features, 16)]


def test_gradient(products):
    g, x, gradient, fisher = half(30, 24), half(30, 40), torch.ones(24, 40), torch.ones(24)
    gradients.both(gradient, fisher, g, x, None, None)
    assert products == [(24, 30, 40)]
    assert torch.allclose(gradient, 1 + g.float().T @ x.float(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(fisher, 1 + g.float().square().sum(0), rtol=1e-4, atol=1e-4)


def test_what_the_library_has_no_product_for_runs_in_triton(products):
    x, out = half(30, 32), torch.zeros(32, 32)
    index, weight = torch.arange(0, 30, 2), torch.rand(30)
    covariance.covariance(out, x, Selection(index))
    covariance.covariance(out, x, Selection(None, weight))
    covariance.covariance(out, x.float())
    covariance.covariance(out, x, config=_tiles.SMALL)  # asked for
    covariance.covariance(torch.zeros(16, 16), x[:, :16])  # small
    gradients.both(torch.zeros(32, 32), None, x, x, weight, None)
    gradients.both(torch.zeros(16, 16), None, x[:, :16], x[:, :16], None, None)
    assert products == []


def test_the_product_is_tried_before_it_is_trusted(monkeypatch):
    """A torch without it, one that raises, and one whose sum is wrong are all "no"."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(
        torch, "ones", lambda *shape, dtype=torch.float32, device=None: torch.full(shape, 1, dtype=dtype)
    )

    def tried(add_product):
        _library.adds.cache_clear()
        monkeypatch.setattr(_library, "add_product", add_product)
        return _library.adds(device, torch.bfloat16)

    def missing(out, left, right):
        raise NotImplementedError

    assert tried(lambda out, left, right: out.add_(left.float() @ right.float()))
    assert not tried(missing)
    assert not tried(lambda out, left, right: out.copy_(left.float() @ right.float()))  # does not add
    assert not _library.adds(torch.device("cpu"), torch.bfloat16) and not _library.adds(device, torch.float32)
    _library.adds.cache_clear()
