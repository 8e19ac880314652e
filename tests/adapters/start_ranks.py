"""A frozen start in two processes; `tests/torchrun.py` starts them."""

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from tests.adapters.start_models import assert_same_bits, layers, started, tensors, train, whole_batch, wrapped
from tests.statistics.models import tiny_llama


def sharded(model):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(model):
    found = tensors(model)
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in found.items()}


def main(out):
    rank = distributed.get_rank()
    ids = whole_batch()[2 * rank : 2 * rank + 2]
    kept = {}

    model = started()
    ddp = DistributedDataParallel(model)
    sent = {id(each) for each in ddp.modules_buffers}
    starts = [layer.lora_start["default"] for layer in layers(model)]
    assert not any(id(start.a) in sent or id(start.b) in sent for start in starts)
    train(ddp, ids)
    kept["ddp"] = tensors(model)
    if rank == 0:
        model.save_pretrained(out / "ddp")

    model = sharded(started())
    train(model, ids)
    kept["fsdp"] = whole(model)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(out / "fsdp", state_dict=full)
    distributed.barrier()

    # Another start, sharded, takes both ways of saving.
    for state, options in (
        (get_model_state_dict(model), None),
        (full, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)),
    ):
        other = sharded(started("task_directions"))
        set_model_state_dict(other, state, options=options)
        one, two = whole(other), kept["fsdp"]
        assert one.keys() == two.keys() and all(torch.equal(each, two[name]) for name, each in one.items())

    # Sharded first: the factors are shards, the start is whole.
    model = sharded(wrapped())
    report = lk.initialize(model, [{"input_ids": ids, "labels": ids}], method="lora_ga", progress=False)
    assert all(each.status == "initialised" for each in report.layers)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with model.disable_adapter():
            torch.testing.assert_close(before, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    train(model, ids)
    assert all(type(layer.lora_start["default"].a) is torch.Tensor for layer in layers(model))
    found = lk.export(model, out / f"exported {rank}")  # gathers: all processes take part
    assert {each.rank for each in found.values()} == {8}
    kept["fsdp first"] = whole(model)

    if rank == 0:
        assert_same_bits(lk.load(tiny_llama(), out / "ddp"), ddp.module)
        torch.save(kept, out / "adapters.pt")
