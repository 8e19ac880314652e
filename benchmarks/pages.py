"""Write README.md's table, docs/results.md and the summary `results/compare.json` from the committed records.

`python -m benchmarks.pages`, after every run that is to be quoted. The words are in `readme.md.j2` and `results.md.j2`;
here are the rows of their tables, the headings first.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import compare, records
from benchmarks.claims import report as claims
from benchmarks.demo import report, study_report
from benchmarks.demo.config import OURS, STOCK
from benchmarks.records import ROOT, cases
from benchmarks.subject import duration

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
_MARKS = ("<!-- table: written by benchmarks/pages.py -->", "<!-- end of table -->")
_MODELS = {
    "llama": "Llama, 8 layers, hidden 512, 16 batches of 8 x 256 tokens",
    "small": "Llama, 2 layers, hidden 512, 4 batches of 8 x 256 tokens",
    "minilm": "MiniLM-L6, 16 batches of 32 docstrings",
}
_SMOLLM2 = "SmolLM2-135M-Instruct, 4 batches of 4 x 128 tokens"
_SIDES = {"peft": "PEFT", "compiled": "torch.compile of PEFT", "hand_written": "addmm by hand", "ours": "ours"}

Rows = list[list[str]]


def record_of(name: str) -> dict[str, Any]:
    """A committed record by its file's stem."""
    record: dict[str, Any] = json.loads((records.RESULTS / f"{name}.json").read_text())
    return record


def _factor(value: float) -> str:
    text = f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return f"**{text}**" if float(text) < 1 else text


def _medians(seconds: dict[str, Any]) -> dict[str, float]:
    return {side: value["p50"] for side, value in seconds.items()}


def _over_ours(seconds: dict[str, Any], sides: Sequence[str]) -> list[str]:
    """Time of each side over ours; a dash where a side was not measured."""
    medians = _medians(seconds)
    return [_factor(medians[side] / medians["ours"]) if side in medians else "–" for side in sides]


def summary() -> Rows:
    """All that has a peer."""
    rows = [["`compare`", "problem", "peer", "ours", "the peer's", "peer / ours", "target", "ours / floor"]]
    for row in compare.summarize(records.RESULTS):
        case = "" if row["subject"] in ("spectrum", "lora_pro", "llm") else f" {row['case']}"
        worst = f" (worst of {row['lowest_of']})" if row["lowest_of"] > 1 else ""
        target = "" if row["target"] is None else f"{row['target']:.3g}, {'met' if row['met'] else '**missed**'}"
        floor = "–" if row["ours_over_floor"] is None else f"{row['ours_over_floor']:.1f}"
        times = [duration(row["ours_seconds"]), duration(row["peer_seconds"])]
        named = [f"{row['subject']}{case}", f"{row['what']}{worst}", row["peer"]]
        rows.append([*named, *times, _factor(row["peer_over_ours"]), target, floor])
    return rows


def counts() -> dict[str, int]:
    """Rows of the summary, those in which the peer is faster, targets, and those that are missed."""
    rows = compare.summarize(records.RESULTS)
    return {
        "rows": len(rows),
        "behind": sum(row["peer_over_ours"] < 1 for row in rows),
        "targets": sum(row["target"] is not None for row in rows),
        "missed": sum(row["met"] is False for row in rows),
    }


def eva() -> Rows:
    """EVA against PEFT's."""
    rows = [["case", "bare forward", "ours", "PEFT", "PEFT / ours", "ours / forward"]]
    for name, title in _MODELS.items():
        entry = cases("eva")[name]
        times = [f"{entry['seconds'][side]['p50']:.1f} s" for side in ("forward", "ours", "peft")]
        rows.append([title, *times, f"{entry['peft_over_ours']:.1f}", f"{entry['ours_over_forward']:.2f}"])
    return rows


def statistics() -> Rows:
    """Collections against ordinary passes."""
    rows = [["model", "what", "time", "passes alone", "ratio"]]
    for name, title in {"llama": _MODELS["llama"], "small": _MODELS["small"], "smollm2": _SMOLLM2}.items():
        if name not in cases("statistics"):
            continue
        entry = cases("statistics")[name]
        times = {side: f"{value:.1f} s" for side, value in _medians(entry["seconds"]).items()}
        ratios = [f"{entry[key]:.2f}" for key in ("statistics_over_training", "sketched_eva_over_forward")]
        rows.append([title, "all statistics", times["statistics"], times["training"], ratios[0]])
        rows.append([title, "EVA from sketches", times["sketched_eva"], times["forward"], ratios[1]])
    return rows


