"""`tune`: which form of the LoRA layers' large products is fastest on this device, measured and written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn

from lora_kernels._checks import FLOATS, as_device, check_range
from lora_kernels._files import locked
from lora_kernels.api.plain import linear_features
from lora_kernels.api.transformers import linear_targets
from lora_kernels.ops.lora_linear import forms, table
from lora_kernels.ops.lora_linear.measure import FLOOR, Measurement, measure
from lora_kernels.ops.lora_linear.table import FORMS, Key
from lora_kernels.reports import Report, Table

_NOTE = "Written by `lora-kernels tune`: median seconds of the forms of a LoRA layer's large product, and the fastest."


@dataclass(frozen=True)
class TuneReport(Report):
    """The result of `tune`.

    Attributes:
        measurements: by shape, tokens, rank and product.
        path: the file they are in.
    """

    measurements: tuple[Measurement, ...]
    path: Path

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    @property
    def ok(self) -> bool:
        """Whether every form that ran gave right numbers."""
        return not any(measurement.wrong for measurement in self.measurements)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads = ("tokens, n -> m", "r", "product", *FORMS, "product alone", "chosen", "over alone", "GFLOP", "MB")
        rows = Table(*heads, title="ms, medians; the floor is the library's product alone")
        reasons: dict[str, None] = {}
        for case in self.measurements:
            by_form = {form: [time for name, time in case.seconds.items() if name.split()[0] == form] for form in FORMS}
            best = [min(times, default=None) for times in by_form.values()]
            times = ["-" if value is None else f"{1e3 * value:.3f}" for value in (*best, case.seconds[FLOOR])]
            rows.add_row(
                f"{case.tokens}, {case.key.n} -> {case.key.m}",
                str(case.rank),
                case.key.product + " dropout" * case.key.dropout,
                *times,
                case.choice.name,
                f"{case.seconds[case.choice.name] / case.seconds[FLOOR]:.2f}",
                f"{case.flops / 1e9:.1f}",
                f"{case.bytes / 1e6:.1f}",
            )
            reasons |= dict.fromkeys(f"{name}: {reason}" for name, reason in case.refused.items())
        yield rows
        yield from reasons
        yield f"written to {self.path}"


def _numbers(name: str, given: int | Sequence[int]) -> list[int]:
    values = list(given) if isinstance(given, Sequence) else [given]
    if not values:
        raise ValueError(f"{name} is empty, but must hold at least one number")
    for value in values:
        check_range(name, value, low=1, integer=True)
    return values


def _shapes(model_or_shapes: nn.Module | Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    if isinstance(model_or_shapes, nn.Module):
        model = model_or_shapes
        names = [name for name in linear_targets(model) if ".lora_" not in f".{name}"]
        names = [name for name in names if name.endswith(".base_layer")] or names
        if not (features := {linear_features(model.get_submodule(name)) for name in names}):
            raise ValueError(f"model ({type(model).__name__}) has no linear layer")
        return sorted(shape for shape in features if shape is not None)
    if not (shapes := [tuple(shape) for shape in model_or_shapes]):
        raise ValueError("shapes is empty, but must hold at least one pair of inputs and outputs")
    for shape in shapes:
        if len(shape) != 2:
            raise ValueError(f"shapes holds {shape!r}, but must hold pairs of inputs and outputs")
        for value in shape:
            check_range("shapes", value, low=1, integer=True)
    return [(shape[0], shape[1]) for shape in dict.fromkeys(shapes)]


def _device(given: torch.device | str | None) -> torch.device:
    device = as_device("device", given if given is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}, but must be a CPU or a CUDA (or ROCm) device")
    return torch.empty(0, device=device).device  # with its index


def tune(
    model_or_shapes: nn.Module | Iterable[tuple[int, int]],
    *,
    tokens: int | Sequence[int] | None = None,
    rank: int | Sequence[int] = 16,
    dtype: torch.dtype | None = None,
    dropout: bool = False,
    device: torch.device | str | None = None,
    rounds: int = 20,
    out: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> TuneReport:
    """Measure the forms of the LoRA layer's products on a device, and write the fastest into a table.

    LoRA layers read the user's table at first use, and again after this. An entry holds for its chip, dtype and shape,
    for token counts and ranks up to the same power of two, with or without dropout, and for a minor version of torch
    and Triton. (On a CPU it was measured with some number of threads, too.) The file is written after every product.

    Args:
        model_or_shapes: a model, for its LoRA layers or else all linear ones but the output layer (its weights are not
            used); or pairs of inputs and outputs.
        tokens: rows of x, batch size times length: one number, or several; by default 8192 on a GPU, else 1024.
        rank: r, and that of a frozen pair added; likewise.
        dtype: of the arithmetic; by default bfloat16 on a GPU, else float32.
        dropout: whether the adapter's input is dropped (which the backward pass masks again).
        device: by default the GPU if there is one.
        rounds: timed calls of each form.
        out: the table's file, which keeps its other records; by default the one that LoRA layers read,
            `$LORA_KERNELS_CACHE` or `lora_kernels/tuned.json` in the user's cache folder.
        progress: called with a line per product, before it is measured.

    Returns:
        What was measured, for `rich` to print. Forms that gave wrong numbers are never chosen; `ok` is false then.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong number, or a file that is there and is no such table.
        RuntimeError: if the default form fails, or gives wrong numbers.
    """
    path = (table.cache_file() if out is None else Path(out)).resolve()
    if path.exists():
        table.read(path)  # before anything is measured
    where = _device(device)
    kind = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    if kind not in FLOATS:
        raise TypeError(f"dtype is {kind}, but must be one of {', '.join(map(str, FLOATS))}")
    check_range("rounds", rounds, low=1, integer=True)
    every = [
        (shape, count, width)
        for shape in _shapes(model_or_shapes)
        for count in _numbers("tokens", (8192 if where.type == "cuda" else 1024) if tokens is None else tokens)
        for width in _numbers("rank", rank)
    ]
    measurements = []
    for (n, m), count, width in every:
        for product in table.PRODUCTS:
            numbers = (table.bucket(count), n, m, table.pad_rank(width), dropout and product == "backward")
            key = Key(forms.chip_name(where), str(kind).removeprefix("torch."), *numbers, product)
            if progress is not None:
                progress(f"{product}: {count} tokens, {n} -> {m}, rank {width}")
            measurement = measure(key, tokens=count, rank=width, device=where, dtype=kind, rounds=rounds)
            measurements.append(measurement)
            try:
                with locked(path):
                    known = table.read(path) if path.exists() else []
                    table.write(path, table.merged(known, [measurement.record()]), _NOTE)
            except OSError as error:
                raise ValueError(f"out is {str(path)!r}, which cannot be written: {error}") from error
            forms.forget()
    return TuneReport(tuple(measurements), path)
