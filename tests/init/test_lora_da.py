import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels.init import LoraDA, resolve_method
from lora_kernels.init.curvature import InputMetric
from lora_kernels.init.lora_da import DIRECT_ORDER
from lora_kernels.statistics import InputMoments, Statistics
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding
from tests.helpers.layers import fisher_diagonal, layer_statistics, weight_gradient
from tests.statistics.models import padded, samples, tiny_llama

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(FOLDER / "lora_da.safetensors")
ABOUT = json.loads((FOLDER / "lora_da.json").read_text())
MODULES, RANK = ABOUT["modules"], ABOUT["rank"]


def moments(second, tokens, total=None):
    made = InputMoments(len(second), second.device, second.dtype)
    made.second, made.count = second, torch.tensor(float(tokens), dtype=torch.float64)
    if total is not None:
        made.total = total
    return made


def outputs(gradient, fisher, tokens):
    return weight_gradient(gradient, tokens), fisher_diagonal(fisher, tokens)


def of(*layers, items=1.0, samples=12, **changes):
    by_name = {layer.name: layer for layer in layers}
    return Statistics(layers=by_name, batches=1, tokens=1.0, loss_items=items, samples=samples, **changes)


def layer(inputs, gradients, name="l"):
    return layer_statistics(name, gradients[1].features, inputs.features, inputs, *gradients)


def made(n=30, m=20, tokens=200, name="l", decay=0.9, inputs=None):
    """A layer whose G has decaying singular values."""
    x = (
        torch.randn(tokens, n, dtype=torch.float64)
        * decay ** torch.arange(n)
        @ torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    )
    q, p = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for size in (m, n))
    size = min(n, m)
    gradient = (q[:, :size] * decay ** torch.arange(size)) @ p[:size] * 1e-2
    fisher = tokens * 1e-3 * (0.5 + torch.rand(m, dtype=torch.float64))
    return layer(inputs or moments(x.mT @ x, tokens, x.sum(0)), outputs(gradient, fisher, tokens), name)


def dense(layer, method, population):
    """Every step of the definition, dense: D, Gamma (of D over its norm) and that norm."""
    c = layer.input.covariance(center=False)
    c = c + method.damping * torch.eye(len(c), dtype=c.dtype)
    w = 1 / (layer.sums["fisher"].total.double() / layer.sums["fisher"].tokens + method.damping)
    d = -torch.linalg.inv(c) @ layer.sums["gradient"].total.double().mT * w
    sigma = torch.linalg.matrix_norm(d, 2) if method.normalize else torch.ones(())
    d = d / sigma
    variance = method.variance_weight * w.sum() / population / sigma**2
    return d, -method.bias_weight * d @ d.mT + variance * torch.linalg.inv(c)


def angle(a, b):
    """Largest principal angle between the spans of rows."""
    a, b = (torch.linalg.qr(each.double().mT).Q for each in (a, b))
    return float(torch.linalg.matrix_norm(a - b @ (b.mT @ a), ord=2).clamp(max=1).asin())


def trace_excess(guidance, a, smallest):
    q = torch.linalg.qr(a.double().mT).Q
    return float((torch.trace(q.mT @ guidance @ q) - smallest.sum()) / smallest.abs().sum())


def method_of(run):
    return LoraDA(**ABOUT["runs"][run])


def golden_statistics(mask, dtype):
    inputs, layers = {}, []
    for name in MODULES:
        key = ABOUT["input_of"][name]
        tokens = int(GOLDEN[f"stats.{mask}.tokens"])
        second = GOLDEN[f"stats.{mask}.input_sum.{key}"].to(dtype)
        inputs.setdefault(key, moments((second + second.mT) / 2, tokens))
        fisher = GOLDEN[f"stats.{mask}.output_sqgrad_sum.{name}"].to(dtype)
        layers.append(layer(inputs[key], outputs(GOLDEN[f"grad.bs1.{name}"].to(dtype), fisher, tokens), name))
    return of(*layers)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-4), (torch.float32, 1e-3)])
