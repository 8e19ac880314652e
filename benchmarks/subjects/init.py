"""Every initialisation against its peer.

Seconds and peak memory, from the base model to the finished adapter, on the same batches. Each run is a process of its
own, so that the high-water mark of memory is its own too; the two sides run in turn. Memory is taken in processes apart
from those that are timed: there the C library's allocator gives freed blocks back at once (it otherwise keeps more or
less of them from run to run), so that the mark is that of live tensors. `--only memory` takes it anew and
keeps the times of the record. Peers: PEFT's EVA, LoRA-GA, CorDA
and PiSSA; for LoRA-DA a transcription of the authors' procedure (one pass for gradients, one more pass for every eight
layers for Fisher and second moments, LOBPCG), since no package has it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks import models, records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject

# PEFT's PiSSA with NITER iterations catches as much of a matrix without decay as ours with so many rounds.
RANK, NITER, ROUNDS = models.RANK, 16, 5
METHODS = ("eva", "lora_ga", "lora_ga_sketch", "corda", "pissa", "lora_da")
# Rows that are a method with other options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"lora_ga_sketch": ("lora_ga", {"form": "sketch"})}
DAMPING, VARIANCE_WEIGHT, LAYERS_PER_PASS, LOBPCG_STEPS = 1e-6, 0.03, 8, 20


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status: `VmRSS` (now) or `VmHWM` (the most since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _config(model: nn.Module, **settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=models.targets(model), **settings)


def ours(method: str, model: nn.Module, batches: Sequence[Any]) -> None:
    """Our side, from the base model to the finished adapter.

    Args:
        method: a name.
        model: the base.
        batches: with labels.
    """
    from peft import get_peft_model

    name, options = VARIANTS.get(method, (method, {}))
    # As PEFT's EVA does it: ranks move, and layers may lose their adapter.
    settings: dict[str, dict[str, Any]] = {"eva": {"rho": 2.0, "min_rank": 0}, "pissa": {"n_iter": ROUNDS}}
    config = lk.init.METHODS[name](**settings.get(name, {}))
    adapter = get_peft_model(model, _config(model))  # type: ignore[arg-type]
    lk.initialize(adapter, batches if config.wants else None, config, progress=False, **options)


def _train_step(model: nn.Module, batches: Sequence[Any]) -> Callable[[], None]:
    def step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    return step


def peft(method: str, model: nn.Module, batches: Sequence[Any]) -> None:
    """PEFT's side.

    Args:
        method: a name.
        model: the base.
        batches: with labels.
    """
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    base: Any = model
    method = VARIANTS.get(method, (method, {}))[0]
    if method == "eva":
        config = _config(model, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
        adapter = get_peft_model(base, config, low_cpu_mem_usage=True)
        initialize_lora_eva_weights(adapter, batches, show_progress_bar=False)  # type: ignore[arg-type]
    elif method == "lora_ga":
        config = _config(model, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        preprocess_loraga(model, config, _train_step(model, batches))
        get_peft_model(base, config)
    elif method == "corda":
        config = _config(model, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

        def run() -> None:  # PEFT's hook takes one sample at a time
            with torch.no_grad():
                for batch in batches:
                    for row in range(len(batch["input_ids"])):
                        model(**{key: value[row : row + 1] for key, value in batch.items()})

        preprocess_corda(model, config, run_model=run)
        get_peft_model(base, config)
    elif method == "pissa":
        get_peft_model(base, _config(model, init_lora_weights=f"pissa_niter_{NITER}"))
    else:
        adapter = get_peft_model(base, _config(model))
        _multi_pass_lora_da(adapter, batches)


def _groups(layers: dict[str, Any]) -> Iterator[list[str]]:
    names = list(layers)
    for low in range(0, len(names), LAYERS_PER_PASS):
        yield names[low : low + LAYERS_PER_PASS]


def _multi_pass_lora_da(adapter: Any, batches: Sequence[Any]) -> None:
    """The authors' procedure: a gradient pass, then a pass per eight layers, then LOBPCG on the guidance matrix."""
    layers = {name: module for name, module in adapter.named_modules() if hasattr(module, "lora_A")}
    bases = {name: module.get_base_layer() for name, module in layers.items()}
    adapter.requires_grad_(False)
    for base in bases.values():
        base.weight.requires_grad_(True)
    with adapter.disable_adapter():
        for base in bases.values():
            base.weight.requires_grad_(True)
        for batch in batches:
            (adapter(**batch).loss / len(batches)).backward()
        gradients = {name: base.weight.grad for name, base in bases.items()}
        for base in bases.values():
            base.weight.grad = None
        for group in _groups(layers):
            second: dict[str, Any] = {}
            fisher: dict[str, Any] = {}
            count = 0

            def forward(name: str, second: dict[str, Any] = second) -> Any:
                def hook(_module: Any, args: Any, _output: Any) -> None:
                    x = args[0].detach().flatten(0, -2)
                    second[name] = second.get(name, 0.0) + x.mT @ x

                return hook

            def backward(name: str, fisher: dict[str, Any] = fisher) -> Any:
                def hook(_module: Any, _inputs: Any, outputs: Any) -> None:
                    fisher[name] = fisher.get(name, 0.0) + outputs[0].flatten(0, -2).square().sum(0)

                return hook

            handles = [bases[name].register_forward_hook(forward(name)) for name in group]
            handles += [bases[name].register_full_backward_hook(backward(name)) for name in group]
            for batch in batches:
                adapter(**batch).loss.backward()
                count += batch["input_ids"].numel()
                for base in bases.values():
                    base.weight.grad = None
            for handle in handles:
                handle.remove()
            for name in group:
                _guide(layers[name], gradients[name], second[name] / count, fisher[name] / count)


