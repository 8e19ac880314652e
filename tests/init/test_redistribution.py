import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from lora_kernels.init.ranks import SCORES
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama

WANTS = {"input_second": True, "fisher": True, "gradient": True}
OFFERED = 6


def wrapped(**changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    return get_peft_model(tiny_llama(hidden_size=48, intermediate_size=80), LoraConfig(**settings))


@pytest.fixture(scope="module")
def stats():
    return lk.collect(wrapped(), padded(samples(), 4), WANTS, dtype=torch.float64, progress=False)


def dense(statistics, name):
    """C, f, G and N of a layer, float64."""
    layer = statistics[name]
    n = layer.tokens
    c = layer.input.covariance(center=False) + 1e-6 * torch.eye(layer.in_features, dtype=torch.float64)
    return c, layer.sums["fisher"].total / layer.sums["fisher"].tokens + 1e-6, statistics[name].gradient(), n


def test_gradient_energy_is_what_a_unit_step_along_a_component_gains(stats):
    scores = SCORES["gradient_energy"][1](stats, dict.fromkeys(stats, OFFERED), seed=0)
    for name in stats:
        truth = torch.linalg.svdvals(stats[name].gradient())[:OFFERED].square()
        assert relative_error(torch.tensor(scores[name], dtype=torch.float64), truth) < 1e-6


def test_fisher_energy_is_the_gain_of_natural_gradient_steps(stats):
    every = {name: min(layer.in_features, layer.out_features) for name, layer in stats.items()}
    scores = SCORES["fisher_energy"][1](stats, every, seed=0)
    for name in stats:
        c, f, g, tokens = dense(stats, name)
        # The minimum of <G, D> + 1/2 (N / items) sum_ij f_i (D C D^T)_ii over all D, by its normal equation.
        best = -(g / f.unsqueeze(1)) @ torch.linalg.inv(c) * (stats.loss_items / tokens)
        gain = -float((g * best).sum()) / 2
        assert abs(sum(scores[name]) / gain - 1) < 1e-3 and scores[name] == sorted(scores[name], reverse=True)


def test_fisher_energy_does_not_see_the_scale_of_a_layer(stats):
    name = next(iter(stats))
    before = SCORES["fisher_energy"][1](stats, {name: OFFERED}, seed=0)[name]
    model = wrapped()
    # Inputs ten times as large, weights a tenth: the same function, another parametrisation.
    base = model.get_submodule(name).get_base_layer()
    norm = model.get_submodule("base_model.model.model.layers.0.input_layernorm")
    with torch.no_grad():
        for part in ("q_proj", "k_proj", "v_proj"):
            layer = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{part}")
            getattr(layer, "base_layer", layer).weight /= 10
        norm.weight *= 10
    assert base is model.get_submodule(name).get_base_layer()
    scaled = lk.collect(model, padded(samples(), 4), WANTS, dtype=torch.float64, progress=False)
    after = SCORES["fisher_energy"][1](scaled, {name: OFFERED}, seed=0)[name]
    plain = SCORES["gradient_energy"][1]
    assert torch.allclose(torch.tensor(after), torch.tensor(before), rtol=2e-2)
    assert plain(scaled, {name: 1}, seed=0)[name][0] > 50 * (plain(stats, {name: 1}, seed=0)[name][0])


def test_gradient_energy_from_sketches():
    model = get_peft_model(
        tiny_llama(hidden_size=160, intermediate_size=512), LoraConfig(r=2, target_modules=["down_proj"])
    )
    batches = padded(samples(), 4)
    offered = {name: 2 for name in lk.collect(model, batches, "gradient", progress=False)}
    sums = [lk.collect(model, batches, "gradient", progress=False, form=f, sketch_size=24) for f in ("exact", "sketch")]
    exact, sketched = (SCORES["gradient_energy"][1](each, offered, seed=0) for each in sums)
    for name in offered:
        assert sums[1][name].form("gradient") == "sketch"
        assert sketched[name] == pytest.approx(exact[name], rel=0.15)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("method", ["eva", "lora_da", "pissa", "corda"])
def test_any_method_takes_any_score(method, score):
    model, batches = wrapped(), padded(samples(), 4)
    before = model.eval()(**batches[0]).logits.detach()
    ranks = lk.init.Redistribution(score, max_rank=6, multiple_of=2, min_rank=2)
    report = lk.initialize(model, batches, method, ranks=ranks, progress=False)
    found = [each.rank for each in report]
    assert sum(found) == 4 * len(found) and set(found) <= {2, 4, 6} and len(set(found)) > 1
    assert report.settings["ranks"]["score"] == score
    for each in report:
        module = model.get_submodule(each.name)
        assert module.lora_A["default"].weight.shape[0] == each.rank
        assert module.scaling["default"] == pytest.approx(2.0)
    if method != "lora_da":
        assert relative_error(model.eval()(**batches[0]).logits.detach(), before) < 1e-4


def test_a_layer_may_lose_its_adapter():
    model = wrapped(r=1, lora_alpha=2)
    report = lk.initialize(
        model,
        padded(samples(), 4),
        "pissa",
        ranks=lk.init.Redistribution("gradient_energy", 4.0, min_rank=0),
        progress=False,
    )
    assert {each.status for each in report} == {"initialised", "removed"}
    assert sum(each.rank for each in report) == len(report.layers)
    for each in report:
        assert hasattr(model.get_submodule(each.name), "lora_A") == (each.rank > 0)


def test_evas_own_redistribution_is_the_general_one(stats):
    own, general = wrapped(), wrapped()
    first = lk.initialize(own, statistics=stats, method=lk.init.EVA(rho=2.0), progress=False)
    assert len({each.rank for each in first}) > 1
    second = lk.initialize(
        general,
        statistics=stats,
        method=lk.init.EVA(rho=1.5, multiple_of=3),
        ranks=lk.init.Redistribution(),
        progress=False,
    )
    assert [each.rank for each in first] == [each.rank for each in second]
    for (_, one), (_, other) in zip(own.named_parameters(), general.named_parameters(), strict=True):
        assert relative_error(other.detach(), one.detach()) < 1e-5


def test_errors(stats):
    with pytest.raises(ValueError, match="score is 'loss', but must be one of"):
        lk.init.Redistribution("loss")
    with pytest.raises(ValueError, match="rho"):
        lk.init.Redistribution(rho=0.5)
    with pytest.raises(ValueError, match="max_rank"):
        lk.init.Redistribution(min_rank=4, max_rank=2)
    only_inputs = lk.collect(wrapped(), padded(samples(), 4), "input_second", progress=False)
    with pytest.raises(ValueError, match="does not reach"):
        lk.initialize(
            wrapped(),
            statistics=only_inputs,
            method="eva",
            ranks=lk.init.Redistribution("gradient_energy"),
            unreached="raise",
        )
    with pytest.raises(ValueError, match="exactly one of loader and statistics"):
        lk.initialize(wrapped(), method="pissa", ranks=lk.init.Redistribution("gradient_energy"))


def test_factors_are_made_for_the_scaling_that_a_new_rank_gives():
    model = wrapped()
    weights = {name: module.get_base_layer().weight.detach().clone() for name, module in lora(model)}
    ranks = lk.init.Redistribution("gradient_energy", adjust_scaling_factors=False, min_rank=1)
    report = lk.initialize(model, padded(samples(), 4), lk.init.PiSSA(n_iter=None), ranks=ranks, progress=False)
    assert len({each.rank for each in report}) > 1
    for each in report:
        module = dict(lora(model))[each.name]
        best = torch.linalg.svd(weights[each.name])
        principal = (best.U[:, : each.rank] * best.S[: each.rank]) @ best.Vh[: each.rank]
        assert module.scaling["default"] == pytest.approx(8 / each.rank)
        product = module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
        assert relative_error(module.scaling["default"] * product, principal) < 1e-4
        assert each.start_share == pytest.approx(float(principal.norm() / weights[each.name].norm()), rel=1e-4)


def lora(model):
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def test_the_start_is_compared_with_the_weight_as_it_was():
    shares = []
    for base in ("intact", "mutate"):
        shares.append([each.start_share for each in lk.initialize(wrapped(), method="pissa", base=base)])
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)
