import pytest
import torch
from peft import PeftModel

import lora_kernels as lk
from tests.adapters.start_models import started, tensors, train, whole_batch
from tests.conftest import relative_error
from tests.statistics.models import tiny_llama

RUN_BY_TWO = "tests.adapters.start_ranks"


@pytest.fixture(scope="module")
def folder(two_processes_ran):
    return two_processes_ran / RUN_BY_TWO


@pytest.fixture(scope="module")
def alone():
    model = started()
    train(model, whole_batch())
    return model


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(folder, alone, name):
    found, expected = torch.load(folder / "adapters.pt")[name], tensors(alone)
    assert found.keys() == expected.keys() and sum(".lora_start." in key for key in expected) == 12
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-3, key


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_what_they_save_is_stock(folder, alone, name):
    ids = whole_batch()
    with torch.no_grad():
        expected, base = alone.eval()(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits
        for model in (PeftModel.from_pretrained(tiny_llama(), folder / name), lk.load(tiny_llama(), folder / name)):
            assert relative_error(model.eval()(input_ids=ids).logits, expected) < 1e-4
    assert relative_error(base, expected) > 1e-2
