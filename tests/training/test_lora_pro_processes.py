import pytest
import torch

from tests.conftest import relative_error
from tests.training.lora_pro_ranks import MODES, few_rows, model_and_optimizer, moments, train
from tests.training.ranks import adapter, batch

RUN_BY_TWO = "tests.training.lora_pro_ranks"


@pytest.fixture(scope="module")
def found(two_processes_ran):
    return torch.load(two_processes_ran / RUN_BY_TWO / "lora_pro.pt")


def alone(name):
    model, optimizer = model_and_optimizer(lambda model: model, MODES[name])
    start = adapter(model)
    train(model, optimizer, batch())
    return start, adapter(model), optimizer


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_end_where_one_ends(found, wrapper, name):
    result = found[f"{wrapper}_{name}"]
    start, expected, _ = alone(name)
    assert result["same"]  # the same bits on both
    assert result["adapter"].keys() == expected.keys()
    bound = 0.05 if name == "full_bfloat16" else 2e-3
    for key, value in expected.items():
        assert relative_error(result["adapter"][key] - start[key], value - start[key]) < bound, key


@pytest.mark.parametrize("name", MODES)
def test_moments_are_sharded_by_rows_and_are_those_of_one_process(found, name):
    rows, whole = found[f"fsdp_{name}"]["rows"]
    assert rows <= 0.55 * whole
    *_, optimizer = alone(name)
    for mine, expected in zip(found[f"fsdp_{name}"]["moments"], moments(optimizer), strict=True):
        # (Random bits go by the row in the whole matrix: but for rounding errors, they round to the same numbers.)
        assert expected.dtype != torch.bfloat16 or float((mine == expected.float()).float().mean()) > 0.9
        assert relative_error(mine, expected.float()) < (0.05 if name == "full_bfloat16" else 1e-3)


@pytest.mark.parametrize("name", MODES)
def test_sharded_runs_resume_to_the_same_bits(found, name):
    assert found[f"fsdp_{name}"]["resumed"]


@pytest.mark.parametrize("mesh", ["", "hybrid_"])
@pytest.mark.parametrize("name", ["efficient", "full"])
def test_fewer_rows_than_processes_and_rows_that_do_not_divide(found, name, mesh):
    expected = few_rows(lambda model: model, slice(None), MODES[name])
    for key, value in expected.items():
        assert relative_error(found[f"few_{mesh}{name}"][key], value) < 1e-4, key
