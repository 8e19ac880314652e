import pytest
import torch

from lora_kernels.statistics import InputMoments, token_weights
from lora_kernels.statistics.masks import align
from tests.helpers.accuracy import assert_accurate, rounding


def test_covariance_of_weighted_batches_in_float64():
    moments = InputMoments(40, torch.device("cpu"))
    x, w = 3 + torch.randn(5, 60, 40), torch.rand(5, 60)
    for batch, weight in zip(x, w, strict=True):
        moments.update(batch, weight)
    rows, flat = x.reshape(-1, 40).double(), w.reshape(-1).double()
    mean = (flat[:, None] * rows).sum(0) / flat.sum()
    truth = (flat[:, None] * (rows - mean)).mT @ (rows - mean) / flat.sum()
    assert moments.tokens == pytest.approx(float(flat.sum()), rel=1e-6)
    raw, bound = (flat[:, None] * rows).mT @ rows / flat.sum(), rounding(torch.float32, 300)
    assert_accurate(moments.mean(), mean, bound)
    assert_accurate(moments.covariance(center=False), raw, bound)
    assert_accurate(moments.covariance(), truth, bound, terms=raw)  # a difference of two larger ones
    assert torch.equal(moments.covariance(), moments.covariance().mT)


def test_wide_covariance_crosses_panels():
    moments, x = InputMoments(1100, torch.device("cpu")), torch.randn(64, 1100)
    moments.update(x)
    assert_accurate(moments.covariance(), torch.cov(x.double().mT, correction=0), rounding(torch.float32, 64))


def test_float64_sums_take_half_inputs():
    moments, x = InputMoments(7, torch.device("cpu"), torch.float64), torch.randn(9, 7).half()
    moments.update(x)
    torch.testing.assert_close(moments.covariance(), torch.cov(x.double().mT, correction=0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reading_the_covariance_leaves_the_sums(dtype):
    moments = InputMoments(6, torch.device("cpu"), dtype)
    moments.update(torch.randn(50, 6))
    kept = moments.second.clone()
    first, again = moments.covariance(), moments.covariance()
    assert torch.equal(first, again) and torch.equal(moments.second, kept)


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="0 tokens"):
        InputMoments(3, torch.device("cpu")).covariance()


ATTENTION = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
LABELS = torch.tensor([[-100, -100, 5, -100], [-100, 7, -100, -100]])


def test_masks():
    batch = {"attention_mask": ATTENTION, "labels": LABELS}
    assert token_weights(batch, None) is None
    assert torch.equal(token_weights(batch, "attention"), ATTENTION.bool())
    assert token_weights(batch, "labels").nonzero().tolist() == [[0, 2], [1, 1]]
    assert token_weights(batch, "next_labels").nonzero().tolist() == [[0, 1], [1, 0]]
    assert token_weights({"pixel_values": torch.ones(2)}, "attention") is None
    assert token_weights(batch, lambda b: b["attention_mask"]).dtype == torch.bool
    assert token_weights(batch, lambda b: None) is None


def test_mask_errors():
    with pytest.raises(ValueError, match=r"needs batch\['labels'\]"):
        token_weights({"attention_mask": ATTENTION, "labels": torch.tensor([1, 0])}, "labels")
    with pytest.raises(ValueError, match=r"must be \(batch, tokens\)"):
        token_weights({}, lambda b: torch.ones(3))
    with pytest.raises(TypeError, match="returned list"):
        token_weights({}, lambda b: [1])


def test_alignment():
    weights = ATTENTION.bool()
    assert torch.equal(align(weights, torch.Size([2, 4]))[0], weights)
    assert torch.equal(align(weights, torch.Size([8]))[0], weights.reshape(-1))
    assert align(weights, torch.Size([2])) == (None, True)  # one row per sample
    assert torch.equal(align(weights, torch.Size([4, 2]))[0], weights.mT)  # tokens first
    assert torch.equal(align(weights, torch.Size([2, 1, 4]))[0], weights[:, None])  # DeepSeek's kv_b_proj
    assert torch.equal(align(weights, torch.Size([2, 4, 3]))[0], weights[:, :, None].expand(2, 4, 3))  # heads
    assert align(weights, torch.Size([2, 3, 4, 4])) == (None, False)  # ambiguous
    assert align(weights, torch.Size([2, 5])) == (None, False)
    square = torch.tensor([[True, False], [True, True]])
    assert torch.equal(align(square, torch.Size([2, 2]))[0], square)  # batch first, where both would do
    assert align(None, torch.Size([3])) == (None, True)