def _guide(module: Any, gradient: torch.Tensor, second: torch.Tensor, fisher: torch.Tensor) -> None:
    n = second.shape[0]
    c = second + DAMPING * torch.eye(n)
    inverse_fisher = 1.0 / (fisher + DAMPING)
    inverse = torch.linalg.inv(c)
    d = -(inverse @ gradient.mT) * inverse_fisher
    sigma = torch.svd_lowrank(d, q=1)[1][0]
    d = d / sigma
    guidance = -d @ d.mT + VARIANCE_WEIGHT * inverse_fisher.sum() / (1e5 * sigma**2) * inverse
    _, vectors = torch.lobpcg(guidance, k=RANK, largest=False, niter=LOBPCG_STEPS)
    with torch.no_grad():
        module.lora_A["default"].weight.copy_(vectors.mT / 32.0)
        module.lora_B["default"].weight.copy_(d.mT @ vectors / 32.0)


def _first_use_of_peft() -> None:
    """PEFT imports its backends (bitsandbytes, torchao) with the first adapter: a second, and no one's merit."""
    from peft import LoraConfig, get_peft_model

    tiny: Any = nn.Sequential(nn.Linear(2, 2))
    get_peft_model(tiny, LoraConfig(r=1, target_modules=["0"]))


def _energy(model: nn.Module) -> float:
    """Squared norm of the adapter, over all layers: of PiSSA, what it caught of the base weights."""
    total = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = (getattr(module, key)["default"].weight.detach().double() for key in ("lora_A", "lora_B"))
            total += module.scaling["default"] ** 2 * float(((b.mT @ b) * (a @ a.mT)).sum())
    return total


def worker(name: str, method: str, side: str) -> dict[str, float]:
    """One run in this process.

    Args:
        name: the case.
        method: the method.
        side: `ours` or `peer`.

    Returns:
        Its seconds, and how far its memory rose above that of the loaded model, in bytes.
    """
    model, batches = models.case(name)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    with torch.no_grad():
        model(**batches[0])  # what the first call sets up is neither side's
    _first_use_of_peft()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    started = time.perf_counter()
    (ours if side == "ours" else peft)(method, model, batches)
    record = {"seconds": time.perf_counter() - started, "bytes": float(_status("VmHWM") - before)}
    # Both sides have put their layers into this very model.
    return {**record, "energy": _energy(model)} if method == "pissa" else record


