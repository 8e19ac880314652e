"""Triton's own launch path on a driver that runs nothing: what is launched, how, and what that costs the host.

For processes in which Triton was imported without its interpreter. Tensors lie on the CPU.
"""

from __future__ import annotations

import contextlib
import types
from unittest import mock

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

NO_STREAM = 7


class FakeDriver(DriverBase):
    """A device of capability 9.0."""

    def __init__(self):
        self.utils = types.SimpleNamespace()
        self.target = GPUTarget("cuda", 90, 32)

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return None

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return NO_STREAM

    def get_device_interface(self):
        return torch.cuda

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass


class Launches(list):
    """The launches so far: a compiled kernel, its grid and its arguments each."""

    compiled = 0  # how many were compiled

    def names(self):
        """Of their kernels."""
        return [kernel.src.fn.__name__ for kernel, _, _ in self]


LAUNCHES = Launches()  # one list: Triton keeps compiled kernels, which write there


@contextlib.contextmanager
def fake_gpu():
    """Kernels are compiled to nothing and launched to nothing; gives the `Launches`."""
    launches = LAUNCHES
    launches.clear()
    launches.compiled = 0

    def compiled(src, target=None, options=None, **_):
        kernel = object.__new__(triton.compiler.CompiledKernel)
        kernel.src, kernel.hash, kernel.name = src, "", src.fn.__name__
        kernel.metadata = types.SimpleNamespace(**options, shared=0)
        kernel.packed_metadata, kernel.module, kernel.function = (), 1, 0

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            assert stream == NO_STREAM
            if enter is not None:
                enter(launch_metadata)
            launches.append((kernel, (x, y, z), args))

        kernel._run = run
        if not hasattr(triton.compiler.CompiledKernel, "run"):  # Triton 3.4
            kernel.run = run
        launches.compiled += 1
        return kernel

    driver.set_active(FakeDriver())
    with mock.patch.object(triton.compiler, "compile", compiled):
        yield launches
