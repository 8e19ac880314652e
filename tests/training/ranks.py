"""What two processes train; `tests/torchrun.py` starts them."""

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels import training
from lora_kernels.training import acceleration, lora_layer
from tests.training.test_accelerate import wrapped

STEPS = 4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch():
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 61, (4, 9), generator=generator)


def train(model, ids, between=None):
    """A few steps on the mean of squared logits: equal shares of a batch have the batch's mean gradient."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        if between is not None:
            between()
        optimizer.step()


def sharded(model, units):
    """FSDP2 with a unit per decoder layer, per LoRA layer, or one in all; the rest is the last unit."""
    layers = model.base_model.model.model.layers
    inner = {"block": list(layers), "linear": [each for _, each in acceleration.lora_layers(model)], "root": []}
    for each in inner[units]:
        fully_shard(each)
    return fully_shard(model)


class Sizes:
    """How many layers each call of the op computed, by optimizer step."""

    def __init__(self):
        self.steps, self.calls = [], []
        self.real = lora_layer.lora_linear_group

    def __enter__(self):
        def counted(x, members, **more):
            self.calls.append(len(members))
            return self.real(x, members, **more)

        lora_layer.lora_linear_group = counted
        return self

    def __exit__(self, *_):
        lora_layer.lora_linear_group = self.real

    def step(self):
        self.steps.append(list(self.calls))
        self.calls.clear()


def grouped(units, ids, *, checkpointing=None, other=False):
    """Train under FSDP2; the adapter, and the sizes of the groups in every step."""
    model = wrapped(target_modules=ALL)
    lk.accelerate(model, strict=True)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    sharded(model, units)
    with Sizes() as sizes:
        if other:  # a step of an optimizer that holds none of the adapter's shards is no change of them
            weight = torch.nn.Parameter(torch.ones(2))
            unrelated = torch.optim.SGD([weight], lr=0.1)
            weight.grad = torch.ones(2)
            model(input_ids=ids).logits.square().mean().backward()
            sizes.step()
            unrelated.step()
            model(input_ids=ids).logits.square().mean().backward()
            sizes.step()
            return {"sizes": sizes.steps}
        train(model, ids, sizes.step)
    return {"adapter": adapter(model), "sizes": sizes.steps, "groups": training.groups(model)}


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
        kept[f"grouped_{units}"] = grouped(units, ids)
    for reentrant in (False, True):
        kept[f"checkpointed_{reentrant}"] = grouped("block", ids, checkpointing=reentrant)
    kept["unrelated"] = grouped("block", ids, other=True)
    if rank == 0:
        torch.save(kept, out / "adapters.pt")
