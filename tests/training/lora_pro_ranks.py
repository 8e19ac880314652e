"""LoRA-Pro in two processes; `tests/torchrun.py` starts them."""

import copy
from functools import partial

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from tests.training.ranks import adapter, batch
from tests.training.test_accelerate import wrapped

MODES = {
    "efficient": {},
    "full": {"mode": "full"},
    "full_bfloat16": {"mode": "full", "state_dtype": torch.bfloat16},
}
STEPS = 4


def model_and_optimizer(wrap, options, seed=10):
    """Ranks of 1 and 3 leave a process without rows of A, or with fewer than the other."""
    model = wrapped(rank_pattern={"q_proj": 1, "down_proj": 3}, modules_to_save=["lm_head"])
    model = wrap(model)
    torch.manual_seed(seed)
    return model, lk.create_lora_pro_optimizer(model, lr=1e-2, weight_decay=0.1, **options)


def train(model, optimizer, ids, steps=STEPS):
    """On the mean of squared logits: equal shares of a batch have the batch's mean gradient."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
    return model


def shard(model):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def moments(optimizer):
    return [each["exp_avg"] for each in optimizer.state.values() if "exp_avg" in each]


def same_on_all(tensors):
    """Whether all processes hold the same bits."""
    flat = torch.cat([each.reshape(-1).float() for each in tensors])
    others = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, flat)
    return all(torch.equal(each, flat) for each in others)


def resumed(options, ids):
    """A run that is saved half-way by torch.distributed.checkpoint's functions, against one that is not."""
    model, optimizer = model_and_optimizer(shard, options)
    train(model, optimizer, ids, 2)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    factors = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    other, second = model_and_optimizer(shard, options, 5)
    with torch.no_grad():
        for name, each in other.named_parameters():
            if name in factors:
                each.copy_(factors[name])
    set_optimizer_state_dict(other, second, state)
    for mine, its in ((model, optimizer), (other, second)):
        train(mine, its, ids, 2)
    pairs = zip(adapter(model).values(), adapter(other).values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


class Few(nn.Module):
    """Pairs with fewer rows than processes, rows that processes cannot share evenly, and those of three experts."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in (("a", (3, 7)), ("b", (1, 3)), ("c", (2, 7)), ("d", (5, 2)), ("e", (6, 7)), ("f", (5, 6))):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x):
        y = x @ (2.0 * self.b @ self.a).T + x @ (2.0 * self.d @ self.c).T
        first, second = self.e.view(3, 2, 7), self.f.view(5, 2, 3)
        return y + torch.einsum("bn,ern,mre->bm", torch.tanh(x), first, second)

    def pairs(self):
        return [(self.a, self.b), (self.c, self.d), (self.e, self.f)]


def few_rows(wrap, share, options):
    """Trained factors of a wrapped `Few`, on this process's share of the rows of a batch."""
    model = wrap(Few())
    optimizer = lk.training.LoraPro(
        [{"pairs": model.pairs(), "scaling": [2.0, 2.0, 1.0], "experts": [1, 1, 3]}], lr=0.05, **options
    )
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(4))[share]
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert {float(each["step"]) for each in optimizer.state.values()} == {STEPS}  # also where a process has no rows
    return adapter(model)


def main(out):
    rank = distributed.get_rank()
    ids, kept = batch()[2 * rank : 2 * rank + 2], {}
    for name, options in MODES.items():
        # The processes need not have the same seed.
        model, optimizer = model_and_optimizer(DistributedDataParallel, options, 10 + rank)
        found = adapter(train(model, optimizer, ids))
        states = moments(optimizer)
        kept[f"ddp_{name}"] = {"adapter": found, "same": same_on_all([*found.values(), *states])}

        model, optimizer = model_and_optimizer(shard, options, 10 + rank)
        found = adapter(train(model, optimizer, ids))
        rows = [each.to_local().shape[0] for each in moments(optimizer)]
        whole = [each.shape[0] for each in moments(optimizer)]
        kept[f"fsdp_{name}"] = {
            "adapter": found,
            "same": same_on_all([*found.values(), *(each["step"] for each in optimizer.state.values())]),
            "rows": (sum(rows), sum(whole)),
            "moments": [each.full_tensor().float() for each in moments(optimizer)],
            "resumed": resumed(options, ids),
        }
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    share = slice(4 * rank, 4 * rank + 4)
    for name in ("efficient", "full"):
        kept[f"few_{name}"] = few_rows(fully_shard, share, MODES[name])
        kept[f"few_hybrid_{name}"] = few_rows(partial(fully_shard, mesh=mesh), share, MODES[name])
    if rank == 0:
        torch.save(kept, out / "lora_pro.pt")
