"""Lower bounds on time and memory: by hand, and their pieces one at a time."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.init.work import corda_work, decompose_seconds, lora_da_work
from lora_kernels.runtime.processes import owners
from lora_kernels.statistics import H200, Rates, make_plan
from lora_kernels.statistics.cost import Footprint, Work, choose_layout, share_seconds
from lora_kernels.statistics.distributed import buckets
from lora_kernels.statistics.estimate import estimate, layer_work, statistic_work
from lora_kernels.statistics.plan import Entry
from lora_kernels.statistics.store import Target
from tests.statistics.models import padded, samples, tiny_llama

# Round numbers, all different, so that a sum tells what went into it.
RATES = Rates("test", 1e6, 5e5, 2.5e5, 1e9, 1e6, 1e5, 1e4, 2e5, 1e5, 1e8, node=4)


def target(name="one", m=30, n=20):
    return Target(name, nn.Linear(1, 1), n, m)


def footprint(total=1000, root=200, unit=100, blocks=8):
    return Footprint(total, root, unit, blocks)


def test_work_is_the_slower_of_operations_and_memory():
    assert Work(2e6, 1e6, 5e5, 1e9).seconds(RATES) == 2 + 2 + 2
    assert Work(2e6, bytes=7e9).seconds(RATES) == 7
    assert Work(single=2e5, double=1e5, bytes=1e12).seconds(RATES, on_host=True) == 2
    assert Work(1, 2, 3, 4) + Work(10, 20, 30, 40) == Work(11, 22, 33, 44)


def test_exchange_by_hand():
    assert RATES.exchange(8e5, 1) == 0
    assert RATES.exchange(8e5, 4) == 8e5 * 3 / 4 / 1e5  # in one node
    # Two nodes: what the other node holds comes over four processes' shares of the network.
    assert RATES.exchange(8e5, 8) == max(8e5 * 7 / 8 / 1e5, 8e5 / 2 / 4e4)
    assert RATES.exchange(8e5, 16) == 8e5 * 3 / 4 / 4e4


@pytest.mark.parametrize(
    ("statistic", "form", "flops", "size"),
    [
        ("fisher", "exact", 0, 2 * 7 * 30),
        ("input_second", "exact", 7 * 20 * 21, 2 * 7 * 20 + 4 * 20 * 21),
        ("output_second", "exact", 7 * 30 * 31, 2 * 7 * 30 + 4 * 30 * 31),
        ("input_second", "sketch", 4 * 7 * 20 * 11, 2 * 7 * 20 + 8 * 20 * 11),
        ("gradient", "exact", 2 * 7 * 600, 2 * 7 * 50 + 8 * 600),
        ("gradient", "sketch", 2 * 7 * 50 * (11 + 6), 2 * 7 * 50 + 8 * (30 * 11 + 20 * 6)),
    ],
)
def test_statistics_by_hand(statistic, form, flops, size):
    entry = Entry(statistic, form, ("one",), 0, 0)
    assert statistic_work(entry, target(), 7, 2, 3, 4) == Work(matmul=flops, bytes=size)


def test_layers_by_hand():
    assert layer_work(target(), 7, 2) == Work(matmul=2 * 7 * 600, bytes=2 * (600 + 7 * 50))


def cost_of(wants, world=1, tokens=80, batch=10, budget=None, found=None, **more):
    layers = [target("one"), target("two", 40, 30)]
    plan = make_plan(layers, wants, groups=[["one"], ["two"]], world_size=world, budget=budget, sketch_size=3)
    settings = {"tokens": tokens, "batch_tokens": batch, "width": 2, **more}
    return plan, estimate(plan, layers, found or footprint(), RATES, **settings)


def test_a_forward_pass_and_its_sums():
    plan, cost = cost_of({"input_second": True})
    forward = 2 * 80 * (600 + 1200) / 1e6
    assert cost.model_seconds == pytest.approx(forward)
    assert cost.statistics_seconds == pytest.approx(80 * (20 * 21 + 30 * 31) / 1e6)
    assert cost.gather_seconds == cost.reduce_seconds == cost.host_seconds == cost.decompose_seconds == 0
    assert cost.layout == "whole" and cost.device_bytes == 1000 + plan.total_bytes and cost.host_bytes == 0
    assert cost.seconds == pytest.approx(cost.model_seconds + cost.statistics_seconds)


def test_gradients_take_a_backward_pass_but_not_of_the_first_layer():
    _, cost = cost_of({"input_second": True, "gradient": True})
    assert cost.model_seconds == pytest.approx(2 * 80 * (600 + 1200 + 1200) / 1e6)


def test_processes_share_the_tokens():
    plan, cost = cost_of({"fisher": True, "input_second": True}, world=8)
    _, alone = cost_of({"fisher": True, "input_second": True})
    assert cost.model_seconds == pytest.approx(alone.model_seconds / 8)
    assert cost.reduce_seconds == pytest.approx(2 * RATES.exchange(plan.message_bytes, 8))
    # Less than a batch each: one step of what there is.
    _, few = cost_of({"fisher": True, "input_second": True}, world=8, tokens=8)
    assert few.model_seconds == pytest.approx(cost.model_seconds / 10)


def test_shards_are_gathered_in_every_step_and_again_for_gradients():
    large = footprint(total=1_500_000, root=1000, unit=1000)
    plan, cost = cost_of({"input_second": True, "gradient": True}, world=4, found=large)
    assert cost.layout == "sharded" and cost.device_bytes == 375_000 + 1000 + 2000 + plan.pass_bytes[0]
    steps = 80 / 4 / 10
    assert cost.gather_seconds == pytest.approx(steps * (RATES.exchange(1_500_000, 4) + RATES.exchange(1_499_000, 4)))
    assert cost.seconds == pytest.approx(cost.gather_seconds + cost.reduce_seconds)  # which hides the rest


def test_several_passes_go_through_the_host():
    wants = {"input_second": True, "gradient": True}
    whole, once = cost_of(wants, world=4)
    plan, cost = cost_of(wants, world=4, budget=5000)
    assert plan.passes == 3 and plan.total_bytes == whole.total_bytes
    assert cost.host_bytes == 4 * plan.total_bytes
    assert cost.host_seconds == pytest.approx((plan.total_bytes + 2 * plan.message_bytes) / 2e5)
    # Of the three passes only some need gradients.
    assert once.model_seconds < cost.model_seconds <= 3 * once.model_seconds
    _, alone = cost_of(wants, budget=5000)
    assert alone.host_seconds == pytest.approx(plan.total_bytes / 2e5)
    assert cost.statistics_seconds == pytest.approx(once.statistics_seconds)


def test_what_does_not_fit_is_said():
    assert choose_layout(footprint(), 10, 0, 8, RATES) == ("whole", "", 1010)
    large = footprint(total=4_000_000)
    assert choose_layout(large, 10, 0, 8, RATES) == ("sharded", "", 500_000 + 200 + 200 + 10)
    layout, why, size = choose_layout(large, 10, 0, 1, RATES)
    assert layout == "none" and "device" in why and size == 4_000_010
    assert choose_layout(large, 600_000, 0, 8, RATES)[0] == "none"
    layout, why, _ = choose_layout(footprint(), 10, 2e8, 8, RATES)
    assert layout == "none" and "host" in why


def test_footprints():
    model = tiny_llama()
    found = Footprint.of(model)
    assert found.total == sum(each.numel() * 4 for each in (*model.parameters(), *model.buffers()))
    block = sum(each.numel() * 4 for each in model.model.layers[0].parameters())
    assert (found.unit, found.blocks, found.root) == (block, 2, found.total - 2 * block)
    plain = Footprint.of(nn.Linear(3, 4))
    assert plain == Footprint(64, 64, 0, 0) and plain.sharded(4) == 16 + 64


def test_owners_balance():
    weights = [1.0, 1, 1, 9] * 8
    loads = [0.0] * 4
    for weight, owner in zip(weights, owners(weights, 4), strict=True):
        loads[owner] += weight
    assert max(loads) == min(loads)
    assert owners([1.0] * 6, 4) == [0, 1, 2, 3, 0, 1]  # equal ones take turns
    assert share_seconds([Work(1e6), Work(2e6), Work(4e6)], [0, 0, 1], RATES) == 4
    assert share_seconds([], [], RATES) == 0


def test_messages_hold_64_mebibytes_of_one_dtype():
    half = (torch.float32, (2**23,))  # 32 MiB
    small = (torch.float64, ())
    assert buckets([half] * 3 + [small] * 2) == [[0, 1, 2], [3, 4]]
    assert buckets([half] * 4) == [[0, 1, 2], [3]]
    assert buckets([small, half, small]) == [[1], [0, 2]]
    assert buckets([]) == []


def test_decompositions_by_hand():
    n, m = 2048, 1000
    block, products = 16 + 8, 2 + 8
    expected = n**3 / 3 + 2 * n * n * m + block * products * (4 * m * n + 2 * n * n)
    assert lora_da_work(n, [m]).double == pytest.approx(expected)
    assert lora_da_work(n, [m, m]).double == pytest.approx(2 * expected - n**3 / 3)
    # Ten products with blocks of 16.
    assert corda_work(n, [m]).double == pytest.approx(n**3 / 3 + 160 * (2 * m * n + 2 * n * n))
    layers = [target("one", m, n), target("two", m, n)]
    plan = make_plan(layers, {"input_second": True}, world_size=2)
    seconds = {
        method: decompose_seconds(method, plan, layers, RATES, 16, on_host=False)
        for method in ("lora_da", "corda", "eva", "task_directions", "fisher")
    }
    assert seconds["lora_da"] == pytest.approx(lora_da_work(n, [m]).seconds(RATES))
    assert seconds["fisher"] == 0 and min(seconds[each] for each in ("corda", "eva", "task_directions")) > 0
    assert seconds["task_directions"] > seconds["lora_da"] > seconds["corda"] > seconds["eva"]
    one = make_plan(layers, {"input_second": True})
    assert decompose_seconds("lora_da", one, layers, RATES, 16, on_host=True) == pytest.approx(
        2 * lora_da_work(n, [m]).double / RATES.host_double
    )
    for form in ("exact", "sketch"):
        plan = make_plan(layers, {"gradient": False}, form=form, world_size=2, sketch_size=8)
        found = decompose_seconds("lora_ga", plan, layers, RATES, 16, on_host=False)
        by_hand = 2 * m * n * 160 / RATES.single if form == "exact" else 2 * 2 * (m + n) * 64 / RATES.double
        assert found == pytest.approx(by_hand)


def test_plans_with_rates(tmp_path):
    model, batch = tiny_llama(), padded(samples(), 4)[0]
    plan = lk.plan(model, "lora_da", batch=batch, world_size=2, rates=H200, tokens=1000)
    assert plan.cost.rates == "H200" and plan.cost.seconds > 0 and plan.cost.decompose_seconds > 0
    assert "on H200: every process holds the model" in str(plan) and "at least" in str(plan)
    assert json.loads(plan.to_json())["cost"]["layout"] == "whole"
    tight = dataclasses.replace(H200, capacity=1000.0)
    text = str(lk.plan(model, "lora_da", rates=tight, tokens=1000))
    assert "does not fit" in text
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(dataclasses.asdict(RATES)))
    assert Rates.read(file) == RATES
    for text in ("{}", "[", '{"speed": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no rates"):
            Rates.read(file)


def test_bad_arguments():
    model = tiny_llama()
    for given in ({"rates": H200}, {"tokens": 5}):
        with pytest.raises(ValueError, match="together"):
            lk.plan(model, "eva", **given)
    with pytest.raises(ValueError, match="tokens"):
        lk.plan(model, "eva", rates=H200, tokens=0)
    with pytest.raises(ValueError, match="batch_tokens"):
        lk.plan(model, "eva", rates=H200, tokens=1, batch_tokens=0)
    with pytest.raises(ValueError, match="rank"):
        lk.plan(model, "eva", rates=H200, tokens=1, rank=0)
    for name, value in (("matmul", 0.0), ("node", 0), ("link", -1.0), ("memory", math.nan)):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(H200, **{name: value})
    with pytest.raises(TypeError, match="host"):
        dataclasses.replace(H200, host="fast")
