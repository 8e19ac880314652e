"""Tile sizes of the kernels that have no tuner: every candidate's time beside that of the shipped choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.part import LIMIT, ROUNDING, Run, relative_error
from lora_kernels.ops._tiles import TileConfig
from lora_kernels.ops.lora_pro_adam import reference
from lora_kernels.ops.lora_pro_adam.config import Adam, ProConfig
from lora_kernels.ops.skinny.config import SkinnyConfig

TOKENS = 8192
# rows, columns, tokens, warps, stages
_TILES = (
    (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 2), (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 2),
)  # fmt: skip
# tokens, columns, warps, stages
_SKINNY = {
    "shrink": (
        (16, 256, 4, 4), (32, 128, 4, 4), (32, 128, 4, 5), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 8, 4),
        (128, 64, 8, 4), (128, 64, 8, 5),
    ),
    "tsreduce": (
        (32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 8, 4), (128, 64, 4, 4),
        (128, 128, 8, 3),
    ),
    "expand": (
        (32, 128, 4, 2), (32, 256, 4, 2), (64, 64, 4, 2), (64, 128, 4, 1), (64, 128, 4, 2), (64, 128, 8, 2),
        (128, 128, 8, 2),
    ),
}  # fmt: skip
# rows, columns, warps, stages
_PRO = (
    (32, 16, 2, 2), (32, 32, 2, 2), (64, 16, 4, 1), (64, 16, 4, 2), (64, 16, 4, 3), (64, 32, 4, 1), (64, 32, 4, 2),
    (128, 16, 8, 2),
)  # fmt: skip
# The right result, a call that returns what a configuration (`None`: the shipped one) gives, and what to do before a
# call whose result is checked.
Problem = tuple[torch.Tensor, Callable[[Any], torch.Tensor], Callable[[], Any]]


def sweep(run: Run) -> None:
    """Covariances, gradients, the skinny products and LoRA-Pro's step."""
    tokens = run.pick(TOKENS, 64)
    cases: list[dict[str, Any]] = [
        {"kernel": "covariance", "tokens": tokens, "n": n} for n in run.pick((4096, 14336), (48,))
    ]
    shapes = run.pick(((4096, 4096), (14336, 4096)), ((48, 32),))
    cases += [{"kernel": "gradient", "tokens": tokens, "m": m, "n": n} for m, n in shapes]
    ranks = run.pick((16, 64), (16,))
    cases += [
        {"kernel": kernel, "tokens": tokens, "n": run.pick(4096, 48), "rank": rank}
        for rank in ranks
        for kernel in _SKINNY
    ]
    cases += [{"kernel": "lora_pro", "m": run.pick(4096, 48), "n": run.pick(4096, 64), "rank": rank} for rank in ranks]
    run.each(cases, _swept)
    ratios = [
        f"{entry['kernel']} {entry['shipped_over_best']:.2f}" for entry in run.record["entries"] if "best" in entry
    ]
    run.record["note"] = "shipped / best: " + ", ".join(ratios)


def _swept(run: Run, kernel: str, **sizes: int) -> dict[str, Any]:
    problems: dict[str, Callable[..., Problem]]
    problems = {"covariance": _covariance, "gradient": _gradient, "lora_pro": _lora_pro}
    truth, call, reset = problems.get(kernel, partial(_skinny, product=kernel))(run, **sizes)
    candidates: tuple[tuple[int, ...], ...] = _SKINNY.get(kernel, _PRO if kernel == "lora_pro" else _TILES)
    config = {"lora_pro": ProConfig, "covariance": TileConfig, "gradient": TileConfig}.get(kernel, SkinnyConfig)
    calls: dict[str, Callable[[], Any]] = {"shipped": partial(call, None)}
    for numbers in run.pick(candidates, candidates[:2]):
        calls["x".join(map(str, numbers))] = partial(call, config(*numbers))
    errors, refused = {}, {}
    for name, one in calls.items():
        reset()
        try:
            result = one()
            errors[name] = relative_error(result.tril() if kernel == "covariance" else result, truth)
        except Exception as failure:  # too much shared memory, or whatever else a compiler raises
            if name == "shipped":
                raise
            refused[name] = f"{type(failure).__name__}: {failure}"[:200]
    bound = LIMIT * errors["shipped"] + ROUNDING
    refused |= {name: f"wrong numbers: {error:.1e}" for name, error in errors.items() if not error <= bound}
    sides = {name: one for name, one in calls.items() if name not in refused}
    seconds = timing.interleaved(sides, run.pick(7, 2), run.device)
    best = min(seconds, key=lambda name: seconds[name]["p50"])
    ratio = seconds["shipped"]["p50"] / seconds[best]["p50"]
    return {"seconds": seconds, "refused": refused, "best": best, "shipped_over_best": ratio}


