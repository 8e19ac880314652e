import pytest
import torch

from tests.conftest import relative_error
from tests.training.ranks import ALL, adapter, batch, train
from tests.training.test_accelerate import wrapped
from tests.training.test_experts import wrapped as mixture

RUN_BY_TWO = "tests.training.ranks"


@pytest.fixture(scope="module")
def trained(two_processes_ran):
    return torch.load(two_processes_ran / RUN_BY_TWO / "adapters.pt")


@pytest.mark.parametrize("name", ["ddp", "fsdp_before", "fsdp_after"])
def test_two_processes_train_what_peft_trains_in_one(trained, name):
    model, start = wrapped(), adapter(wrapped())
    train(model, batch())
    expected = adapter(model)
    assert trained[name].keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(trained[name][key], value) < 1e-4, key
        assert relative_error(value, start[key]) > 1e-2  # it has moved


@pytest.fixture(scope="module")
def expected():
    model = wrapped(target_modules=ALL)
    train(model, batch())
    return adapter(model)


@pytest.mark.parametrize("name", ["block", "root", "linear", "checkpointed_False", "checkpointed_True"])
def test_any_units_train_the_same_adapter(trained, expected, name):
    for key, value in expected.items():
        assert relative_error(trained[name][key], value) < 1e-4, key


@pytest.mark.parametrize("units", ["ddp", "block", "experts", "root"])
def test_experts_in_two_processes_train_what_peft_trains_in_one(trained, units):
    model = mixture()
    train(model, batch())
    expected = adapter(model)
    assert trained[f"experts_{units}"].keys() == expected.keys() and any("experts" in key for key in expected)
    for key, value in expected.items():
        assert relative_error(trained[f"experts_{units}"][key], value) < 1e-4, key
