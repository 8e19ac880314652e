"""docs/scaling.md: what collections keep and send on large models, from their plans: `python -m benchmarks.scaling`.

Plans need no weights and no GPU, and come out the same everywhere. `--measure` also runs small collections on this CPU,
with one process and with two, and counts what they keep and send (`benchmarks/scaling_measure.py`). Both go to
benchmarks/results/scaling.json, from which the page is written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import lora_kernels as lk
from benchmarks.records import RESULTS, environment
from lora_kernels.api.transformers import empty_model, example_batch, linear_targets
from lora_kernels.statistics import STATISTICS
from lora_kernels.statistics.plan import AUTO_SHARE, show_bytes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RECORD = RESULTS / "scaling.json"
CONFIGS = ROOT / "tests" / "configs"
MODELS = {"7B": "llama-2-7b", "70B": "llama-3-70b", "405B": "llama-3-405b"}
WORLDS = (1, 8, 64)
SKETCH = 64
# Memory of a device (NVIDIA H200) and of a host of eight (DGX H200), from the data sheets.
DEVICE_BYTES, HOST_BYTES, DEVICES_PER_HOST = 141e9, 2e12, 8
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


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's weights: of all, of what is in no repeated block, and of the largest of so many blocks."""

    total: int
    root: int
    unit: int
    blocks: int

    @staticmethod
    def of(model: nn.Module) -> Footprint:
        """Measure a model on any device; blocks are what its outermost `ModuleList`s hold."""
        blocks: list[nn.Module] = []
        inside: set[int] = set()
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and id(module) not in inside:
                blocks += list(module)
                inside |= {id(part) for block in module for part in block.modules()}
        sizes = [_bytes(block) for block in blocks]
        total = _bytes(model)
        return Footprint(total, total - sum(sizes), max(sizes, default=0), len(sizes))

    def sharded(self, processes: int) -> float:
        """Bytes per device with FSDP2, a unit per block: the shard, and what is gathered at the worst moment."""
        return self.total / processes + self.root + min(2, self.blocks) * self.unit

    def layout(self, plan: lk.statistics.Plan) -> tuple[str, float]:
        """How the model can lie beside a plan's sums (`whole`, `sharded`, or why it does not fit); bytes per device."""
        processes, largest = plan.world_size, max(plan.pass_bytes)
        whole, sharded = self.total + largest, self.sharded(processes) + largest
        # Sums of finished passes rest on the host, every process its own.
        if plan.passes > 1 and plan.total_bytes * min(processes, DEVICES_PER_HOST) > HOST_BYTES:
            return "the sums of finished passes do not fit the host", min(whole, sharded)
        if whole <= DEVICE_BYTES:
            return "whole", whole
        if processes > 1 and sharded <= DEVICE_BYTES:
            return "sharded", sharded
        return "weights and sums do not fit the device", sharded if processes > 1 else whole


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _budget(footprint: Footprint, world: int) -> int:
    """What `budget="auto"` takes: half of what the weights leave."""
    weights = footprint.total if footprint.total < DEVICE_BYTES else footprint.sharded(world)
    return int(AUTO_SHARE * (DEVICE_BYTES - weights))


def planned(models: Iterable[str] = tuple(MODELS)) -> list[dict[str, Any]]:
    """A row of plain values per model, number of devices and method."""
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
            settings = {"targets": targets, "world_size": world, "sketch_size": SKETCH, "budget": budget}
            for method, wants, form in METHODS:
                try:
                    plan = lk.plan(model, wants, batch=batch, form=form, **settings)
                except ValueError as error:
                    rows.append({**about, "method": method, "refused": str(error)})
                    continue
                layout, device_bytes = footprint.layout(plan)
                rows.append(
                    {
                        **about,
                        "method": method,
                        "forms": " + ".join(sorted({entry.form for entry in plan.entries})),
                        "layout": layout,
                        "device_bytes": device_bytes,
                        "sums": plan.total_bytes,
                        "passes": plan.passes,
                        "sent": plan.communication,
                        "messages": plan.messages,
                    }
                )
    return rows


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(heads)
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _model_section(name: str, rows: list[dict[str, Any]]) -> list[str]:
    weights = show_bytes(rows[0]["weights"])
    lines = ["", f"### {name} (`tests/configs/{MODELS[name]}.json`, {weights} in bfloat16)", ""]
    body, notes = [], []
    for row in rows:
        devices = f"{row['world']} devices" if row["world"] > 1 else "one device"
        if "refused" in row:
            notes.append(f"- {devices}{', ' + row['method'] if row['method'] else ''}: {row['refused']}.")
            continue
        fits = row["layout"] in ("whole", "sharded")
        if not fits:
            notes.append(f"- {devices}, {row['method']}: {row['layout']}.")
        sizes = (show_bytes(row["device_bytes"]), show_bytes(row["sums"]), str(row["passes"]), show_bytes(row["sent"]))
        layout = row["layout"] if fits else "**does not fit**"
        body.append([str(row["world"]), row["method"], row["forms"], layout, *sizes, str(row["messages"])])
    heads = ("devices", "method", "form", "weights", "per device", "sums", "passes", "sent", "messages")
    lines += _table(heads, body) if body else []
    return [*lines, *([""] if notes and body else []), *notes]


