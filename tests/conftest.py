"""Shared fixtures. Triton must know before its import whether kernels are interpreted, hence the environment first."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What was tuned on this machine must not decide what is tested.
os.environ["LORA_KERNELS_CACHE"] = os.path.join(os.path.dirname(__file__), "no-such-table.json")

import pytest
from filelock import FileLock


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():  # the files that interpret their kernels elsewhere run them here
        for item in items:
            if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":
                item.add_marker(pytest.mark.gpu)
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not `item.keywords`: the clone may lie in a folder of that name
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_collection_finish():
    """What is imported by now stays: `gc.collect`, which every training of transformers calls, is to pass over it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two_processes_ran(request, tmp_path_factory):
    """Folder of folders: what two processes have left of each module that a collected test file names as `RUN_BY_TWO`.

    One launch for all, also where several workers of pytest-xdist run the tests: most of its time goes into starting
    the processes.
    """
    from tests.torchrun import two_processes  # noqa: PLC0415

    files = {getattr(item, "module", None) for item in request.session.items}
    modules = sorted({file.RUN_BY_TWO for file in files if hasattr(file, "RUN_BY_TWO")})
    workers = "PYTEST_XDIST_WORKER" in os.environ  # the folder of each lies in the folder of all
    folder = tmp_path_factory.getbasetemp()
    out = (folder.parent if workers else folder) / "ranks"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            made = out.with_suffix(".unfinished")
            made.mkdir(exist_ok=True)
            two_processes("tests.torchrun", made, *modules)
            made.rename(out)
    return out


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every `torch.empty` is full of NaN, so that memory that is read before it is written shows."""

    def poison(function):
        def call(*args, **kwargs):
            made = function(*args, **kwargs)
            if made.dtype == torch.uint8:  # bits of a mask
                return made.fill_(0b10100101)
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-(2**15))

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius error relative to the truth."""
    truth = truth.to(torch.float64)
    return float(torch.linalg.norm(found.to(torch.float64) - truth) / torch.linalg.norm(truth).clamp_min(1e-300))
