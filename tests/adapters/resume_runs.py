"""Runs of transformers' Trainer that are resumed; as a program, `resume_runs.py METHOD KIND CHECKPOINT OUT`."""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import lora_kernels as lk
from tests.adapters.start_models import BATCHES, tensors, wrapped
from tests.statistics.models import tiny_llama

METHODS = ("eva", "lora_da", "lora_ga", "corda", "pissa", "task_directions")
# The optimizer: the Trainer's, or the user's own; and whether LoRA-Dash is trained. ("late": attached after it.)
KINDS = ("adamw", "lora_pro", "dash", "own adamw dash", "own lora_pro dash")
STEPS = 5


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = torch.randint(0, 61, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def begun(method):
    model = wrapped(lora_dropout=0.1)
    lk.initialize(model, None if method == "pissa" else BATCHES, method=method, progress=False)
    return model


def trainer(model, folder, kind):
    more = {}
    if "dash" in kind:
        more["callbacks"] = [lk.api.LoraDashCallback(lk.LoraDash(k=3, pre_launch=3))]
        if "own" in kind:  # the optimizer is to hold the coordinates
            lk.LoraDash(k=3, pre_launch=3).attach(model)
    if kind == "lora_pro":
        more["optimizer_cls_and_kwargs"] = lk.training.lora_pro_cls_and_kwargs(model, lr=1e-2)
    elif "lora_pro" in kind:
        more["optimizers"] = (lk.create_lora_pro_optimizer(model, lr=1e-2), None)
    elif "adamw dash" in kind:
        trained = [each for each in model.parameters() if each.requires_grad]
        more["optimizers"] = (torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1), None)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=2,  # and the last
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    return Trainer(model, arguments, train_dataset=Data(), **more)


def resumed(model, folder, kind, checkpoint):
    """Trained on from a checkpoint."""
    trainer(model, folder, kind).train(resume_from_checkpoint=str(checkpoint))
    return model


def main(method, kind, checkpoint, out):
    """In a process that has never called `initialize` (no method), or calls it again."""
    model = begun(method) if method else lk.load(tiny_llama(), checkpoint)
    torch.save(tensors(resumed(model, Path(out) / "run", kind, checkpoint)), Path(out) / "tensors.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