def _covariance(run: Run, tokens: int, n: int) -> Problem:
    from lora_kernels.ops.covariance import kernel

    x, out = run.normal(tokens, n), torch.zeros(n, n, device=run.device)

    def call(config: TileConfig | None) -> torch.Tensor:
        kernel.covariance(out, x, config=config)
        return out

    return (x.double().mT @ x.double()).tril_(), call, out.zero_


def _gradient(run: Run, tokens: int, m: int, n: int) -> Problem:
    from lora_kernels.ops.gradient_statistics import kernel

    x, g, out = run.normal(tokens, n), run.normal(tokens, m), torch.zeros(m, n, device=run.device)

    def call(config: TileConfig | None) -> torch.Tensor:
        kernel.gradient_statistics(out, g, x, None, None, config)
        return out

    return g.double().mT @ x.double(), call, out.zero_


def _skinny(run: Run, tokens: int, n: int, rank: int, *, product: str) -> Problem:
    from lora_kernels.ops.skinny import kernel

    x, t, a = run.normal(tokens, n), run.normal(tokens, rank), run.normal(rank, n)
    if product == "shrink":
        narrow = torch.empty_like(t)

        def shrink(config: SkinnyConfig | None) -> torch.Tensor:
            kernel.shrink(narrow, x, a, 1.0, None, config)
            return narrow

        return x.double() @ a.double().mT, shrink, narrow.zero_
    if product == "tsreduce":
        tall = torch.empty(rank, n, device=run.device)

        def tsreduce(config: SkinnyConfig | None) -> torch.Tensor:
            kernel.tsreduce(tall, t, x, None, config)
            return tall

        return t.double().mT @ x.double(), tsreduce, tall.zero_
    wide = torch.empty_like(x)

    def expand(config: SkinnyConfig | None) -> torch.Tensor:
        kernel.expand(wide, t, a, None, None, None, config)
        return wide

    return t.double() @ a.double(), expand, wide.zero_


def _lora_pro(run: Run, m: int, n: int, rank: int) -> Problem:
    from lora_kernels.ops.lora_pro_adam import kernel

    start = run.normal(1, m, n, dtype=torch.float32), run.normal(1, m, n, dtype=torch.float32).square_()
    a, b = run.normal(1, rank, n, dtype=torch.float32, scale=n**-0.5), run.normal(1, m, rank, dtype=torch.float32)
    factors = a, b, run.normal(1, rank, n, dtype=torch.float32), run.normal(1, m, rank, dtype=torch.float32)
    numbers = Adam(scaling=2.0, beta1=0.9, beta2=0.999, eps=1e-8, step=3, row_offset=0, row_step=m)
    bt_h, h_at = torch.empty(1, rank, n, device=run.device), torch.empty(1, m, rank, device=run.device)
    moments = start[0].clone(), start[1].clone()

    def reset() -> None:
        for moment, value in zip(moments, start, strict=True):
            moment.copy_(value)

    def call(config: ProConfig | None) -> torch.Tensor:
        kernel.lora_pro_adam(moments, factors, numbers, None, bt_h, h_at, config)
        return h_at

    truth = reference.lora_pro_adam(*start, *factors, scaling=2.0, betas=(0.9, 0.999), eps=1e-8, step=3)
    return truth[3], call, reset
