"""What the committed records say, as sections of Markdown."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import compare
from benchmarks.demo import study_report
from benchmarks.records import RESULTS, cases
from benchmarks.subject import duration

_CASES = {
    "llama": "Llama, 8 layers, hidden 512, 16 batches of 8 x 256 tokens",
    "small": "the same, 2 layers, 4 batches",
    "minilm": "MiniLM-L6, 16 batches of 32 docstrings",
}


def record_of(name: str) -> dict[str, Any]:
    """A committed record by its file's stem."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def summary() -> list[str]:
    """The table of all that has a peer."""
    rows = compare.summarize(RESULTS)
    lines = [
        "Everything that has a peer, side by side in one process (or each run in a process of its own), in turn, after "
        "the numbers agreed; medians. Of many shapes the one with the **lowest** ratio stands here. The floor is what "
        "the bytes and FLOPs of the problem cost at the rates at which the machine copies and multiplies, whichever is "
        "more; – where the record is older than the floor. Asked for: the ratio that was aimed at.",
        "",
        "| `compare` | problem | peer | ours | the peer's | peer / ours | asked for | ours / floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        count = f" (lowest of {each['lowest_of']})" if each["lowest_of"] > 1 else ""
        case = "" if each["subject"] in ("spectrum", "lora_pro", "llm") else f" {each['case']}"
        target = "" if each["target"] is None else f"{each['target']:.3g}, {'met' if each['met'] else '**missed**'}"
        floor = "–" if each["ours_over_floor"] is None else f"{each['ours_over_floor']:.1f}"
        ratio = f"{each['peer_over_ours']:.2f}" if each["peer_over_ours"] < 100 else f"{each['peer_over_ours']:.0f}"
        ratio = f"**{ratio}**" if each["peer_over_ours"] < 1 else ratio
        times = f"{duration(each['ours_seconds'])} | {duration(each['peer_seconds'])}"
        named = f"{each['subject']}{case} | {each['what']}{count} | {each['peer']}"
        lines.append(f"| {named} | {times} | {ratio} | {target} | {floor} |")
    behind = sum(each["peer_over_ours"] < 1 for each in rows)
    missed = sum(each["met"] is False for each in rows)
    return [
        *lines,
        "",
        f"{behind} of {len(rows)} rows are below 1: there the peer is faster. {missed} of "
        f"{sum(each['target'] is not None for each in rows)} targets are missed. `python -m benchmarks.compare all` "
        "repeats everything (hours), `make bench` a small part (minutes). Records: `benchmarks/results/`.",
    ]


def _figure(name: str, text: str) -> list[str]:
    return ["", f"![{text}](figures/{name}.svg)"]


def eva() -> list[str]:
    """EVA against PEFT's."""
    records = {name: each for name, each in cases("eva").items() if name in _CASES}
    machine = records["llama"]["environment"]
    lines = [
        f"EVA, rank 16, rho 2, against PEFT {machine['versions']['peft']}'s `get_eva_state_dict` in the same process, "
        f"on {machine['threads']} threads of an {machine['processor']} CPU, torch {machine['versions']['torch']}; "
        "median seconds, and the share of the bare forward passes over the same batches:",
        "",
        "| case | bare forward | lora_kernels | PEFT | PEFT / ours | ours / forward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in _CASES.items():
        each = records[name]
        times = {side: f"{value['p50']:.1f} s" for side, value in each["seconds"].items()}
        lines.append(
            f"| {title} | {times['forward']} | {times['ours']} | {times['peft']} | {each['peft_over_ours']:.1f} | "
            f"{each['ours_over_forward']:.2f} |"
        )
    worst = min(each["quality"]["captured_minus_peft_worst"] for each in records.values())
    lines += [
        "",
        "On the exact float64 covariance, our directions capture at least the variance that PEFT's do, in every layer "
        f"(smallest difference {worst:+.1e}). Record: `benchmarks/results/eva.json`; "
        "`python -m benchmarks.compare eva` repeats them.",
    ]
    return lines


def statistics() -> list[str]:
    """Collections against ordinary passes."""
    records = {name: cases("statistics")[name] for name in ("llama", "small")}
    lines = [
        "All statistics in one pass (input second moments, weight gradients, Fisher diagonals of all linear layers), "
        "against ordinary forward and backward passes with all weight gradients; and EVA from sketches, against the "
        "bare forward passes. Medians, same machine, side by side:",
        "",
        "| case | training passes | all statistics | ratio | bare forward | sketched EVA | ratio | of the best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in records.items():
        times = {side: f"{value['p50']:.1f} s" for side, value in each["seconds"].items()}
        first = f"{times['training']} | {times['statistics']} | {each['statistics_over_training']:.2f}"
        second = f"{times['forward']} | {times['sketched_eva']} | {each['sketched_eva_over_forward']:.2f}"
        lines.append(f"| {_CASES[name]} | {first} | {second} | {each['sketched_eva_captured_of_best']['mean']:.1%} |")
    return [
        *lines,
        "",
        "(The last column: variance that the sketched directions capture, of what the best ones would.)",
    ]


def methods() -> list[str]:
    """Every initialisation against its peer."""
    record, small = cases("init")["llama"], cases("init")["small"]["methods"]
    pissa = record["methods"]["pissa"]
    lines = [
        "Initialisations from the base model to the finished adapter, each run a process of its own "
        f"({_CASES['llama']}; peers: PEFT {record['environment']['versions']['peft']}, "
        f"with {record['pissa_niter']} iterations for PiSSA; for LoRA-DA the authors' multi-pass procedure). PEFT's "
        "CorDA takes one sample at a time. Memory: the most above the loaded model, of live tensors, on its first two "
        "layers alone.",
        "",
        "| method | ours | peer | peer / ours | memory, ours | memory, peer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, each in record["methods"].items():
        seconds = [f"{each[side]['seconds']['p50']:.1f} s" for side in ("ours", "peer")]
        memory = [
            f"{small[method][side]['bytes'] / 1e6:.0f} MB" if method in small else "" for side in ("ours", "peer")
        ]
        lines.append(f"| {method} | {seconds[0]} | {seconds[1]} | {each['seconds_ratio']:.1f} | {' | '.join(memory)} |")
    return [
        *lines,
        "",
        "LoRA-GA's time is that of one forward and backward pass on either side; sketches save the products for weight "
        f"gradients. PEFT's PiSSA catches {pissa['energy_ratio']:.1%} of the energy that ours does. Record: "
        "`benchmarks/results/init.json`.",
        *_figure("init", "Initialisations, ours and their peers"),
    ]


def layers() -> list[str]:
    """The fused layer."""
    record = cases("linear")
    entries = record["layers"]["entries"]
    others = {
        side: name
        for side, name in (("compiled", "torch.compile / ours"), ("hand_written", "addmm / ours"))
        if any(side in each["seconds"] for each in entries)
    }
    lines = [
        "The fused LoRA layer, forward and backward, in float32 where nothing else stands, against PEFT's and against "
        "the base layer alone (its forward and the gradient of its input). Beside both stands a bound: what a layer "
        "whose products cost their FLOPs at the base layer's rate, and nothing else, would reach."
        + (
            " torch.compile is that of PEFT's layer, compilation not counted; addmm are passes written by hand as "
            "unsloth and liger write theirs, with torch's dropout before them."
            if others
            else ""
        ),
        "",
        f"| tokens x n -> m | rank | dropout | PEFT / ours | at most | {' | '.join([*others.values(), 'ours / base'])} "
        "| at least |",
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * len(others),
    ]
    for each in entries:
        seconds = {side: value["p50"] for side, value in each["seconds"].items()}
        bound = seconds["peft"] / seconds["base"] / each["floor_over_base"]
        ratios = [f"{seconds[side] / seconds['ours']:.2f}" if side in seconds else "–" for side in others]
        more = "".join(f" {ratio} |" for ratio in ratios)
        words = [each[key] for key in ("dtype",) if each.get(key, "float32") != "float32"]
        words += [] if each.get("extension", True) else ["without the extension"]
        sizes = ", ".join([f"{each['tokens']} x {each['n']} -> {each['m']}", *words])
        lines.append(
            f"| {sizes} | {each['rank']} | {each['dropout']:g} | {each['peft_over_ours']:.2f} | "
            f"{bound:.2f} |{more} {each['ours_over_base']:.2f} | {each['floor_over_base']:.2f} |"
        )
    lines += _figure("layers", "Layers against PEFT's, with the bound that FLOPs allow")
    return [*lines, *_call(record.get("call")), *_dora(record.get("dora"))]


_SIDES = {"ours": "ours", "peft": "PEFT's", "compiled": "torch.compile of PEFT's", "hand_written": "addmm by hand"}


def _call(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    found, slower = [], 0
    for each in record["entries"]:
        for key, words in (("forward_seconds", "forward"), ("seconds", "forward and backward")):
            if key in each:
                times = ", ".join(
                    f"{name} {duration(each[key][side]['p50'])}" for side, name in _SIDES.items() if side in each[key]
                )
                found.append(f"{words}, dropout {each['dropout']:g}: {times}")
                slower += each[key]["ours"]["p50"] > each[key]["peft"]["p50"]
    one = record["entries"][0]
    threads = f" on {one['threads']} thread" if one.get("threads") == 1 else ""
    end = " On a CPU, layers as small as this are slower accelerated." if slower == len(found) else ""
    return [
        "",
        f"What a call costs in Python, {one['tokens']} tokens, {one['n']} -> {one['m']}, rank {one['rank']}{threads}, "
        f"where there is next to nothing to compute: {'; '.join(found)}.{end}",
    ]


def _dora(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    found = [
        f"{each['tokens']} x {each['n']} -> {each['m']}: ours {each['dora_over_lora']['ours']:.2f}, PEFT's "
        f"{each['dora_over_lora']['peft']:.2f}, PEFT's DoRA over ours "
        f"{each['seconds']['peft']['p50'] / each['seconds']['ours']['p50']:.2f}"
        for each in record["entries"]
    ]
    rank = record["entries"][0]["rank"]
    return ["", f"Time of a DoRA layer over that of a LoRA layer, rank {rank}, no dropout: {'; '.join(found)}."]


def training() -> list[str]:
    """A training step."""
    step = cases("train")["llama"]
    times = {side: duration(value["p50"]) for side, value in step["seconds"].items()}
    others = [
        f"{name} {times[side]} ({step['seconds'][side]['p50'] / step['seconds']['ours']['p50']:.2f} times ours)"
        for side, name in (("compiled", "torch.compile of PEFT's model"), ("hand_written", "addmm by hand"))
        if side in times
    ]
    return [
        f"A whole training step (the 8-layer Llama, 8 x 256 tokens, LoRA on all {step['layers']} linear layers, rank "
        f"{step['rank']}, dropout {step['dropout']:g}): PEFT {times['peft']}, accelerated {times['ours']}, "
        f"{step['peft_over_ours']:.2f} times as fast; "
        f"{''.join(f'{other}; ' for other in others)}the adapters keep {step['bytes_ratio']:.2f} of the bytes for the "
        "backward pass. Records: `benchmarks/results/{linear,train}.json`.",
        *_figure("train", "Time of a training step, and bytes kept for the backward pass"),
    ]


def language_model() -> list[str]:
    """Training steps of a real language model; nothing where there is no record."""
    steps = cases("llm")
    if not steps:
        return []
    one = next(iter(steps.values()))
    lines = [
        f"A whole training step of {one['model']} (weights {one['weights']}) with LoRA on all {one['layers']} linear "
        "layers: forward, loss, backward and AdamW. The base alone is its forward pass and the gradient of its "
        "embeddings, which no adapter can undercut:",
        "",
        "| tokens | rank | dropout | dtype | ours | PEFT / ours | torch.compile / ours | addmm / ours | ours / base |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in steps.values():
        seconds = {side: value["p50"] for side, value in each["seconds"].items()}
        ratios = [
            f"{seconds[side] / seconds['ours']:.2f}" if side in seconds else "–"
            for side in ("peft", "compiled", "hand_written")
        ]
        lines.append(
            f"| {each['batch']} x {each['length']} | {each['rank']} | {each['dropout']:g} | {each['dtype']} | "
            f"{duration(seconds['ours'])} | {' | '.join(ratios)} | {each['ours_over_base']:.2f} |"
        )
    return [*lines, "", "Record: `benchmarks/results/llm.json`; `python -m benchmarks.compare llm` repeats it."]


def lora_pro() -> list[str]:
    """LoRA-Pro's steps."""
    record = cases("lora_pro")
    full, efficient = record["full"], record["efficient"]
    floor, rates = full["floor"], full["rates"]
    times = {side: f"{1e3 * value['p50']:.0f} ms" for side, value in full["seconds"].items()}
    least = 1e3 * (floor["bytes"] / rates["copy"] + floor["flops"] / rates["products"]["float32"])
    share = max(full["peak_extra_bytes"]["ours"], 1) / full["moment_bytes"]
    return [
        f"A full LoRA-Pro step of {len(full['layers'])} layers, rank {full['rank']}, "
        f"{full['moment_bytes'] / 8e6:.0f} M weights: {times['ours']}, against {times['faithful']} for the "
        f"authors' procedure in torch ({full['faithful_over_ours']:.1f} times) and {times['careful']} for a careful "
        f"version in torch ({full['careful_over_ours']:.1f} times); copying the moments' bytes and multiplying at this "
        f"machine's rates take {least:.0f} ms together. Extra memory at its peak: {share:.1%} of the moments. The "
        f"efficient step takes {efficient['ours_over_adamw']:.1f} times AdamW's on the same factors. Record: "
        "`benchmarks/results/lora_pro.json`.",
        *_figure("lora_pro", "A full LoRA-Pro step, ours and two ways in torch"),
    ]


def landscape() -> list[str]:
    """Verdicts, spectra, monitor."""
    found = cases("landscape")
    sensing, demo, monitor = (found[name] for name in ("sensing", "demo", "monitor"))
    spectrum = cases("spectrum")["adapters"]
    time = 1e3 * spectrum["entries"][0]["all_layers_seconds"]
    runs = sensing["runs"]
    right = sum(each["truth"] == each["verdict"] for each in runs)
    kinds = ", ".join(f"{sum(row.values())} {name}" for name, row in sensing["confusion"].items())
    rates = [f"{each['learning_rate']:g} ({each['loud_layers']} of {each['layers']})" for each in demo["runs"]]
    return [
        f"The verdict on {len(runs)} runs of a sensing problem whose nuclear-norm solution is known ({kinds}): {right} "
        f"right; at minima the certificate's ratio is 1 within {sensing['largest_ratio_error_at_minima']:.0e}. On the "
        f"demo's model, layers called loud by learning rate: {', '.join(rates)}. Spectra of {spectrum['layers']} "
        f"adapters ({spectrum['features']} x {spectrum['features']}, rank {spectrum['rank']}) take {time:.0f} ms, "
        f"{spectrum['smallest_ratio']:.0f} times less per layer than singular values of one product. The monitor costs "
        f"{monitor['share_of_training']:.2%} of training at every {monitor['every']} steps. Records: "
        "`benchmarks/results/{landscape,spectrum}.json`.",
        *_figure("landscape", f"Verdicts on {len(runs)} runs"),
    ]


def linalg() -> list[str]:
    """Small matrices, randomized decompositions."""
    small, large = cases("small_linalg")["eigh"], cases("svd")
    eigh = [each for each in small["entries"] if each["order"] in (8, 16)]
    ratios = {(each["order"], each["dtype"]): each["torch_over_ours"] for each in eigh}
    named = ", ".join(f"{ratio:.1f} (n = {n}, {dtype})" for (n, dtype), ratio in sorted(ratios.items()))
    lines = [
        f"Batched small eigenproblems, {small['batch']} matrices: `torch.linalg.eigh` takes {named} times as long as "
        "`eigh`.",
        "",
        "Randomized SVD (block Krylov, with its error bound), times faster than `torch.linalg.svd` and than "
        "`torch.svd_lowrank` with 8 extra columns and its default of two iterations (error: excess of the Frobenius "
        "residual over the best possible):",
        "",
        "| matrices | spectrum | rank | than svd | than svd_lowrank | error | svd_lowrank's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in (entry for name in ("small", "large", "batch") for entry in large[name]["entries"]):
        shape = " x ".join(str(size) for size in each["shape"][-2:])
        matrices = f"{each['shape'][0]} of {shape}" if len(each["shape"]) == 3 else shape
        times, errors = each["times_faster"], each["error_over_best"]
        lines.append(
            f"| {matrices} | {each['spectrum']} | {each['rank']} | {times['torch.linalg.svd']:.0f} | "
            f"{times['torch.svd_lowrank+8']:.2f} | {errors['ours krylov']['frobenius'] - 1:.1e} | "
            f"{errors['torch.svd_lowrank+8']['frobenius'] - 1:.1e} |"
        )
    lines += [
        "",
        "Below 1 `svd_lowrank` is the faster one: it is not beaten on single small matrices at small ranks. "
        "Records: `benchmarks/results/{statistics,small_linalg,svd}.json`.",
        *_figure("linalg", "Linear algebra, times faster than torch's"),
    ]
    return lines


def demo() -> list[str]:
    """The demo."""
    record = record_of("demo")
    task, config, summary = record["task"], record["config"], record["summary"]
    steps = summary["eva"]["steps"]
    rates = {arm: value["rate"] for arm, value in record["learning_rates"].items()}
    lines = [
        f"The demo ({task['name']}; {task['train']} training and {task['test']} held-out texts; MiniLM-L6, rank "
        f"{config['rank']}, {config['steps']} steps of {config['batch_size']}, {config['seeds']} seeds, each side at "
        f"the rate that a study on other seeds chose: random {rates['random']:g}, EVA {rates['eva']:g}):",
        "",
        f"| held-out, mean and spread over seeds | {' | '.join(f'step {step}' for step in steps)} |",
        "| --- |" + " --- |" * len(steps),
    ]
    for measure, pattern in (("loss", "{:.3f} ± {:.3f}"), ("accuracy", "{:.1%} ± {:.1%}")):
        for arm, title in (("random", "random LoRA"), ("eva", "EVA")):
            pairs = zip(summary[arm][f"{measure}_mean"], summary[arm][f"{measure}_deviation"], strict=True)
            lines.append(f"| {measure}, {title} | " + " | ".join(pattern.format(*pair) for pair in pairs) + " |")
    lines += ["", "What the demo says of it:", "", *(f"> {line}" for line in record["verdict"])]
    lines += ["", f"The whole demo took {record['total_seconds']:.0f} s on {record['threads']} threads."]
    return lines


def _tuning(protocol: dict[str, Any]) -> str:
    count = len(protocol.get("tuning_seeds", (0,)))  # older records have one
    return f"{count} other seeds" if count > 1 else "another seed"


def study(record: dict[str, Any], name: str) -> list[str]:
    """The study of what the initialisations do for a real task.

    Args:
        record: of `benchmarks.demo.study`.
        name: its file's, without suffix.

    Returns:
        Lines.
    """
    data, protocol, machine = record["data"], record["protocol"], record["environment"]
    seeds = len(protocol["seeds"])
    headings, *means = study_report.mean_rows(record)
    lines = [
        f"Which start, which way to train helps on a real task: {data['name']}; {data['train']} training and "
        f"{data['test']} test texts; "
        f"{record['model']['name']}, rank {protocol['rank']}, {protocol['evaluate_at'][-1]} steps of "
        f"{protocol['batch_size']}, {seeds} seed{'s' if seeds > 1 else ''}. Every arm has the rate that was best for "
        f"it on other texts and {_tuning(protocol)} (the head's is {record['head']['rate']:g} in all"
        f"{', the largest that was tried' if record['head']['at_edge'] else ''}). Test loss and accuracy after so many "
        "steps, means over seeds:",
        "",
        f"| {' | '.join(headings)} |",
        "| --- |" + " --- |" * (len(headings) - 1),
        *(f"| {' | '.join(row)} |" for row in means),
        "",
        *(f"- {sentence}" for sentence in record["verdict"]),
    ]
    return [
        *lines,
        *_figure(name, "Loss and accuracy by step, and the differences from random LoRA"),
        "",
        f"Record: `benchmarks/results/{name}.json`, made by `python -m benchmarks.demo.study` on an "
        f"{machine['processor']} CPU.",
    ]


def studies() -> dict[str, dict[str, Any]]:
    """Every study of quality that there is a record of."""
    return {file.stem: record_of(file.stem) for file in sorted(RESULTS.glob("quality_*.json"))}


def caution() -> list[str]:
    """The demo's own random LoRA beside the study's on the same task: what a rate chosen by one seed is worth."""
    demo, record = record_of("demo"), record_of("quality_docstrings")
    theirs, ours = demo["summary"]["random"], record["summary"]["random"]
    best = min(
        (each["loss"][-1]["mean"], name) for name, each in record["summary"].items() if name != study_report.BASELINE
    )
    return [
        "A caution on the docstrings: one seed chose these rates. For random LoRA it chose "
        f"{record['tuning']['random']['rate']:g} and "
        f"ends at a loss of {ours['loss'][-1]['mean']:.3f}; the demo, whose rate "
        f"{demo['learning_rates']['random']['rate']:g} was chosen by two seeds, ends at "
        f"{theirs['loss_mean'][-1]:.3f} on the same texts. Against that, what is left of the lead of "
        f"{study_report.title(best[1])} ({best[0]:.3f}) is {theirs['loss_mean'][-1] - best[0]:.3f}.",
        "",
    ]


def quality() -> list[str]:
    """Every study of quality."""
    lines = [line for name, record in studies().items() for line in (*study(record, name), "")]
    return lines + (caution() if "quality_docstrings" in studies() else [])
