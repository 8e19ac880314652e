"""All singular triplets of a weight: against float64, where they are hardest to tell apart, and from the disk."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.linalg import core_basis


def made(m, n, sigma):
    torch.manual_seed(1)
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k).double()).Q for size in (m, n))
    return (u * sigma) @ v.mT, u, v


def assert_decomposes(weight, found, tolerance):
    u, s, vh = (each.double() for each in found)
    k, scale = min(weight.shape), float(s[0]) if float(s[0]) > 0 else 1.0
    assert u.shape == (weight.shape[0], k) and s.shape == (k,) and vh.shape == (k, weight.shape[1])
    assert float((u * s @ vh - weight.double()).abs().max()) < tolerance * scale
    for basis in (u.mT, vh):
        assert float((basis @ basis.mT - torch.eye(k).double()).abs().max()) < max(tolerance, 1e-13)
    assert bool((s[:-1] >= s[1:]).all()) and bool((s >= 0).all())


@pytest.mark.parametrize(("m", "n"), [(31, 17), (17, 31), (23, 23), (1, 7), (7, 1), (1, 1)])
def test_any_shape(m, n):
    weight = torch.randn(m, n).double()
    assert_decomposes(weight, core_basis(weight), 1e-12)
    narrow = core_basis(weight.float())
    assert {each.dtype for each in narrow} == {torch.float32}
    assert_decomposes(weight.float(), narrow, 1e-5)
    assert core_basis(weight.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
def test_directions_of_small_singular_values(shape):
    """Down to 1e-6 of the largest, whose squares are the rounding of the Gram matrix times 1e4."""
    sigma = torch.logspace(0, -6, 40).double()
    weight, u, v = made(*shape, sigma)
    found = core_basis(weight)
    assert_decomposes(weight, found, 1e-12)
    assert float(((found[1] - sigma).abs() / sigma).max()) < 1e-7
    overlap = (found[0].mT @ u).diagonal() * (found[2] @ v).diagonal()  # signs are free, but paired
    assert float((1 - overlap).max()) < 1e-10


def test_rank_deficient_and_zero():
    sigma = torch.cat((torch.linspace(2.0, 1.0, 10), torch.zeros(8))).double()
    weight, _, _ = made(25, 18, sigma)
    found = core_basis(weight)
    assert_decomposes(weight, found, 1e-12)
    assert float(found[1][10:].max()) < 1e-13
    assert_decomposes(torch.zeros(5, 4), core_basis(torch.zeros(5, 4)), 1e-12)


def test_repeatable():
    weight = torch.randn(19, 12)
    assert all(torch.equal(one, other) for one, other in zip(core_basis(weight), core_basis(weight), strict=True))


def test_kept_on_disk_by_the_values_of_the_weight(tmp_path, monkeypatch):
    weight = torch.randn(9, 5)
    first = core_basis(weight, str(tmp_path))
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    again = core_basis(weight.clone(), str(tmp_path))
    assert not calls and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    core_basis(weight + 1, str(tmp_path))
    core_basis(weight.double(), str(tmp_path))
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    damaged = core_basis(weight, str(tmp_path))
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(first, damaged, strict=True))


def test_a_file_of_another_weight_is_refused(tmp_path):
    weight = torch.randn(9, 5)
    core_basis(weight, str(tmp_path))
    (file,) = tmp_path.iterdir()
    kept = load_file(str(file))
    save_file({**kept, "s": kept["s"] * 1.01}, str(file))
    with pytest.raises(ValueError, match="another weight"):
        core_basis(weight, str(tmp_path))
    save_file({**kept, "s": kept["s"][:4].clone()}, str(file))
    with pytest.raises(ValueError, match="another shape"):
        core_basis(weight, str(tmp_path))


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        core_basis(torch.randn(4, 3), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_errors():
    with pytest.raises(ValueError, match="must be a matrix"):
        core_basis(torch.zeros(3))
    bad = torch.zeros(3, 3)
    bad[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        core_basis(bad)
