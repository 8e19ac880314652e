"""Side-by-side comparisons: `python -m benchmarks.compare eva|statistics [--case ...]`.

`eva`: our EVA, PEFT's, and the bare forward passes. `statistics`: one pass that collects everything, the ordinary
forward and backward passes of full fine-tuning, and EVA from sketches.

Correctness is checked before any time is believed; both sides run in one process, in turn, on the same model and the
same batches.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

import lora_kernels as lk
from benchmarks import records
from lora_kernels.ops.covariance import reference

CONSOLE = Console(width=None if sys.stdout.isatty() else 120)
RANK, RHO = 16, 2.0


def llama(layers: int) -> torch.nn.Module:
    """The benchmark Llama, random weights, embeddings with a decaying spectrum as trained ones have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8, vocab_size=8192
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        scale = torch.arange(1, 513).float().rsqrt()
        rotation = torch.linalg.qr(torch.randn(512, 512)).Q
        model.model.embed_tokens.weight.copy_((torch.randn(8192, 512) * scale) @ rotation)
    return model


def llama_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 8 x 256 tokens, frequent tokens more often."""
    generator = torch.Generator().manual_seed(1)
    weights = 1.0 / torch.arange(1, 8193).float()
    return [
        {
            "input_ids": torch.multinomial(weights, 8 * 256, replacement=True, generator=generator).view(8, 256),
            "attention_mask": torch.ones(8, 256, dtype=torch.long),
        }
        for _ in range(count)
    ]


def minilm() -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """MiniLM-L6 and 16 batches of 32 docstrings of the standard library."""
    from transformers import AutoModel, AutoTokenizer

    from lora_kernels.demo.data import docstring_task
    from lora_kernels.demo.task import model_folder

    folder = model_folder(None)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = [example.text for example in docstring_task().train][: 16 * 32]
    batches = []
    for low in range(0, len(texts), 32):
        encoded = tokenizer(texts[low : low + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({key: encoded[key] for key in ("input_ids", "attention_mask")})
    return model, batches


def case(name: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """Model and batches of a case.

    Args:
        name: `small`, `llama` or `minilm`.

    Returns:
        Both.
    """
    if name == "minilm":
        return minilm()
    layers, count = (2, 4) if name == "small" else (8, 16)
    return llama(layers), llama_batches(count)


def wrap(model: torch.nn.Module, method: str) -> torch.nn.Module:
    """A PEFT model on a copy of `model`.

    Args:
        model: the base.
        method: `eva` for PEFT's own, else stock.

    Returns:
        The PEFT model.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model

    eva = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=RHO)} if method == "eva" else {}
    targets = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in targets if "lm_head" not in name and "pooler" not in name]
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, target_modules=targets, **eva))


