"""The batched small linear algebra against torch, op by op: `python -m benchmarks.small_linalg [--quick]`.

Torch runs as a user would write it: `torch.linalg.eigh`; `cholesky` and `cholesky_solve`; two `eigh`, a division and
four products; the singular values of the r x r core of two QR factorisations. Answers are checked against float64
before any time is believed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import records
from lora_kernels.ops import cholesky_solve, eigh, factor_spectrum, sylvester
from lora_kernels.ops.small_linalg import reference

CONSOLE = Console(width=None if sys.stdout.isatty() else 120)
# 32 layers of 7 adapters; factors of layers of 1024 features.
BATCH, FEATURES = 224, 1024
ORDERS = (4, 8, 16, 32, 64)
# Worst error allowed, relative to the largest entry of the answer.
BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-10}


@dataclass(frozen=True)
class Case:
    """One problem of the benchmark.

    Attributes:
        ours: called with a backend.
        torch: the way of torch.
        truth: the answer in float64.
    """

    ours: Callable[[str], torch.Tensor]
    torch: Callable[[], torch.Tensor]
    truth: torch.Tensor


def core_spectrum(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Singular values of `scaling * B A` in torch, without forming it."""
    left, right = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.mT, mode="r").R
    return torch.linalg.svdvals(left @ right.mT) * scaling


def case(op: str, n: int, dtype: torch.dtype, batch: int, device: torch.device) -> Case:
    """Make a problem.

    Args:
        op: `eigh`, `cholesky_solve`, `sylvester` or `factor_spectrum`.
        n: order, or rank.
        dtype: of the numbers.
        batch: how many.
        device: where.

    Returns:
        The problem.
    """
    generator = torch.Generator().manual_seed(n)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(batch, *size, generator=generator, dtype=torch.float64).to(device, dtype)

    if op == "factor_spectrum":
        a, b = draw(n, FEATURES), draw(FEATURES, n)
        truth = core_spectrum(a.double(), b.double(), 2.0)
        return Case(lambda to: factor_spectrum(a, b, 2.0, backend=to), lambda: core_spectrum(a, b, 2.0), truth)
    roots = [draw(n, 2 * n) for _ in range(2)]
    p, q = (each @ each.mT / (2 * n) for each in roots)
    if op == "eigh":
        return Case(
            lambda to: eigh(p, backend=to)[0], lambda: torch.linalg.eigh(p)[0], torch.linalg.eigvalsh(p.double())
        )
    if op == "sylvester":
        rhs = draw(n, n)
        truth = reference.sylvester(p.double(), q.double(), rhs.double())
        return Case(lambda to: sylvester(p, q, rhs, backend=to), lambda: reference.sylvester(p, q, rhs), truth)
    rhs = draw(n, FEATURES)
    truth = torch.linalg.solve(p.double(), rhs.double())
    return Case(lambda to: cholesky_solve(p, rhs, backend=to), lambda: reference.cholesky_solve(p, rhs), truth)


def run(op: str, n: int, dtype: torch.dtype, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Check and time one problem.

    Args:
        op: as for `case`.
        n: likewise.
        dtype: likewise.
        batch: likewise.
        rounds: how often each side is timed.
        device: where.

    Returns:
        A row of the record.

    Raises:
        SystemExit: if an answer is wrong.
    """
    problem = case(op, n, dtype, batch, device)
    errors = {}
    for name, answer in (("ours", problem.ours("auto")), ("torch", problem.torch())):
        errors[name] = float((answer.double() - problem.truth).abs().max() / problem.truth.abs().max())
    if not errors["ours"] <= BOUNDS[dtype]:
        raise SystemExit(f"{op} of order {n} in {dtype} is wrong by {errors['ours']:.1e}")
    times = records.interleaved({"torch": problem.torch, "ours": lambda: problem.ours("auto")}, rounds)
    return {
        "op": op,
        "order": n,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "seconds": times,
        "errors": errors,
        "torch_over_ours": times["torch"]["p50"] / times["ours"]["p50"],
    }


def show(rows: list[dict[str, Any]], device: torch.device) -> None:
    """Print the rows."""
    table = Table(
        "op", "order", "dtype", "ours", "torch", "torch / ours", "error", "torch's", title=f"on {device.type}"
    )
    for row in rows:
        times = [f"{1e3 * row['seconds'][name]['p50']:.2f} ms" for name in ("ours", "torch")]
        errors = [f"{row['errors'][name]:.1e}" for name in ("ours", "torch")]
        table.add_row(row["op"], str(row["order"]), row["dtype"], *times, f"{row['torch_over_ours']:.2f}", *errors)
    CONSOLE.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its record.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="orders 8 and 16, 3 rounds, no record")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = 3 if options.quick else options.rounds
    rows = [
        run(op, n, dtype, options.batch, rounds, device)
        for op in ("eigh", "cholesky_solve", "sylvester", "factor_spectrum")
        for dtype in (torch.float32, torch.float64)
        for n in (ORDERS[1:3] if options.quick else ORDERS)
    ]
    show(rows, device)
    if not options.quick:
        record = {"batch": options.batch, "features": FEATURES, "device": device.type, "cases": rows}
        CONSOLE.print(f"record: {records.save('small_linalg', record, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
