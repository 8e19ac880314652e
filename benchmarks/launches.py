"""What a LoRA layer costs the host: `python -m benchmarks.launches [--out FOLDER]`, on any machine with Triton.

Counts the launches of a forward and backward pass at a chip's size, and takes the time of the host for launches that a
driver throws away (`tests/helpers/fake_gpu.py`), per layer of a chain of eight: with prepared launches, and through
Triton's front end. Neither a GPU's launches (2 to 3 us each) nor the library's products are in it. The node in
autograd's graph is called as accelerated layers call it. The time is that of the process, so others may run.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch

from benchmarks.records import save
from lora_kernels.ops import _launching
from lora_kernels.ops.lora_linear.op import apply_directly
from lora_kernels.ops.lora_linear.passes import Scalars
from lora_kernels.ops.skinny import kernel
from tests.helpers.fake_gpu import fake_gpu
from tests.ops.fake_gpu_parts import chip_of, count

LAYERS, STEPS, ROUNDS = 8, 100, 5
SHAPES = ((1024, 4096, 4096), (4096, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 14336))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def chain(dtype: torch.dtype) -> Callable[[], None]:
    """A step of eight layers in a row, whose factors have a dtype; activations are bfloat16."""
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    g, weight = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
    factors = [
        (torch.randn(16, 64, dtype=dtype, requires_grad=True), torch.randn(64, 16, dtype=dtype, requires_grad=True))
        for _ in range(LAYERS)
    ]
    scalars = Scalars(1.0, 0.0, 0, 0, "triton")

    def step() -> None:
        y = x
        for a, b in factors:
            y = apply_directly(y, weight, None, a, b, scalars)  # type: ignore[no-untyped-call]
        y.backward(g)  # type: ignore[no-untyped-call]
        for leaf in (x, *(factor for pair in factors for factor in pair)):
            leaf.grad = None

    return step


def microseconds(step: Callable[[], None], launches: Any) -> float:
    """The least time of a step, per layer: what disturbs a step only adds to it."""
    for _ in range(20):
        step()
    gc.collect()
    gc.freeze()
    times = []
    for _ in range(STEPS):
        launches.clear()
        before = time.process_time()
        step()
        times.append((time.process_time() - before) / LAYERS)
    return round(min(times) * 1e6, 1)


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description="launches and host time of a LoRA layer, without a GPU")
    parser.add_argument("--out", type=Path, help="folder of the record (default: the committed one)")
    folder = parser.parse_args().out
    torch.set_num_threads(1)
    counts, host = [], []
    with fake_gpu() as launches:
        with chip_of(132):
            for (tokens, n, m), (name, dtype), drop in (
                (shape, item, drop) for shape in SHAPES for item in DTYPES.items() for drop in (False, True)
            ):
                names = count(tokens, n, m, dtype, drop, launches)
                counts.append(
                    {"tokens": tokens, "n": n, "m": m, "factors": name, "dropout": drop, "launches": len(names)}
                )
        with mock.patch.object(torch.Tensor, "addmm_", lambda self, *_: self):
            for name, dtype in DTYPES.items():
                step, prepared, front_end = chain(dtype), [], []
                for _ in range(ROUNDS):
                    prepared.append(microseconds(step, launches))
                    forget()
                    with mock.patch.object(_launching, "prepares", lambda: False):
                        front_end.append(microseconds(step, launches))
                    forget()
                host.append({"factors": name, "prepared_us": min(prepared), "front_end_us": min(front_end)})
                print(host[-1])
    path = save("launches", {"processors": 132, "launches": counts, "host": host}, folder)
    print(path)


def forget() -> None:
    """Forget what was compiled."""
    _launching.constants_of.cache_clear()
    kernel._plan.cache_clear()
    for constants in (kernel._SUM, kernel._SUM_PAIR):
        constants.compiled.clear()


if __name__ == "__main__":
    main()
