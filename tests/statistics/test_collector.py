import random

import pytest
import torch
from torch import nn

from lora_kernels import collect
from lora_kernels.statistics import Statistics


class Block(nn.Module):
    """q, k, v read one tensor; out reads another of the same shape; head reads one row per sample."""

    def __init__(self, n=12):
        super().__init__()
        self.embed = nn.Embedding(50, n)
        self.q, self.k, self.v = nn.Linear(n, n), nn.Linear(n, n), nn.Linear(n, 2 * n)
        self.out = nn.Linear(2 * n, n)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(n, 3)
        self.seen = []

    def forward(self, input_ids, attention_mask=None):
        x = self.drop(self.embed(input_ids))
        self.seen.append(x.detach().clone())
        y = torch.cat([self.q(x), self.k(x)], -1) * self.v(x).sigmoid()
        return self.head(self.out(y).mean(1))


def batches(count=3, tokens=7, masked=True):
    made = []
    for _ in range(count):
        mask = (torch.rand(4, tokens) < 0.7).long()
        mask[:, 0] = 1
        made.append({"input_ids": torch.randint(0, 50, (4, tokens)), **({"attention_mask": mask} if masked else {})})
    return made


def test_sums_match_what_the_layers_saw():
    model, data = Block().train(), batches()
    stats = collect(model, data, progress=False)
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(model.seen, data, strict=True)]).double()
    assert list(stats) == ["q", "k", "v", "out", "head"]
    assert stats["q"].input is stats["k"].input is stats["v"].input
    assert stats["q"].shared_with == ("k", "v") and stats["out"].shared_with == ()
    assert stats["out"].input is not stats["q"].input
    torch.testing.assert_close(
        stats["k"].input.covariance(center=False), rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6
    )
    assert stats["q"].input.tokens == stats["out"].input.tokens == stats.tokens == len(rows)
    assert stats["head"].input.tokens == 12  # pooled: one row per sample, whatever the mask
    assert stats.batches == 3 and stats["v"].out_features == 24


def test_sharing_can_be_switched_off_and_does_not_change_numbers():
    model, data = Block(), batches()
    shared = collect(model, data, progress=False)
    alone = collect(model, data, share_inputs=False, progress=False)
    assert alone["q"].input is not alone["k"].input
    torch.testing.assert_close(alone["k"].input.covariance(), shared["k"].input.covariance(), rtol=0, atol=0)


def test_in_place_change_between_reads_is_another_input():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            first = self.a(x) + self.b(x.view(-1, 4)).view_as(x)
            x.mul_(2)
            return first + self.c(x)

    x = torch.randn(5, 3, 4)
    stats = collect(Sneaky(), [x.clone()], progress=False)
    assert stats["a"].input is stats["b"].input  # a view of the same memory
    assert stats["c"].input is not stats["a"].input
    torch.testing.assert_close(stats["c"].input.covariance(), 4 * stats["a"].input.covariance())


def test_freed_memory_is_not_taken_for_a_shared_input():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()  # the allocator reuses the addresses of inputs that died
            return x

    stats = collect(Chain(), [torch.randn(256, 64)], progress=False)
    assert len({id(layer.input) for layer in stats.values()}) == 12
    assert all(layer.shared_with == () for layer in stats.values())


class Routed(nn.Module):
    """Shares an input in some batches only; leaves a layer out in others."""

    def __init__(self, plan):
        super().__init__()
        self.a, self.b, self.rare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.plan = iter(plan)

    def forward(self, x):
        step = next(self.plan)
        y = self.a(x) + self.b(x if "share" in step else x.clone())
        return y + self.rare(x.exp()) if "rare" in step else y


def test_a_layer_whose_sharing_ends_in_a_later_batch_is_left_out_and_said(tmp_path):
    data, options = [torch.randn(3, 4) for _ in range(3)], {"targets": ["a", "b"], "progress": False}
    whole = collect(Routed([[], [], []]), data, share_inputs=False, **options)
    stats = collect(Routed([["share"], [], ["share"]]), data, **options)
    torch.testing.assert_close(stats["a"].input.covariance(), whole["a"].input.covariance(), rtol=0, atol=0)
    assert stats["b"].input is None and stats["b"].tokens == 0 and not stats["a"].shared_with
    assert stats["b"].notes == ("no input_second: it stopped sharing its input in batch 1; pass share_inputs=False",)
    stats.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors")["b"].notes == stats["b"].notes


