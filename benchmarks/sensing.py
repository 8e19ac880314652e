"""Matrix sensing with a known answer, for the verdicts of `lora_kernels.landscape`; run by `compare landscape`.

A planted update of low rank is measured through a sine, so that the loss is almost convex near zero and full of traps
far away, as arXiv 2502.09376 supposes of fine-tuning. A proximal gradient method, which knows nothing of factors, gives
the nuclear-norm solution. LoRA with weight decay is trained from the usual start, from large random factors, for too
few steps, and with too small a rank; the truth about each run comes from that solution's objective and rank and from
training on, never from the numbers that the verdict reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from benchmarks.records import CONSOLE
from lora_kernels.landscape import Adapter, Spectrum, Thresholds, certify, judge, measure
from lora_kernels.landscape.certificate import Certificate
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, RANK_LIMITED, STILL_TRAINING
from lora_kernels.statistics import Gradient

KINDS = (LOW_RANK_MINIMUM, STILL_TRAINING, RANK_LIMITED, LOUD_FAILURE)
COLOURS = {LOW_RANK_MINIMUM: "#009E73", STILL_TRAINING: "#E69F00", RANK_LIMITED: "#0072B2", LOUD_FAILURE: "#D55E00"}

# Sensing: a 24 x 20 update of rank 2 from 400 measurements `sin(w <M, X>) / w`, LoRA of rank 6 with s = 2.
M, N, PLANTED, MEASUREMENTS, FREQUENCY = 24, 20, 2, 400, 0.8
RANK, SCALING, NUCLEAR = 6, 2.0, 0.01
# Frobenius norms of the planted update and of that at a hostile start, where the sine bends.
SIZE, HOSTILE = 0.25, 1.5
PROBLEMS, ITERATIONS = 8, 1000
STOPPED = {"zero": (3, 30), "large": (3, 30)}  # iterations of the runs that are stopped early
# The truth: objective within this share of the solution's, and rank at this tolerance of a dense decomposition.
CLOSE, DENSE_TOLERANCE = 1e-3, 1e-3


@dataclass(frozen=True)
class Sensing:
    """A problem.

    Attributes:
        matrices: `(q, m n)`.
        values: `(q,)`.
    """

    matrices: torch.Tensor
    values: torch.Tensor

    @staticmethod
    def make(seed: int) -> Sensing:
        """Draw a problem."""
        generator = torch.Generator().manual_seed(seed)
        matrices = torch.randn(MEASUREMENTS, M * N, generator=generator, dtype=torch.float64)
        left, right = (
            torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((M, PLANTED), (PLANTED, N))
        )
        planted = SIZE * (left @ right) / torch.linalg.matrix_norm(left @ right)
        return Sensing(matrices, torch.sin(FREQUENCY * (matrices @ planted.reshape(-1))) / FREQUENCY)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Half the mean squared error of an update."""
        seen = torch.sin(FREQUENCY * (self.matrices @ x.reshape(-1))) / FREQUENCY
        return 0.5 * (seen - self.values).square().mean()

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Of the loss, `(m, n)`."""
        phase = FREQUENCY * (self.matrices @ x.reshape(-1))
        error = torch.sin(phase) / FREQUENCY - self.values
        return (self.matrices.mT @ (error * torch.cos(phase))).reshape(M, N) / len(error)

    def solve(self) -> tuple[float, int]:
        """Objective and rank of the nuclear-norm solution that accelerated proximal gradient reaches from zero."""
        step = 1 / float(torch.linalg.matrix_norm(self.matrices, 2) ** 2 / len(self.values))
        x = ahead = torch.zeros(M, N, dtype=torch.float64)
        momentum = 1.0
        for _ in range(5000):
            u, s, vh = torch.linalg.svd(ahead - step * self.gradient(ahead), full_matrices=False)
            fresh = (u * (s - step * NUCLEAR).clamp_min(0)) @ vh
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            if float(((ahead - fresh) * (fresh - x)).sum()) > 0:  # restart where the momentum points uphill
                ahead, following = fresh, 1.0
            else:
                ahead = fresh + (momentum - 1) / following * (fresh - x)
            moved = float(torch.linalg.matrix_norm(fresh - x))
            x, momentum = fresh, following
            if moved < 1e-12:
                break
        s = torch.linalg.svdvals(x)
        return float(self.loss(x) + NUCLEAR * s.sum()), int((s > DENSE_TOLERANCE * s[0]).sum())


class Run:
    """LoRA on a problem, by L-BFGS on loss and weight decay."""

    def __init__(self, problem: Sensing, start: str, seed: int, rank: int = RANK) -> None:
        """Draw the factors: `zero` (B = 0, as usual) or `large`."""
        generator = torch.Generator().manual_seed(1000 + seed)
        a = torch.randn(rank, N, generator=generator, dtype=torch.float64) / math.sqrt(N)
        b = torch.randn(M, rank, generator=generator, dtype=torch.float64) / math.sqrt(M)
        grow = math.sqrt(HOSTILE / float(torch.linalg.matrix_norm(SCALING * b @ a)))
        a, b = (a, 0 * b) if start == "zero" else (a * grow, b * grow)
        self.problem, self.decay = problem, NUCLEAR * SCALING
        self.a, self.b = a.requires_grad_(), b.requires_grad_()

    def objective(self) -> torch.Tensor:
        """Loss and decay."""
        decay = 0.5 * self.decay * (self.a.square().sum() + self.b.square().sum())
        return self.problem.loss(SCALING * self.b @ self.a) + decay

    def train(self, iterations: int) -> None:
        """Go on for at most so many iterations."""
        optimizer = torch.optim.LBFGS(
            [self.a, self.b],
            max_iter=iterations,
            max_eval=3 * iterations,
            history_size=20,
            tolerance_grad=1e-12,
            tolerance_change=1e-18,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = self.objective()
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    def state(self) -> tuple[float, int]:
        """Objective, and rank of the product by a dense decomposition."""
        s = torch.linalg.svdvals((SCALING * self.b @ self.a).detach())
        return float(self.objective().detach()), int((s > DENSE_TOLERANCE * s[0]).sum())

    def diagnose(self) -> tuple[Spectrum, Certificate]:
        """What the library says of the factors as they are."""
        adapter = Adapter("update", self.a.detach(), self.b.detach(), SCALING)
        spectrum = measure([adapter])["update"]
        gradient = Gradient(self.problem.gradient((SCALING * self.b @ self.a).detach()))
        losses = [float(self.problem.loss(x * SCALING * (self.b @ self.a).detach())) for x in (0.0, 1.0)]
        return spectrum, certify(adapter, spectrum, gradient, self.decay, losses[0] - losses[1])


def truth(here: tuple[float, int], end: tuple[float, int], solution: tuple[float, int]) -> str:
    """What a run is, by the solution and by where training on leads."""
    if here[0] > (1 + CLOSE) * end[0]:
        return STILL_TRAINING
    if here[0] <= (1 + CLOSE) * solution[0] and here[1] == solution[1]:
        return LOW_RANK_MINIMUM
    return LOUD_FAILURE if here[1] > solution[1] else RANK_LIMITED


def runs(problems: int = PROBLEMS) -> list[dict[str, Any]]:
    """Five runs per problem: from zero, twice from large factors, one stopped early, one of rank one.

    Args:
        problems: how many.

    Returns:
        Per run start, truth, verdict and the numbers behind both; the objects themselves under `_`.
    """
    entries = []
    for seed in range(problems):
        problem = Sensing.make(seed)
        solution = problem.solve()
        early = "zero" if seed % 2 == 0 else "large"
        plan = [("zero", ITERATIONS, RANK), *[("large", ITERATIONS, RANK)] * 2]
        plan += [(early, STOPPED[early][seed // 2 % 2], RANK), ("zero", ITERATIONS, 1)]
        for number, (start, iterations, adapter_rank) in enumerate(plan):
            run = Run(problem, start, 10 * seed + number, adapter_rank)
            run.train(iterations)
            here = run.state()
            spectrum, certificate = run.diagnose()
            if iterations < ITERATIONS:
                run.train(ITERATIONS)
            end = run.state()
            entries.append(
                {
                    "problem": seed,
                    "start": start,
                    "iterations": iterations,
                    "adapter_rank": adapter_rank,
                    "truth": truth(here, end, solution),
                    "verdict": judge(spectrum, certificate).kind,
                    "objective_over_solution": here[0] / solution[0],
                    "end_over_solution": end[0] / solution[0],
                    "rank": here[1],
                    "solution_rank": solution[1],
                    "numerical_rank": spectrum.numerical_rank,
                    "values": list(spectrum.values),
                    "frobenius": spectrum.frobenius,
                    "balance": spectrum.balance,
                    "ratio": certificate.ratio,
                    "alignment": certificate.alignment,
                    "stationarity": certificate.stationarity,
                    "cost": certificate.cost,
                    "gain": certificate.gain,
                    "_": (spectrum, certificate),
                }
            )
    return entries


def confusion(results: Sequence[dict[str, Any]], limits: Thresholds | None = None) -> dict[str, dict[str, int]]:
    """How often each truth got each verdict."""
    table: dict[str, dict[str, int]] = {}
    for run in results:
        verdict = judge(*run["_"], limits).kind
        row = table.setdefault(run["truth"], dict.fromkeys(KINDS, 0))
        row[verdict] = row.get(verdict, 0) + 1
    return table


def right(table: dict[str, dict[str, int]]) -> bool:
    """Whether every run got its truth."""
    return all(row.get(name, 0) == sum(row.values()) for name, row in table.items())


def margins(results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Per threshold, the range around its default in which every verdict stays right, in steps of 2^(1/2)."""
    ranges = {}
    for name in ("rank_tolerance", "stationarity", "ratio", "alignment"):
        default = getattr(Thresholds(), name)
        ends = []
        for direction in (-1, 1):
            value, last = default, math.nan
            for _ in range(60):
                if value > 1 and name == "rank_tolerance":
                    break
                if not right(confusion(results, replace(Thresholds(), **{name: value}))):
                    break
                last, value = value, value * 2 ** (direction / 2)
            ends.append(last)
        ranges[name] = ends
    return ranges


