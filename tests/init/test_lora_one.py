import pytest
import torch

import lora_kernels as lk
from lora_kernels.init import METHODS, LoraOne, resolve_method
from lora_kernels.statistics import Statistics
from tests.conftest import relative_error
from tests.helpers.layers import gradient_layer, sketched_gradient_layer
from tests.statistics.models import padded, samples, tiny_llama

CPU = torch.device("cpu")


def matrix(m, n, decay=0.8):
    k = min(m, n)
    u, v = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(n, k)).Q
    return (u * decay ** torch.arange(k)) @ v.mT


def definition(gradient, rank, gamma):
    """A and B in float64, up to the signs of the triplets."""
    u, s, vh = torch.linalg.svd(-gradient.double(), full_matrices=False)
    root = (s[:rank] / s[0] / gamma).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


@pytest.mark.parametrize("shape", [(24, 33), (33, 24), (300, 200), (1, 40), (40, 1)])
@pytest.mark.parametrize("gamma", [128.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(shape, gamma, dtype):
    gradient, rank = matrix(*shape).to(dtype), min(6, *shape)
    found = LoraOne(gamma=gamma).factors({"l": gradient_layer("l", gradient)}, {"l": rank})["l"]
    a, b = definition(gradient, rank, gamma)
    got_a, got_b = found.factors.A.double(), found.factors.B.double()
    assert relative_error(got_b @ got_a, b @ a) < 1e-5
    signs = (got_a * a).sum(1).sign()
    assert relative_error(got_a * signs[:, None], a) < 1e-4 and relative_error(got_b * signs, b) < 1e-4
    assert float(torch.linalg.matrix_norm(got_b @ got_a, 2)) == pytest.approx(1 / gamma, rel=1e-5)
    assert float((got_b @ got_a * gradient).sum()) < 0  # a step downhill
    s = torch.linalg.svdvals(gradient)
    left = float(s[rank] / s[0]) if rank < len(s) else 0.0
    assert left * (1 - 1e-5) <= found.residual and not found.notes


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_a_sketch_gives_the_same_whatever_the_size_of_the_gradient(size):
    x, g = torch.randn(300, 6) @ matrix(6, 70), size * torch.randn(300, 6) @ matrix(6, 50)
    sums = Statistics(layers={"l": sketched_gradient_layer("l", g, x, 24)}, loss_items=300.0)
    a, b = definition(g.double().mT @ x.double(), 3, 128.0)
    found = LoraOne().factors(sums, {"l": 3})["l"]
    assert relative_error(found.factors.B.double() @ found.factors.A.double(), b @ a) < 1e-4
    assert found.solver == "two_sided" and LoraOne().sketch_size([4, 8]) == 16


def test_fewer_directions_than_r_leave_rows_that_can_learn():
    gradient = torch.randn(20, 2) @ torch.randn(2, 30)
    found = LoraOne().factors({"l": gradient_layer("l", gradient)}, {"l": 5})["l"]
    a, b = definition(gradient, 2, 128.0)
    assert relative_error(found.factors.B.double() @ found.factors.A.double(), b @ a) < 1e-5
    assert "2 directions above rounding for r = 5" in found.notes[0]
    assert not found.factors.B[:, 2:].any()
    torch.testing.assert_close(found.factors.A[2:].norm(dim=1), torch.full((3,), 128.0**-0.5))


def test_a_zero_gradient_leaves_the_stock_start():
    layers = {"zero": gradient_layer("zero", torch.zeros(12, 15)), "good": gradient_layer("good", matrix(12, 15))}
    found = LoraOne().factors(layers, {"zero": 3, "good": 3})
    assert found["zero"].solver == "stock" and "its weight gradient is zero" in found["zero"].notes[0]
    assert found["good"].solver != "stock" and bool(found["good"].factors.B.any())


def adapted(**changes):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **changes))


@pytest.mark.parametrize("form", ["exact", "sketch"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_initialize_moves_the_function_downhill_and_says_so(changes, form):
    model, batches = adapted(**changes), padded(samples(), 4)
    weights = {name: each.clone() for name, each in model.named_parameters() if "base_layer" in name}
    before = [float(model.eval()(**batch).loss.detach()) for batch in batches]
    report = lk.initialize(model, batches, "lora_one", form=form, sketch_size=16, progress=False)
    after = [float(model.eval()(**batch).loss.detach()) for batch in batches]
    assert sum(after) < sum(before)
    assert all(torch.equal(each, weights[name]) for name, each in model.named_parameters() if name in weights)
    assert all(each.status == "initialised" and each.start_change < 0 and each.start_share > 0 for each in report)
    assert any("moves the model" in sentence for sentence in report.advice)
    if changes.get("use_dora"):
        for each in report:
            module = model.get_submodule(each.name)
            delta = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            norm = (module.get_base_layer().weight + delta).norm(dim=1)
            torch.testing.assert_close(module.lora_magnitude_vector["default"].weight, norm)


def test_names_and_settings():
    assert METHODS["lora_one"] is LoraOne and resolve_method("lora_one") == LoraOne()
    for gamma in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gamma is"):
            LoraOne(gamma=gamma)
    with pytest.raises(ValueError, match="no weight gradient of layer l"):
        LoraOne().factors({}, {"l": 2})
