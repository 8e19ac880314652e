"""docs/scaling.md: what collections cost on large models, from their plans alone: `python -m benchmarks.scaling`.

The predictions need no weights and no GPU, and come out the same everywhere. `--measure` runs small collections on this
CPU as well, with one process and with two, and puts them beside their predictions (`benchmarks/scaling_measure.py`).
Both go to benchmarks/results/scaling.json, from which the page is written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lora_kernels as lk
from benchmarks.records import RESULTS, environment
from lora_kernels.api.transformers import empty_model, example_batch, linear_targets
from lora_kernels.statistics import H200, STATISTICS
from lora_kernels.statistics.budget import AUTO_SHARE, show_bytes
from lora_kernels.statistics.cost import Footprint

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RECORD = RESULTS / "scaling.json"
CONFIGS = ROOT / "tests" / "configs"
MODELS = {"7B": "llama-2-7b", "70B": "llama-3-70b", "405B": "llama-3-405b"}
WORLDS = (1, 8, 64)
RANK, SKETCH, TOKENS, BATCH = 16, 64, 2**20, 8192
# Name, what is collected, form.
METHODS: tuple[tuple[str, Any, str], ...] = (
    ("eva", "eva", "auto"),
    ("eva, sketched", "eva", "sketch"),
    ("lora_ga", "lora_ga", "auto"),
    ("lora_ga, sketched", "lora_ga", "sketch"),
    ("corda", "corda", "auto"),
    ("lora_da", "lora_da", "auto"),
    ("task_directions", "task_directions", "auto"),
    ("all statistics, exact", dict.fromkeys(STATISTICS, True), "auto"),
)
_MARK = "<!-- written by benchmarks/scaling.py: edit that, and run it again -->"


def _budget(footprint: Footprint, world: int) -> int:
    """What `budget="auto"` takes: half of what the weights leave."""
    weights = footprint.total if footprint.total < H200.capacity else footprint.sharded(world)
    return int(AUTO_SHARE * (H200.capacity - weights))


def predicted(models: Iterable[str] = tuple(MODELS)) -> list[dict[str, Any]]:
    """A row per model, number of devices and method.

    Args:
        models: names in `MODELS`.

    Returns:
        Plain values.
    """
    rows: list[dict[str, Any]] = []
    for name in models:
        model = empty_model(CONFIGS / f"{MODELS[name]}.json", "causal-lm")
        targets, batch, footprint = linear_targets(model), example_batch(model), Footprint.of(model)
        for world in WORLDS:
            budget = _budget(footprint, world)
            about = {"model": name, "world": world, "weights": footprint.total, "budget": budget}
            if budget <= 0:
                rows.append({**about, "method": "", "refused": "the weights do not fit the device"})
                continue
            for label, wants, form in METHODS:
                try:
                    plan = lk.plan(
                        model,
                        wants,
                        batch=batch,
                        targets=targets,
                        world_size=world,
                        form=form,
                        sketch_size=SKETCH,
                        budget=budget,
                        rates=H200,
                        tokens=TOKENS,
                        batch_tokens=BATCH,
                        rank=RANK,
                    )
                except ValueError as error:
                    rows.append({**about, "method": label, "refused": str(error)})
                    continue
                rows.append({**about, "method": label, **_figures(plan)})
    return rows


def _figures(plan: lk.Plan) -> dict[str, Any]:
    assert plan.cost is not None  # rates were given
    forms = sorted({each.form for each in plan.entries})
    return {
        "forms": " + ".join(forms),
        "passes": plan.passes,
        "sums": plan.total_bytes,
        "largest": max(plan.pass_bytes),
        "sent": plan.communication,
        "messages": plan.messages,
        **asdict(plan.cost),
        "seconds": plan.cost.seconds,
    }


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(head)
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _rates() -> list[str]:
    return [
        f"Rates of a device ({H200.name}): {H200.matmul / 1e12:.0f} TFLOP/s in bfloat16, {H200.double / 1e12:.0f} in "
        f"float64, {H200.memory / 1e12:.1f} TB/s and {show_bytes(H200.capacity)} of memory, "
        f"{H200.link / 1e9:.0f} GB/s to each neighbour of {H200.node} in a node and {H200.network / 1e9:.0f} GB/s per "
        f"device beyond it, {H200.host / 1e9:.0f} GB/s to a host of {show_bytes(H200.host_capacity)}, whose share per "
        f"device does {H200.host_double / 1e12:.1f} TFLOP/s in float64. They are {H200.source}. None was measured. "
        "Your own measured rates go into a JSON file with the fields of `statistics.Rates`.",
    ]


def _model_section(name: str, rows: list[dict[str, Any]]) -> list[str]:
    weights = show_bytes(rows[0]["weights"])
    lines = ["", f"### {name} (`tests/configs/{MODELS[name]}.json`, {weights} in bfloat16)", ""]
    body, notes = [], []
    for each in rows:
        where = str(each["world"])
        if "refused" in each:
            who = f"{where} devices" if each["world"] > 1 else "one device"
            notes.append(f"- {who}{', ' + each['method'] if each['method'] else ''}: {each['refused']}.")
            continue
        fits = {"whole": "whole", "sharded": "sharded", "none": "**does not fit**"}[each["layout"]]
        if each["layout"] == "none":
            size = show_bytes(each["host_bytes"])
            notes.append(
                f"- {where} devices, {each['method']}: {each['why_not']} ({size} per host); seconds as if it did."
            )
        parts = ("model", "statistics", "gather", "reduce", "host", "decompose")
        body.append(
            [
                where,
                each["method"],
                each["forms"],
                fits,
                show_bytes(each["device_bytes"]),
                show_bytes(each["sums"]),
                str(each["passes"]),
                show_bytes(each["sent"]),
                str(each["messages"]),
                *(_number(each[f"{part}_seconds"]) for part in parts),
                f"**{_number(each['seconds'])}**",
            ]
        )
    head = ("devices", "method", "form", "weights", "per device", "sums", "passes", "sent", "messages")
    if body:
        lines += _table((*head, "model s", "sums s", "gather s", "reduce s", "host s", "decompose s", "at least"), body)
    return [*lines, *([""] if notes and body else []), *notes]


def _says(rows: list[dict[str, Any]]) -> list[str]:
    """What the tables say, worked out from them."""

    def pick(model: str, world: int, method: str) -> dict[str, Any] | None:
        found = [each for each in rows if (each["model"], each["world"], each["method"]) == (model, world, method)]
        return found[0] if found and "refused" not in found[0] else None

    lines = []
    one, many = pick("7B", 1, "lora_da"), pick("7B", 64, "lora_da")
    if one and many:
        lines.append(
            f"- By these bounds 64 devices make LoRA-DA's start on 7B {one['seconds'] / many['seconds']:.0f} times "
            f"as fast as one; {_number(many['reduce_seconds'])} s of {_number(many['seconds'])} s add up the sums."
        )
    large, small = pick("70B", 8, "lora_da"), pick("70B", 8, "eva, sketched")
    if large and small:
        lines.append(
            f"- On 70B and 8 devices LoRA-DA keeps {show_bytes(large['sums'])} of exact sums, takes {large['passes']} "
            f"passes and at least {_number(large['seconds'])} s, of which {_number(large['decompose_seconds'])} s are "
            f"decompositions; EVA from sketches keeps {show_bytes(small['sums'])} and takes "
            f"{_number(small['seconds'])} s."
        )
    slowest = [each for each in rows if "refused" not in each and each["passes"] > 1]
    share = max((each["decompose_seconds"] / each["seconds"] for each in slowest), default=0.0)
    lines.append(
        "- Where a plan takes several passes, sums of finished passes rest on the host, every process its own, and are "
        f"decomposed there: up to {share:.0%} of the time at these rates."
    )
    lines.append(
        "- Every process holds all sums, so a host holds them once per device: that is what keeps the exact methods "
        "from 70B and larger models, not the devices. Sketches (EVA, LoRA-GA) fit, by this count, wherever the "
        "weights do."
    )
    lines.append(
        "- CorDA and task directions read the base weights and refuse sharded ones: where the tables say *sharded*, "
        "collect on the sharded model and initialise, from these statistics, one that is not (on a host, say)."
    )
    impossible = [each for each in rows if "refused" in each or each["layout"] == "none"]
    lines.append(f"- {len(impossible)} of the {len(rows)} cases cannot be run as they stand; the notes say why.")
    return lines


def _measured(measured: dict[str, Any]) -> list[str]:
    about = measured["environment"]
    exact = sum(each["planned"] == each["found"] for each in measured["rows"])
    lines = [
        f"A Llama with {measured['parameters'] / 1e6:.0f} M weights in float32, LoRA on all linear layers, 3 batches "
        f"of 4 x 256 tokens per process, one thread each, on an {about['processor']} CPU, torch "
        f"{about['versions']['torch']}. Bytes of sums, passes, all-reductions, their bytes, and small messages "
        f"(plan, failures, layout, counts): {exact} of {len(measured['rows'])} runs found exactly what was planned.",
        "",
    ]
    for world, rates in measured["rates"].items():
        link = "" if world == "1" else f", {rates['link'] / 1e9:.2f} GB/s between processes (gloo)"
        lines.append(
            f"- {world} process{'es' * (world != '1')}: {rates['matmul'] / 1e9:.0f} GFLOP/s in float32, "
            f"{rates['double'] / 1e9:.0f} in float64, copies at {rates['memory'] / 1e9:.1f} GB/s{link}, per process."
        )
    lines.append("")
    body = []
    for each in measured["rows"]:
        found, floor = each["seconds"], each["floor"]
        cells = []
        for part in ("passes", "reduce", "decompose"):
            if floor[part] < 1e-4:
                cells += [f"{found[part]:.2g}" if found[part] > 1e-4 else "", "", ""]
            else:
                cells += [f"{found[part]:.2g}", f"{floor[part]:.2g}", f"{found[part] / floor[part]:.1f}"]
        counts = each["found"]
        body.append(
            [
                each["case"],
                str(each["world"]),
                show_bytes(counts["bytes"]),
                str(counts["passes"]),
                str(counts["reductions"]),
                show_bytes(counts["reduced_bytes"]),
                *cells,
            ]
        )
    head = ["case", "processes", "sums", "passes", "messages", "reduced"]
    for part in ("passes", "reduction", "decomposition"):
        head += [f"{part} s", "least", "ratio"]
    return lines + _table(head, body)


def page(record: dict[str, Any]) -> str:
    """The text of docs/scaling.md.

    Args:
        record: of benchmarks/results/scaling.json.

    Returns:
        Markdown.
    """
    rows = record["predicted"]
    lines = [
        _MARK,
        "",
        "# Large models and many devices",
        "",
        f"What `lora-kernels plan` says of Llamas with 7, 70 and 405 billion weights on {', '.join(map(str, WORLDS))} "
        f"devices: {TOKENS} tokens read in each pass by all devices together, {BATCH} per device and step; rank "
        f"{RANK}, sketches of {SKETCH} columns; all linear layers but the output layer. The budget for sums is half "
        "of what the "
        'weights leave of a device\'s memory, which is what `budget="auto"` takes there. One of the lines:',
        "",
        "```text",
        f"lora-kernels plan --config tests/configs/{MODELS['70B']}.json --method lora_da --world 8 --rates h200 \\",
        f"    --budget {_budget_of(rows, '70B', 8)}",
        "```",
        "",
        *_rates(),
        "",
        "**The seconds are lower bounds, not forecasts**: operations and bytes over those peaks, attention, norms, the "
        "output layer, launches and waits left out, and of iterations the rounds that they take at least. No run on "
        "a GPU stands behind them; the last section compares the same formulas with small runs on a CPU. Memory "
        "counts weights and sums, not activations: what is said to fit may still not fit.",
        "",
        "Columns: *weights* lie whole on every device, or sharded over all (FSDP2, a unit per decoder layer); *per "
        "device* is weights and the sums of the largest pass; *sums* is what every process holds in the end; *sent* is "
        "what each process sends in a ring all-reduce of them, in so many *messages*. Seconds: the model's passes, "
        "additions to the sums, gathering of shards (in parallel with both), the all-reduce, sums to the host and "
        "back, decompositions of the process that has most to do. `all statistics` has no decomposition of its own.",
        "",
        "## What the tables say",
        "",
        *_says(rows),
        "",
        "## Tables",
    ]
    for name in MODELS:
        lines += _model_section(name, [each for each in rows if each["model"] == name])
    lines += ["", "## Checked against small runs", ""]
    if record.get("measured"):
        lines += _measured(record["measured"])
        lines += [
            "",
            "*Least* is the same formula at the rates of this CPU, measured just before by as many processes at "
            "once; a ratio of 1 cannot be beaten. The passes include what the bound leaves out: attention, norms, "
            "logits and loss, and Python. Bounds on decompositions are loose: of "
            "iterations they count the rounds taken at least, of reconstructions from sketches one product.",
        ]
    else:
        lines.append("Not measured yet: `python -m benchmarks.scaling --measure`.")
    return "\n".join(lines) + "\n"


def _budget_of(rows: list[dict[str, Any]], model: str, world: int) -> int:
    return next(each["budget"] for each in rows if (each["model"], each["world"]) == (model, world))


def measure(quick: bool = False) -> dict[str, Any]:
    """The small runs, with one process and with two.

    Args:
        quick: counts alone, on a tiny model.

    Returns:
        Rates, rows, and the machine.

    Raises:
        RuntimeError: if a run fails.
    """
    found: dict[str, Any] = {"environment": environment(), "rates": {}, "rows": []}
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            out = Path(folder) / f"{world}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            command += ["-m", "benchmarks.scaling_measure", str(out), *(["--quick"] if quick else [])]
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            one = json.loads(out.read_text())
            found["rates"][str(world)], found["parameters"] = one["rates"], one["parameters"]
            found["rows"] += one["rows"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the record and the page.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description="docs/scaling.md, from plans alone")
    parser.add_argument("--measure", action="store_true", help="run the small collections on this CPU too")
    options = parser.parse_args(arguments)
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record = {"rates": asdict(H200), "predicted": predicted(), "measured": before.get("measured")}
    if options.measure:
        record["measured"] = measure()
    RECORD.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
