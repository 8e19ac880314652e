"""The least time of a plan: what every pass multiplies, reads and sends, at given rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lora_kernels._checks import check_range
from lora_kernels.statistics.cost import Cost, Footprint, Rates, Work, choose_layout
from lora_kernels.statistics.plan import Entry, Plan, co_size
from lora_kernels.statistics.sketches import PROBES
from lora_kernels.statistics.store import Target
from lora_kernels.statistics.wants import FISHER, INPUT_SECOND, OF_GRADIENTS, OUTPUT_SECOND


def layer_work(target: Target, rows: float, width: int) -> Work:
    """One product of a layer: its output, or as much for the gradient of its input.

    Args:
        target: the layer.
        rows: tokens.
        width: bytes of an activation and of a weight.

    Returns:
        The work.
    """
    m, n = target.out_features, target.in_features
    return Work(matmul=2.0 * rows * m * n, bytes=width * (m * n + rows * (m + n)))


def statistic_work(entry: Entry, target: Target, rows: float, width: int, sketch_size: int, total: int) -> Work:
    """Adding a batch to one set of sums.

    Args:
        entry: of the plan.
        target: its layer.
        rows: tokens.
        width: bytes of an activation.
        sketch_size: columns of a sketch.
        total: bytes of a sum.

    Returns:
        The work: operands are read once, sums read and written once (of symmetric ones the triangle).
    """
    m, n = target.out_features, target.in_features
    k = sketch_size + PROBES
    if entry.statistic == FISHER:
        return Work(bytes=width * rows * m)
    if entry.statistic in (INPUT_SECOND, OUTPUT_SECOND):
        order = n if entry.statistic == INPUT_SECOND else m
        if entry.form == "sketch":
            return Work(matmul=4.0 * rows * order * k, bytes=width * rows * order + 2 * total * order * k)
        return Work(matmul=rows * order * (order + 1), bytes=width * rows * order + total * order * (order + 1))
    if entry.form == "exact":
        return Work(matmul=2.0 * rows * m * n, bytes=width * rows * (m + n) + 2 * total * m * n)
    rest = co_size(sketch_size)
    return Work(matmul=2.0 * rows * (m + n) * (k + rest), bytes=width * rows * (m + n) + 2 * total * (m * k + n * rest))


def estimate(
    plan: Plan,
    targets: Sequence[Target],
    footprint: Footprint,
    rates: Rates,
    *,
    tokens: int,
    batch_tokens: int,
    width: int = 2,
    dtype: torch.dtype = torch.float32,
    decompose_seconds: float = 0.0,
) -> Cost:
    """What a plan costs at least.

    Args:
        plan: the plan.
        targets: the layers that it is for.
        footprint: of the model.
        rates: of a device and its links.
        tokens: that all processes together read in each pass.
        batch_tokens: per process and step.
        width: bytes of an activation and of a weight.
        dtype: of the sums.
        decompose_seconds: of what follows the passes (see `init.work`).

    Returns:
        The cost.

    Raises:
        ValueError: if a number is out of range.
    """
    check_range("tokens", tokens, low=1, integer=True)
    check_range("batch_tokens", batch_tokens, low=1, integer=True)
    world = plan.world_size
    mine = tokens / world
    steps = max(1, -(-tokens // (world * batch_tokens)))
    rows = mine / steps
    largest = max(plan.pass_bytes, default=0)
    host_bytes = float(plan.total_bytes * min(world, rates.node)) if plan.passes > 1 else 0.0
    layout, why, device_bytes = choose_layout(footprint, largest, host_bytes, world, rates)
    sharded = layout == "sharded" or (layout == "none" and world > 1 and footprint.total + largest > rates.capacity)
    model, gather = _passes(plan, targets, footprint, rates, rows, width)
    by_name = {target.name: target for target in targets}
    sums = sum(
        statistic_work(each, by_name[each.layers[0]], rows, width, plan.sketch_size, dtype.itemsize).seconds(rates)
        for each in plan.entries
    )
    moved = 0.0
    if plan.passes > 1:  # finished sums go to the host; to be added up over processes they travel through the device
        moved = plan.total_bytes + (2.0 * plan.message_bytes if world > 1 else 0.0)
    return Cost(
        rates=rates.name,
        tokens=tokens,
        batch_tokens=batch_tokens,
        layout=layout,
        why_not=why,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        model_seconds=steps * model,
        statistics_seconds=steps * sums,
        gather_seconds=steps * gather if sharded else 0.0,
        reduce_seconds=2.0 * rates.exchange(plan.message_bytes, world),
        host_seconds=moved / rates.host,
        decompose_seconds=decompose_seconds,
    )


def _passes(
    plan: Plan, targets: Sequence[Target], footprint: Footprint, rates: Rates, rows: float, width: int
) -> tuple[float, float]:
    """Seconds of one step of every pass, added up: the model's products, and the gathering of its shards."""
    times: Mapping[str, float] = {each.name: layer_work(each, rows, width).seconds(rates) for each in targets}
    forward = sum(times.values())
    # Nobody asks for the gradient of what the first layers read.
    backward = forward - sum(times[name] for name in plan.entries[0].layers)
    blocks = footprint.total - footprint.root
    model = gather = 0.0
    for number in range(plan.passes):
        gradients = any(each.number == number and each.statistic in OF_GRADIENTS for each in plan.entries)
        model += forward + (backward if gradients else 0.0)
        gather += rates.exchange(footprint.total, plan.world_size)
        gather += rates.exchange(blocks, plan.world_size) if gradients else 0.0
    return model, gather
