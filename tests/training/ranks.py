"""What two processes train, under torchrun: `torchrun --nproc-per-node 2 -m tests.training.ranks OUT`."""

import datetime
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from tests.training.test_accelerate import wrapped

STEPS = 4


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


def adapter(model):
    """All factors, whole and on every process."""
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def main():
    out = Path(sys.argv[1])
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
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
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if when == "after":
            lk.accelerate(model)
        train(model, ids)
        kept[f"fsdp_{when}"] = adapter(model)
    if rank == 0:
        torch.save(kept, out / "adapters.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
