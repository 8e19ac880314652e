"""Launches of Triton kernels that skip Triton's front end where the same launch was made before.

`kernel[grid](...)` specialises on the types of arguments, whether addresses are multiples of 16, and values of numbers,
at each call: 10 to 20 us, where the launch itself takes 3. So a launch with the numbers and dtypes of an earlier one,
and all addresses multiples of 16, runs what was compiled for that one. Numbers that no code depends on, as they are
floats or not specialised, may differ. Interpreted kernels, AMD's (there, sizes of tensors count too) and versions of
Triton in which this was not checked always go through the front end.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from triton.runtime import JITFunction, driver

from lora_kernels.ops._tiles import build_platform
from lora_kernels.ops._tl import INTERPRETED

KNOWN_TRITON = ((3, 4), (3, 5), (3, 6), (3, 7))
_MOST_KEPT = 4096  # launches of one kernel: numbers of tokens differ from batch to batch
_HOOKS: Any = getattr(getattr(triton, "knobs", None), "runtime", None)  # hooks are chains; in Triton 3.4 one or `None`


class Constants:
    """Compile-time arguments, which kernels take last, and what was compiled for them."""

    __slots__ = ("arguments", "compiled")

    def __init__(self, warps: int = 4, stages: int = 3, **values: Any) -> None:
        """Values are by the names of the kernel's parameters."""
        self.arguments = {**values, "num_warps": warps, "num_stages": stages}
        self.compiled: dict[tuple[Any, ...], Any] = {}


constants_of = functools.lru_cache(maxsize=1024)(Constants)  # the same object at every call


@functools.cache
def prepares() -> bool:
    """Whether launches may skip the front end, with this Triton and this build of torch."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return not INTERPRETED and build_platform() == "cuda" and version in KNOWN_TRITON


def hooked() -> bool:
    """Whether a profiler is to hear of launches."""
    before, after = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[float, ...],
    constants: Constants,
    free: tuple[float, ...] = (),  # floats, and numbers of 32 bits that the kernel does not specialise on
) -> None:
    """`kernel[grid](*tensors, *numbers, *free, **constants)` on the current stream, on the tensors' current device."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    bits = 0
    for address in addresses:
        bits |= address
    device, aligned = tensors[0].get_device(), bits % 16 == 0
    key = (id(kernel), device, numbers, *[tensor.dtype for tensor in tensors])
    compiled: Any = constants.compiled.get(key) if aligned else None
    if compiled is not None:
        stream = driver.active.get_current_stream(device)
        kernel, run, function, metadata, tail = compiled
        if hooked():
            kernel[grid](*addresses, *numbers, *free, *tail, stream=stream)
        else:
            run(*grid, stream, function, metadata, None, None, None, *addresses, *numbers, *free, *tail)
        return
    compiled = kernel[grid](*tensors, *numbers, *free, **constants.arguments)
    if aligned and type(kernel) is JITFunction and prepares():
        tail = tuple(constants.arguments[name] for name in kernel.arg_names[len(tensors) + len(numbers) + len(free) :])
        if len(constants.compiled) >= _MOST_KEPT:
            constants.compiled.clear()
        constants.compiled[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, tail
