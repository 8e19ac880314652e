"""What the methods' decompositions take at least, per layer or input, and which process does them.

Counted are the large products and factorizations of each method with its defaults, and the rounds that its iterations
take before they may stop. What depends on the data (further rounds) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lora_kernels.linalg.eigen import krylov_depth
from lora_kernels.linalg.randomized_svd import block_plan
from lora_kernels.runtime.processes import owners
from lora_kernels.statistics.cost import Rates, Work, share_seconds
from lora_kernels.statistics.plan import Plan
from lora_kernels.statistics.sketches import PROBES
from lora_kernels.statistics.store import Target
from lora_kernels.statistics.wants import GRADIENT, INPUT_SECOND

_WIDE, _SINGLE = 8, 4
_EXTRA = 8  # columns of a Krylov block beside those that are asked for
_ROUNDS = 4  # of CorDA's and LoRA-GA's randomized SVD


def lora_da_work(n: int, outputs: Sequence[int], rank: int = 16) -> Work:
    """LoRA-DA's solution of the layers that read one input.

    Args:
        n: size of the input.
        outputs: sizes of the layers' outputs.
        rank: r.

    Returns:
        Cholesky factor, steps, and the iteration for their directions.
    """
    found = Work(double=n**3 / 3, bytes=2 * _WIDE * n * n)
    block = rank + _EXTRA
    for m in outputs:
        depth = krylov_depth(n, rank, _EXTRA)
        products = n if depth is None else block * (2 + depth)
        found += Work(double=2 * n * n * m + products * (4 * m * n + 2 * n * n), bytes=_WIDE * (n * n + 2 * m * n))
    return found


def corda_work(n: int, outputs: Sequence[int], rank: int = 16) -> Work:
    """CorDA's decomposition of `W C` for the layers that read one input.

    Args:
        n: size of the input.
        outputs: sizes of the layers' outputs.
        rank: r.

    Returns:
        Cholesky factor and block products.
    """
    found = Work(double=n**3 / 3, bytes=2 * _WIDE * n * n)
    for m in outputs:
        products = _svd_columns(m, n, rank)
        found += Work(double=products * (2 * m * n + 2 * n * n), bytes=_WIDE * (n * n + m * n))
    return found


def _svd_columns(m: int, n: int, rank: int) -> int:
    """Columns that a randomized SVD multiplies the matrix or its transpose by, all rounds together."""
    width, rounds = block_plan(rank, "krylov", None, _ROUNDS)
    return min(m, n) if width * (rounds + 1) > min(m, n) else width * (2 * rounds + 2)


def _eva_work(n: int, rank: int, form: str, sketch_size: int) -> Work:
    if form == "sketch":
        columns = sketch_size + PROBES
        return Work(double=2 * n * sketch_size**2, bytes=_SINGLE * n * columns + 2 * _WIDE * n * columns)
    depth = krylov_depth(n, rank, _EXTRA)
    if depth is None:
        return Work(double=4 * n**3 / 3, bytes=2 * _WIDE * n * n)
    products = 2 + depth
    return Work(double=2 * n * n * (rank + _EXTRA) * products, bytes=_WIDE * n * n * (products + 1))


def _task_work(m: int, n: int) -> Work:
    small = min(m, n)
    step = n**3 / 3 + 2 * n * n * m
    core = 3 * m * n * small + 4 * small**3 / 3 + 2 * max(m, n) * small**2 - 2 * small**3 / 3
    return Work(double=step + core, single=2 * m * n * small, bytes=2 * _WIDE * (n * n + 2 * m * n))


def decompose_seconds(
    method: str, plan: Plan, targets: Iterable[Target], rates: Rates, rank: int, *, on_host: bool
) -> float:
    """The least time of the process that has most to decompose.

    Args:
        method: a name in `METHODS`; another one decomposes nothing.
        plan: of the collection.
        targets: the layers.
        rates: of the device.
        rank: of the adapters.
        on_host: the sums rest on the host, and are decomposed there.

    Returns:
        Seconds.
    """
    layers = {target.name: target for target in targets}
    work, who = _pieces(method, plan, layers, rank)
    if who is None:
        who = owners([1.0] * len(work), plan.world_size)
    return share_seconds(work, who, rates, on_host=on_host)


def _pieces(method: str, plan: Plan, layers: Mapping[str, Target], rank: int) -> tuple[list[Work], list[int] | None]:
    """What is shared out, and the owners where they do not simply take turns."""
    inputs = [each for each in plan.entries if each.statistic == INPUT_SECOND]
    sizes = {each.layers[0]: layers[each.layers[0]].in_features for each in inputs}
    if method == "eva":
        # Inputs of one size are batched, and the batches take turns.
        ordered = sorted(inputs, key=lambda each: sizes[each.layers[0]])
        return [_eva_work(sizes[each.layers[0]], rank, each.form, plan.sketch_size) for each in ordered], None
    if method in ("corda", "lora_da"):
        make = corda_work if method == "corda" else lora_da_work
        outputs = [[layers[name].out_features for name in each.layers] for each in inputs]
        work = [make(sizes[each.layers[0]], some, rank) for each, some in zip(inputs, outputs, strict=True)]
        return work, owners([each.double for each in work], plan.world_size)
    if method == "task_directions":
        return [_task_work(target.out_features, target.in_features) for target in layers.values()], None
    if method == "lora_ga":
        return _lora_ga_pieces(plan, layers, rank)
    return [], None


def _lora_ga_pieces(plan: Plan, layers: Mapping[str, Target], rank: int) -> tuple[list[Work], list[int]]:
    """Exact gradients take turns; sketches are reconstructed by every process."""
    work: list[Work] = []
    everywhere: list[Work] = []
    for each in plan.entries:
        if each.statistic != GRADIENT:
            continue
        m, n = layers[each.layers[0]].out_features, layers[each.layers[0]].in_features
        if each.form == "sketch":
            everywhere.append(Work(double=2.0 * (m + n) * plan.sketch_size**2))
        else:
            columns = _svd_columns(m, n, 2 * rank)
            work.append(Work(single=2.0 * m * n * columns, bytes=2 * _SINGLE * m * n))
    world = plan.world_size
    turns = [index % world for index in range(len(work))]
    return work + everywhere * world, turns + [process for process in range(world) for _ in everywhere]