def methods(timed: str, weighed: str) -> Rows:
    """Every initialisation against its peer: seconds of a case, and memory of another or the same."""
    times, memories = (cases("init")[name]["methods"] for name in (timed, weighed))
    rows = [["method", "ours", "peer", "peer / ours", "memory, ours", "memory, peer"]]
    for method, entry in times.items():
        seconds = [f"{entry[side]['seconds']['p50']:.1f} s" for side in ("ours", "peer")]
        memory = ["", ""]
        if "bytes" in memories.get(method, {}).get("ours", {}):
            memory = [f"{memories[method][side]['bytes'] / 1e6:.0f} MB" for side in ("ours", "peer")]
        rows.append([method, *seconds, _factor(entry["seconds_ratio"]), *memory])
    return rows


def layers() -> Rows:
    """The fused layer."""
    entries = cases("linear")["layers"]["entries"]
    others = [side for side in ("compiled", "hand_written") if any(side in entry["seconds"] for entry in entries)]
    names = {"compiled": "torch.compile / ours", "hand_written": "addmm / ours"}
    rows = [["tokens x n -> m", "rank", "dropout", "PEFT / ours", "at most", *(names[side] for side in others)]]
    rows[0] += ["ours / base", "at least"]
    for entry in entries:
        medians = _medians(entry["seconds"])
        sizes = f"{entry['tokens']} x {entry['n']} -> {entry['m']}"
        sizes += "" if entry.get("dtype", "float32") == "float32" else f", {entry['dtype']}"
        sizes += "" if entry.get("extension", True) else ", without the extension"
        bound = medians["peft"] / medians["base"] / entry["floor_over_base"]
        cells = [sizes, str(entry["rank"]), f"{entry['dropout']:g}", _factor(entry["peft_over_ours"]), f"{bound:.2f}"]
        cells += _over_ours(entry["seconds"], others)
        rows.append([*cells, f"{entry['ours_over_base']:.2f}", f"{entry['floor_over_base']:.2f}"])
    return rows


def call() -> Rows:
    """What a call costs in Python; nothing where there is no record."""
    entries = cases("linear").get("call", {}).get("entries", [])
    sides = [side for side in _SIDES if any(side in entry["seconds"] for entry in entries)]
    rows = [["passes", "dropout", *(_SIDES[side] for side in sides)]] if entries else []
    for entry in entries:
        for key, passes in (("forward_seconds", "forward"), ("seconds", "forward and backward")):
            if key in entry:
                times = [duration(entry[key][side]["p50"]) if side in entry[key] else "–" for side in sides]
                rows.append([passes, f"{entry['dropout']:g}", *times])
    return rows


def dora() -> Rows:
    """DoRA layers beside LoRA layers; nothing where there is no record."""
    entries = cases("linear").get("dora", {}).get("entries", [])
    rows = (
        [["tokens x n -> m", "rank", "DoRA / LoRA, ours", "DoRA / LoRA, PEFT", "DoRA, PEFT / ours"]] if entries else []
    )
    for entry in entries:
        sizes = [f"{entry['tokens']} x {entry['n']} -> {entry['m']}", str(entry["rank"])]
        overheads = [f"{entry['dora_over_lora'][side]:.2f}" for side in ("ours", "peft")]
        rows.append([*sizes, *overheads, *_over_ours(entry["seconds"], ["peft"])])
    return rows


def training() -> Rows:
    """A training step of the 8-layer Llama."""
    entry = cases("train")["llama"]
    rows = [["", "time of a step", "over ours", "kept for adapters"]]
    for side, title in _SIDES.items():
        if side in entry["seconds"]:
            kept = entry["bytes_saved_for_adapters"].get(side)
            time = duration(entry["seconds"][side]["p50"])
            rows.append(
                [title, time, *_over_ours(entry["seconds"], [side]), "–" if kept is None else f"{kept / 1e6:.0f} MB"]
            )
    return rows