@pytest.mark.parametrize("run", ABOUT["runs"])
def test_golden(run, dtype, bound):
    method = method_of(run)
    stats = golden_statistics(method.token_mask, dtype)
    found = method.factors(stats, dict.fromkeys(MODULES, RANK))
    for name in MODULES:
        answer, a, b = found[name], GOLDEN[f"{run}.{name}.A"], GOLDEN[f"{run}.{name}.B"]
        values = GOLDEN[f"{run}.{name}.eigenvalues"]
        assert float((values[RANK] - values[RANK - 1]) / values[0].abs()) > 1e-4, "no gap: the fixture cannot tell"
        assert angle(answer.factors.A, a) < bound, name
        assert relative_error(answer.factors.A, a) < bound and relative_error(answer.factors.B, b) < bound, name
        product = answer.factors.B.double() @ answer.factors.A.double()
        assert relative_error(product, b.double() @ a.double()) < bound / 10, name
        assert answer.residual < 1e-10 and 0 <= answer.explained_variance <= 1 and not answer.notes
        if not (method.normalize_variance or method.output_damping_ratio):
            _, guidance = dense(stats[name], method, method.population_size)
            assert abs(trace_excess(guidance, answer.factors.A, values[:RANK])) < 1e-7


def test_golden_official_product_after_the_ratio_of_the_sigmas():
    run = "labels_b003"
    found = method_of(run).factors(golden_statistics("labels", torch.float32), dict.fromkeys(MODULES, RANK))
    ratio = GOLDEN[f"{run}.official.sigma"] / GOLDEN[f"{run}.exact.sigma"]
    assert float(ratio.min()) < 0.87, "the fixture must hold a sigma that is far off"
    for number, name in enumerate(MODULES):
        product = found[name].factors.B.double() @ found[name].factors.A.double()
        official = GOLDEN[f"{run}.{name}.official_B"].double() @ GOLDEN[f"{run}.{name}.official_A"].double()
        # The official solver stops early: its own angle is what separates the products.
        assert relative_error(product, official * ratio[number]) < 2 * float(GOLDEN[f"{run}.angles"][number].max())


def golden_model(dtype):
    config = LlamaConfig(**{**ABOUT["model_config"], "attn_implementation": "eager"})
    model = LlamaForCausalLM(config)
    weights = {name.removeprefix("model."): each for name, each in GOLDEN.items() if name.startswith("model.")}
    model.load_state_dict(weights)
    return model.to(dtype)


def golden_batches(size):
    data = {name: GOLDEN[f"data.{name}"].long() for name in ("input_ids", "attention_mask", "labels")}
    return [{name: each[low : low + size] for name, each in data.items()} for low in range(0, 12, size)]