def sensing(problems: int = PROBLEMS) -> dict[str, Any]:
    """The experiment; prints the table.

    Args:
        problems: how many problems.

    Returns:
        The part of the record.
    """
    results = runs(problems)
    table = confusion(results)
    shown = Table("truth", *(f"verdict {kind}" for kind in KINDS), title=f"{len(results)} runs")
    for name, row in table.items():
        shown.add_row(name, *(str(row.get(kind, 0)) for kind in KINDS))
    CONSOLE.print(shown)
    good = [run for run in results if run["truth"] == LOW_RANK_MINIMUM]
    worst = max(abs(run["ratio"] - 1) for run in good)
    CONSOLE.print(f"minima: s|G|/lambda within {worst:.1e} of 1; loud failures end at ", end="")
    CONSOLE.print(", ".join(f"{e['objective_over_solution']:.2f}" for e in results if e["truth"] == LOUD_FAILURE))
    settings = {
        "shape": [M, N],
        "planted_rank": PLANTED,
        "measurements": MEASUREMENTS,
        "frequency": FREQUENCY,
        "rank": RANK,
        "scaling": SCALING,
        "nuclear": NUCLEAR,
        "weight_decay": NUCLEAR * SCALING,
        "planted_norm": SIZE,
        "hostile_norm": HOSTILE,
        "iterations": ITERATIONS,
    }
    stripped = [{key: value for key, value in run.items() if key != "_"} for run in results]
    return {
        "settings": settings,
        "thresholds": asdict(Thresholds()),
        "confusion": table,
        "all_right": right(table),
        "largest_ratio_error_at_minima": worst,
        "thresholds_may_lie_in": margins(results),
        "runs": stripped,
    }


