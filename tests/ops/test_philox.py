import pytest
import torch

from lora_kernels.ops import _philox

# Known answers of the Random123 distribution for philox4x32 with 10 rounds.
KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("seed, counter, answer", KNOWN)
def test_known_answers(seed, counter, answer):
    words = _philox.philox4x32(seed, [torch.tensor([word]) for word in counter])
    assert tuple(int(word) for word in words) == answer


def test_an_element_depends_on_its_position_alone():
    whole = _philox.normal(40, 37, seed=5, stream=3)
    assert torch.equal(_philox.normal(20, 11, seed=5, stream=3), whole[:20, :11])
    assert not torch.equal(_philox.normal(40, 37, seed=5, stream=4), whole)
    assert not torch.equal(_philox.normal(40, 37, seed=6, stream=3), whole)


def test_normal_moments():
    draws = _philox.normal(1000, 1000, seed=1)
    count = draws.numel()
    assert abs(float(draws.mean())) < 5 / count**0.5
    assert abs(float(draws.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((draws**4).mean()) - 3) < 5 * (96 / count) ** 0.5
    assert abs(float((draws.abs() > 3).double().mean()) - 0.0027) < 5 * (0.0027 / count) ** 0.5


def test_errors():
    with pytest.raises(ValueError, match="4 words"):
        _philox.philox4x32(0, [torch.zeros(1)])
    with pytest.raises(ValueError, match="64-bit"):
        _philox.normal(1, 1, seed=2**64)
