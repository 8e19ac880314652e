"""Small models and an independent account, in float64 autograd, of what a collection must find."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def tiny_llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)


def samples(count=8, longest=11):
    """Sequences of different lengths; in some the labels begin later."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for index in range(count):
        length = 4 + (5 * index) % (longest - 3)
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: index % 3] = -100
        made.append((ids, labels))
    return made


def padded(made, size):
    """Batches of `size` samples, padded on the right."""
    batches = []
    for low in range(0, len(made), size):
        part = made[low : low + size]
        longest = max(len(ids) for ids, _ in part)
        batch = {
            "input_ids": torch.zeros(len(part), longest, dtype=torch.long),
            "attention_mask": torch.zeros(len(part), longest, dtype=torch.long),
            "labels": torch.full((len(part), longest), -100),
        }
        for row, (ids, labels) in enumerate(part):
            batch["input_ids"][row, : len(ids)] = ids
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = labels
        batches.append(batch)
    return batches


def account(model, made, names, *, per_sample=False):
    """Sums over samples, one at a time, by retained gradients: no padding, no hooks of ours, float64."""
    model = model.double().eval()
    modules = dict(model.named_modules())
    found = {name: {"gradient": 0.0, "fisher": 0.0, "input": 0.0, "output": 0.0, "rows": 0} for name in names}
    items = 0
    for ids, labels in made:
        count = int((labels[1:] != -100).sum())
        kept, handles = {}, []

        def keep(name, kept=kept):
            def hook(_module, args, output):
                output.retain_grad()
                kept[name] = (args[0].detach(), output)

            return hook

        for name in names:
            handles.append(modules[name].register_forward_hook(keep(name)))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        loss = model(input_ids=ids[None], labels=labels[None]).loss
        (loss if per_sample else loss * count).backward()
        for handle in handles:
            handle.remove()
        for name in names:
            x, g = kept[name][0][0], kept[name][1].grad[0]
            sums = found[name]
            sums["gradient"] = sums["gradient"] + g.mT @ x
            sums["fisher"] = sums["fisher"] + g.square().sum(0)
            sums["input"] = sums["input"] + x.mT @ x
            sums["output"] = sums["output"] + g.mT @ g
            sums["rows"] += len(x)
        items += 1 if per_sample else count
    return found, items


class Experts(nn.Module):
    """A mixture of experts that routes each row to one of four; the last gets none."""

    def __init__(self, n=12):
        super().__init__()
        self.embed = nn.Embedding(50, n)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)) for _ in range(4)
        )
        self.head = nn.Linear(n, 5)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        flat, out = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).reshape(-1, x.shape[-1])
        route = torch.where(input_ids.reshape(-1) % 50 < 1, 2, input_ids.reshape(-1) % 2)
        for number, expert in enumerate(self.experts):
            rows = (route == number).nonzero().squeeze(-1)
            if number == 3 and len(rows) == 0:
                continue
            out = out.index_add(0, rows, expert(flat[rows]))
        logits = self.head(out.view_as(x))
        return (nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),)
