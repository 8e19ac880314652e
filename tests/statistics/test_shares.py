"""Who computes what, and which sums travel together."""

import torch

from lora_kernels.runtime.processes import owners
from lora_kernels.statistics.distributed import buckets


def test_owners_balance():
    weights = [1.0, 1, 1, 9] * 8
    loads = [0.0] * 4
    for weight, owner in zip(weights, owners(weights, 4), strict=True):
        loads[owner] += weight
    assert max(loads) == min(loads)
    assert owners([1.0] * 6, 4) == [0, 1, 2, 3, 0, 1]  # equal ones take turns


def test_messages_hold_64_mebibytes_of_one_dtype():
    half = (torch.float32, (2**23,))  # 32 MiB
    small = (torch.float64, ())
    assert buckets([half] * 3 + [small] * 2) == [[0, 1, 2], [3, 4]]
    assert buckets([half] * 4) == [[0, 1, 2], [3]]
    assert buckets([small, half, small]) == [[1], [0, 2]]
    assert buckets([]) == []