def _counted(measured: dict[str, Any]) -> list[str]:
    about, rows = measured["environment"], measured["rows"]
    exact = sum(row["planned"] == row["found"] for row in rows)
    lines = [
        f"A Llama with {measured['parameters'] / 1e6:.0f} M weights in float32, LoRA on all linear layers, 3 batches "
        f"of 4 x 256 tokens per process, on an {about['processor']} CPU, torch {about['versions']['torch']}. Bytes of "
        f"sums, passes, all-reductions, their bytes, and small messages (plan, failures, layout, counts): {exact} of "
        f"{len(rows)} runs kept and sent exactly what was planned.",
        "",
    ]
    counts = [(row, row["found"]) for row in rows]
    body = [
        [
            row["case"],
            str(row["world"]),
            show_bytes(count["bytes"]),
            str(count["passes"]),
            str(count["reductions"]),
            show_bytes(count["reduced_bytes"]),
        ]
        for row, count in counts
    ]
    return lines + _table(("case", "processes", "sums", "passes", "messages", "reduced"), body)


def page(record: dict[str, Any]) -> str:
    """The text of docs/scaling.md, from the record."""
    rows = record["planned"]
    impossible = [row for row in rows if row.get("layout") not in ("whole", "sharded")]
    budget = next(row["budget"] for row in rows if (row["model"], row["world"]) == ("70B", 8))
    lines = [
        _MARK,
        "",
        "# Large models and many devices",
        "",
        f"What `lora-kernels plan` says of Llamas with 7, 70 and 405 billion weights on {', '.join(map(str, WORLDS))} "
        f"devices of {show_bytes(DEVICE_BYTES)} (H200; 8 in a host of {show_bytes(HOST_BYTES)}): sketches of {SKETCH} "
        "columns, all linear layers but the output layer. The budget for sums is half of what the weights leave of a "
        'device\'s memory, which is what `budget="auto"` takes there. One of the lines:',
        "",
        "```text",
        f"lora-kernels plan --config tests/configs/{MODELS['70B']}.json --method lora_da --world 8 --budget {budget}",
        "```",
        "",
        "Memory counts weights and sums, not activations: what is said to fit may still not fit. Columns: *weights* "
        "lie whole on every device, or sharded over all (FSDP2, a unit per decoder layer); *per device* is weights and "
        "the sums of the largest pass; *sums* is what every process holds in the end; *sent* is what each sends in "
        "a ring all-reduce of them, in so many *messages*.",
        "",
        "- Every process holds all sums, so a host holds them once per device: that is what keeps the exact methods "
        "from 70B and larger models, not the devices. Sketches (EVA, LoRA-GA) fit wherever the weights do.",
        "- Where a plan takes several passes, sums of finished passes rest on the host, and are decomposed there.",
        "- CorDA and task directions read the base weights and refuse sharded ones: where the tables say *sharded*, "
        "collect on the sharded model and initialise, from these statistics, one that is not (on a host, say).",
        f"- {len(impossible)} of the {len(rows)} cases cannot be run as they stand; the notes say why.",
        "",
        "## Tables",
    ]
    for name in MODELS:
        lines += _model_section(name, [row for row in rows if row["model"] == name])
    lines += ["", "## Checked against small runs", "", *_counted(record["measured"])]
    return "\n".join(lines) + "\n"


def measure(quick: bool = False, worlds: Iterable[int] = (1, 2)) -> dict[str, Any]:
    """Counts of small runs, in so many processes each, on a tiny model if quick; `RuntimeError` if one fails."""
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            out = Path(folder) / f"{world}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            command += ["-m", "benchmarks.scaling_measure", str(out), *(["--quick"] if quick else [])]
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            part = json.loads(out.read_text())
            result["parameters"] = part["parameters"]
            result["rows"] += part["rows"]
    return result


def main(arguments: list[str] | None = None) -> int:
    """Write the record and the page."""
    parser = argparse.ArgumentParser(description="docs/scaling.md, from plans alone")
    parser.add_argument("--measure", action="store_true", help="run the small collections on this CPU too")
    options = parser.parse_args(arguments)
    measured = measure() if options.measure else json.loads(RECORD.read_text())["measured"]
    record = {"planned": planned(), "measured": measured}
    RECORD.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    PAGE.write_text(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