def exact_covariances(model: torch.nn.Module, batches: Sequence[Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Centred float64 covariances of the inputs of layers, by hooks of our own and no code of either side."""
    sums: dict[str, list[Any]] = {name: [0.0, 0.0, 0.0] for name in names}
    mask: list[torch.Tensor] = []

    def hook(name: str) -> Any:
        def observe(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            second, total = reference.covariance(inputs[0], mask[0])
            for slot, value in enumerate((second, total, float(mask[0].sum()))):
                sums[name][slot] = sums[name][slot] + value

        return observe

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        for batch in batches:
            mask[:] = [batch["attention_mask"].bool()]
            model(**batch)
    return {
        name: second / count - torch.outer(total / count, total / count)
        for name, (second, total, count) in sums.items()
    }


def captured(basis: torch.Tensor, covariance: torch.Tensor) -> float:
    """Share of the variance in the span of the rows of `basis`."""
    q = torch.linalg.qr(basis.double().mT).Q
    return float(torch.trace(q.mT @ covariance @ q) / torch.trace(covariance))


def check_eva(
    model: torch.nn.Module, batches: Sequence[Any], ours: Any, peft: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Per layer, the variance that each side's directions capture on the exact covariance, at equal rank.

    Args:
        model: the base model.
        batches: the data.
        ours: a PEFT model that we initialised.
        peft: PEFT's state dict.

    Returns:
        Worst and mean difference (ours minus PEFT's) over the layers that both gave a rank, and both rank sums.
    """
    prefix = "base_model.model."
    found = {
        name.removeprefix(prefix): module.lora_A["default"].weight.detach()
        for name, module in ours.named_modules()
        if hasattr(module, "lora_A")
    }
    theirs = {name.removeprefix(prefix): value for name, value in peft.items()}
    both = [name for name in found if name in theirs and theirs[name].shape[0] > 0]
    truth = exact_covariances(model, batches, both)
    differences = []
    for name in both:
        rank = min(found[name].shape[0], theirs[name].shape[0])
        differences.append(captured(found[name][:rank], truth[name]) - captured(theirs[name][:rank], truth[name]))
    return {
        "layers_compared": len(both),
        "captured_minus_peft_worst": min(differences),
        "captured_minus_peft_mean": sum(differences) / len(differences),
        "rank_sum": sum(each.shape[0] for each in found.values()),
        "rank_sum_peft": sum(each.shape[0] for each in theirs.values()),
    }


def run_eva(name: str, rounds: int, with_peft: bool) -> dict[str, Any]:
    """Time EVA against PEFT's and against the bare forward passes.

    Args:
        name: the case.
        rounds: how often ours and the bare passes are timed.
        with_peft: whether PEFT runs too (minutes on the large case).

    Returns:
        The record.
    """
    model, batches = case(name)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    reports: list[Any] = []
    adapters: list[torch.nn.Module] = []

    def adapter() -> None:
        adapters[:] = [wrap(model, "stock")]

    def ours() -> None:
        reports[:] = [lk.initialize(adapters[0], batches, lk.EVA(rho=RHO), progress=False)]

    times = records.interleaved({"forward": bare, "ours": ours}, rounds, {"ours": adapter})
    record: dict[str, Any] = {"case": name, "rank": RANK, "rho": RHO, "seconds": times}
    record["parts"] = reports[0].seconds
    record["tokens"] = reports[0].tokens
    record["ours_over_forward"] = times["ours"]["p50"] / times["forward"]["p50"]
    if with_peft:
        from peft.tuners.lora.eva import get_eva_state_dict

        state: dict[str, torch.Tensor] = {}
        peft_model = wrap(model, "eva")

        def peft() -> None:
            state.update(get_eva_state_dict(peft_model, batches, show_progress_bar=sys.stderr.isatty()))

        times["peft"] = records.quantiles([records.seconds(peft)])
        record["peft_over_ours"] = times["peft"]["p50"] / times["ours"]["p50"]
        record["quality"] = check_eva(model, batches, adapters[0], state)
        if record["quality"]["captured_minus_peft_worst"] < -1e-6:
            raise SystemExit(f"a layer captures less variance than PEFT's: {record['quality']}")
    return record


def show_eva(record: dict[str, Any]) -> None:
    """Print a record."""
    table = Table("side", "seconds (p50)", "of the bare forward", title=f"EVA, case {record['case']}")
    base = record["seconds"]["forward"]["p50"]
    for name, times in record["seconds"].items():
        table.add_row(name, f"{times['p50']:.2f}", f"{times['p50'] / base:.2f}")
    CONSOLE.print(table)
    if "peft_over_ours" in record:
        CONSOLE.print(f"PEFT takes {record['peft_over_ours']:.1f} times as long; {record['quality']}")


def check_statistics(model: torch.nn.Module, batches: Sequence[Any], found: Any) -> dict[str, float]:
    """How far the collected sums are from those of plain autograd and plain float64 hooks.

    Args:
        model: the model, its weight gradients those of the summed losses of all batches.
        batches: the data.
        found: the statistics.

    Returns:
        Largest relative Frobenius errors over all layers.
    """
    worst = {"gradient": 0.0, "input_second": 0.0}
    names = list(found)
    truth = exact_covariances(model, batches, [names[0], names[-2]])
    for name in names:
        expected = model.get_submodule(name).weight.grad
        error = torch.linalg.norm(found[name].output.gradient - expected) / torch.linalg.norm(expected)
        worst["gradient"] = max(worst["gradient"], float(error))
    for name, expected in truth.items():
        error = torch.linalg.norm(found[name].input.covariance() - expected) / torch.linalg.norm(expected)
        worst["input_second"] = max(worst["input_second"], float(error))
    return worst


def run_statistics(name: str, rounds: int) -> dict[str, Any]:
    """Time the collection of all statistics against ordinary training passes, and sketched EVA against bare ones.

    Args:
        name: the case, a Llama.
        rounds: how often each is timed.

    Returns:
        The record.
    """
    model, batches = case(name)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    results: dict[str, Any] = {}
    adapters: list[torch.nn.Module] = []

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def clear() -> None:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True)

    def training() -> None:
        for batch in batches:
            items = (batch["labels"][:, 1:] != -100).sum()
            (model(**batch).loss * items).backward()

    def everything() -> None:
        wants = ("input_second", "gradient", "fisher")
        results["statistics"] = lk.collect(model, batches, wants, progress=False)

    def adapter() -> None:
        adapters[:] = [wrap(model, "stock")]

    def sketched_eva() -> None:
        results["report"] = lk.initialize(adapters[0], batches, lk.EVA(rho=RHO), form="sketch", progress=False)

    clear()
    training()
    everything()
    errors = check_statistics(model, batches, results["statistics"])
    if max(errors.values()) > 1e-4:
        raise SystemExit(f"the sums are wrong: {errors}")
    clear()
    calls = {"forward": forward, "training": training, "statistics": everything, "sketched_eva": sketched_eva}
    times = records.interleaved(calls, rounds, {"training": clear, "statistics": clear, "sketched_eva": adapter})
    statistics, report = results["statistics"], results["report"]
    truth = exact_covariances(model, batches, [each.name.removeprefix("base_model.model.") for each in report.layers])
    shares = []
    for each in report.layers:
        covariance = truth[each.name.removeprefix("base_model.model.")]
        factor = adapters[0].get_submodule(each.name).lora_A["default"].weight.detach()
        best = torch.linalg.eigvalsh(covariance)[-factor.shape[0] :].sum() / covariance.trace()
        shares.append(captured(factor, covariance) / float(best))
    return {
        "case": name,
        "rank": RANK,
        "rho": RHO,
        "layers": len(statistics),
        "tokens": statistics.tokens,
        "seconds": times,
        "statistics_over_training": times["statistics"]["p50"] / times["training"]["p50"],
        "sketched_eva_over_forward": times["sketched_eva"]["p50"] / times["forward"]["p50"],
        "errors": errors,
        "sketched_eva_parts": report.seconds,
        "sketched_eva_captured_of_best": {"worst": min(shares), "mean": sum(shares) / len(shares)},
    }


def show_statistics(record: dict[str, Any]) -> None:
    """Print a record."""
    table = Table("side", "seconds (p50)", title=f"statistics, case {record['case']}")
    for name, times in record["seconds"].items():
        table.add_row(name, f"{times['p50']:.2f}")
    CONSOLE.print(table)
    CONSOLE.print(
        f"all statistics take {record['statistics_over_training']:.2f} of the training passes; sketched EVA takes "
        f"{record['sketched_eva_over_forward']:.2f} of the bare forward passes"
    )
    CONSOLE.print(record["errors"], record["sketched_eva_captured_of_best"], record["sketched_eva_parts"])


def main(arguments: list[str] | None = None) -> int:
    """Run a comparison and write its record.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["eva", "statistics"])
    parser.add_argument("--case", choices=["small", "llama", "minilm"], default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true", help="time ours and the bare forward passes only")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record")
    options = parser.parse_args(arguments)
    if options.what == "eva":
        record = run_eva(options.case, options.rounds, not options.no_peft)
        show_eva(record)
    elif options.case == "minilm":
        parser.error("statistics needs a model with a loss: --case small or llama")
    else:
        record = run_statistics(options.case, options.rounds)
        show_statistics(record)
    CONSOLE.print(f"record: {records.save(f'{options.what}_{options.case}', record, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
