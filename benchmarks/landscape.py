"""The landscape diagnosis against what is known: `python -m benchmarks.landscape [--what PART ...]`.

sensing: matrix sensing with a planted update of low rank, measured through a sine, so that the loss is almost convex
near zero and full of traps far away, as arXiv 2502.09376 supposes of fine-tuning. A proximal gradient method, which
knows nothing of factors, gives the nuclear-norm solution. LoRA with weight decay is trained from the usual start, from
large random factors, for too few steps, and with too small a rank; the truth about each run comes from that solution's
objective and rank and from training on, never from the numbers that the verdict reads.
demo: a sane run of the demo's model and one at 100 times its learning rate.
monitor: what the monitor costs of a training step.
spectrum: the spectra of a whole model's adapters against singular values of the products.

Each part replaces its own entry of benchmarks/results/landscape.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import records
from lora_kernels.landscape import Adapter, Gradient, Spectrum, Thresholds, certify, factor_spectra, judge, measure
from lora_kernels.landscape.certificate import Certificate
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, RANK_LIMITED, STILL_TRAINING

CONSOLE = Console(width=None if sys.stdout.isatty() else 120)
KINDS = (LOW_RANK_MINIMUM, STILL_TRAINING, RANK_LIMITED, LOUD_FAILURE)
PARTS = ("sensing", "demo", "monitor", "spectrum")
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
    found = []
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
            found.append(
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
    return found


def confusion(found: Sequence[dict[str, Any]], limits: Thresholds | None = None) -> dict[str, dict[str, int]]:
    """How often each truth got each verdict."""
    table: dict[str, dict[str, int]] = {}
    for each in found:
        verdict = judge(*each["_"], limits).kind
        row = table.setdefault(each["truth"], dict.fromkeys(KINDS, 0))
        row[verdict] = row.get(verdict, 0) + 1
    return table


def right(table: dict[str, dict[str, int]]) -> bool:
    """Whether every run got its truth."""
    return all(row.get(name, 0) == sum(row.values()) for name, row in table.items())


def margins(found: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
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
                if not right(confusion(found, replace(Thresholds(), **{name: value}))):
                    break
                last, value = value, value * 2 ** (direction / 2)
            ends.append(last)
        ranges[name] = ends
    return ranges


def sensing(folder: Path, problems: int = PROBLEMS) -> dict[str, Any]:
    """The experiment; prints the table and draws the figure.

    Args:
        folder: of the figure.
        problems: how many problems.

    Returns:
        The part of the record.
    """
    found = runs(problems)
    table = confusion(found)
    shown = Table("truth", *(f"verdict {kind}" for kind in KINDS), title=f"{len(found)} runs")
    for name, row in table.items():
        shown.add_row(name, *(str(row.get(kind, 0)) for kind in KINDS))
    CONSOLE.print(shown)
    good = [each for each in found if each["truth"] == LOW_RANK_MINIMUM]
    worst = max(abs(each["ratio"] - 1) for each in good)
    CONSOLE.print(f"minima: s|G|/lambda within {worst:.1e} of 1; loud failures end at ", end="")
    CONSOLE.print(", ".join(f"{e['objective_over_solution']:.2f}" for e in found if e["truth"] == LOUD_FAILURE))
    picture = folder / "landscape.png"
    draw(found, table, picture)
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
    stripped = [{key: value for key, value in each.items() if key != "_"} for each in found]
    return {
        "settings": settings,
        "thresholds": asdict(Thresholds()),
        "confusion": table,
        "all_right": right(table),
        "largest_ratio_error_at_minima": worst,
        "thresholds_may_lie_in": margins(found),
        "runs": stripped,
    }


def draw(found: Sequence[dict[str, Any]], table: dict[str, dict[str, int]], path: Path) -> None:
    """Spectra, certificate and confusion table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    spectra, certificate, cells = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    for each in found:
        colour, label = COLOURS.get(each["truth"], "black"), each["truth"].replace("_", " ")
        values = [max(value, 1e-9) for value in each["values"]]
        spectra.plot(range(1, len(values) + 1), values, color=colour, alpha=0.6, marker=".", label=label)
        certificate.scatter(each["stationarity"], each["ratio"], color=colour, s=18, label=label)
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
    cells.set(xlabel="verdict", ylabel="truth", title=f"{len(found)} runs")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