def language_model() -> Rows:
    """Training steps of a real language model; nothing where there is no record."""
    sides = ("peft", "compiled", "hand_written")
    heads = ["tokens", "rank", "dropout", "dtype", "ours", "PEFT / ours", "torch.compile / ours", "addmm / ours"]
    rows = [[*heads, "ours / base"]] if cases("llm") else []
    for entry in sorted(
        cases("llm").values(), key=lambda e: (e["dtype"] != "float32", e["tokens"], e["dropout"], e["rank"])
    ):
        sizes = [f"{entry['batch']} x {entry['length']}", str(entry["rank"]), f"{entry['dropout']:g}", entry["dtype"]]
        times = [duration(entry["seconds"]["ours"]["p50"]), *_over_ours(entry["seconds"], sides)]
        rows.append([*sizes, *times, f"{entry['ours_over_base']:.2f}"])
    return rows


def lora_pro() -> Rows:
    """A full LoRA-Pro step, and what the machine needs at least."""
    full = cases("lora_pro")["full"]
    seconds = _medians(full["seconds"])
    floor = (
        full["floor"]["bytes"] / full["rates"]["copy"] + full["floor"]["flops"] / full["rates"]["products"]["float32"]
    )
    rows = [["", "time of a full step", "over ours"]]
    for side, title in {
        "faithful": "the authors' procedure, in torch",
        "careful": "careful torch",
        "ours": "ours",
    }.items():
        rows.append([title, duration(seconds[side]), f"{seconds[side] / seconds['ours']:.2f}"])
    return [*rows, ["the moments' bytes and the FLOPs alone", duration(floor), f"{floor / seconds['ours']:.2f}"]]


def landscape() -> Rows:
    """Verdicts by the kind of run, and MiniLM-L6 at two learning rates."""
    sensing, demo = cases("landscape")["sensing"], cases("landscape")["demo"]
    rows = [["runs", "number", "verdict"]]
    for truth in sensing["confusion"]:
        verdicts = [run["verdict"] for run in sensing["runs"] if run["truth"] == truth]
        right = sum(verdict == truth for verdict in verdicts)
        rows.append([f"sensing problem, {truth}", str(len(verdicts)), f"{right} right"])
    for run in demo["runs"]:
        loud = f"{run['loud_layers']} of {run['layers']} layers are called loud"
        rows.append([f"MiniLM-L6, learning rate {run['learning_rate']:g}", "1", loud])
    return rows


def eigh() -> Rows:
    """Batched small eigenproblems."""
    entries = [entry for entry in cases("small_linalg")["eigh"]["entries"] if entry["order"] in (8, 16)]
    entries.sort(key=lambda entry: (entry["order"], entry["dtype"]))
    rows = [[str(entry["order"]), entry["dtype"], f"{entry['torch_over_ours']:.1f}"] for entry in entries]
    return [["order", "dtype", "torch.linalg.eigh / ours"], *rows]


def svd() -> Rows:
    """Randomized decompositions."""
    rows = [["matrices", "spectrum", "rank", "svd / ours", "svd_lowrank / ours", "error", "svd_lowrank's error"]]
    for entry in (entry for name in ("small", "large", "batch") for entry in cases("svd")[name]["entries"]):
        shape = " x ".join(str(size) for size in entry["shape"][-2:])
        matrices = f"{entry['shape'][0]} of {shape}" if len(entry["shape"]) == 3 else shape
        times, errors = entry["times_faster"], entry["error_over_best"]
        ratios = [f"{times['torch.linalg.svd']:.0f}", _factor(times["torch.svd_lowrank+8"])]
        excess = [f"{errors[side]['frobenius'] - 1:.1e}" for side in ("ours krylov", "torch.svd_lowrank+8")]
        rows.append([matrices, entry["spectrum"], str(entry["rank"]), *ratios, *excess])
    return rows


def demo_records(name: str = "demo") -> list[dict[str, Any]]:
    """The record of `make demo`, if there is one; `demo_swept`: of one at the rates of a sweep."""
    return [record_of(name)] if (records.RESULTS / f"{name}.json").is_file() else []


def demo(record: dict[str, Any]) -> Rows:
    """Stock PEFT and ours, side by side."""
    rows = [["held-out loss in nats per token", STOCK, OURS, ""]]
    for entry in record["rows"]:
        row = report.Row(**{name: entry[name] for name in ("measure", "unit", "stock", "ours", "judged")})
        rows.append([row.measure, row.cell(row.stock), row.cell(row.ours), row.difference])
    return rows


