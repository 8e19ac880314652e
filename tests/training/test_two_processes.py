import pytest
import torch

from tests.conftest import relative_error
from tests.training.ranks import ALL, STEPS, adapter, batch, train
from tests.training.test_accelerate import wrapped

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


ALONE, TOGETHER = [1] * 7 * 2, [3, 1, 2, 1] * 2


@pytest.mark.parametrize(
    ("name", "later"),
    [
        ("grouped_block", TOGETHER),
        ("grouped_root", TOGETHER),
        ("checkpointed_False", TOGETHER * 2),  # again in the backward pass
        ("checkpointed_True", ALONE + TOGETHER),  # the first forward of a reentrant checkpoint has no graph
    ],
)
def test_groups_of_one_unit_run_as_one_after_the_first_step(trained, expected, name, later):
    found = trained[name]
    assert found["sizes"] == [ALONE * (2 if name.startswith("checkpointed") else 1)] + [later] * (STEPS - 1)
    for key, value in expected.items():
        assert relative_error(found["adapter"][key], value) < 1e-4, key
    first = [each.rsplit(".", 1)[1] for each in found["groups"][0]]
    assert first == ["q_proj", "k_proj", "v_proj"]


def test_layers_of_different_units_are_computed_by_themselves(trained, expected):
    found = trained["grouped_linear"]
    assert found["sizes"] == [ALONE] * STEPS
    for key, value in expected.items():
        assert relative_error(found["adapter"][key], value) < 1e-4, key


def test_another_optimizer_starts_no_group(trained):
    assert trained["unrelated"]["sizes"] == [ALONE] * 2
