"""How the layer's large product and its low-rank term are put together, and which way is chosen.

    expand_first    write bias + t B^T, then let the library's product accumulate onto it; rounds once
    expand_add      the library's product, then add t B^T in place; rounds twice
    gemm            one Triton kernel for both; rounds once (a frozen pair beside a masked term is added in place)

Which is fastest depends on chip and shape, so the choice is what was measured: the user's table (`lora-kernels tune`),
else the one that ships, else `expand_first`. The op makes it, where sizes are known, from nothing that differs
between a forward pass and its recomputation; tables are read once, at first use.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lora_kernels._checks import check_choice
from lora_kernels.ops._backend import triton_refuses
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops.lora_linear import table
from lora_kernels.ops.lora_linear.config import CONFIGS, GemmConfig
from lora_kernels.ops.lora_linear.table import FORMS, Key, Record
from lora_kernels.ops.skinny import _launch

DEFAULT = "expand_first"

override: str | None = None


@dataclass(frozen=True)
class Choice:
    """A form, and where the choice is from."""

    form: str  # one of `FORMS`
    config: GemmConfig | None = None  # of the Triton kernel; `None` for its default
    origin: str = "default"  # `default`, `forced`, or the table it is from

    @property
    def name(self) -> str:
        """As in tables of times."""
        return self.form if self.config is None else f"{self.form} {self.config.name}"


class Term(NamedTuple):
    """A low-rank matrix: `drop(t b)`."""

    t: torch.Tensor  # `(tokens, r)`
    b: torch.Tensor  # `(r, d)`
    mask: Mask | None = None  # of the product


@dataclass(frozen=True)
class Tables:
    """The records of the tables."""

    entries: dict[Key, tuple[Record, str]]  # with the table's name
    counts: dict[Path, tuple[int, int, int]]  # per file: records used, of other versions, of other chips
    problems: dict[Path, str]  # per file that cannot be read, why


@contextlib.contextmanager
def use_form(name: str) -> Iterator[None]:
    """Run every LoRA layer inside the block in one form, in all threads; for tests and measurements.

    The form is looked up whenever a product runs: a backward pass, or a recomputation, takes the form of the block it
    runs in, so a block should hold all of a training step.

    Args:
        name: `expand_first`, `expand_add`, `gemm`, or `auto` for what was measured. Where a form cannot run, the layer
            raises `RuntimeError` with the reason. A layer without a weight of its own (`lora_delta`) has but one form.

    Yields:
        Nothing.

    Raises:
        ValueError: on another name.
    """
    global override
    check_choice("form", name, ("auto", *FORMS))
    before, override = override, None if name == "auto" else name
    try:
        yield
    finally:
        override = before


@functools.lru_cache(maxsize=64)
def chip_name(device: torch.device) -> str:
    """What the tables call a device: a GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def gemm_refuses(device: torch.device, dtype: torch.dtype, backend: str = "triton") -> str | None:
    """Why the Triton kernel cannot take a product whose skinny products run on `backend`, or `None` if it can."""
    missing = triton_refuses(device)
    if missing is not None:
        return missing
    if dtype == torch.float64:
        return "takes no float64"
    return None if backend == "triton" else f"a Triton kernel, but the call runs on backend {backend!r}"


@functools.cache
def tables() -> Tables:
    """The tables, the user's before the shipped one, read at first use; a malformed one is warned of and not used."""
    entries: dict[Key, tuple[Record, str]] = {}
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    counts, problems, chips = {}, {}, {chip_name(device) for device in devices}
    for path, name in ((table.PACKAGED, "shipped"), (table.cache_file(), "tuned")):
        if name == "tuned" and not path.exists():
            continue
        try:
            records = table.read(path)
        except ValueError as error:
            problems[path] = str(error)
            warnings.warn(f"{error}; LoRA layers run in their default form", RuntimeWarning, stacklevel=2)
            continue
        current = [record for record in records if table.is_current(record)]
        usable = [record for record in current if record.key.chip in chips]
        counts[path] = len(usable), len(records) - len(current), len(current) - len(usable)
        entries |= {record.key: (record, name) for record in usable}
    return Tables(entries, counts, problems)


_chosen: dict[tuple[object, ...], Choice] = {}


@functools.cache
def untuned() -> bool:
    """Whether no table has a record for this machine, so that products have their default form unless one is forced."""
    return not tables().entries


def forget() -> None:
    """Read the tables again at the next use."""
    _chosen.clear()
    tables.cache_clear()
    untuned.cache_clear()


def choose(
    product: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    rank: int,
    dropout: bool,
    backend: str,
) -> Choice:
    """The form of a product of tokens, n and m: forced (or an error), or measured and able to run, or the default."""
    if override is not None:
        reason = gemm_refuses(device, dtype, backend) if override == "gemm" else None
        if reason is not None:
            raise RuntimeError(f"the form {override!r} cannot run: {reason}")
        return Choice(override, origin="forced")
    tokens, n, m = sizes
    small = (product, device, dtype, table.bucket(tokens), n, m, table.pad_rank(rank), dropout, backend)
    choice = _chosen.get(small)
    if choice is None:
        numbers = (table.bucket(tokens), n, m, table.pad_rank(rank), dropout)
        known = tables().entries.get(Key(chip_name(device), str(dtype).removeprefix("torch."), *numbers, product))
        choice = Choice(DEFAULT)
        if known is not None and (known[0].form != "gemm" or gemm_refuses(device, dtype, backend) is None):
            record, origin = known
            choice = Choice(record.form, None if record.config is None else CONFIGS[record.config], origin)
        _chosen[small] = choice
    return choice


def combine(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    terms: Sequence[Term],
    *,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    backend: str,
    choice: Choice,
) -> None:
    """`out = (base or bias) + left right + the terms`, of one dtype.

    `out` and `base` `(tokens, d)` and `left` `(tokens, k)` have unit column stride, `right` `(k, d)` any strides,
    `bias` is `(d,)` contiguous. Without `right`, which alone may have a base, the terms have but one form.
    """
    if right is None or choice.form == "expand_first":
        for number, (t, b, mask) in enumerate(terms):
            start, row = (out, None) if number else (base, bias)
            _launch.expand(out, t, b, base=start, bias=row, mask=mask, backend=backend)
        if right is not None:
            out.addmm_(left, right)
        return
    if choice.form == "expand_add":
        if bias is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(bias, left, right, out=out)
    else:
        # Imported here: without Triton the other forms still work.
        from lora_kernels.ops.lora_linear import kernel  # noqa: PLC0415

        (t, b, mask), *terms = terms
        kernel.linear(
            out, left, right, t, _launch.cast(b, t.dtype), bias, mask, kernel.fitting(choice.config, out, left, right)
        )
    for t, b, mask in terms:
        _launch.expand(out, t, b, base=out, mask=mask, backend=backend)
