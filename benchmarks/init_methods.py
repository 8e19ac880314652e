"""Every initialisation against its peer: `python -m benchmarks.init_methods [--case small|llama]`.

Seconds and peak memory, from the base model to the finished adapter, on the same batches. Each run is a process of its
own, so that the high-water mark of memory is its own too; the two sides run in turn. Memory is taken in processes apart
from those that are timed: there the C library's allocator gives freed blocks back at once (it otherwise keeps more or
less of them from run to run), so that the mark is that of live tensors. `--what memory` takes it anew and
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
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import lora_kernels as lk
from benchmarks import records
from benchmarks.compare import CONSOLE, case

RANK, NITER = 16, 16
METHODS = ("eva", "lora_ga", "lora_ga_sketch", "corda", "pissa", "lora_da")
# Rows that are a method with other options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"lora_ga_sketch": ("lora_ga", {"form": "sketch"})}
DAMPING, VARIANCE_WEIGHT, LAYERS_PER_PASS, LOBPCG_STEPS = 1e-6, 0.03, 8, 20


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status: `VmRSS` (now) or `VmHWM` (the most since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _targets(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]


def _config(model: nn.Module, **settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_targets(model), **settings)


def ours(method: str, model: nn.Module, batches: Sequence[Any]) -> None:
    """Our side, from the base model to the finished adapter.

    Args:
        method: a name.
        model: the base.
        batches: with labels.
    """
    from peft import get_peft_model

    name, options = VARIANTS.get(method, (method, {}))
    config = lk.init.METHODS[name]()
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
    model, batches = case(name)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    with torch.no_grad():
        model(**batches[0])  # what the first call sets up is neither side's
    _first_use_of_peft()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    started = time.perf_counter()
    (ours if side == "ours" else peft)(method, model, batches)
    taken = {"seconds": time.perf_counter() - started, "bytes": float(_status("VmHWM") - before)}
    # Both sides have put their layers into this very model.
    return {**taken, "energy": _energy(model)} if method == "pissa" else taken


# Blocks from this size on are mapped one by one and unmapped when they are freed.
_EAGER = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _spawn(name: str, method: str, side: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.init_methods", "--case", name, "--worker", method, side]
    settings = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
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
        side: {"seconds": records.quantiles([each["seconds"] for each in found])} for side, found in runs.items()
    }
    if method == "pissa":
        entry["energy_ratio"] = runs["peer"][0]["energy"] / runs["ours"][0]["energy"]
    entry["seconds_ratio"] = entry["peer"]["seconds"]["p50"] / entry["ours"]["seconds"]["p50"]
    return entry


def run(name: str, methods: Sequence[str], rounds: int, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Compare methods with their peers.

    Args:
        name: the case.
        methods: which.
        rounds: timed processes per side.
        known: times by method, from a record, or `None` to take them.

    Returns:
        The record.
    """
    results = {}
    for method in methods:
        entry = _timed(name, method, rounds) if known is None else dict(known[method])
        for side in ("ours", "peer"):
            entry[side] = {**entry[side], "bytes": _spawn(name, method, side, _EAGER)["bytes"]}
        entry["bytes_ratio"] = entry["peer"]["bytes"] / entry["ours"]["bytes"]
        results[method] = entry
    return {"case": name, "rank": RANK, "pissa_niter": NITER, "rounds": rounds, "methods": results}


def show(record: dict[str, Any]) -> None:
    """Print a record."""
    table = Table("method", "ours", "peer", "peer / ours", "memory ours", "memory peer", "peer / ours")
    for method, each in record["methods"].items():
        seconds = [f"{each[side]['seconds']['p50']:.2f} s" for side in ("ours", "peer")]
        memory = [f"{each[side]['bytes'] / 1e6:.0f} MB" for side in ("ours", "peer")]
        table.add_row(method, *seconds, f"{each['seconds_ratio']:.2f}", *memory, f"{each['bytes_ratio']:.2f}")
    CONSOLE.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and write its record.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=["small", "llama"], default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record")
    parser.add_argument("--what", choices=["both", "memory"], default="both")
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(worker(options.case, *options.worker)))
        return 0
    known, environment = None, {}
    if options.what == "memory":
        old = json.loads((options.out / f"init_{options.case}.json").read_text())
        known, environment = old["methods"], {"times_from": old["environment"]}
        options.methods, options.rounds = list(known), old["rounds"]
    record = {**run(options.case, options.methods, options.rounds, known), **environment}
    show(record)
    CONSOLE.print(f"record: {records.save(f'init_{options.case}', record, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
