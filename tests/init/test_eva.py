import math

import pytest
import torch

from lora_kernels.init import EVA, METHODS, resolve_method
from lora_kernels.statistics import InputMoments
from tests.helpers.layers import layer_statistics


def layer(name, x, out_features=30, moments=None):
    if moments is None:
        moments = InputMoments(x.shape[-1], x.device)
        moments.update(x)
    return layer_statistics(name, out_features, moments.features, moments)


def data(tokens=500, n=20, decay=0.8, mean=1.0):
    q = torch.linalg.qr(torch.randn(n, n)).Q
    return mean + (torch.randn(tokens, n) * decay ** torch.arange(n)) @ q


def exact(x, center=True):
    rows = x.double() - (x.double().mean(0) if center else 0)
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(x))
    return values.flip(0), vectors.flip(1)


def angles(a, b):
    """Angle between paired unit vectors (rows of a, columns of b)."""
    return (a.double() * b.mT).sum(-1).abs().clamp(max=1).acos()


@pytest.mark.parametrize("n", [20, 700])  # full decomposition, and Krylov
@pytest.mark.parametrize("center", [True, False])
def test_equals_the_exact_decomposition(n, center):
    x = data(3000, n, decay=0.9 if n == 20 else 0.97, mean=1.0 if center else 0.0)
    found = EVA(rho=1.0, center=center).factors({"l": layer("l", x, n)}, {"l": 8})["l"]
    values, vectors = exact(x, center)
    gaps = (values[:-1] - values[1:])[:8] / values[0]
    assert float(gaps.min()) > 1e-3, "the data must separate the eigenvalues"
    assert float(angles(found.factors.A, vectors[:, :8]).max()) < 1e-3
    a = found.factors.A.double()  # orthonormal but for the rounding of its entries
    assert float((a @ a.mT - torch.eye(8)).abs().max()) <= torch.finfo(torch.float32).eps
    assert found.factors.B.shape == (n, 8) and float(found.factors.B.abs().max()) == 0
    assert found.explained_variance == pytest.approx(float(values[:8].sum() / values.sum()), abs=1e-5)
    assert found.solver == ("direct" if n == 20 else "krylov") and found.residual <= 1e-7


def test_ranks_follow_explained_variance():
    steep, flat = layer("steep", data(decay=0.3)), layer("flat", data(decay=0.98))
    found = EVA(rho=2.0).factors({"steep": steep, "flat": flat}, {"steep": 6, "flat": 6})
    ratios = {}
    for name, each in (("steep", steep), ("flat", flat)):
        values = torch.linalg.eigvalsh(each.input.covariance()).flip(0)
        ratios[name] = (values / values.sum())[:12].tolist()
    pool = sorted(((r, name) for name, rs in ratios.items() for r in rs), reverse=True)[:12]
    expected = {name: sum(1 for _, each in pool if each == name) for name in ratios}
    assert {name: each.factors.rank for name, each in found.items()} == expected
    assert expected["steep"] < expected["flat"] <= 12


def test_layers_with_one_input_share_directions_and_whitening_does_not_compound():
    x = data()
    q = layer("q", x)
    group = {"q": q, "k": layer("k", x, moments=q.input), "v": layer("v", x, 5, moments=q.input)}
    whitened = EVA(rho=1.0, whiten=True).factors(group, {"q": 4, "k": 4, "v": 4})
    alone = EVA(rho=1.0, whiten=True).factors({"q": q}, {"q": 4})["q"].factors.A
    plain = EVA(rho=1.0).factors({"q": q}, {"q": 4})["q"].factors.A
    singular = torch.linalg.svdvals(x.double() - x.double().mean(0))[:4]
    torch.testing.assert_close(alone.double(), plain.double() / singular.sqrt()[:, None], rtol=1e-4, atol=1e-6)
    for name in group:
        assert torch.equal(whitened[name].factors.A, alone)
    assert whitened["v"].factors.B.shape == (5, 4)


