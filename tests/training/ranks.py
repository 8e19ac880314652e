"""What two processes train; `tests/torchrun.py` starts them."""

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.training import acceleration
from tests.training.test_accelerate import wrapped
from tests.training.test_experts import wrapped as mixture

STEPS = 4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch():
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 61, (4, 9), generator=generator)


def train(model, ids):
    """A few steps on the mean of squared logits: equal shares of a batch have the batch's mean gradient."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()


def sharded(model, units):
    """FSDP2 with a unit per decoder layer, per LoRA layer, or one in all; the rest is the last unit."""
    layers = model.base_model.model.model.layers
    inner = {
        "block": list(layers),
        "experts": [],
        "linear": [each for _, each in acceleration.lora_layers(model)],
        "root": [],
    }
    for each in inner[units]:
        fully_shard(each)
    return fully_shard(model)


def trained(units, ids, checkpointing=None):
    """The adapter after training under FSDP2."""
    model = wrapped(target_modules=ALL)
    lk.accelerate(model, strict=True)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    sharded(model, units)
    train(model, ids)
    return adapter(model)


def adapter(model):
    """All factors, whole and on every process."""
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def main(out):
    rank = distributed.get_rank()
    ids = batch()[2 * rank : 2 * rank + 2]

    model = wrapped()
    report = lk.accelerate(model, strict=True)
    assert {each.path for each in report} == {"fused"}
    ddp = DistributedDataParallel(model)
    train(ddp, ids)
    kept = {"ddp": adapter(ddp)}

    for when in ("before", "after"):
        model = wrapped()
        if when == "before":
            lk.accelerate(model, strict=True)
        sharded(model, "block")
        if when == "after":
            report = lk.accelerate(model, strict=True)
            assert {each.path for each in report} == {"fused"}
        train(model, ids)
        kept[f"fsdp_{when}"] = adapter(model)
    for units in ("block", "root", "linear"):
        kept[units] = trained(units, ids)
    for reentrant in (False, True):
        kept[f"checkpointed_{reentrant}"] = trained("block", ids, checkpointing=reentrant)
    for units in ("ddp", "block", "experts", "root"):
        model = mixture()
        assert {path.path for path in lk.accelerate(model)} == {"fused", "delta"}
        if units == "experts":
            for layer in model.base_model.model.model.layers:
                fully_shard(layer.mlp.experts)
        model = DistributedDataParallel(model) if units == "ddp" else sharded(model, units)
        train(model, ids)
        kept[f"experts_{units}"] = adapter(model)
    if rank == 0:
        torch.save(kept, out / "adapters.pt")
