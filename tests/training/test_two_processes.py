import pytest
import torch

from tests.conftest import relative_error
from tests.torchrun import two_processes
from tests.training.ranks import adapter, batch, train
from tests.training.test_accelerate import wrapped


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    two_processes("tests.training.ranks", out)
    return torch.load(out / "adapters.pt")


@pytest.mark.parametrize("name", ["ddp", "fsdp_before", "fsdp_after"])
def test_two_processes_train_what_peft_trains_in_one(trained, name):
    model, start = wrapped(), adapter(wrapped())
    train(model, batch())
    expected = adapter(model)
    assert trained[name].keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(trained[name][key], value) < 1e-4, key
        assert relative_error(value, start[key]) > 1e-2  # it has moved
