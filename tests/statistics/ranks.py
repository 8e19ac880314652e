"""What two processes do; `tests/torchrun.py` starts them."""

import hashlib

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.statistics import STATISTICS, Statistics
from tests.statistics.models import padded, samples, tiny_llama


def peft_model():
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    torch.manual_seed(5)
    return get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]))


def shares(made, number, world):
    """Uneven: the first process has one batch more; with one process, all of them."""
    batches = padded(made, 2)
    if world == 1:
        return batches
    cut = len(batches) // 2 + 1
    return batches[:cut] if number == 0 else batches[cut:]


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def digest(tensors):
    found = hashlib.sha256()
    for each in tensors:
        found.update(each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def bits(stats):
    """Only what is defined: of a symmetric sum, the lower triangle."""
    return digest(
        value.tril() if name in sums.triangular else value
        for layer in stats.values()
        for sums in layer.sums.values()
        for name, value in sums.tensors().items()
    )


def equal_everywhere(value):
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, value)
    assert len(set(everyone)) == 1, everyone


def expect(error, pattern, call):
    import re  # noqa: PLC0415

    try:
        call()
    except error as caught:
        assert re.search(pattern, str(caught)), caught
        return
    raise AssertionError(f"no {error.__name__}")


def main(out):
    number, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    made = samples(10)
    mine = shares(made, number, world)

    def keep(name, stats):
        equal_everywhere(bits(stats))
        if number == 0:
            stats.save(out / f"{name}.safetensors")

    ddp = DistributedDataParallel(tiny_llama())
    keep("ddp", lk.collect(ddp, mine, STATISTICS, progress=False))
    keep("passes", lk.collect(ddp, mine, STATISTICS, progress=False, form="exact", budget="60KB"))
    keep("sketch", lk.collect(ddp, mine, ("input_second", "gradient"), progress=False, form="sketch", sketch_size=2))
    fsdp = sharded(tiny_llama())
    flags = [each.requires_grad for each in fsdp.parameters()]
    keep("fsdp", lk.collect(fsdp, mine, STATISTICS, progress=False))
    keep("fsdp_passes", lk.collect(fsdp, mine, STATISTICS, progress=False, form="exact", budget="60KB"))
    assert [each.requires_grad for each in fsdp.parameters()] == flags and all(flags)
    assert all(each.grad is None for each in fsdp.parameters())
    loss = fsdp(**mine[0]).loss  # and it still trains
    loss.backward()
    assert all(each.grad is not None for each in fsdp.parameters())

    # One process without any data at all.
    keep("lonely", lk.collect(ddp, shares(made, 0, 1) if number == 0 else [], STATISTICS, progress=False))
    keep("fsdp_lonely", lk.collect(fsdp, shares(made, 0, 1) if number == 0 else [], STATISTICS, progress=False))

    # A checkpoint of each process's own.
    keep("checkpoint", lk.collect(ddp, mine, STATISTICS, progress=False, checkpoint=out / "part", checkpoint_every=1))
    assert (out / f"part.{number}-of-{world}").exists()
    again = lk.collect(ddp, mine, STATISTICS, progress=False, checkpoint=out / "part", checkpoint_every=1)
    keep("resumed", again)

    # A failure on one process is an error on all.
    spoilt = [{**mine[0], "input_ids": mine[0]["input_ids"] + 1000}] if number == 1 else mine
    if number == 1:
        expect(IndexError, "index", lambda: lk.collect(ddp, spoilt, STATISTICS, progress=False))
    else:
        expect(RuntimeError, "process 1: IndexError", lambda: lk.collect(ddp, spoilt, STATISTICS, progress=False))

    def nan_on_one(outputs, _batch):
        return outputs.loss * (float("nan") if number == 1 else 1.0)

    settings = {"progress": False, "loss": nan_on_one}
    error, pattern = (ValueError, "loss is nan") if number == 1 else (RuntimeError, "process 1: ValueError")
    expect(error, pattern, lambda: lk.collect(fsdp, mine, STATISTICS, **settings))

    # Factors: decompositions are shared out, all processes write the same.
    model = peft_model()
    lk.initialize(model, mine, lk.init.EVA(rho=2.0), progress=False)
    factors = {name: each.detach() for name, each in model.named_parameters() if "lora_" in name}
    equal_everywhere(digest(factors.values()))
    model = peft_model()
    lk.initialize(model, mine, "lora_da", progress=False)
    solved = {name: each.detach() for name, each in model.named_parameters() if "lora_" in name}
    equal_everywhere(digest(solved.values()))
    ready = peft_model()
    for layer in ready.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(ready)
    expect(ValueError, "sharded", lambda: lk.initialize(ready, mine, lk.init.EVA(rho=2.0), progress=False))
    lk.initialize(ready, mine, lk.init.EVA(rho=1.0), progress=False)
    inside = {name: each.full_tensor() for name, each in ready.named_parameters() if "lora_A" in name}
    equal_everywhere(digest(inside.values()))

    # Methods that read base weights refuse sharded ones; statistics of the sharded model serve one that is whole.
    expect(ValueError, "sharded .* corda reads it", lambda: lk.initialize(ready, mine, "corda", progress=False))
    found = []
    for observed in (ready, peft_model()):
        whole = peft_model()
        lk.initialize(whole, None, "corda", statistics=lk.collect(observed, mine, "corda", progress=False))
        found.append({name: each.detach() for name, each in whole.named_parameters() if "lora_" in name})
    equal_everywhere(digest(found[0].values()))
    for name, each in found[0].items():
        torch.testing.assert_close(each, found[1][name], rtol=1e-3, atol=1e-5)
    if number == 0:
        torch.save({"factors": factors, "solved": solved, "inside": inside}, out / "factors.pt")
        assert Statistics.load(out / "ddp.safetensors").batches == 5