class TwoInputs(nn.Module):
    """As DeBERTa: all layers read x, two of them another tensor too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = x.exp()
        return (self.v(x) + self.q(x) + self.k(x) + self.q(y) * self.k(y)).square().mean()


@pytest.mark.parametrize("budget", [None, "1GB"])
def test_layers_that_share_in_some_calls_only_have_sums_of_their_own(budget):
    data, wants, model = [torch.randn(3, 4) for _ in range(2)], ("input_second", "fisher"), TwoInputs()
    options = {"progress": False, "dtype": torch.float64, "budget": budget}
    stats = collect(model.double(), [x.double() for x in data], wants, targets=["q", "k", "v"], **options)
    assert model.calls == 3 + (budget is not None)  # the first batch ran twice, and the probe
    x = torch.cat(data).double()
    both = torch.cat([x, x.exp()])
    for name, rows in {"q": both, "k": both, "v": x}.items():
        torch.testing.assert_close(stats[name].input_covariance(), rows.mT @ rows / len(rows))
        assert stats[name].sums["fisher"].tokens == len(rows)
    assert stats["q"].shared_with == ("k",) and not stats["v"].shared_with and not stats["v"].notes


def test_layers_that_join_late_or_never_run():
    stats = collect(Routed([["share"], ["share", "rare"]]), [torch.randn(3, 4) for _ in range(2)], progress=False)
    assert stats["rare"].input.tokens == 3 and stats["a"].input.tokens == 6
    stats = collect(Routed([["share"]]), [torch.randn(3, 4)], progress=False)
    assert stats["rare"].input is None and stats["rare"].notes == ("never called in this pass",)


def state(model):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return [m.training for m in model.modules()], hooks, [p.requires_grad for p in model.parameters()]


class Bomb(Exception):
    pass


@pytest.mark.parametrize("error", [Bomb, KeyboardInterrupt, None])
def test_everything_is_restored(error):
    model = Block().train()
    model.q.eval()
    model.k.weight.requires_grad_(False)
    before, rng = state(model), torch.get_rng_state()
    calls = []

    def forward(m, batch):
        calls.append(1)
        torch.rand(3)
        if error is not None and len(calls) == 2:
            raise error
        return m(**batch)

    data = batches()
    rng = torch.get_rng_state()
    if error is None:
        collect(model, data, forward=forward, progress=False)
    else:
        with pytest.raises(error):
            collect(model, data, forward=forward, progress=False)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_bounds():
    model = Block()
    assert collect(model, batches(5), max_batches=2, progress=False).batches == 2
    stats = collect(model, batches(5, masked=False), max_tokens=50, progress=False)
    assert stats.batches == 2 and stats.tokens == 56
    read = []
    endless = (read.append(1) or batches(1)[0] for _ in iter(int, 1))
    assert collect(model, endless, max_batches=3, progress=False).batches == 3
    assert len(read) <= 4


def test_bad_data_is_named():
    model = Block()
    with pytest.raises(ValueError, match="loader is empty"):
        collect(model, [], progress=False)
    masked = [{**b, "attention_mask": torch.zeros(4, 7)} for b in batches()]
    with pytest.raises(ValueError, match="no token was counted in 3 batches"):
        collect(model, masked, targets=["q", "out"], progress=False)
    wrong = [{**b, "attention_mask": torch.ones(4, 9)} for b in batches()]
    with pytest.raises(ValueError, match=r"mask has shape \(4, 9\), which matches the input of no observed layer"):
        collect(model, wrong, targets=["q", "out"], progress=False)
    with pytest.raises(ValueError, match="max_batches is 0, but must be >= 1"):
        collect(model, batches(), max_batches=0, progress=False)
    with pytest.raises(ValueError, match="mask is 'all', but must be one of 'attention'"):
        collect(model, batches(), mask="all", progress=False)
    with pytest.raises(ValueError, match="targets names 'z', but the model has no such module"):
        collect(model, batches(), targets=["z"], progress=False)
    with pytest.raises(ValueError, match="'embed', a Embedding, but must name linear layers"):
        collect(model, batches(), targets=["embed"], progress=False)
    with pytest.raises(ValueError, match="model is on the meta device"):
        collect(Block().to("meta"), batches(), progress=False)


def test_nonfinite_inputs():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            return self.second(torch.where(x[..., :1] > 3, float("inf"), y))

    good, bad = torch.randn(6, 4).clamp(-2, 2), torch.randn(6, 4).clamp(-2, 2)
    bad[2, 0] = 4.0
    with pytest.raises(ValueError, match="non-finite input .* in layer second in batch 1"):
        collect(Poisoned(), [good, bad], progress=False)
    stats = collect(Poisoned(), [good, bad], nonfinite="skip", progress=False)
    assert stats["second"].input.tokens == 11 and stats.skipped_rows["second"] == 1
    assert stats["first"].input.tokens == 12 and stats.skipped_rows["first"] == 0
    assert torch.isfinite(stats["second"].input.covariance()).all()


def test_rows_that_are_tokens_first_are_masked():
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(50, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            return self.b(self.a(x).transpose(0, 1) * 1.0)

    model, data = TokensFirst(), batches(1)
    stats = collect(model, data, progress=False)
    rows = model.a(model.embed(data[0]["input_ids"]))[data[0]["attention_mask"].bool()]
    assert stats["b"].input.tokens == len(rows) < 28
    torch.testing.assert_close(stats["b"].input_covariance(), (rows.mT @ rows / len(rows)).double())


def test_unaligned_rows_are_counted_and_said():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(50, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, input_ids, attention_mask):
            return self.b(self.a(self.embed(input_ids))[:, 1:])

    with pytest.warns(RuntimeWarning, match="does not match the input rows of 1 layers .first: b"):
        stats = collect(Halves(), batches(1), progress=False)
    assert stats["b"].input.tokens == 24 and "all rows counted" in stats["b"].notes[0]
    assert stats["a"].input.tokens < 28


def test_random_state_of_python_is_left_alone():
    random.seed(3)
    before = random.getstate()
    collect(Block(), batches(), progress=False)
    assert random.getstate() == before


def test_the_rows_that_count_are_looked_up_once_per_batch(monkeypatch):
    """Each look-up waits for the device: as many as there are shapes of the mask, not as there are layers."""
    lookups, nonzero = [], torch.Tensor.nonzero

    def counted(tensor):
        lookups.append(tensor.shape)
        return nonzero(tensor)

    data = batches()
    monkeypatch.setattr(torch.Tensor, "nonzero", counted)
    wants = ("input_second", "gradient")
    for share in (True, False):
        lookups.clear()
        collect(Block(), data, wants, loss=lambda output, batch: output.sum(), share_inputs=share)
        assert len(lookups) == len(data)
