import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import lora_kernels as lk
from lora_kernels.api.transformers import empty_model, example_batch, linear_targets
from lora_kernels.cli import main
from lora_kernels.init import METHODS
from lora_kernels.statistics import make_plan, parse_budget
from tests.statistics.models import padded, samples, tiny_llama

CONFIGS = Path(__file__).parents[1] / "configs"


def tensors_of(stats):
    seen = {}
    for layer in stats.values():
        for sums in layer.sums.values():
            seen |= {id(value): value for value in sums.tensors().values()}
    return list(seen.values())


@pytest.mark.parametrize("form", ["exact", "sketch"])
def test_bytes_are_those_of_the_sums(form):
    model, wants = tiny_llama(), ("input_second", "output_second", "fisher", "gradient")
    batch = padded(samples(), 4)[0]
    plan = lk.plan(model, wants, batch=batch, form=form, sketch_size=2)
    stats = lk.collect(model, [batch], wants, form=form, sketch_size=2, progress=False)
    kept = sum(each.numel() * each.element_size() for each in tensors_of(stats))
    assert kept == plan.total_bytes
    assert plan.passes == 1 and plan.pass_bytes == (plan.total_bytes,)
    assert "passes over the data: 1" in str(plan)  # print shows the table, not the fields
    assert {each.form for each in plan.entries} == ({"exact"} if form == "exact" else {"exact", "sketch"})
    groups = [each.layers for each in plan.entries if each.statistic == "input_second"]
    assert tuple(f"model.layers.0.self_attn.{which}_proj" for which in "qkv") in groups


def llama_7b_bytes():
    """By hand: q, k, v share an input, and so do gate and up."""
    n, m, layers = 4096, 11008, 32
    second = 3 * (n * n + n) + m * m + m
    gradient = 4 * n * n + 3 * n * m
    fisher = 4 * n + 2 * m + n
    return 4 * layers * (second + gradient + fisher)


def test_llama_7b_on_the_meta_device():
    model = empty_model(CONFIGS / "llama-2-7b.json", "causal-lm")
    targets = linear_targets(model)
    assert len(targets) == 7 * 32
    plan = lk.plan(model, "lora_da", batch=example_batch(model), targets=targets, budget="40GB", world_size=8)
    expected = llama_7b_bytes()
    assert abs(plan.total_bytes - expected) < 1e-6 * expected
    assert plan.passes == 2 and max(plan.pass_bytes) <= 40e9 and sum(plan.pass_bytes) == plan.total_bytes
    # Of second moments the lower triangle travels, in panels of 512 rows.
    n, m = 4096, 11008

    def above(size):
        return sum(min(512, size - low) * max(size - low - 512, 0) for low in range(0, size, 512))

    saved = 4 * 32 * (3 * above(n) + above(m))
    assert abs(plan.communication - 2 * 7 / 8 * (expected - saved)) < 1e-6 * expected
    assert plan.backward == 0 and plan.shared


