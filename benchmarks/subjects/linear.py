"""The fused LoRA layer, forward and backward, against PEFT's, `torch.compile` of PEFT's, and hand-written passes.

`layers`: beside them the base layer alone (its forward and the gradient of its input). `floor_over_base` is the FLOPs
of the layer over those of the base layer: no implementation that computes the products can be closer to the base than
that. `call`: a layer so small that only the cost of calling it is left, on one thread, forward alone and both ways.
`dora`: DoRA layers, ours and PEFT's, beside LoRA layers of the same shape.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks import lora_layers, records
from benchmarks.lora_layers import PEERS
from benchmarks.rates import here
from benchmarks.subject import Row, Subject

SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (2048, 512), (512, 4096))
RANKS, DROPOUTS, RANK = (8, 16, 64), (0.0, 0.05), 16
# Tokens, n and m: of a small language model's step; of the rows in bfloat16 and of DoRA; of those without extension.
SMALL, SQUARE = (512, 576, 1536), (2048, 1024, 1024)
CALL_TOKENS, CALL_SIZE, CALL_ROUNDS, CALL_REPEAT = 8, 64, 61, 50
PASSES = {"forward_seconds": "forward", "seconds": "forward and backward"}
# The peer's time over ours: of a layer without dropout and with it, and where the extension is not compiled; of a call,
# forward alone and both ways; LoRA over DoRA.
TARGETS = {0.0: 1.15, 0.05: 1.4}
PLAIN_TARGET = 1.0
CALL_TARGETS = {
    "forward_seconds": {"peft": 1 / 0.6, "hand_written": 1 / 1.1},
    "seconds": {"peft": 1 / 0.7, "hand_written": 1 / 1.1},
}
DORA_TARGET = 1 / 1.15
# Relative differences from PEFT's numbers in float32; in other dtypes, errors against float64 over PEFT's errors.
BOUND, TIMES_PEFTS = 1e-4, 2.0
# Runs `layer` in a process in which the extension cannot be imported, whatever looks for it.
_PLAIN = (
    "import json, sys; sys.modules['lora_kernels._C'] = None; from benchmarks.subjects import linear; "
    "found = linear.layer(**json.loads(sys.argv[1])); "
    "print(json.dumps({**found, 'extension': sys.modules['lora_kernels._C'] is not None}))"
)


def _numbers(layer: Any, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients, dropout off."""
    layer.eval()
    values = lora_layers.both_ways(layer, x, g)()
    layer.train()
    return values