@pytest.mark.parametrize("run", ["attn_b003", "labels_b003", "x_attn_varstrong"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_from_the_collector_whatever_the_batch_size(run, dtype):
    method, found = method_of(run), {}
    for size in (1, 4):
        stats = lk.collect(
            golden_model(dtype),
            golden_batches(size),
            method,
            targets=MODULES,
            dtype=dtype,
            progress=False,
            **method.collect_options,
        )
        assert stats.loss_items == stats.samples == 12
        found[size] = method.factors(stats, dict.fromkeys(MODULES, RANK))
    for name in MODULES:
        one, four = (found[size][name].factors for size in (1, 4))
        # The saved statistics behind the exact answer are float32 sums themselves.
        assert angle(one.A, GOLDEN[f"{run}.{name}.A"]) < 1e-3
        assert angle(one.A, four.A) < (1e-7 if dtype == torch.float64 else 1e-3)
        bound = 1e-6 if dtype == torch.float64 else 2e-3
        assert relative_error(four.B @ four.A, one.B @ one.A) < bound
        assert relative_error(one.B @ one.A, GOLDEN[f"{run}.{name}.B"] @ GOLDEN[f"{run}.{name}.A"]) < 2e-3


@pytest.mark.parametrize("n, m", [(650, 620), (620, 650), (700, 40), (40, 700)])
@pytest.mark.parametrize("weight", [0.0, 0.03, 30.0])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_large_layers_without_dense_products(n, m, weight, on_gpu, monkeypatch):
    if on_gpu:  # there the inverse of C is formed
        monkeypatch.setattr(InputMetric, "solve_thin", lambda metric, block: metric.inverse @ block)
    stats = of(made(n, m, 2 * n, decay=0.97))
    method = LoraDA(variance_weight=weight, population_size=1000, damping=1e-3)
    found = method.factors(stats, {"l": 6})["l"]
    d, guidance = dense(stats["l"], method, 1000)
    values, vectors = torch.linalg.eigh(guidance)
    iterated = min(n, m) > DIRECT_ORDER or (weight > 0 and n > DIRECT_ORDER)
    assert (found.solver not in ("direct", "svd")) == iterated and found.residual < 1e-8
    assert float(values[6] - values[5]) / float(values[0].abs()) > 1e-3, "no gap"
    assert angle(found.factors.A, vectors[:, :6].mT) < 1e-5
    assert_accurate(found.factors.B, d.mT @ found.factors.A.double().mT, rounding(torch.float32, max(n, m)))


def test_layers_share_one_factorisation_and_keep_their_order(monkeypatch):
    q = made(name="q")
    stats = of(q, made(name="o"), made(m=7, name="k", inputs=q.input))
    seen, factorize = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda c: seen.append(c.shape) or factorize(c))
    found = LoraDA().factors(stats, {"q": 3, "o": 2, "k": 5})
    assert list(found) == ["q", "o", "k"] and len(seen) == 2
    alone = LoraDA().factors(of(stats["k"]), {"k": 5})["k"].factors
    assert torch.equal(found["k"].factors.A, alone.A) and torch.equal(found["k"].factors.B, alone.B)
    assert alone.A.shape == (5, 30) and alone.B.shape == (7, 5)


def test_explained_variance_is_of_the_centred_input():
    x = 3 + torch.randn(500, 12, dtype=torch.float64) * torch.linspace(0.1, 2, 12)
    stats = of(layer(moments(x.mT @ x, 500, x.sum(0)), [made(12, 9).sums[name] for name in ("gradient", "fisher")]))
    answer = LoraDA().factors(stats, {"l": 4})["l"]
    a, centred = torch.linalg.qr(answer.factors.A.double().mT).Q, x - x.mean(0)
    assert answer.explained_variance == pytest.approx(float((centred @ a).square().sum() / centred.square().sum()))


def test_a_failed_cholesky_raises_the_damping_and_says_so():
    broken = made()
    broken.input.second -= 0.1 * 200 * torch.eye(30, dtype=torch.float64)
    answer = LoraDA().factors(of(broken), {"l": 3})["l"]
    assert "input damping raised from 1e-06 to " in answer.notes[0]
    assert torch.isfinite(answer.factors.A).all() and torch.isfinite(answer.factors.B).all()
    broken.input.second.fill_diagonal_(-1e9)
    with pytest.raises(ValueError, match="moment of layer l is not positive definite, even with damping"):
        LoraDA().factors(of(broken), {"l": 3})


def test_open_population_and_useless_directions_are_said():
    stats = of(made())
    open_size, given = (LoraDA(population_size=size).factors(stats, {"l": 3})["l"].factors for size in (None, 12))
    assert torch.equal(open_size.A, given.A) and torch.equal(open_size.B, given.B)
    assert LoraDA().remarks(stats) == ("population_size was left open: taken as the 12 samples read",)
    assert not LoraDA(population_size=12).remarks(stats) and not LoraDA(variance_weight=0.0).remarks(stats)
    thin = made()
    thin.sums["gradient"].total = thin.sums["gradient"].total[:, :1] * torch.ones(30, dtype=torch.float64)
    for weight in (0.0, 0.03):
        answer = LoraDA(variance_weight=weight, population_size=12).factors(of(thin), {"l": 3})["l"]
        assert answer.notes == ("only 1 of 3 directions gain more than their variance costs",)
        a = answer.factors.A.double() * 32
        assert float((a @ a.mT - torch.eye(3)).abs().max()) < 1e-6
    dead = made()
    dead.sums["fisher"].total[:15] = 0
    assert "half of the Fisher diagonal" in LoraDA(output_damping_ratio=0.5).factors(of(dead), {"l": 2})["l"].notes[0]


def test_statistics_of_another_convention_are_said():
    stats = of(made(), fingerprint={"options": {"weighting": "token", "mask": "attention"}})
    with pytest.warns(RuntimeWarning, match="collected with weighting='token' instead of 'sample'"):
        LoraDA().factors(stats, {"l": 2})


def without(statistic):
    good = made()
    return of(replace(good, sums={name: sums for name, sums in good.sums.items() if name != statistic}))


def with_total(statistic, value):
    good = made()
    good.sums[statistic].total = value
    return of(good)


@pytest.mark.parametrize(
    "stats, message",
    [
        (lambda: of(layer_statistics("l", 5, 5)), "no exact second moment of the input of layer l"),
        (lambda: without("fisher"), "no exact Fisher diagonal of layer l"),
        (lambda: without("gradient"), "no exact weight gradient of layer l"),
        (lambda: with_total("fisher", torch.full((20,), torch.nan)), "the Fisher diagonal of layer l holds NaN"),
        (lambda: of(made(), items=0.0), "statistics hold no loss"),
        (lambda: of(made(), samples=0), "statistics count no samples: give population_size"),
    ],
)
def test_statistics_that_will_not_do(stats, message):
    with pytest.raises(ValueError, match=message):
        LoraDA().factors(stats(), {"l": 2})


@pytest.mark.parametrize(
    "change, why",
    [
        (("gradient", "total", torch.zeros(20, 30)), "its weight gradient is zero"),
        (("fisher", "total", torch.zeros(20)), "its Fisher diagonal is zero"),
        (("fisher", "count", torch.zeros(())), "it counted no row in the backward pass"),
    ],
)
def test_a_layer_that_the_loss_does_not_depend_on_starts_as_stock_lora(change, why):
    good, bad = made(name="good"), made(name="bad")
    statistic, name, value = change
    setattr(bad.sums[statistic], name, value)
    found = LoraDA(population_size=9).factors(of(bad, good), {"bad": 2, "good": 2})
    alone = LoraDA(population_size=9).factors(of(good), {"good": 2})["good"]
    assert list(found) == ["bad", "good"] and torch.equal(found["good"].factors.B, alone.factors.B)
    assert found["bad"].solver == "stock" and why in found["bad"].notes[0] and not found["bad"].factors.B.any()


def test_sketched_inputs_and_bad_ranks():
    model, batches = tiny_llama(), padded(samples(4), 2)
    stats = lk.collect(
        model, batches, ("input_second", "fisher", "gradient"), form="sketch", sketch_size=4, progress=False
    )
    with pytest.raises(ValueError, match="no exact second moment of the input of layer model.layers.0.mlp.down_proj"):
        LoraDA().factors(stats, {"model.layers.0.mlp.down_proj": 2})
    with pytest.raises(ValueError, match=r"layer l has rank 21, but must be between 1 and min\(m, n\) = 20"):
        LoraDA().factors(of(made()), {"l": 21})
    assert LoraDA().factors(of(), {}) == {}


@pytest.mark.parametrize(
    "name, value",
    [("bias_weight", 0.0), ("damping", 0.0), ("gamma", -1.0), ("output_damping_ratio", float("inf"))],
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be above 0 and finite"):
        LoraDA(**{name: value})
    with pytest.raises(ValueError, match="variance_weight is -1, but must be >= 0"):
        LoraDA(variance_weight=-1)
    with pytest.raises(ValueError, match="token_mask is 'all', but must be one of 'attention', 'labels'"):
        LoraDA(token_mask="all")
    with pytest.raises(TypeError, match="population_size must be an int"):
        LoraDA(population_size=2.5)


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, target_modules="all-linear"))