def test_command_line_for_models_larger_than_any_machine(capsys):
    command = ["plan", "--config", str(CONFIGS / "llama-3-70b.json"), "--method", "lora_da", "--budget", "40GB"]
    assert main([*command, "--world", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    n, kv, m, layers = 8192, 1024, 28672, 80
    by_hand = 4 * layers * (3 * n * n + m * m + 2 * n * n + 2 * n * kv + 3 * n * m)
    assert abs(found["total_bytes"] - by_hand) < 1e-3 * by_hand
    assert len(found["pass_bytes"]) == found["passes"] > 5
    assert all(each <= 40e9 for each in found["pass_bytes"])
    assert main([*command, "--world", "8"]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in text and "8 processes" in text and "passes over the data" in text
    command[command.index("lora_da")] = "eva"
    assert main(command) == 0
    assert "sketch" in capsys.readouterr().out
    command[command.index("eva")] = "nonsense"
    assert main(command) == 2
    assert "nonsense" in capsys.readouterr().err


def test_every_method_has_a_plan_or_says_that_it_needs_no_data():
    model = tiny_llama()
    for method, wants in ((name, method().wants) for name, method in METHODS.items()):
        if not wants:
            with pytest.raises(ValueError, match="needs no statistics"):
                lk.plan(model, method)
            continue
        assert {each.statistic for each in lk.plan(model, method).entries} == set(wants)


def test_exact_until_the_budget_is_reached_then_sketched_then_postponed():
    model = tiny_llama(hidden_size=64, intermediate_size=160)
    free = lk.plan(model, {"input_second": False})
    assert {each.form for each in free.entries} == {"exact"}
    budget = free.total_bytes - 1000
    some = lk.plan(model, {"input_second": False}, budget=budget, sketch_size=8)
    assert some.passes == 1 and some.total_bytes <= budget
    forms = {each.form for each in some.entries}
    assert forms == {"exact", "sketch"}
    sketched = [each for each in some.entries if each.form == "sketch"]
    assert all("down_proj" in each.layers[0] for each in sketched)  # the largest first
    exact = lk.plan(model, {"input_second": True}, budget=budget, sketch_size=8)
    assert exact.passes == 2 and {each.form for each in exact.entries} == {"exact"}
    assert max(exact.pass_bytes) <= budget
    with pytest.raises(
        ValueError, match=r"budget is 1 KB, but the exact input_second of .*down_proj alone takes 103 KB"
    ):
        lk.plan(model, {"input_second": True}, budget=1000)


def test_sketched_and_postponed_collections_follow_the_plan():
    model, batches = tiny_llama(hidden_size=64, intermediate_size=160), padded(samples(), 4)
    wants = {"input_second": False, "fisher": True}
    whole = lk.collect(model, batches, wants, progress=False)
    reads = []

    class Loader(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    exact = lk.collect(model, Loader(batches), wants, form="exact", budget=150_000, progress=False)
    passes = lk.plan(model, wants, batch=batches[0], form="exact", budget=150_000).passes
    assert passes > 2 and len(reads) == passes + 1  # one more for the groups
    for name in whole:
        torch.testing.assert_close(exact[name].input.second.tril(), whole[name].input.second.tril(), rtol=0, atol=0)
        torch.testing.assert_close(exact[name].sums["fisher"].total, whole[name].sums["fisher"].total, rtol=0, atol=0)
    with pytest.raises(ValueError, match="iterator that can be read once"):
        lk.collect(model, iter(batches), wants, form="exact", budget=150_000, progress=False)


def test_budgets():
    assert parse_budget(None) is None and parse_budget(7) == 7
    assert parse_budget("40GB") == 40 * 10**9 and parse_budget(" 1.5 MiB") == 3 * 2**19 and parse_budget("123") == 123
    free = parse_budget(0.999)
    assert 0.8 * free < 2 * parse_budget("auto") < 1.2 * free
    for bad in ("much", "40XB", "-1", 1.5, 0, -3, "0.5.1GB"):
        with pytest.raises(ValueError, match="budget"):
            parse_budget(bad)
    with pytest.raises(TypeError, match="budget"):
        parse_budget(True)


def test_bad_arguments():
    model = tiny_llama()
    with pytest.raises(ValueError, match="form"):
        lk.plan(model, "eva", form="rough")
    with pytest.raises(TypeError, match="no option mask"):
        lk.plan(model, "eva", mask=None)
    with pytest.raises(ValueError, match="world_size"):
        lk.plan(model, "eva", world_size=0)
    with pytest.raises(ValueError, match="empty"):
        make_plan([], {"fisher": True})
    with pytest.raises(ValueError, match="wants"):
        lk.plan(model, ("fisher", "hessian"))
    with pytest.raises(TypeError, match="wants"):
        lk.plan(model, 3)


def test_it_prints():
    console = Console(width=120, record=True)
    console.print(lk.plan(tiny_llama(), "lora_da", budget="1MB", world_size=2))
    text = console.export_text()
    assert "upper bound" in text and "budget 1 MB" in text


def test_the_keywords_of_a_collection_are_its_options():
    from typing import get_type_hints

    from lora_kernels.statistics.options import CollectKeywords, CollectOptions

    assert get_type_hints(CollectKeywords) == get_type_hints(CollectOptions)