def _worst(values: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return lora_layers.largest(lora_layers.relative(one, two) for one, two in zip(values, truth, strict=True))


def check(sides: Mapping[str, Any], x: torch.Tensor, g: torch.Tensor) -> dict[str, dict[str, float]]:
    """Compare output and gradients of all sides with PEFT's.

    Args:
        sides: layers by name, `peft` among them.
        x: `(tokens, n)`.
        g: the gradient of the output, `(tokens, m)`.

    Returns:
        For the record: `differences` from PEFT's numbers, the largest of each side; where x is not float32, `errors`
        against float64, PEFT's too.

    Raises:
        SystemExit: if they are too large.
    """
    by_side = {name: _numbers(layer, x, g) for name, layer in sides.items()}
    if x.dtype == torch.float32:
        values = {name: _worst(numbers, by_side["peft"]) for name, numbers in by_side.items() if name != "peft"}
        kind, bound, against = "differences", BOUND, "PEFT's numbers"
    else:
        exact = x.detach().double().requires_grad_()
        truth = _numbers(copy.deepcopy(sides["peft"]).double(), exact, g.double())
        values = {name: _worst(numbers, truth) for name, numbers in by_side.items()}
        kind, bound, against = "errors", TIMES_PEFTS * values["peft"], "float64"
    if not lora_layers.largest(values.values()) <= bound:
        sizes = f"{x.shape[1]} -> {g.shape[1]}, {x.dtype}"
        raise SystemExit(f"{sizes}: relative differences from {against} {values}, but must be at most {bound:.1e}")
    return {kind: values}


def _sides(stock: Any, compiler: bool) -> dict[str, Any]:
    sides = {"peft": stock, "hand_written": lora_layers.hand_written(stock), "ours": lora_layers.fused(stock)}
    return {**sides, "compiled": lora_layers.compiled(stock)} if compiler else sides


def layer(
    tokens: int,
    n: int,
    m: int,
    rank: int,
    dropout: float,
    rounds: int,
    compiler: bool,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Check and time one layer.

    Args:
        tokens: rows of x.
        n: inputs.
        m: outputs.
        rank: of the adapter.
        dropout: of its input.
        rounds: timed calls of each side.
        compiler: whether `torch.compile` takes part; its compilations are not timed.
        dtype: of everything.

    Returns:
        An entry.

    Raises:
        SystemExit: if a side gives other numbers than PEFT's.
    """
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    x, g = torch.randn(tokens, n, dtype=kind, requires_grad=True), torch.randn(tokens, m, dtype=kind)
    stock = lora_layers.stock(n, m, rank, dropout, x.device, kind)
    sides = _sides(stock, compiler)
    checked = check(sides, x, g)
    weight = stock.base_layer.weight.detach()
    calls = {"base": lambda: lora_layers.gradients(nn.functional.linear(x, weight), [x], g)}
    calls |= {name: lora_layers.both_ways(side, x, g) for name, side in sides.items()}
    times = records.interleaved(calls, rounds)
    if compiler:
        torch._dynamo.reset()
    return {
        "tokens": tokens,
        "n": n,
        "m": m,
        "rank": rank,
        "dropout": dropout,
        "dtype": dtype,
        **checked,
        "seconds": times,
        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
        "ours_over_base": times["ours"]["p50"] / times["base"]["p50"],
        # t, y, u, dx, dA, dB: six products of r against two of the base layer.
        "floor_over_base": 1 + 3 * rank * (n + m) / (2 * n * m),
    }


def without_extension(**problem: Any) -> dict[str, Any]:
    """`layer` in a process of its own that finds no compiled extension.

    Args:
        problem: the arguments of `layer`.

    Returns:
        The entry, with `extension` false.

    Raises:
        SystemExit: if the process fails.
    """
    command = [sys.executable, "-c", _PLAIN, json.dumps(problem)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=records.ROOT)
    if done.returncode != 0:
        raise SystemExit(f"without the extension: {done.stderr[-3000:]}")
    entry: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return entry


def _floor(entry: Mapping[str, Any]) -> dict[str, Any]:
    kind = getattr(torch, entry["dtype"])
    return lora_layers.floor(here(), entry["tokens"], entry["n"], entry["m"], entry["rank"], kind).record()


def _problems(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The arguments of `layer`, by row; `extension` beside them."""
    shapes = [(options.tokens, *shape) for shape in SHAPES]
    float32 = [(shape, rank) for shape in shapes for rank in RANKS] + [(SMALL, rank) for rank in RANKS[:2]]
    kinds = [(*problem, "float32") for problem in float32] + [(shape, RANK, "bfloat16") for shape in (SQUARE, SMALL)]
    for (tokens, n, m), rank, dtype in [(shapes[0], RANK, "float32")] if options.quick else kinds:
        for dropout in DROPOUTS:
            yield {"tokens": tokens, "n": n, "m": m, "rank": rank, "dropout": dropout, "dtype": dtype}
    if not options.quick:
        tokens, n, m = SQUARE
        yield {"tokens": tokens, "n": n, "m": m, "rank": RANK, "dropout": DROPOUTS[-1], "extension": False}


def layers(options: argparse.Namespace) -> dict[str, Any]:
    """All shapes, ranks, both kinds of dropout; some in bfloat16, and one without the compiled extension."""
    entries = []
    with lk.ops.use_form(options.form):
        for problem in _problems(options):
            extension = problem.pop("extension", True)
            measure, compiler = (layer, options.compile) if extension else (without_extension, False)
            entry = measure(**problem, rounds=options.rounds, compiler=compiler)
            entry["floor"] = _floor(entry)
            entries.append(entry)
            records.CONSOLE.print(f"{_named(entry)}: PEFT / ours {entry['peft_over_ours']:.2f}")
    return {"entries": entries}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """No threads beside the caller's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(dropout: float, rounds: int, repeat: int, compiler: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"tokens": CALL_TOKENS, "n": CALL_SIZE, "m": CALL_SIZE, "rank": RANKS[0]}
    x, g = torch.randn(CALL_TOKENS, CALL_SIZE, requires_grad=True), torch.randn(CALL_TOKENS, CALL_SIZE)
    stock = lora_layers.stock(CALL_SIZE, CALL_SIZE, RANKS[0], dropout, x.device, x.dtype)
    sides = _sides(stock, compiler)
    checked = check(sides, x, g)
    calls: dict[str, Callable[[], Any]] = {
        f"forward_seconds {name}": partial(layer, x) for name, layer in sides.items()
    }
    calls |= {f"seconds {name}": lora_layers.both_ways(layer, x, g) for name, layer in sides.items()}
    times = records.interleaved(calls, rounds, repeat=repeat)
    if compiler:
        torch._dynamo.reset()
    passes = {kind: {name: times[f"{kind} {name}"] for name in sides} for kind in PASSES}
    entry = {**sizes, "dropout": dropout, "dtype": "float32", "threads": 1, "repeat": repeat, **checked, **passes}
    return {**entry, "peft_over_ours": passes["seconds"]["peft"]["p50"] / passes["seconds"]["ours"]["p50"]}


def call(options: argparse.Namespace) -> dict[str, Any]:
    """A layer whose numbers are done in no time: what a call costs in Python, forward alone and both ways."""
    rounds, repeat = (3, 5) if options.quick else (CALL_ROUNDS, CALL_REPEAT)
    with one_thread():
        entries = [_call(dropout, rounds, repeat, options.compile) for dropout in DROPOUTS]
    return {"entries": entries}


def dora_layer(tokens: int, n: int, m: int, rank: int, rounds: int) -> dict[str, Any]:
    """Check and time a DoRA layer and a LoRA layer of its shape, ours and PEFT's, forward and backward.

    Args:
        tokens: rows of x.
        n: inputs.
        m: outputs.
        rank: of the adapters.
        rounds: timed calls of each side.

    Returns:
        An entry; its sides are `ours` and `peft`, which are DoRA, and `ours_lora` and `peft_lora`.

    Raises:
        SystemExit: if ours gives other numbers than PEFT's.
    """
    torch.manual_seed(0)
    x, g = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
    sides: dict[str, Any] = {}
    differences = {}
    for suffix, dora in (("", True), ("_lora", False)):
        stock = lora_layers.stock(n, m, rank, 0.0, x.device, x.dtype, dora=dora)
        pair = {"peft": stock, "ours": lora_layers.fused(stock)}
        differences["ours" + suffix] = check(pair, x, g)["differences"]["ours"]
        sides |= {name + suffix: adapted for name, adapted in pair.items()}
    times = records.interleaved({name: lora_layers.both_ways(adapted, x, g) for name, adapted in sides.items()}, rounds)
    entry = {"tokens": tokens, "n": n, "m": m, "rank": rank, "dropout": 0.0, "dtype": "float32"}
    return {
        **entry,
        "differences": differences,
        "seconds": times,
        "dora_over_lora": {side: times[side]["p50"] / times[f"{side}_lora"]["p50"] for side in ("ours", "peft")},
        "floor": _floor(entry),
    }


def dora(options: argparse.Namespace) -> dict[str, Any]:
    """DoRA beside LoRA."""
    shapes = [SMALL] if options.quick else [SQUARE, SMALL]
    return {"entries": [dora_layer(*shape, RANK, options.rounds) for shape in shapes]}


def _kind(entry: Mapping[str, Any]) -> str:
    """What a row is beside its sizes."""
    dtype = entry.get("dtype", "float32")
    extra = [] if entry.get("extension", True) else ["without the extension"]
    return ", ".join([f"dropout {entry['dropout']:g}", *([] if dtype == "float32" else [dtype]), *extra])


def _named(entry: Mapping[str, Any]) -> str:
    return f"{entry['tokens']} x {entry['n']} -> {entry['m']}, r = {entry['rank']}, {_kind(entry)}"


def _target(entry: Mapping[str, Any], side: str) -> float | None:
    """Of a layer forward and backward."""
    if side != "peft" or entry["n"] == CALL_SIZE or entry.get("dtype", "float32") != "float32":
        return None
    return TARGETS[entry["dropout"]] if entry.get("extension", True) else PLAIN_TARGET


def _dora_rows(entry: Mapping[str, Any]) -> list[Row]:
    name = f"DoRA, {entry['tokens']} x {entry['n']} -> {entry['m']}, r = {entry['rank']}"
    floor, times = entry["floor"]["seconds"], {side: value["p50"] for side, value in entry["seconds"].items()}
    return [
        Row(name, "PEFT", times["ours"], times["peft"], floor),
        Row(name, "LoRA, ours", times["ours"], times["ours_lora"], floor, DORA_TARGET),
    ]


def _call_rows(entry: Mapping[str, Any]) -> list[Row]:
    table_rows = []
    for kind, words in PASSES.items():
        times, about = entry[kind], f"{words}, {_kind(entry)}"
        name = f"{entry['tokens']} x {entry['n']} -> {entry['m']}, r = {entry['rank']}, {about}"
        table_rows += [
            Row(name, peer, times["ours"]["p50"], times[side]["p50"], None, CALL_TARGETS[kind].get(side), about)
            for side, peer in PEERS.items()
            if side in times
        ]
    return table_rows


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Each layer, and each call, against each peer."""
    table_rows = []
    for one in entry["entries"]:
        if "dora_over_lora" in one:
            table_rows += _dora_rows(one)
        elif "forward_seconds" in one:
            table_rows += _call_rows(one)
        else:
            times, floor = one["seconds"], one.get("floor", {}).get("seconds")
            table_rows += [
                Row(
                    _named(one),
                    peer,
                    times["ours"]["p50"],
                    times[side]["p50"],
                    floor,
                    _target(one, side),
                    _kind(one),
                )
                for side, peer in PEERS.items()
                if side in times
            ]
    return table_rows


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Minima of calls; what DoRA costs PEFT."""
    lines = []
    for one in entry["entries"]:
        if "dora_over_lora" in one:
            sides = " and ".join(f"{one['dora_over_lora'][side]:.2f} ({side})" for side in ("ours", "peft"))
            lines.append(f"{one['tokens']} x {one['n']} -> {one['m']}: DoRA over LoRA {sides}")
        for kind in PASSES if "forward_seconds" in one else ():
            least = ", ".join(f"{side} {1e6 * value['min']:.0f} µs" for side, value in one[kind].items())
            lines.append(f"{PASSES[kind]}, {_kind(one)}, minima: {least}")
    return lines


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=2048, help="of `layers`")
    parser.add_argument("--form", default="auto", help="of the large products, as `ops.use_form` takes it")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")


SUBJECT = Subject(
    name="linear",
    about="The fused LoRA layer against PEFT's, torch.compile of PEFT's and hand-written passes; outputs and all "
    "gradients must be PEFT's.",
    cases={"layers": layers, "call": call, "dora": dora},
    rows=rows,
    notes=notes,
    full=("layers", "call", "dora"),
    quick=("layers", "call", "dora"),
    rounds=9,
    options=_options,
)
