import math

import pytest
import torch

import lora_kernels as lk
from lora_kernels.statistics.sketches import GradientSketch, InputSketch, stream_of
from lora_kernels.statistics.sums import InputMoments
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama

CPU = torch.device("cpu")


def rows(count=700, n=96, decay=6.0, mean=0.0, dtype=torch.float32):
    torch.manual_seed(2)
    basis = torch.linalg.qr(torch.randn(n, n).double()).Q
    x = torch.randn(count, n).double() * torch.exp(-torch.arange(n) / decay) @ basis.mT + mean
    return x.to(dtype)


def filled(x, size=24, weight=None, **settings):
    sketch = InputSketch(x.shape[1], CPU, size=size, **settings)
    for low in range(0, len(x), 256):
        part = slice(low, low + 256)
        sketch.update(x[part], None if weight is None else weight[part])
    return sketch


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_components_are_those_of_the_exact_covariance(center, mean):
    x = rows(mean=mean)
    exact = InputMoments(96, CPU)
    exact.update(x)
    truth = exact.covariance(center=center)
    values, vectors = torch.linalg.eigh(truth)
    sketch = filled(x)
    pairs = sketch.components(6, center=center)
    error = float(pairs.residuals)
    assert sketch.trace(center=center) == pytest.approx(float(truth.trace()), rel=1e-5)
    torch.testing.assert_close(pairs.values, values.flip(0)[:6], rtol=2e-2, atol=0)
    cosines = torch.linalg.svdvals(vectors[:, -6:].mT @ pairs.vectors)
    assert float(cosines.min()) > 1 - 1e-3
    # The bound holds, and means something.
    left = torch.linalg.norm(truth @ pairs.vectors - pairs.vectors * pairs.values, dim=0).max() / values[-1]
    assert float(left) <= error < 0.2


def test_the_bound_holds_for_a_flat_spectrum_where_the_sketch_fails():
    torch.manual_seed(4)
    x = torch.randn(2000, 80)
    exact = InputMoments(80, CPU)
    exact.update(x)
    truth = exact.covariance()
    pairs = filled(x, size=10).components(4)
    error = float(pairs.residuals)
    left = torch.linalg.norm(truth @ pairs.vectors - pairs.vectors * pairs.values, dim=0).max() / pairs.values[0]
    assert 0.1 < float(left) <= error


def test_masks_weights_and_batches_add_up():
    x = rows(600)
    keep = torch.rand(600) < 0.5
    poisoned = torch.where(keep.unsqueeze(1), x, torch.full_like(x, float("nan")))
    one, other = filled(x[keep]), filled(poisoned, weight=keep)
    for name in one.tensors():
        torch.testing.assert_close(one.tensors()[name], other.tensors()[name], rtol=1e-4, atol=1e-4)
    weights = torch.rand(600)
    scaled, plain = filled(x * weights.sqrt().unsqueeze(1)), filled(x, weight=weights)
    torch.testing.assert_close(scaled.product, plain.product, rtol=1e-4, atol=1e-3)
    assert plain.tokens == pytest.approx(float(weights.sum()), rel=1e-6)


def test_streams_differ_by_name_and_seed_and_nothing_else():
    x = rows(50)
    a = filled(x, seed=1, stream=stream_of("a")).product
    assert torch.equal(a, filled(x, seed=1, stream=stream_of("a")).product)
    assert relative_error(a, filled(x, seed=1, stream=stream_of("b")).product) > 0.5
    assert relative_error(a, filled(x, seed=2, stream=stream_of("a")).product) > 0.5


def test_gradient_sketch_gives_the_triplets_of_the_gradient():
    torch.manual_seed(6)
    m, n, count = 70, 110, 400
    core = torch.randn(12, 12).double() * torch.exp(-torch.arange(12) / 2.0)
    x = torch.randn(count, 12).double() @ torch.randn(12, n).double()
    g = torch.randn(count, 12).double() @ core @ torch.randn(12, m).double()
    exact = g.mT @ x
    sketch = GradientSketch(m, n, CPU, torch.float64, size=20, co_size=40, seed=3, stream=9)
    for low in range(0, count, 128):
        sketch.update(g[low : low + 128], x[low : low + 128])
    found = sketch.svd(12, scale=0.5)
    s = torch.linalg.svdvals(exact) / 2
    torch.testing.assert_close(found.S, s[:12], rtol=1e-9, atol=0)
    assert relative_error(found.U * found.S @ found.Vh, exact / 2) < 1e-9
    fewer = sketch.svd(4, scale=0.5)
    left = torch.linalg.matrix_norm(exact / 2 - fewer.U * fewer.S @ fewer.Vh, ord=2)
    assert float(left) <= float(fewer.error) < 30 * float(left)


def test_more_columns_than_features_is_exact():
    x = rows(300, n=7)
    exact = InputMoments(7, CPU)
    exact.update(x)
    pairs = filled(x, size=24).components(5)
    error = float(pairs.residuals)
    torch.testing.assert_close(
        pairs.values, torch.linalg.eigvalsh(exact.covariance()).flip(0)[:5], rtol=1e-4, atol=1e-7
    )
    assert error < 1e-4
    sketch = GradientSketch(5, 7, CPU, size=24, co_size=48)
    g = torch.randn(300, 5)
    sketch.update(g, x)
    torch.testing.assert_close(sketch.svd(4).S.float(), torch.linalg.svdvals(g.mT @ x)[:4], rtol=1e-3, atol=1e-4)


def test_errors():
    sketch = InputSketch(10, CPU, size=4)
    with pytest.raises(ValueError, match="holds 0 tokens"):
        sketch.components(2)
    sketch.update(torch.randn(20, 10))
    with pytest.raises(
        ValueError, match="5 components are asked of a sketch with 4 columns: collect with sketch_size=10"
    ):
        sketch.components(5)
    with pytest.raises(ValueError, match="5 triplets are asked of a sketch with 4 columns"):
        GradientSketch(9, 10, CPU, size=4, co_size=8).svd(5)
    constant = InputSketch(10, CPU, size=4)
    constant.update(torch.ones(20, 10))
    pairs = constant.components(2)
    error = float(pairs.residuals)
    assert float(pairs.values.max()) < 1e-5 and math.isfinite(error)


def test_sketched_eva_captures_the_variance_of_exact_eva():
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    def run(**options):
        model = tiny_llama(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        batches = padded(samples(24), 4)
        report = lk.initialize(model, batches, lk.init.EVA(rho=1.0), progress=False, **options)
        stats = lk.collect(model, batches, progress=False)
        captured = {}
        for name, layer in stats.items():
            a = model.get_submodule(name).lora_A["default"].weight.detach().double()
            truth = layer.input.covariance()
            captured[name] = float((a @ truth @ a.mT).trace() / truth.trace())
        return captured, report

    exact, _ = run()
    sketched, report = run(form="sketch", sketch_size=48)
    assert {layer.solver for layer in report.layers} == {"nystrom"}
    report.to_json()
    for layer in report.layers:
        assert 0 < layer.eigen_residual < 10
        # A Nystrom approximation lies below the matrix: what it promises is there.
        assert layer.explained_variance <= sketched[layer.name] + 1e-6
        assert sketched[layer.name] > 0.9 * exact[layer.name]
