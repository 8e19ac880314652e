"""Every form of every Triton kernel that the ops launch: found by launching them on tensors without memory.

`launch_all` reaches all of them: it calls each launch function with each combination of its flags, at sizes on both
sides of every bound. What would be launched is written down, once per chip, whose capability and number of
multiprocessors decide on configurations and on parts of sums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from lora_kernels import ops  # noqa: F401  (fills OPS)
from lora_kernels.ops import _reduce, _tiles
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._launching import Constants
from lora_kernels.ops._op import OPS
from lora_kernels.ops._rows import Selection
from lora_kernels.ops.covariance import kernel as covariance
from lora_kernels.ops.gradient_statistics import kernel as gradients
from lora_kernels.ops.grouped_lora import kernel as grouped
from lora_kernels.ops.lora_linear import config as linear_config
from lora_kernels.ops.lora_linear import kernel as linear
from lora_kernels.ops.lora_pro_adam import config as adam_config
from lora_kernels.ops.lora_pro_adam import kernel as adam
from lora_kernels.ops.random_matrix import kernel as draws
from lora_kernels.ops.random_matrix.reference import KINDS, Omega
from lora_kernels.ops.sketch import kernel as sketch
from lora_kernels.ops.skinny import config as skinny_config
from lora_kernels.ops.skinny import kernel as skinny

KERNEL_MODULES = sorted({_reduce.__name__, *(op.kernel_module for op in OPS.values() if op.kernel_module is not None)})
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BOTH = (False, True)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A compile target.

    Attributes:
        name: as shown.
        target: for Triton.
        processors: multiprocessors of its largest chip.
        shared: bytes of shared memory that one program may use.
        matrix: the instruction of its matrix units.
        stores: instructions that write global memory.
    """

    name: str
    target: GPUTarget
    processors: int
    shared: int
    matrix: str
    stores: tuple[str, ...] = ("st.global", "red.global", "atom.global", "cp.async.bulk.tensor")

    @property
    def capability(self) -> tuple[int, int] | None:
        """As `_tiles.capability_of` gives it."""
        return None if self.target.backend == "hip" else divmod(self.target.arch, 10)


_AMD_STORES = ("global_store", "buffer_store", "flat_store")
CHIPS = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 108, 166_912, "mma.sync"),
    Chip("sm_86", GPUTarget("cuda", 86, 32), 84, 101_376, "mma.sync"),
    Chip("sm_89", GPUTarget("cuda", 89, 32), 142, 101_376, "mma.sync"),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 132, 232_448, "wgmma.mma_async"),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 148, 232_448, "tcgen05.mma"),
    Chip("sm_120", GPUTarget("cuda", 120, 32), 188, 101_376, "mma.sync"),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 304, 65_536, "v_mfma", _AMD_STORES),
)


@contextlib.contextmanager
def recorded(chip: Chip) -> Iterator[dict[object, dict[str, Any]]]:
    """Launches write down on what they depend instead of being made, as on a chip; not with tensors that have memory.

    A description has the `kernel`, its `signature` (types of arguments), `constexprs`, `warps` and `stages`.
    """
    found: dict[object, dict[str, Any]] = {}

    def launch(
        kernel: Any, _grid: object, tensors: tuple[torch.Tensor, ...], numbers: tuple[float, ...],
        constants: Constants, free: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        numbers += free
        kinds = (kernel, *(tensor.dtype for tensor in tensors), *map(type, numbers), *constants.arguments.items())
        if kinds in found:
            return
        types = [TYPES[tensor.dtype] for tensor in tensors]
        types += ["fp32" if isinstance(number, float) else "i32" for number in numbers]
        constexprs = dict(constants.arguments)
        launched = {"warps": constexprs.pop("num_warps"), "stages": constexprs.pop("num_stages")}
        if "UPCAST" in constexprs:
            constexprs["UPCAST"] = False
        assert [*kernel.arg_names[len(types) :]] == [name for name in kernel.arg_names if name in constexprs]
        signature = dict(zip(kernel.arg_names, types, strict=False))
        found[kinds] = {"kernel": kernel, "signature": signature, "constexprs": constexprs, **launched}

    fakes = {
        "launch": launch, "processors": lambda _: chip.processors, "capability_of": lambda _: chip.capability,
        "build_platform": lambda: chip.target.backend,
    }  # fmt: skip
    modules = [_tiles, adam_config, skinny_config, *map(importlib.import_module, KERNEL_MODULES)]
    with contextlib.ExitStack() as stack:
        for module, (name, fake) in itertools.product(modules, fakes.items()):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, fake))
        for cached in (skinny._plan, skinny_config.shrink_config):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield found


