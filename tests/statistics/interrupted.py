"""A collection that is killed at a given point: `python interrupted.py CHECKPOINT OUT KILL_AT PASSES`."""

import os
import signal
import sys

import torch
from torch import nn

import lora_kernels as lk


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 20), nn.GELU(), nn.Linear(20, 4))


class Data:
    """Twelve batches, and a signal to the own process before one of them, in one of the readings."""

    def __init__(self, kill_at=-1):
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            (torch.randn(5, 20, generator=generator), torch.randn(5, 4, generator=generator)) for _ in range(12)
        ]
        self.kill_at, self.handed = kill_at, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            if self.handed == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.handed += 1
            yield batch


def gather(data, checkpoint=None, budget=None):
    return lk.collect(
        model(),
        data,
        ("input_second", "fisher", "gradient"),
        forward=lambda model, batch: model(batch[0]),
        loss=lambda outputs, batch: (outputs - batch[1]).square().mean(),
        checkpoint=checkpoint,
        checkpoint_every=2,
        budget=budget,
        progress=False,
    )


def main():
    checkpoint, out, kill_at, budget = sys.argv[1:]
    kind, _, number = kill_at.partition(":")
    writes = []
    real = os.replace

    def replace(source, target):
        writes.append(target)
        if kind == "before" and len(writes) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if kind == "after" and len(writes) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    data = Data(int(number) if kind == "batch" else -1)
    gather(data, checkpoint, int(budget) or None).save(out)


if __name__ == "__main__":
    main()