def draw(results: Sequence[dict[str, Any]], table: dict[str, dict[str, int]]) -> Any:
    """Spectra, certificate and confusion table of the runs of a record, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    spectra, certificate, cells = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    for run in results:
        colour, label = COLOURS.get(run["truth"], "black"), run["truth"].replace("_", " ")
        values = [max(value, 1e-9) for value in run["values"]]
        spectra.plot(range(1, len(values) + 1), values, color=colour, alpha=0.6, marker=".", label=label)
        certificate.scatter(run["stationarity"], run["ratio"], color=colour, s=18, label=label)
    spectra.set(yscale="log", xlabel="index", ylabel="singular value of s B A", title="spectra by truth")
    certificate.set(xscale="log", yscale="log", xlabel="stationarity", ylabel="s |G|_2 / lambda", title="certificate")
    certificate.axvline(Thresholds().stationarity, color="0.5", linestyle=":")
    certificate.axhline(1 + Thresholds().ratio, color="0.5", linestyle=":")
    for axes in (spectra, certificate):
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize=7)
        axes.grid(alpha=0.3)
    names = [kind for kind in KINDS if kind in table]
    counts = [[table[name].get(kind, 0) for kind in KINDS] for name in names]
    cells.imshow(counts, cmap="Greens", vmin=0, vmax=max(max(row) for row in counts) * 1.5)
    for row, values in enumerate(counts):
        for column, value in enumerate(values):
            cells.text(column, row, str(value), ha="center", va="center")
    cells.set_xticks(range(len(KINDS)), [kind.replace("_", "\n") for kind in KINDS], fontsize=8)
    cells.set_yticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    cells.set(xlabel="verdict", ylabel="truth", title=f"{len(results)} runs")
    return figure