def launch_all(chip: Chip, aligned: bool) -> None:
    """Launch every form; `aligned`, or else with sizes and strides that are not multiples of 16."""
    odd = 0 if aligned else 1

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    def factor(transposed: bool, *sizes: int, dtype: torch.dtype) -> torch.Tensor:
        return new(*sizes[:-2], *sizes[:-3:-1], dtype=dtype).mT if transposed else new(*sizes, dtype=dtype)

    few, many, wide = 64, 2**16, 4096 + odd
    seed = new(1, dtype=torch.int64)
    masks = (None, Mask(1000, seed, 3))
    for dtype in DTYPES:
        cast = functools.partial(new, dtype=dtype)
        for (index, weight), tokens in itertools.product(itertools.product(BOTH, BOTH), (few, many)):
            rows = Selection(new(tokens, dtype=torch.int64) if index else None, new(tokens) if weight else None)
            for height, width in ((64, 64), (1024, 1024), (1024, 8192), (3072, 3072), (8192, 8192)):
                g, x = cast(tokens, height + odd), cast(tokens, width + odd)
                gradients.gradient_statistics(new(g.shape[1], x.shape[1]), g, x, *rows)
                if height == width:
                    covariance.covariance(new(x.shape[1], x.shape[1]), x, rows, new(x.shape[1]))
            x = cast(tokens, wide)
            for kind, k in itertools.product(KINDS if tokens == few else (), (16, 32, 64)):
                sketch.sketch(new(wide, k), x, x, rows, None, Omega(kind, 1, 2))
        for weights in (None, new(64)):
            gradients.both(None, new(wide), cast(64, wide), None, None, weights)
        for kind in KINDS:
            draws.random_matrix(cast(64, wide), kind, 1, 2, 3)
        # Tokens of one tile, of flat tiles, and more.
        lengths = (few, 32 * chip.processors, many)
        for rank, mask, tokens in itertools.product((16, 32, 64), masks, lengths):
            x, t = cast(tokens, wide), cast(tokens, rank)
            for kind, transposed in itertools.product(
                dict.fromkeys((dtype, torch.float32)), BOTH if mask is None else (False,)
            ):
                out = factor(transposed, rank, wide, dtype=kind)
                skinny.tsreduce(out, t, x, mask)
                skinny.tsreduce_pair((new(rank, wide, dtype=kind),) * 2, t, x, mask, t, x)
                if kind != dtype and chip.target.backend == "hip":  # there, factors are cast before
                    continue
                skinny.shrink(t, x, out, 0.5, mask)
                for base, bias in ((None, None), (None, cast(wide)), (x, None)):
                    skinny.expand(x, t, out, base, bias, mask)
        offsets = new(5, dtype=torch.int32 if aligned else torch.int64)
        x = cast(many, wide)
        oriented = ((None, False), (masks[1], False), (None, True))
        for rank, (mask, transposed) in itertools.product((16, 32, 64), oriented):
            t, a = cast(many, rank), factor(transposed, 4, rank, wide, dtype=dtype)
            grouped.shrink(t, x, offsets, a, 0.5, mask)
            for out in dict.fromkeys((dtype, torch.float32, torch.bfloat16)):
                sums = factor(transposed, 4, rank, wide, dtype=out)
                grouped.reduce(sums, t, x, offsets, mask)
            # The forward product adds, and has no mask; the backward one starts anew, and A is not transposed.
            for base in (x,) * (mask is None) + (None,) * (not transposed):
                grouped.expand(x, t, offsets, a, base, mask)
        for config in linear_config.candidates(dtype, aligned=aligned, capability=chip.capability):
            x, right, t = cast(few, wide), cast(wide, wide), cast(few, 16)
            for turned, transposed, bias in itertools.product(BOTH, BOTH, (None, cast(wide))):
                b = factor(transposed, 16, wide, dtype=dtype)
                for mask in masks if not transposed and bias is None else (None,):
                    linear.linear(x, x, right.mT if turned else right, t, b, bias, mask, config)
    for pair in (torch.bfloat16, torch.float16):
        draws.random_matrix(new(2, 64, wide, dtype=pair), "gaussian", 1, 2, 3)
    numbers = adam_config.Adam(scaling=0.5, beta1=0.9, beta2=0.99, eps=1e-8, step=1, row_offset=0, row_step=64)
    for rank, state in itertools.product(adam_config.RANKS, (torch.float32, torch.bfloat16)):
        left, right, moment = new(2, 64, rank), new(2, rank, wide), new(2, 64, wide, dtype=state)
        for precision in adam_config.precisions(chip.target.backend):
            with mock.patch.object(adam, "precision_for", lambda _, precision=precision: precision):
                factors = right, left, right, left
                adam.lora_pro_adam(
                    (moment, moment), factors, numbers, seed, torch.empty_like(right), torch.empty_like(left)
                )


