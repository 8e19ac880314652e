"""The randomized SVD against torch's full and low-rank ones.

Per case (shape, spectrum, rank) every side is timed in turn in one process, and judged on its residual after it is cut
to the same rank: Frobenius and spectral norm, relative to those of the best approximation, which the known spectrum
gives. Errors are means over seeds, times medians over rounds. torch's low-rank SVD gets its default of two iterations
with 6 and with 8 extra columns.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject
from lora_kernels.linalg import randomized_svd

SHAPES = {"tiny": (160, 128), "small": (1024, 1024), "large": (2048, 5504), "batch": (64, 512, 512)}
SPECTRA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "1/i": lambda i: 1 / i,
    "exp(-i/50)": lambda i: torch.exp(-i / 50),
}
RANKS = (16, 64)
# The bars: how many times faster than each side at no larger error.
TARGETS = {"torch.linalg.svd": 5.0, "torch.svd_lowrank+6": 1.5, "torch.svd_lowrank+8": 1.5}
# Errors count as equal up to this, relative to the best approximation's.
EQUAL = 1e-3
Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def matrix(shape: Sequence[int], spectrum: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix (or a batch) with random singular vectors and known singular values.

    Args:
        shape: `(..., m, n)`.
        spectrum: a key of `SPECTRA`.

    Returns:
        The matrix, and its singular values in float64.
    """
    *batch, m, n = shape
    k = min(m, n)
    generator = torch.Generator().manual_seed(0)
    values = SPECTRA[spectrum](torch.arange(1, k + 1, dtype=torch.float64))
    u, v = (torch.linalg.qr(torch.randn(*batch, size, k, generator=generator)).Q for size in (m, n))
    return (u * values.float()) @ v.mT, values


def sides(a: torch.Tensor, rank: int) -> dict[str, Callable[[int], Triplets]]:
    """Who is compared; each is called with a seed.

    Args:
        a: the matrix.
        rank: the number of triplets asked for.

    Returns:
        By name, functions that return U, S and Vh of that rank.
    """

    def cut(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> Triplets:
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    def ours(seed: int) -> Triplets:
        result = randomized_svd(a, rank, seed=seed)
        return result.U, result.S, result.Vh

    def lowrank(extra: int) -> Callable[[int], Triplets]:
        def run(seed: int) -> Triplets:
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(a, rank + extra, niter=2)
            return cut(u, s, v.mT)

        return run

    return {
        "ours krylov": ours,
        "torch.svd_lowrank+6": lowrank(6),
        "torch.svd_lowrank+8": lowrank(8),
        "torch.linalg.svd": lambda _seed: cut(*torch.linalg.svd(a, full_matrices=False)),
    }


def _spectral(residual: torch.Tensor) -> float:
    """The largest spectral norm of a batch, by the smaller Gram matrix (a full SVD takes minutes here)."""
    product = residual @ residual.mT if residual.shape[-2] <= residual.shape[-1] else residual.mT @ residual
    return float(torch.linalg.eigvalsh(product)[..., -1].max().clamp_min(0).sqrt())


def errors(a: torch.Tensor, triplets: Triplets, values: torch.Tensor) -> dict[str, float]:
    """Norms of the residual of one matrix (the first of a batch) over those of the best approximation.

    Args:
        a: the matrix or batch.
        triplets: the triplets.
        values: all singular values.

    Returns:
        `frobenius` and `spectral`; 1 is the best.
    """
    first = (0,) * (a.dim() - 2)
    u, s, vh = (tensor[first].to(torch.float64) for tensor in triplets)
    residual = a[first].to(torch.float64) - (u * s) @ vh
    rest = values[s.shape[-1] :]
    return {
        "frobenius": float(torch.linalg.matrix_norm(residual) / torch.linalg.vector_norm(rest)),
        "spectral": _spectral(residual) / float(rest[0]),
    }


def compare(name: str, spectrum: str, rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """One comparison.

    Args:
        name: a key of `SHAPES`.
        spectrum: a key of `SPECTRA`.
        rank: the number of triplets.
        options: of the command line.

    Returns:
        An entry.

    Raises:
        SystemExit: if ours is wrong.
    """
    a, values = matrix(SHAPES[name], spectrum)
    calls = sides(a, rank)
    exact = calls.pop("torch.linalg.svd")
    quality: dict[str, dict[str, float]] = {}
    for side, call in calls.items():
        errors_by_seed = [errors(a, call(seed), values) for seed in range(options.seeds)]
        quality[side] = {key: sum(one[key] for one in errors_by_seed) / options.seeds for key in errors_by_seed[0]}
    if quality["ours krylov"]["frobenius"] > 1.5:
        raise SystemExit(f"ours is wrong on {name} {spectrum} rank {rank}: {quality}")
    times = records.interleaved({side: lambda call=call: call(0) for side, call in calls.items()}, options.rounds)
    if options.full_svd:
        times["torch.linalg.svd"] = records.quantiles([records.seconds(lambda: exact(0))])
    base = times["ours krylov"]["p50"]
    ratios = {side: one["p50"] / base for side, one in times.items() if side in TARGETS}
    mine = quality["ours krylov"]
    floor = Floor(4.0 * rank * a.numel(), 4.0 * a.numel(), here(), "float32")
    return {
        "shape": list(a.shape),
        "spectrum": spectrum,
        "rank": rank,
        "seconds": times,
        "floor": floor.record(),
        "times_faster": ratios,
        "error_over_best": quality,
        "no_larger_error": {
            side: all(mine[key] <= quality[side][key] + EQUAL for key in mine) for side in ratios if side in quality
        },
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All spectra and ranks of a shape."""
    pairs = itertools.product(SPECTRA, options.rank or (RANKS[:1] if options.quick else RANKS))
    entries = [compare(name, *pair, options) for pair in pairs]
    return {"rounds": options.rounds, "seeds": options.seeds, "entries": entries}


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Ours (block Krylov) against each way of torch."""
    table_rows = []
    for one in entry["entries"]:
        shape = " x ".join(str(size) for size in one["shape"])
        for side, target in TARGETS.items():
            if side in one["seconds"]:
                ours, theirs = (one["seconds"][name]["p50"] for name in ("ours krylov", side))
                what = f"{shape}, {one['spectrum']}, rank {one['rank']}"
                table_rows.append(Row(what, side, ours, theirs, one.get("floor", {}).get("seconds"), target))
    return table_rows


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Errors."""
    return [
        f"{one['spectrum']}, rank {one['rank']}: excess of the Frobenius residual over the best possible: "
        + ", ".join(f"{side} {error['frobenius'] - 1:.1e}" for side, error in one["error_over_best"].items())
        for one in entry["entries"]
    ]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, choices=RANKS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="over which errors are averaged")
    parser.add_argument("--no-full", dest="full_svd", action="store_false", help="leave out torch.linalg.svd")


SUBJECT = Subject(
    name="svd",
    about="The randomized SVD against torch.linalg.svd and torch.svd_lowrank; its residual must be within half of the "
    "best possible, and the excess over that is recorded for every side.",
    cases={name: partial(measure, name) for name in SHAPES},
    rows=rows,
    notes=notes,
    full=("small", "large", "batch"),
    quick=("small",),
    rounds=15,
    options=_options,
)