def studies() -> dict[str, dict[str, Any]]:
    """Every study of quality that there is a record of, language models first."""
    found = {file.stem: record_of(file.stem) for file in sorted(records.RESULTS.glob("quality_*.json"))}
    return dict(sorted(found.items(), key=lambda item: "accuracy" in study_report.measures(item[1])))


def rate_studies() -> dict[str, dict[str, Any]]:
    """Every record of learning rates, swept and suggested."""
    return {file.stem: record_of(file.stem) for file in sorted(records.RESULTS.glob("rates_*.json"))}


def studies_in_short() -> Rows:
    """Each study's verdict by held-out loss after the last step."""
    rows = [["task", "rank", "better than random LoRA", "not distinguishable", "worse"]]
    for record in studies().values():
        arms: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
        for arm, comparisons in study_report.compare_all(record).items():
            verdict = "behind" if comparisons is None else comparisons["loss"][-1][1].verdict
            arms.get(verdict, arms["level"]).append(study_report.title(arm).replace(", ", " "))
        task, rank = record["data"]["name"].split(",")[0], str(record["protocol"]["rank"])
        rows.append([task, rank, *(", ".join(names) or "none" for names in arms.values())])
    return rows


def gains() -> Rows:
    """The README's table: what a user gains, how much was measured, and on what."""
    steps = [entry for entry in cases("llm").values() if entry["dtype"] == "float32"]
    full, train = cases("lora_pro")["full"], cases("train")["llama"]
    rows = [["what you gain", "measured", "on"]]
    for dropout in sorted({entry["dropout"] for entry in steps}):
        entries = [entry for entry in steps if entry["dropout"] == dropout]
        ratios = [entry["peft_over_ours"] for entry in entries]
        tokens = [entry["tokens"] for entry in entries]
        what = f"training steps against PEFT, {f'dropout {dropout:g}' if dropout else 'no dropout'}"
        where = (
            f"{entries[0]['model']}, all {entries[0]['layers']} linear layers, {min(tokens)} to {max(tokens)} tokens"
        )
        rows.append([what, _gain(ratios), where])
    evas = cases("eva")
    rows.append(
        ["EVA against PEFT's EVA", _gain([evas[name]["peft_over_ours"] for name in _MODELS]), "two Llamas, MiniLM-L6"]
    )
    weights = f"{len(full['layers'])} layers, {full['moment_bytes'] / 8e6:.0f} M weights, rank {full['rank']}"
    rows.append(["LoRA-Pro steps against the authors' procedure", _gain([full["faithful_over_ours"]]), weights])
    where = f"8-layer Llama, 8 x 256 tokens, dropout {train['dropout']:g}"
    rows.append(["memory that adapters keep for the backward pass", f"{train['bytes_ratio']:.0%} of PEFT's", where])
    return rows


def _gain(ratios: Sequence[float]) -> str:
    """The median of ratios, and the worst of them."""
    middle, worst = (
        f"{ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f}x" for ratio in (median(ratios), min(ratios))
    )
    return f"{middle} as fast" + (f" (worst of {len(ratios)}: {worst})" if len(ratios) > 1 else "")


def _table(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"table": _table, "duration": duration}
    sources = (summary, counts, eva, statistics, methods, layers, call, dora, training, language_model, lora_pro)
    sources += (
        landscape,
        eigh,
        svd,
        demo,
        demo_records,
        studies,
        rate_studies,
        studies_in_short,
        gains,
        record_of,
        cases,
    )
    environment.globals |= {source.__name__: source for source in sources}
    environment.globals |= {"study": study_report, "claims": claims}
    return environment


def block() -> str:
    """The table as it must stand in the README."""
    return f"{_MARKS[0]}\n{_environment().get_template('readme.md.j2').render()}{_MARKS[1]}"


def page() -> str:
    """The page of all results."""
    return re.sub(r"\n{3,}", "\n\n", _environment().get_template("results.md.j2").render()).rstrip() + "\n"


def main() -> int:
    """Rewrite the README's table, the page and the summary."""
    compare.write_summary(records.RESULTS)
    text = README.read_text()
    pattern = re.compile(f"{re.escape(_MARKS[0])}.*?{re.escape(_MARKS[1])}", flags=re.S)
    README.write_text(pattern.sub(lambda _: block(), text))
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