@pytest.mark.parametrize("mask", ["attention", "labels"])
def test_initialize_collects_by_the_methods_conventions(mask):
    assert resolve_method("lora_da") == LoraDA()
    method = LoraDA(token_mask=mask, population_size=100)
    found = {}
    for size in (1, 4):
        model = adapted()
        before = {name: each.clone() for name, each in model.named_parameters() if "lora" not in name}
        report = lk.initialize(model, padded(samples(), size), method, dtype=torch.float64, progress=False)
        assert report.method == "lora_da" and all(each.status == "initialised" and each.rank == 3 for each in report)
        assert all(torch.equal(each, before[name]) for name, each in model.named_parameters() if name in before)
        found[size] = {name: each.detach() for name, each in model.named_parameters() if "lora_" in name}
    stats = lk.collect(
        adapted(), padded(samples(), 2), method, dtype=torch.float64, progress=False, **method.collect_options
    )
    expected = method.factors(stats, dict.fromkeys(stats, 3))
    for name, each in expected.items():
        for size in (1, 4):
            a, b = (found[size][f"{name}.lora_{part}.default.weight"] for part in "AB")
            assert relative_error(b @ a, each.factors.B @ each.factors.A) < 1e-3, name


def test_initialize_by_name_and_the_users_options_win():
    report = lk.initialize(adapted(), padded(samples(), 4), "lora_da", progress=False)
    assert sum("taken as the 8 samples read" in sentence for sentence in report.advice) == 1
    with pytest.warns(RuntimeWarning, match="weighting='token' instead of 'sample'"):
        lk.initialize(adapted(), padded(samples(), 4), "lora_da", weighting="token", progress=False)


def test_the_population_is_that_of_the_loaders_dataset():
    rows = [{name: value[0] for name, value in batch.items()} for batch in padded(samples(8), 1)]
    rows = [row for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])] * 5
    loader = torch.utils.data.DataLoader(rows, batch_size=1)
    report = lk.initialize(adapted(), loader, "lora_da", max_batches=2, progress=False)
    assert report.settings["population_size"] == len(rows) > 2
    assert not any("population_size was left open" in sentence for sentence in report.advice)
    report = lk.initialize(adapted(), loader, LoraDA(population_size=77), max_batches=2, progress=False)
    assert report.settings["population_size"] == 77