# Steps and learning rates of the demo's runs, as factors of the studied rate.
DEMO_STEPS, DEMO_FACTORS = 40, (1, 100)


def _demo_model(seed: int) -> tuple[Any, Any, Any]:
    """The demo's model with stock LoRA, an endless stream of its batches, and its optimizer's groups."""
    from lora_kernels.demo import task as demo
    from lora_kernels.demo.config import DemoConfig
    from lora_kernels.demo.data import docstring_task
    from lora_kernels.demo.run import quiet_transformers

    quiet_transformers()
    config, data = DemoConfig(plots=False), docstring_task()
    folder = demo.model_folder(None)
    tokenizer = demo.load_tokenizer(folder)
    model = demo.build_model(folder, len(data.labels), config.rank, seed, tokenizer.pad_token_id)
    loader = demo.Batches(tokenizer, data.labels, config.max_tokens).shuffled(data.train, config.batch_size, seed)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    return model, endless, lambda rate: demo.parameter_groups(model, rate, 3e-3)


def _train(model: Any, batches: Any, optimizer: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.tensor(math.nan)
    for _ in range(steps):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def demo(steps: int = DEMO_STEPS) -> dict[str, Any]:
    """Diagnose the demo's model, trained at the studied rate and at 100 times that, without data.

    Args:
        steps: of each run.

    Returns:
        The part of the record.
    """
    from lora_kernels import diagnose
    from lora_kernels.demo.config import DEFAULT_RATES

    rows = []
    for factor in DEMO_FACTORS:
        torch.manual_seed(0)
        model, batches, groups = _demo_model(0)
        rate = factor * DEFAULT_RATES["random"]
        loss = _train(model, batches, torch.optim.AdamW(groups(rate), weight_decay=0.0), steps)
        found = diagnose(model)
        shares = sorted(each.spectrum.spectral_share or math.nan for each in found)
        full = sum(each.spectrum.numerical_rank == each.spectrum.rank for each in found)
        row = {
            "learning_rate": rate,
            "last_loss": loss if math.isfinite(loss) else None,
            "verdict": found.verdict.kind,
            "loud_layers": sum(each.verdict.kind == LOUD_FAILURE for each in found),
            "layers": len(found.layers),
            "full_rank_layers": full,
            "share": {"smallest": shares[0], "median": shares[len(shares) // 2], "largest": shares[-1]},
        }
        rows.append(row)
        CONSOLE.print(
            f"rate {rate:g}: last loss {loss:.3g}, {found.verdict.kind}, {row['loud_layers']} of {row['layers']} "
            f"layers loud, |sBA|/|W| from {shares[0]:.3g} to {shares[-1]:.3g}, {full} layers of full rank"
        )
    between = [rows[0]["share"]["largest"], rows[-1]["share"]["smallest"]]
    CONSOLE.print(f"loud_share {Thresholds().loud_share:g}; the runs leave {between[0]:.3g} to {between[1]:.3g}")
    return {"steps": steps, "loud_share": Thresholds().loud_share, "the_runs_leave": between, "runs": rows}


def monitor(rounds: int = 21, every: int = 50) -> dict[str, Any]:
    """What the monitor costs of a training step of the demo, both in turn in one process.

    Args:
        rounds: how often each is timed.
        every: steps between two measurements.

    Returns:
        The part of the record.
    """
    from lora_kernels import LandscapeMonitor

    model, batches, groups = _demo_model(0)
    optimizer = torch.optim.AdamW(groups(3e-3), weight_decay=0.0)
    watched = LandscapeMonitor(every)
    watched.begin(model)
    calls = {"step": lambda: _train(model, batches, optimizer, 1), "measurement": lambda: watched.measure(model)}
    times = records.interleaved(calls, rounds)
    share = times["measurement"]["p50"] / (every * times["step"]["p50"])
    CONSOLE.print(
        f"a step {1e3 * times['step']['p50']:.1f} ms, a measurement {1e3 * times['measurement']['p50']:.1f} ms: "
        f"{share:.3%} of the training time at every={every}"
    )
    return {"every": every, "layers": len(watched.latest), "seconds": times, "share_of_training": share}


# A model of 32 blocks of 7 layers; the last quarter of each adapter's directions is zero.
LAYERS, FEATURES, ADAPTER_RANK = 224, 4096, 16
BOUND, FLOOR, LEAST_SPEEDUP = 1e-5, 1e-4, 500.0


def graded_factors(layers: int, features: int, rank: int, nonzero: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factors whose products have `nonzero` singular values over about 4 decades, in float32."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.cat((torch.logspace(0, -3.5, nonzero), torch.zeros(rank - nonzero)))
    pairs = []
    for _ in range(layers):
        a, b = (torch.randn(*size, generator=generator) for size in ((rank, features), (features, rank)))
        mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        # (B D mix^T)(mix A) = B D A: the zero directions lie across the columns of both.
        pairs.append((mix @ a, (b * shares) @ mix.mT))
    return pairs


def spectrum(layers: int = LAYERS, features: int = FEATURES, subset: int = 2) -> dict[str, Any]:
    """The spectra of all adapters at once against `svdvals` of the products of some, in turn.

    Each round times one product's singular values and all spectra. The products of the other layers are not
    decomposed: the ratio is time per layer, of one layer against the mean of all.

    Args:
        layers: adapters.
        features: of both sides of each.
        subset: how many products are decomposed.

    Returns:
        The part of the record.

    Raises:
        SystemExit: if a spectrum is wrong.
    """
    nonzero = 3 * ADAPTER_RANK // 4
    pairs = graded_factors(layers, features, ADAPTER_RANK, nonzero)
    found = factor_spectra(pairs, 2.0)  # also the round that is not counted
    rows = []
    for index in range(subset):
        a, b = pairs[index]
        product = 2.0 * b @ a
        dense = records.seconds(lambda product=product: torch.linalg.svdvals(product))
        ours = records.seconds(lambda: factor_spectra(pairs, 2.0))
        truth = torch.linalg.svdvals(2.0 * b.double() @ a.double())[:ADAPTER_RANK]
        counted = truth > FLOOR * truth[0]
        error = float(((found[index] - truth)[counted] / truth[counted]).abs().max())
        rank = int((found[index] > 1e-6 * found[index][0]).sum())
        if not error <= BOUND or rank != nonzero:
            raise SystemExit(f"layer {index}: relative error {error:.1e}, rank {rank} instead of {nonzero}")
        rows.append(
            {"dense_seconds": dense, "all_layers_seconds": ours, "ratio": dense / (ours / layers), "error": error}
        )
        CONSOLE.print(
            f"layer {index}: svdvals of the product {dense:.2f} s; all {layers} spectra {1e3 * ours:.0f} ms; per layer "
            f"{rows[-1]['ratio']:,.0f} times faster; largest relative error {error:.1e}"
        )
    worst = min(row["ratio"] for row in rows)
    CONSOLE.print(f"at least {worst:,.0f} times faster per layer ({LEAST_SPEEDUP:g} asked for)")
    return {
        "layers": layers,
        "features": features,
        "rank": ADAPTER_RANK,
        "nonzero": nonzero,
        "measured_layers": subset,
        "note": "per layer: one product's svdvals against the mean over all layers of one batched call",
        "rows": rows,
        "smallest_ratio": worst,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run parts of the benchmark and write them into the record.

    Args:
        arguments: of the command line.

    Returns:
        0, or 1 if a verdict was wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=PARTS, default=["sensing", "demo", "monitor"])
    parser.add_argument("--quick", action="store_true", help="2 problems, few steps, small layers, no record")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record and the figure")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    quick = options.quick
    calls = {
        "sensing": lambda: sensing(options.out, 2 if quick else PROBLEMS),
        "demo": lambda: demo(6 if quick else DEMO_STEPS),
        "monitor": lambda: monitor(3 if quick else 21),
        "spectrum": lambda: spectrum(8, 256, 1) if quick else spectrum(),
    }
    file = options.out / "landscape.json"
    parts = json.loads(file.read_text())["parts"] if file.is_file() else {}
    for name in options.what:
        parts[name] = {"environment": records.environment(), **calls[name]()}
        if not quick:
            CONSOLE.print(f"record: {records.save('landscape', {'parts': parts}, options.out)}")
    return 0 if "sensing" not in options.what or parts["sensing"]["all_right"] else 1


if __name__ == "__main__":
    sys.exit(main())
