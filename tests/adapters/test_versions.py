"""Supported versions of PEFT: the floor is one number, and an older one is named before anything of it is used."""

import re
from importlib import metadata

import peft
import peft_matrix
import pytest
import torch

import lora_kernels as lk
from lora_kernels.adapters.view import MINIMUM, require_peft
from tests.adapters import peft_files
from tests.adapters.start_models import wrapped
from tests.statistics.models import tiny_llama


@pytest.fixture
def asked_again():
    require_peft.cache_clear()
    yield
    require_peft.cache_clear()


def minor(version):
    return tuple(map(int, version.split(".")[:2]))


def test_the_floor_is_the_same_everywhere():
    floor = re.search(r'^peft = \["peft>=(.*?)"', (peft_matrix.ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert minor(floor) == MINIMUM
    newest = re.search(r"^peft==(.*)$", (peft_matrix.ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    versions = [minor(each.peft) for each in peft_matrix.ENVIRONMENTS]
    assert sorted(set(versions)) == [(0, number) for number in range(MINIMUM[1], minor(newest)[1] + 1)]
    assert peft_matrix.ENVIRONMENTS[-1].peft == newest


CALLS = {
    "accelerate": lk.accelerate,
    "restore": lk.restore,
    "initialize": lambda model: lk.initialize(model, method="pissa"),
    "collect": lambda model: lk.collect(model, []),
    "export": lambda model: lk.export(model, "nowhere"),
    "load": lambda model: lk.load(tiny_llama(), "nowhere"),
    "attach": lambda model: lk.LoraDash().attach(model),
    "create_lora_pro_optimizer": lambda model: lk.create_lora_pro_optimizer(model, lr=1e-3),
    "diagnose": lk.diagnose,
}


@pytest.mark.parametrize("call", CALLS)
def test_an_older_version_is_named(monkeypatch, asked_again, call):
    model = wrapped()
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"peft 0\.17\.1 is installed, but lora_kernels needs peft>=0\.18: pip"):
        CALLS[call](model)


@pytest.mark.parametrize(("version", "good"), [("0.18.0.dev0", True), ("1.0", True), ("0.9.0", False), ("?", True)])
def test_versions_are_numbers(monkeypatch, asked_again, version, good):
    monkeypatch.setattr(peft, "__version__", version)
    if good:
        require_peft()
    else:
        with pytest.raises(ImportError, match=r"peft 0\.9\.0 is installed"):
            require_peft()


def test_written_files_are_read(tmp_path):
    peft_files.write(tmp_path)
    peft_files.read(tmp_path)
    torch.save(torch.load(tmp_path / "ranks" / "logits.pt") * 1.001, tmp_path / "ranks" / "logits.pt")
    with pytest.raises(AssertionError, match="ranks"):
        peft_files.read(tmp_path)


def test_no_peft_at_all(monkeypatch, asked_again):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.delattr(peft, "__version__")
    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"peft is not installed, .* pip install 'lora_kernels\[peft\]'"):
        require_peft()
