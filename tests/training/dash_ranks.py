"""What two processes train with LoRA-Dash; `tests/torchrun.py` starts them."""

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.training import dash
from tests.training.dash_models import adam, wrapped

STEPS, SWITCH = 6, 3


def batch():
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 61, (4, 9), generator=generator)


def train(model, run, ids):
    """Steps on the mean of squared logits: equal shares of a batch have the batch's mean gradient."""
    optimizer = adam(model, lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
        run.step(optimizer)


def adapter(model):
    """All tensors of the adapter, whole and on every process."""
    found = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" in name:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def assert_alike(tensors):
    for name, value in tensors.items():
        others = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(others, value.contiguous())
        assert torch.equal(*others), name


def main(out):
    rank = distributed.get_rank()
    ids = batch()[2 * rank : 2 * rank + 2]
    solved = []
    real = dash.core_basis
    dash.core_basis = lambda *args: solved.append(1) or real(*args)
    kept = {}
    for name in ("eager", "accelerated", "compiled_graph"):
        model = wrapped()
        run = lk.LoraDash(k=3, pre_launch=SWITCH).attach(model)
        if name != "eager":
            lk.accelerate(model, strict=True)
        ddp = DistributedDataParallel(model, static_graph=name == "compiled_graph")  # no find_unused_parameters
        sent = {id(each) for each in ddp.modules_buffers}
        assert not any(id(each.left) in sent or id(each.right) in sent for each in run.directions().values())
        solved.clear()
        train(ddp, run, ids)
        assert run.launched and len(solved) == 3  # of six
        kept[name] = adapter(ddp)
        assert_alike(kept[name])
    try:
        lk.LoraDash(k=3).attach(ddp)
    except ValueError as error:
        assert "attach before wrapping" in str(error)
    else:
        raise AssertionError("attached to DistributedDataParallel")

    model = wrapped()
    run = lk.LoraDash(k=3, pre_launch=SWITCH).attach(model)
    lk.accelerate(model, strict=True)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    solved.clear()
    train(model, run, ids)
    assert len(solved) == 3
    kept["fsdp"] = adapter(model)
    assert_alike(kept["fsdp"])
    late = wrapped()
    fully_shard(late)
    try:
        lk.LoraDash(k=3).attach(late)
    except ValueError as error:
        assert "attach before sharding" in str(error)
    else:
        raise AssertionError("attached to a sharded model")

    # A process that fails makes the others fail, too, instead of waiting.
    model = wrapped()
    run = lk.LoraDash(k=3, pre_launch=1).attach(model)
    if rank == 0:
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.fill_(float("nan"))
    try:
        run.step(adam(model))
    except (ValueError, RuntimeError) as error:
        assert "layers.0.self_attn.q_proj" in str(error) and not run.launched
    else:
        raise AssertionError("a bad factor went unnoticed")
    if rank == 0:
        torch.save(kept, out / "adapters.pt")
