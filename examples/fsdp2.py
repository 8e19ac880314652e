"""Several processes with FSDP2: the same start everywhere, from each process's own share of the data.

    torchrun --nproc-per-node 2 examples/fsdp2.py

For your own model: replace `make_base` and `share`. A model that fits no single device is sharded first and given its
start afterwards: `lk.initialize` takes sharded models too, with methods that keep the ranks (`lk.init.EVA(rho=1.0)`).
"""

import functools
import hashlib
import os

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk


def make_base():
    """A tiny model with random weights, the same in every process."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **size))


def share(rank, count=30):
    """A process's own batches: sequences that count in steps of 1 to 4, from anywhere."""
    generator = torch.Generator().manual_seed(rank)
    start = torch.randint(0, 64, (count, 8, 1), generator=generator)
    step = torch.randint(1, 5, (count, 8, 1), generator=generator)
    return [{"input_ids": each, "labels": each} for each in (start + step * torch.arange(16)) % 64]


def same_everywhere(model):
    """Whether all processes hold the same adapter, bit by bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            digest.update(whole.detach().cpu().numpy().tobytes())
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, digest.hexdigest())
    return len(set(found)) == 1


def main():
    """What every process does."""
    gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if gpu else "gloo")
    rank = distributed.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)

    say = functools.partial(print, flush=True) if rank == 0 else lambda _text: None
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in share(rank)]
    model = get_peft_model(make_base(), LoraConfig(r=8, target_modules="all-linear")).to(device)
    # The statistics of all processes are added up; the decompositions are shared out among them.
    report = lk.initialize(model, batches, method="eva", max_batches=8, progress=False)
    say(report.summary())
    say(f"start: same bits in {distributed.get_world_size()} processes: {same_everywhere(model)}")

    say(lk.accelerate(model).summary())
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # After sharding: the optimizer has to hold the shards.
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / distributed.get_world_size())
    say(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    say(f"end: same bits in {distributed.get_world_size()} processes: {same_everywhere(model)}")
    distributed.barrier()  # gloo's threads may hold tensors of Python's until then (pytorch/pytorch#179291)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
