"""Learning-rate advice in two processes; `tests/torchrun.py` starts them."""

import json

import pytest
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from tests.statistics.models import padded, samples, tiny_llama


def wrapped():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def main(out):
    rank = distributed.get_rank()
    mine = (2 * padded(samples(8), 2))[rank::2]  # every other batch
    kept = lk.suggest_learning_rate(DistributedDataParallel(wrapped()), mine).to_dict()
    report = lk.initialize(wrapped(), mine if rank == 0 else mine[:2], progress=False, suggest_rate=True)
    assert report.learning_rate.line, report.learning_rate.reason
    with pytest.raises(RuntimeError if rank == 0 else ValueError, match="yielded no batch"):
        lk.suggest_learning_rate(wrapped(), mine if rank == 0 else [])

    def forward(model, batch):
        if rank == 1:
            raise ArithmeticError("out of numbers")
        return model(**batch)

    with pytest.raises(RuntimeError if rank == 0 else ArithmeticError, match="out of numbers"):
        lk.suggest_learning_rate(wrapped(), mine, forward=forward)
    model = wrapped()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    with pytest.raises(ValueError, match="sharded parameters"):
        lk.suggest_learning_rate(fully_shard(model), mine)
    (out / f"{rank}.json").write_text(json.dumps(kept))
