"""The landscape diagnosis against what is known: `python -m benchmarks.landscape [--what PART ...]`.

sensing: runs whose outcome is known; see `benchmarks.sensing`.
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
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.sensing import CONSOLE, PROBLEMS, sensing
from lora_kernels.landscape import Thresholds, factor_spectra
from lora_kernels.landscape.verdict import LOUD_FAILURE

PARTS = ("sensing", "demo", "monitor", "spectrum")

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