def test_serving_constraints():
    stats = {"a": layer("a", data(decay=0.5)), "b": layer("b", data(decay=0.97))}
    ranks = {"a": 8, "b": 8}
    found = EVA(rho=2.0, min_rank=4, max_rank=12, multiple_of=4).factors(stats, ranks)
    got = {name: each.factors.rank for name, each in found.items()}
    assert got == {"a": 4, "b": 12}


def test_a_constant_input_and_few_tokens_are_said():
    constant = EVA(rho=1.0).factors({"l": layer("l", torch.ones(9, 6))}, {"l": 2})["l"]
    assert math.isnan(constant.explained_variance) and "never varies" in constant.notes[0]
    few = EVA(rho=1.0).factors({"l": layer("l", torch.randn(3, 6))}, {"l": 4})["l"]
    assert "3 tokens cannot determine 4 directions" in few.notes[0]
    assert torch.isfinite(few.factors.A).all()
    whitened = EVA(rho=1.0, whiten=True).factors({"l": layer("l", torch.ones(9, 6))}, {"l": 2})["l"]
    assert torch.isfinite(whitened.factors.A).all()


def test_a_layer_without_a_token_starts_as_stock_lora():
    stats = {"l": layer("l", data()), "empty": layer("empty", torch.zeros(0, 20))}
    found = EVA(rho=2.0, max_rank=8).factors(stats, {"l": 4, "empty": 4})
    assert found["empty"].solver == "stock" and "it saw no token" in found["empty"].notes[0]
    assert found["l"].factors.rank == found["empty"].factors.rank == 4


def test_a_method_is_one_class():
    from dataclasses import dataclass

    from lora_kernels.init import InitMethod, LayerFactors, LoraFactors

    try:

        @dataclass(frozen=True)
        class Ones(InitMethod):
            name = "ones"
            wants = {}

            def solve_all(self, layers):
                sizes = {name: (layer.rank, *layer.shape) for name, layer in layers.items()}
                return {
                    name: LayerFactors(LoraFactors(torch.ones(r, n), torch.zeros(m, r)))
                    for name, (r, m, n) in sizes.items()
                }

        peft = pytest.importorskip("peft")
        import lora_kernels as lk

        model = peft.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(6, 5)), peft.LoraConfig(r=2, target_modules=["0"])
        )
        report = lk.initialize(model, method="ones", progress=False)
        assert report.method == "ones" and report.layers[0].status == "initialised"
        assert bool((model.get_submodule("base_model.model.0").lora_A["default"].weight == 1).all())
        with pytest.raises(ValueError, match="name of Other is 'ones', which .*Ones has"):
            type("Other", (InitMethod,), {"name": "ones"})
        with pytest.raises(TypeError, match="abstract"):
            type("Nothing", (InitMethod,), {})()
    finally:
        METHODS.pop("ones", None)


def test_errors():
    with pytest.raises(ValueError, match="rho is 0.5, but must be >= 1"):
        EVA(rho=0.5)
    with pytest.raises(ValueError, match="max_rank is 2, but must be >= 4"):
        EVA(min_rank=4, max_rank=2)
    with pytest.raises(ValueError, match=r"layer l has rank 30, but must be between 1 and min\(m, n\) = 20"):
        EVA().factors({"l": layer("l", data())}, {"l": 30})
    with pytest.raises(ValueError, match="no second moment of the input of layer l"):
        EVA().factors({"l": layer_statistics("l", 3, 3)}, {"l": 1})
    with pytest.raises(ValueError, match="layer a has rank 30, .* = 20; layer b has rank 21"):
        EVA().factors({"a": layer("a", data()), "b": layer("b", data())}, {"a": 30, "b": 21})


def test_methods_by_name_and_config():
    assert resolve_method("eva") == EVA() and all(METHODS[name].name == name for name in METHODS)
    assert resolve_method(EVA(rho=1.5)).rho == 1.5
    with pytest.raises(ValueError, match="method is 'evil', but must be one of .*'eva', "):
        resolve_method("evil")
    with pytest.raises(TypeError, match="must be a name or a method config"):
        resolve_method(3)