def _name(case: dict[str, Any]) -> str:
    """The kernel, the dtypes that it meets, tile sizes, precision, warps and stages, and its flags."""
    constexprs = case["constexprs"].items()
    types = [kind for kind, _ in itertools.groupby(kind[1:] for kind in case["signature"].values() if kind[0] == "*")]
    sizes = "x".join(str(value) for _, value in constexprs if type(value) is int)
    precisions = [value for _, value in constexprs if type(value) is str and value != "ieee"]
    flags = [name.removeprefix("HAS_").lower() for name, value in constexprs if value is True and name != "ALIGNED"]
    kernel = case["kernel"].__name__.removesuffix("_kernel")
    return " ".join((kernel, *types, sizes, f"{case['warps']}w{case['stages']}s", *precisions, *flags))


def _matrix(case: dict[str, Any], platform: str) -> bool:
    """Whether the chip's own matrix instruction must be there, and not serialised.

    Where a mask meets the left operand in registers, the compiler may serialise products (C7515); fewer than 64 rows of
    a tile go to the older matrix instruction on later chips, and so do LoRA-Pro's.
    """
    constexprs, product = case["constexprs"], case["kernel"].__name__.removesuffix("_kernel").split("_")[-1]
    if "PRECISION" not in constexprs or platform == "hip":
        return "PRECISION" in constexprs
    if product == "shrink":
        return constexprs["TOKENS"] >= 64 and not constexprs.get("HAS_DROPOUT")
    return product != "adam" and (product not in ("reduce", "pair") or constexprs["RANK"] >= 64)


@functools.cache
def cases() -> tuple[dict[str, Any], ...]:
    """All forms of all kernels, for the ahead-of-time check.

    Returns:
        Per form what `recorded` writes down, and `name`, `matrix` (whether the chip's own tensor-core instruction must
        be there), `platform` (`cuda` or `hip`), `aligned` (whether sizes, strides and addresses are multiples of 16; if
        not, they may also be 1), and `chips`, which launch it.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for chip, aligned in itertools.product(CHIPS, BOTH):
        where = {"platform": chip.target.backend, "aligned": aligned}
        with recorded(chip) as launches:
            launch_all(chip, aligned)
        for key, case in launches.items():
            entry = {"name": _name(case), **case, "matrix": _matrix(case, chip.target.backend), **where, "chips": []}
            found.setdefault((key, *where.values()), entry)["chips"].append(chip.name)
    return tuple(sorted(found.values(), key=lambda case: (case["kernel"].__module__, case["name"])))
