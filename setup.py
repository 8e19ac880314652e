"""Builds `lora_kernels._C`; everything else is in pyproject.toml.

LORA_KERNELS_BUILD_EXT=0 leaves the extension out, LORA_KERNELS_CUDA=0 its CUDA part. Without a C++ compiler the
install is pure Python, with one warning.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build_support  # noqa: E402  (lives beside this file, which is not on the path of an isolated build)


class NinjaBuild(build_ext):
    """Hands the extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, only what changed."""
        plan = build_support.make_plan()
        assert plan is not None  # the extension is declared only where there is a plan
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build_support.run_ninja(build_support.write_ninja(plan, Path(self.build_temp).resolve(), output))


def extensions() -> list[Extension]:
    """The extension, or nothing where it is switched off or cannot be built."""
    if os.environ.get("LORA_KERNELS_BUILD_EXT", "1") == "0":
        return []
    if build_support.find_cxx() is None:
        print(
            "warning: lora_kernels: no C++ compiler found (CXX, c++, g++, clang++): installing without the compiled "
            "CPU/CUDA kernels; the plain torch backend is used instead",
            file=sys.stderr,
        )
        return []
    return [Extension("lora_kernels._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
