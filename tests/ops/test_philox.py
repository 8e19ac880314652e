import pytest
import torch

from lora_kernels.ops import _philox
from lora_kernels.ops.random_matrix import reference

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
    whole = reference.random_matrix(40, 37, "gaussian", seed=5, stream=3)
    assert torch.equal(reference.random_matrix(20, 11, "gaussian", seed=5, stream=3), whole[:20, :11])
    assert not torch.equal(reference.random_matrix(40, 37, "gaussian", seed=5, stream=4), whole)
    assert not torch.equal(reference.random_matrix(40, 37, "gaussian", seed=6, stream=3), whole)


def test_normal_moments():
    draws = reference.random_matrix(1000, 1000, "gaussian", seed=1)
    count = draws.numel()
    assert abs(float(draws.mean())) < 5 / count**0.5
    assert abs(float(draws.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((draws**4).mean()) - 3) < 5 * (96 / count) ** 0.5
    assert abs(float((draws.abs() > 3).double().mean()) - 0.0027) < 5 * (0.0027 / count) ** 0.5


def test_errors():
    with pytest.raises(ValueError, match="4 words"):
        _philox.philox4x32(0, [torch.zeros(1)])
    with pytest.raises(ValueError, match="64-bit"):
        reference.random_matrix(1, 1, "gaussian", seed=2**64)


def _words_by_hand(seed, counter, rounds):
    """Philox 4x32 in Python's integers."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(rounds):
        one, two = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (two >> 32) ^ c1 ^ key0, two & 0xFFFFFFFF, (one >> 32) ^ c3 ^ key1, one & 0xFFFFFFFF
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99, 0.999999])
def test_keep_mask_is_what_it_is_said_to_be(p):
    assert _words_by_hand(KNOWN[2][0], KNOWN[2][1], 10) == KNOWN[2][2]
    seed, stream, rows, columns = 0x9E3779B97F4A7C15, 0xFFFFFFFE, 5, 21
    mask = _philox.keep_mask(rows, columns, p=p, seed=seed, stream=stream)
    threshold = min(round(p * 65536), 65535)
    for row in range(rows):
        for column in range(columns):
            word = _words_by_hand(seed, (column // 8, row, stream, 0), 7)[column % 8 // 2]
            assert bool(mask[row, column]) == ((word >> 16 * (column % 2)) & 0xFFFF >= threshold)


def test_keep_mask_in_parts_and_from_a_tensor():
    whole = _philox.keep_mask(40, 37, p=0.3, seed=2**64 - 5, stream=3)
    assert torch.equal(_philox.keep_mask(15, 11, p=0.3, seed=2**64 - 5, stream=3, first_row=20), whole[20:35, :11])
    assert torch.equal(_philox.keep_mask(40, 37, p=0.3, seed=torch.tensor([-5]), stream=3), whole)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keep_rate_and_streams(p):
    masks = [_philox.keep_mask(512, 1024, p=p, seed=11, stream=stream) for stream in (0, 1)]
    count, deviation = masks[0].numel(), (p * (1 - p)) ** 0.5
    centred = [mask.double() - (1 - _philox.keep_threshold(p) / 65536) for mask in masks]
    for each in centred:
        assert abs(float(each.mean())) < 5 * deviation / count**0.5
        assert abs(float((each[1:] * each[:-1]).mean())) < 5 * deviation**2 / count**0.5
        assert abs(float((each[:, 1:] * each[:, :-1]).mean())) < 5 * deviation**2 / count**0.5
    assert abs(float((centred[0] * centred[1]).mean())) < 5 * deviation**2 / count**0.5


def test_mean_is_kept():
    for p in (0.1, 0.333, 0.999999):
        threshold = _philox.keep_threshold(p)
        assert (65536 - threshold) / 65536 * _philox.keep_factor(threshold) == 1
