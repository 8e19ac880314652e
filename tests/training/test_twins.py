"""Random sequences of adapter operations on two equal models, one of them accelerated: the same after each."""

import random

import pytest
import torch
from torch import nn

from tests.helpers import twins


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", list(twins.KINDS))
def test_random_sequences(kind, seed):
    twins.run(kind, seed)


@pytest.mark.parametrize("name", [name for name in twins.OPERATIONS if name != "probe"])
@pytest.mark.parametrize("kind", list(twins.KINDS))
def test_an_operation_by_itself(kind, name):
    rng = random.Random(name)
    for adapter, several in (("plain", True), ("dora", False)):
        pair = twins.Pair(kind, adapter)
        for twin in (pair.stock, pair.fused):
            twins.add_adapter(twin, name="one", adapter="dropout", some=True, again=True, seed=1)
            twins.set_adapter(twin, names=["default", "one"], several=several)
        for mode in (twins.eval_mode, twins.train_mode):
            mode(pair.stock), mode(pair.fused)
            arguments = twins.OPERATIONS[name].draw(twins.Draw(rng, pair.stock))
            if arguments is not None:
                pair.step(name, arguments)


@pytest.mark.parametrize("kind", list(twins.KINDS))
def test_every_layer_of_the_accelerated_twin_is_fused_at_first(kind):
    pair = twins.Pair(kind)
    paths = {path.path for path in twins.lk.accelerate(pair.fused.model, guard=False, strict=True)}
    assert paths == ({"fused"} if kind == "llama" else {"fused", "delta"})
    assert not any(twins.accelerated(layer) for layer in pair.stock.layers().values())


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1 + 2e-4), ("bfloat16", 0.5)])
@pytest.mark.parametrize("kind", list(twins.KINDS))
def test_a_wrong_adapter_of_one_layer_is_reported(kind, dtype, factor):
    pair = twins.Pair(kind)
    pair.step("cast", {"to": dtype, "which": "all"})
    for layer in pair.fused.layers().values():
        before = layer.scaling["default"]
        layer.scaling["default"] *= factor
        with pytest.raises(twins.Difference):
            pair.compare("probe", {})
        layer.scaling["default"] = before
    pair.compare("probe", {})


def test_a_difference_comes_with_the_call_that_repeats_it(monkeypatch):
    def spoil(twin, layer):
        if twin.fused:
            nn.init.zeros_(twin.model.get_submodule(layer).lora_B["default"].weight)

    operations = {"eval_mode": twins.OPERATIONS["eval_mode"], "probe": twins.OPERATIONS["probe"]}
    operations["spoil"] = twins.Operation(spoil, lambda draw: {"layer": draw.layer()})
    monkeypatch.setattr(twins, "OPERATIONS", operations)
    with pytest.raises(twins.Difference) as first:
        twins.run("net", 1)
    message, _, call = str(first.value).partition("\n")
    with pytest.raises(twins.Difference) as second:
        eval(call, {"replay": twins.replay})
    assert message == f"after spoil: {second.value}"
    adapter, rest, _ = twins.shortened("net", "plain", eval(call, {"replay": lambda *arguments: arguments})[2])
    assert adapter == "plain" and [name for name, _ in rest] == ["spoil"]
