import pytest
import torch

import lora_kernels as lk
from tests.conftest import relative_error
from tests.training.dash_models import wrapped
from tests.training.dash_ranks import SWITCH, adapter, batch, train

RUN_BY_TWO = "tests.training.dash_ranks"


@pytest.fixture(scope="module")
def trained(two_processes_ran):
    return torch.load(two_processes_ran / RUN_BY_TWO / "adapters.pt")


@pytest.mark.parametrize("name", ["eager", "accelerated", "compiled_graph", "fsdp"])
def test_two_processes_train_what_one_does(trained, name):
    model = wrapped()
    run = lk.LoraDash(k=3, pre_launch=SWITCH).attach(model)
    train(model, run, batch())
    expected = adapter(model)
    assert trained[name].keys() == expected.keys() and sum("coordinates" in key for key in expected) == 6
    for key, value in expected.items():
        assert bool(value.any()), key
        assert relative_error(trained[name][key], value) < 1e-3, key
