"""The randomized SVD against torch's full and low-rank ones: `python -m benchmarks.randomized_svd [--case ...]`.

Per case (shape, spectrum, rank) every side is timed in turn in one process, and judged on its residual after it is cut
to the same rank: Frobenius and spectral norm, relative to those of the best approximation, which the known spectrum
gives. Errors are means over seeds, times medians over rounds. torch's low-rank SVD gets its default of two iterations
with 6 and with 8 extra columns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import records
from lora_kernels.linalg import randomized_svd

CONSOLE = Console(width=None if sys.stdout.isatty() else 120)
SHAPES = {"small": (1024, 1024), "large": (2048, 5504), "batch": (64, 512, 512)}
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

    def ours(method: str) -> Callable[[int], Triplets]:
        def run(seed: int) -> Triplets:
            found = randomized_svd(a, rank, method=method, seed=seed)
            return found.U, found.S, found.Vh

        return run

    def lowrank(extra: int) -> Callable[[int], Triplets]:
        def run(seed: int) -> Triplets:
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(a, rank + extra, niter=2)
            return cut(u, s, v.mT)

        return run

    return {
        "ours krylov": ours("krylov"),
        "ours subspace": ours("subspace"),
        "torch.svd_lowrank+6": lowrank(6),
        "torch.svd_lowrank+8": lowrank(8),
        "torch.linalg.svd": lambda _seed: cut(*torch.linalg.svd(a, full_matrices=False)),
    }


def _spectral(residual: torch.Tensor) -> float:
    """The largest spectral norm of a batch, by the smaller Gram matrix (a full SVD takes minutes here)."""
    product = residual @ residual.mT if residual.shape[-2] <= residual.shape[-1] else residual.mT @ residual
    return float(torch.linalg.eigvalsh(product)[..., -1].max().clamp_min(0).sqrt())


def errors(a: torch.Tensor, found: Triplets, values: torch.Tensor) -> dict[str, float]:
    """Norms of the residual of one matrix (the first of a batch) over those of the best approximation.

    Args:
        a: the matrix or batch.
        found: the triplets.
        values: all singular values.

    Returns:
        `frobenius` and `spectral`; 1 is the best.
    """
    first = (0,) * (a.dim() - 2)
    u, s, vh = (each[first].to(torch.float64) for each in found)
    residual = a[first].to(torch.float64) - (u * s) @ vh
    rest = values[s.shape[-1] :]
    return {
        "frobenius": float(torch.linalg.matrix_norm(residual) / torch.linalg.vector_norm(rest)),
        "spectral": _spectral(residual) / float(rest[0]),
    }


def run_case(name: str, spectrum: str, rank: int, rounds: int, seeds: int, full: bool) -> dict[str, Any]:
    """One comparison.

    Args:
        name: a key of `SHAPES`.
        spectrum: a key of `SPECTRA`.
        rank: the number of triplets.
        rounds: how often each side is timed.
        seeds: over how many the errors are averaged.
        full: whether torch's full SVD runs too (once, where it takes long).

    Returns:
        The record.
    """
    a, values = matrix(SHAPES[name], spectrum)
    calls = sides(a, rank)
    exact = calls.pop("torch.linalg.svd")
    quality: dict[str, dict[str, float]] = {}
    for side, call in calls.items():
        found = [errors(a, call(seed), values) for seed in range(seeds)]
        quality[side] = {key: sum(each[key] for each in found) / seeds for key in found[0]}
    if quality["ours krylov"]["frobenius"] > 1.5:
        raise SystemExit(f"ours is wrong on {name} {spectrum} rank {rank}: {quality}")
    times = records.interleaved({side: lambda call=call: call(0) for side, call in calls.items()}, rounds)
    if full:
        times["torch.linalg.svd"] = records.quantiles([records.seconds(lambda: exact(0))])
    base = times["ours krylov"]["p50"]
    ratios = {side: each["p50"] / base for side, each in times.items() if side in TARGETS}
    mine = quality["ours krylov"]
    return {
        "case": name,
        "shape": list(a.shape),
        "spectrum": spectrum,
        "rank": rank,
        "seconds": times,
        "times_faster": ratios,
        "error_over_best": quality,
        "no_larger_error": {
            side: all(mine[key] <= quality[side][key] + EQUAL for key in mine) for side in ratios if side in quality
        },
        "target_met": {side: ratio >= TARGETS[side] for side, ratio in ratios.items()},
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print the records."""
    table = Table("case", "side", "ms (p50)", "ours is faster", "frobenius - 1", "spectral - 1", title="Randomized SVD")
    for each in results:
        label = f"{each['case']} {each['spectrum']} r={each['rank']}"
        for side, times in each["seconds"].items():
            ratio, quality = each["times_faster"].get(side), each["error_over_best"].get(side)
            table.add_row(
                label,
                side,
                f"{times['p50'] * 1e3:.2f}",
                "" if ratio is None else f"{ratio:.2f}x",
                *("" if quality is None else f"{quality[key] - 1:.1e}" for key in ("frobenius", "spectral")),
            )
            label = ""
    CONSOLE.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparisons and write their record.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rank", type=int, choices=RANKS, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--no-full", action="store_true", help="leave out torch.linalg.svd")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = list(SHAPES) if options.case == "all" else [options.case]
    results = []
    for name, spectrum, rank in itertools.product(names, SPECTRA, options.rank or RANKS):
        results.append(run_case(name, spectrum, rank, options.rounds, options.seeds, not options.no_full))
        show(results[-1:])
    record = {"rounds": options.rounds, "seeds": options.seeds, "targets": TARGETS, "results": results}
    CONSOLE.print(f"record: {records.save('randomized_svd', record, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