# Blocks from this size on are mapped one by one and unmapped when they are freed.
_EAGER = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _spawn(name: str, method: str, side: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    code = f"import json; from {__name__} import worker; print(json.dumps(worker({name!r}, {method!r}, {side!r})))"
    command = [sys.executable, "-c", code]
    settings = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings, cwd=records.ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{method}, {side}: {done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _timed(name: str, method: str, rounds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side in runs:
            runs[side].append(_spawn(name, method, side))
    entry: dict[str, Any] = {
        side: {"seconds": records.quantiles([run["seconds"] for run in results])} for side, results in runs.items()
    }
    if method == "pissa":
        entry["energy_ratio"] = runs["peer"][0]["energy"] / runs["ours"][0]["energy"]
    entry["seconds_ratio"] = entry["peer"]["seconds"]["p50"] / entry["ours"]["seconds"]["p50"]
    return entry


def _floor(model: nn.Module, batches: Sequence[Any], method: str) -> Floor:
    """The passes that a method needs; of PiSSA, two products with as many columns as the rank."""
    work = models.work(model, batches)
    weights = sum(model.get_submodule(name).weight.numel() for name in models.targets(model))  # type: ignore[union-attr, misc]
    flops = {
        "eva": work.forward + work.covariance,
        "lora_ga": 3 * work.forward,
        "lora_ga_sketch": 2 * work.forward,
        "corda": work.forward + work.covariance,
        "pissa": 4.0 * RANK * weights,
        "lora_da": 3 * work.forward + work.covariance,
    }
    return Floor(flops[method], 0.0, here(), "float32")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compare methods with their peers.

    Args:
        name: the case.
        options: of the command line.

    Returns:
        The entry.
    """
    known, rounds, methods = None, 1 if options.quick else options.rounds, options.methods
    if options.only == "memory":
        known = records.cases("init", options.out)[name]
        methods, rounds = list(known["methods"]), known["rounds"]
    model, batches = models.case(name)
    results = {}
    for method in methods:
        entry = _timed(name, method, rounds) if known is None else dict(known["methods"][method])
        for side in ("ours", "peer") if options.only != "time" else ():
            entry[side] = {**entry[side], "bytes": _spawn(name, method, side, _EAGER)["bytes"]}
        if options.only != "time":
            entry["bytes_ratio"] = entry["peer"]["bytes"] / max(entry["ours"]["bytes"], 1.0)
        entry["floor"] = _floor(model, batches, method).record()
        results[method] = entry
    record = {"rank": RANK, "pissa_niter": NITER, "pissa_rounds": ROUNDS, "rounds": rounds, "methods": results}
    return record if known is None else {**record, "times_from": known.get("times_from", known["environment"])}


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Each method against its peer."""
    table_rows = []
    for method, result in entry["methods"].items():
        ours, theirs = (result[side]["seconds"]["p50"] for side in ("ours", "peer"))
        peer = "the authors' passes" if method == "lora_da" else "PEFT"
        table_rows.append(Row(method, peer, ours, theirs, result.get("floor", {}).get("seconds"), group=method))
    return table_rows


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Memory."""
    lines = []
    for method, result in entry["methods"].items():
        if "bytes_ratio" in result:
            memory = " and ".join(f"{result[side]['bytes'] / 1e6:.0f} MB" for side in ("ours", "peer"))
            lines.append(f"{method}: {memory} above the loaded model, ours and the peer's")
    return lines


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--only", choices=["time", "memory"], help="by default both")


SUBJECT = Subject(
    name="init",
    about="Every initialisation against its peer, from the base model to the finished adapter, each run in a process "
    "of its own: seconds and memory. The tests compare what they find with PEFT's and with exact answers; of PiSSA "
    "the energy that both catch is recorded.",
    cases={name: partial(measure, name) for name in (*models.LLAMAS, "smollm2")},
    rows=rows,
    notes=notes,
    full=("small", "llama", "smollm2"),
    quick=("tiny",),
    table=("llama", "smollm2"),
    rounds=3,
    options=_options,
)
