"""The batched small linear algebra against torch, op by op.

Torch runs as a user would write it: `torch.linalg.eigh`; `cholesky` and `cholesky_solve`; two `eigh`, a division and
four products; the singular values of the r x r core of two QR factorisations. Answers are checked against float64
before any time is believed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject
from lora_kernels.ops import cholesky_solve, eigh, factor_spectrum, sylvester
from lora_kernels.ops.small_linalg import reference

OPS = ("eigh", "cholesky_solve", "sylvester", "factor_spectrum")
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
    p, q = (root @ root.mT / (2 * n) for root in roots)
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
    return Case(
        lambda to: cholesky_solve(p, rhs, backend=to),
        lambda: torch.cholesky_solve(rhs, torch.linalg.cholesky(p)),
        truth,
    )


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
        "floor": _floor(op, n, dtype, batch, device).record(),
        "torch_over_ours": times["torch"]["p50"] / times["ours"]["p50"],
    }


def _floor(op: str, n: int, dtype: torch.dtype, batch: int, device: torch.device) -> Floor:
    """What is read and written, and the leading terms of the textbooks' FLOPs without iterations."""
    flops, numbers = {
        "eigh": (4 / 3 * n**3, 2.0 * n**2),
        "cholesky_solve": (n**3 / 3 + 2.0 * n**2 * FEATURES, n**2 + 2.0 * n * FEATURES),
        "sylvester": (2 * 4 / 3 * n**3 + 8.0 * n**3, 4.0 * n**2),
        "factor_spectrum": (2.0 * n * (n + 1) * FEATURES, 2.0 * n * FEATURES),
    }[op]
    kind = str(dtype).removeprefix("torch.")
    return Floor(batch * flops, batch * numbers * dtype.itemsize, here(device.type), kind)


def measure(op: str, options: argparse.Namespace) -> dict[str, Any]:
    """An op in both precisions and all orders."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries = [
        run(op, n, dtype, options.batch, options.rounds, device)
        for dtype in BOUNDS
        for n in (ORDERS[1:3] if options.quick else ORDERS)
    ]
    return {"batch": options.batch, "features": FEATURES, "device": device.type, "entries": entries}


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Each order and precision."""
    table_rows = []
    for one in entry["entries"]:
        ours, theirs = (one["seconds"][name]["p50"] for name in ("ours", "torch"))
        what = f"{entry['batch']} of order {one['order']}, {one['dtype']}"
        table_rows.append(Row(what, "torch", ours, theirs, one.get("floor", {}).get("seconds"), group=one["op"]))
    return table_rows


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Errors."""
    worst = max(one["errors"]["ours"] for one in entry["entries"])
    return [f"largest error {worst:.1e}; torch's {max(one['errors']['torch'] for one in entry['entries']):.1e}"]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=BATCH, help="matrices in a batch")


SUBJECT = Subject(
    name="small_linalg",
    about="Batched eigenproblems, solves, Sylvester equations and adapter spectra against torch; answers must be those "
    "of float64.",
    cases={op: partial(measure, op) for op in OPS},
    rows=rows,
    notes=notes,
    full=OPS,
    quick=OPS,
    rounds=21,
    options=_options,
)
