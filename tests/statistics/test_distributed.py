import pytest
import torch

import lora_kernels as lk
from lora_kernels.statistics import STATISTICS, Statistics
from tests.conftest import relative_error
from tests.statistics.models import samples, tiny_llama
from tests.statistics.ranks import peft_model, shares

RUN_BY_TWO = "tests.statistics.ranks"


@pytest.fixture(scope="module")
def results(two_processes_ran):
    return two_processes_ran / RUN_BY_TWO


@pytest.mark.parametrize(
    "name", ["ddp", "passes", "fsdp", "fsdp_passes", "lonely", "fsdp_lonely", "checkpoint", "resumed"]
)
def test_two_processes_find_what_one_finds(results, name):
    model = tiny_llama()
    expected = lk.collect(model, shares(samples(10), 0, 1), STATISTICS, progress=False)
    found = Statistics.load(results / f"{name}.safetensors")
    assert list(found) == list(expected)
    for layer in expected:
        assert found[layer].sums.keys() == expected[layer].sums.keys()
        for statistic, sums in expected[layer].sums.items():
            for key, value in sums.tensors().items():
                seen = found[layer].sums[statistic].tensors()[key]
                if key in sums.triangular:
                    value, seen = value.tril(), seen.tril()
                assert relative_error(seen, value) < 1e-6, (layer, statistic, key)
    for key in ("batches", "tokens", "loss_items", "samples"):
        assert getattr(found, key) == getattr(expected, key)


def test_sketches_add_over_processes(results):
    model = tiny_llama()
    wants = ("input_second", "gradient")
    batches = shares(samples(10), 0, 1)
    expected = lk.collect(model, batches, wants, form="sketch", sketch_size=2, progress=False)
    found = Statistics.load(results / "sketch.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert relative_error(found[name].input.product, expected[name].input.product) < 1e-6
    assert relative_error(found[name].sums["gradient"].left, expected[name].sums["gradient"].left) < 1e-6


def test_factors_are_those_of_one_process(results):
    saved = torch.load(results / "factors.pt")
    for key, rho in (("factors", 2.0), ("inside", 1.0)):
        model = peft_model()
        lk.initialize(model, shares(samples(10), 0, 1), lk.init.EVA(rho=rho), progress=False)
        expected = {name: each for name, each in model.named_parameters() if name in saved[key]}
        assert len(expected) == len(saved[key]) > 0
        for name, value in expected.items():
            found = saved[key][name]
            if "lora_A" in name:  # the same subspace
                assert relative_error(found.mT @ found, value.mT @ value) < 1e-4
            else:
                assert not bool(found.any())


def test_lora_da_factors_are_those_of_one_process(results):
    solved = torch.load(results / "factors.pt")["solved"]
    model = peft_model()
    lk.initialize(model, shares(samples(10), 0, 1), "lora_da", progress=False)
    expected = {name: each.detach() for name, each in model.named_parameters()}
    names = [name for name in solved if "lora_A" in name]
    assert names
    for name in names:
        other = name.replace("lora_A", "lora_B")
        assert relative_error(solved[other] @ solved[name], expected[other] @ expected[name]) < 1e-3, name
