"""GPUs that no kernel was compiled for: every backend but torch's says so, and nothing is launched."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from lora_kernels.ops import _backend, _ext
from lora_kernels.ops._op import OPS
from lora_kernels.ops.small_linalg import drivers


@pytest.fixture
def gpu(monkeypatch):
    """Stands for a GPU of a compute capability."""

    def of(capability):
        _backend._too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        return torch.device("cuda", 0)

    yield of
    _backend._too_old.cache_clear()


@pytest.mark.skipif(torch.version.hip is not None, reason="capabilities of NVIDIA chips")
@pytest.mark.parametrize("capability, usable", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_triton_kernels_are_for_chips_that_they_are_compiled_for(gpu, capability, usable):
    pytest.importorskip("triton")
    reason = _backend.triton_refuses(gpu(capability))
    assert reason is None if usable else f"has {capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize("limit", [0, 40])
def test_no_binary_is_no_launch(gpu, monkeypatch, limit):
    limits = dict.fromkeys((f"{name}_cuda_limit" for name in ("eigh", "sylvester")), lambda size: limit)
    module = SimpleNamespace(**limits, build_info=lambda: {"cuda_archs": "sm_80 sm_90"})
    monkeypatch.setattr(_ext, "load", lambda: (module, None))
    device, kernels = gpu((7, 5)), ("eigh", "sylvester")
    reason = drivers._order_refuses(device, 41, kernels, torch.float32)
    if limit:
        assert reason == "order 41 exceeds the 40 that fit in shared memory"
        assert drivers._order_refuses(device, 40, kernels, torch.float32) is None
    else:
        assert "no code for compute capability 7.5 (only sm_80 sm_90)" in reason


def test_auto_takes_torch_on_an_old_gpu(gpu, monkeypatch):
    pytest.importorskip("triton")
    device = gpu((7, 5))
    monkeypatch.setattr("lora_kernels.ops._op.device_of", lambda args: device)
    x = torch.ones(2, 3)
    assert OPS["covariance_"].choose("auto", torch.zeros(3, 3), x, None, None) == "torch"
    with pytest.raises(_backend.Refused, match=r"compute capability 8\.0, and cuda:0 has 7\.5"):
        OPS["covariance_"].choose("triton", torch.zeros(3, 3), x, None, None)
