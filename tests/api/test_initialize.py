import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_kernels as lk

peft = pytest.importorskip("peft")
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict


def llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    )


def text(count=4, batch=4, tokens=16):
    torch.manual_seed(7)
    made = []
    for _ in range(count):
        mask = torch.ones(batch, tokens, dtype=torch.long)
        mask[::2, tokens - 5 :] = 0
        made.append({"input_ids": torch.randint(0, 100, (batch, tokens)), "attention_mask": mask})
    return made


def adapted(rank=4, model=None, **options):
    return get_peft_model(model or llama(), LoraConfig(**{"r": rank, "target_modules": "all-linear", **options}))


def run(model, loader=None, method=None, **options):
    return lk.initialize(model, loader or text(), method or lk.init.EVA(rho=2.0), progress=False, **options)


def ranks(model, adapter="default"):
    return {name: module.r[adapter] for name, module in model.named_modules() if hasattr(module, "lora_A")}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_function_is_kept_ranks_move_and_the_adapter_loads_in_stock_peft(tmp_path):
    model, base = adapted(), llama()
    before = logits(base, text(1)[0])
    report = run(model)
    torch.testing.assert_close(logits(model, text(1)[0]), before)
    assert len(set(ranks(model).values())) > 1
    assert sum(each.rank for each in report) == 4 * 14
    for module in model.modules():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B["default"].weight)
    trained = logits(model, text(1)[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert ranks(loaded) == ranks(model)
    assert torch.equal(logits(loaded, text(1)[0]), trained)


def test_by_default_every_layer_keeps_its_rank_and_no_adapter_is_removed_unless_asked():
    model = adapted(rank=8)
    assert {each.rank for each in lk.initialize(model, text(), progress=False)} == {8}
    assert model.peft_config["default"].rank_pattern == {} and set(ranks(model).values()) == {8}
    for options in ({"method": lk.init.EVA(rho=4.0)}, {"method": "eva", "ranks": lk.init.Redistribution(rho=4.0)}):
        model = adapted(rank=1)
        found = [each.rank for each in lk.initialize(model, text(), progress=False, **options)]
        assert set(found) == {1}  # as many ranks as layers, one for each
        model = adapted(rank=2)
        found = [each.rank for each in lk.initialize(model, text(), progress=False, **options)]
        assert min(found) == 1 and max(found) > 2 and sum(found) == 2 * 14
        config = model.peft_config["default"]
        assert config.r == max(found) and config.lora_alpha / config.r == pytest.approx(8 / 2)


def test_rank_zero_removes_the_adapter_and_the_config_says_so(tmp_path):
    model = adapted(rank=1)
    report = run(model, method=lk.init.EVA(rho=4.0, min_rank=0))
    removed = {each.name for each in report if each.status == "removed"}
    assert removed and all(type(model.get_submodule(name)) is nn.Linear for name in removed)
    assert {each.name for each in report if each.rank} == set(ranks(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert ranks(loaded) == ranks(model)
    assert torch.equal(logits(loaded, text(1)[0]), logits(model, text(1)[0]))


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_follows_the_rank(rslora):
    model = adapted(lora_alpha=10, use_rslora=rslora)
    scaling = 10 / math.sqrt(4) if rslora else 10 / 4
    run(model)
    assert all(m.scaling["default"] == pytest.approx(scaling) for m in model.modules() if hasattr(m, "lora_A"))
    assert len({m.lora_alpha["default"] for m in model.modules() if hasattr(m, "lora_A")}) > 1
    fixed = adapted(lora_alpha=10)
    run(fixed, method=lk.init.EVA(rho=2.0, adjust_scaling_factors=False))
    assert {m.lora_alpha["default"] for m in fixed.modules() if hasattr(m, "lora_A")} == {10}


def test_same_directions_as_peft_and_at_least_its_variance():
    loader = text(count=6, batch=8)
    theirs = get_eva_state_dict(
        adapted(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=0.999)), loader, show_progress_bar=False
    )
    model = adapted()
    stats = lk.collect(model, loader, progress=False)
    lk.initialize(model, method=lk.init.EVA(rho=1.0), statistics=stats, progress=False)
    assert len(theirs) == 14
    for name, vectors in theirs.items():
        s = stats[name].input.covariance()
        captured = []
        for rows in (model.get_submodule(name).lora_A["default"].weight.detach(), vectors):
            q = torch.linalg.qr(rows.double().mT).Q
            captured.append(float(torch.trace(q.mT @ s @ q) / torch.trace(s)))
        assert captured[0] >= captured[1] - 1e-9, name
        assert captured[0] <= captured[1] + 0.1, name  # PEFT's incremental PCA is close, so both see the same data


def test_gpt2_conv1d():
    base = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=100, n_positions=32))
    model = adapted(model=base, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    before = logits(model, text(1)[0])
    report = run(model)
    assert {each.name.rsplit(".", 1)[1] for each in report} == {"c_attn", "c_proj", "c_fc"}
    mlp = model.get_submodule("base_model.model.transformer.h.0.mlp.c_proj")
    assert mlp.in_features == 96 and mlp.lora_A["default"].weight.shape[1] == 96
    torch.testing.assert_close(logits(model, text(1)[0]), before)


def test_classifier_with_pooled_layers():
    config = BertConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, num_labels=3
    )
    model = get_peft_model(
        BertForSequenceClassification(config),
        LoraConfig(r=2, target_modules=["query", "key", "pooler.dense"], modules_to_save=["classifier"]),
    )
    head = copy.deepcopy(model.get_submodule("base_model.model.classifier").state_dict())
    report = run(model, method=lk.init.EVA(rho=1.0))
    tokens = {each.name.rsplit(".", 2)[-2]: each.tokens for each in report}
    assert tokens["pooler"] == 16 and tokens["self"] > 16
    after = model.get_submodule("base_model.model.classifier").state_dict()
    assert all(torch.equal(head[key], after[key]) for key in head)


def test_embeddings_are_reported_as_unsupported():
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    before = model.get_submodule("base_model.model.model.embed_tokens").lora_embedding_A["default"].clone()
    report = run(model)
    status = {each.name.rsplit(".", 1)[1]: each for each in report}
    assert status["embed_tokens"].status == "unsupported" and "Embedding" in status["embed_tokens"].notes[0]
    assert torch.equal(model.get_submodule("base_model.model.model.embed_tokens").lora_embedding_A["default"], before)


def test_other_adapters_and_other_state_survive():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    kept = {n: p.clone() for n, p in model.named_parameters() if "default" in n or "lora" not in n}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    report = run(model, adapter_name="second", method=lk.init.EVA(rho=2.0, min_rank=1))
    assert [each.rank for each in report] == [m.r["second"] for m in model.modules() if "second" in getattr(m, "r", ())]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    assert {n: p.requires_grad for n, p in now.items()} == flags and model.training


def test_removing_a_layer_keeps_the_other_adapter_on_it():
    model = adapted(rank=1)
    model.add_adapter("second", LoraConfig(r=1, target_modules="all-linear"))
    report = run(model, adapter_name="second", method=lk.init.EVA(rho=4.0, min_rank=0))
    gone = next(each.name for each in report if each.status == "removed")
    module = model.get_submodule(gone)
    assert "default" in module.r and "second" not in module.r
    assert torch.isfinite(logits(model, text(1)[0])).all()


def test_dtype_and_flags_of_new_parameters():
    model = adapted(model=llama().bfloat16())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    dtype = {n: p.dtype for n, p in model.named_parameters()}
    run(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype[name], name
        assert parameter.requires_grad == ("lora_B" in name), name


def test_adapter_on_the_meta_device_is_materialised():
    config = LoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)
    assert any(p.is_meta for p in model.parameters())
    run(model)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.isfinite(logits(model, text(1)[0])).all()


def test_an_optimizer_made_before_trains_the_new_factors():
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = text(1)[0]
    stale = model(**batch, labels=batch["input_ids"]).loss  # a graph of the old factors is still alive
    before = ranks(model)
    run(model)
    assert ranks(model) != before
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start and "lora_B" in n)
    assert model(**batch, labels=batch["input_ids"]).loss < loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_ranks_of_an_accelerated_model_change():
    model, batch = adapted(), text(1)[0]
    lk.accelerate(model)
    logits(model, batch)  # prepares the layers for the ranks that they have
    before = ranks(model)
    run(model)
    assert ranks(model) != before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    fused = logits(model, batch)
    lk.restore(model)
    torch.testing.assert_close(fused, logits(model, batch), rtol=1e-4, atol=1e-4)


def test_ranks_under_distributed_data_parallel_stay(tmp_path):
    """It averages no gradient of factors whose shape it does not know."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(adapted())
        before, weights = ranks(model.module), {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match="ranks of a model in DistributedDataParallel cannot change"):
            run(model)
        assert ranks(model.module) == before
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        run(model, method=lk.init.EVA(rho=1.0))
    finally:
        torch.distributed.destroy_process_group()


def batch_logits(model):
    return logits(model, text(1)[0])


def scatter(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"use_dora": True, "use_rslora": True}])
def test_force_over_a_trained_magnitude_or_bias_gives_the_function_of_the_base(settings, rho):
    model, base = adapted(**settings), batch_logits(llama())
    scatter(model)
    assert (batch_logits(model) - base).abs().max() > 0.01
    run(model, method=lk.init.EVA(rho=rho), force=True)
    torch.testing.assert_close(batch_logits(model), base, rtol=1e-5, atol=2e-6)
    scatter(model)  # what the start left is still trained
    assert (batch_logits(model) - base).abs().max() > 0.01


def test_force_leaves_no_norms_of_before_in_peft_s_cache():
    DoraCaching = pytest.importorskip("peft.helpers").__dict__.get("DoraCaching")
    if DoraCaching is None:
        pytest.skip("this PEFT caches nothing")

    model, base = adapted(use_dora=True), batch_logits(llama())
    scatter(model)
    with DoraCaching():
        batch_logits(model)
        run(model, method=lk.init.EVA(rho=1.0), force=True)
        torch.testing.assert_close(batch_logits(model), base, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_lora_da_on_dora_computes_what_it_says(trained):
    batches = [{**batch, "labels": batch["input_ids"]} for batch in text()]
    model = adapted(use_dora=True)
    if trained:
        scatter(model)
    run(model, batches, lk.init.LoraDA(gamma=1.0), force=trained)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            total = module.get_base_layer().weight + module.scaling["default"] * (
                module.lora_B["default"].weight @ module.lora_A["default"].weight
            )
            magnitude = module.lora_magnitude_vector["default"].weight
            assert magnitude.requires_grad
            torch.testing.assert_close(magnitude, total.norm(dim=1), rtol=1e-5, atol=1e-7)
            assert (magnitude - module.get_base_layer().weight.norm(dim=1)).abs().max() > 1e-3
            merged = module.get_base_layer().weight + module.get_delta_weight("default")
            torch.testing.assert_close(merged, total)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_force_over_trained_biases_of_the_base_is_refused(bias):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)

        def forward(self, x):
            return self.norm(self.q(x))

    data = [torch.randn(9, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    model = get_peft_model(Biased(), LoraConfig(r=2, target_modules=["q"], bias=bias))
    run(model, loader=data, method=lk.init.EVA(rho=1.0), force=True)  # of an adapter that is as it was made
    scatter(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"trained with bias='{bias}'.*make the model anew"):
        run(model, loader=data, method=lk.init.EVA(rho=1.0), force=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    unbiased = adapted(bias=bias)  # a Llama has none
    scatter(unbiased)
    run(unbiased, method=lk.init.EVA(rho=1.0), force=True)
    torch.testing.assert_close(batch_logits(unbiased), batch_logits(llama()), rtol=1e-5, atol=2e-6)


def test_a_fresh_magnitude_keeps_its_bits():
    model = adapted(use_dora=True)
    before = {name: value.clone() for name, value in model.named_parameters() if "magnitude" in name}
    run(model, method=lk.init.EVA(rho=1.0))
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


def test_a_trained_bias_of_b_is_refused_unless_forced():
    model = adapted(lora_bias=True)
    nn.init.ones_(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_B["default"].bias)
    with pytest.raises(ValueError, match="up_proj has a lora_B bias that is not zero.*force=True"):
        run(model)


def test_a_trained_adapter_is_refused_unless_forced():
    model = adapted()
    nn.init.ones_(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_B["default"].weight)
    with pytest.raises(ValueError, match="up_proj has a lora_B that is not zero.*force=True"):
        run(model)
    run(model, force=True)
    assert all(
        float(m.lora_B["default"].weight.detach().abs().max()) == 0 for m in model.modules() if hasattr(m, "lora_A")
    )


def test_merged_adapters_are_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="has merged adapters"):
        run(model)


def unread():
    raise AssertionError("the data was read")
    yield


def test_failure_before_writing_leaves_the_model_as_it_was():
    model = adapted()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="must be at most min"):
        run(adapted(rank=40))
    for options in (
        {"method": lk.init.EVA(rho=2.0, min_rank=5)},
        {"method": "lora_ga", "ranks": lk.init.Redistribution(min_rank=5)},
    ):
        with pytest.raises(ValueError, match="budget"):
            lk.initialize(model, unread(), progress=False, **options)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_statistics_serve_several_methods_and_must_fit():
    model = adapted()
    stats = lk.collect(model, text(), progress=False)
    one = lk.initialize(model, statistics=stats, method=lk.init.EVA(rho=1.0), progress=False)
    first = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
    again = adapted()
    lk.initialize(again, text(), lk.init.EVA(rho=1.0), progress=False)
    assert all(torch.equal(dict(again.named_parameters())[n], p) for n, p in first.items())
    two = lk.initialize(model, statistics=stats, method=lk.init.EVA(rho=2.0, whiten=True), progress=False)
    assert {each.rank for each in one} == {4} and len({each.rank for each in two}) > 1
    other = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="statistics have no entry"):
        lk.initialize(other, statistics=stats, progress=False)
    with pytest.raises(ValueError, match="exactly one of loader and statistics"):
        lk.initialize(model, text(), statistics=stats)


def test_unreached_layers_keep_their_values_or_raise():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    model = get_peft_model(Half(), LoraConfig(r=2, target_modules=["used", "unused"]))
    kept = model.get_submodule("base_model.model.unused").lora_A["default"].weight.clone()
    with pytest.warns(RuntimeWarning, match="does not reach 1 LoRA layers .first: base_model.model.unused"):
        report = run(model, loader=[torch.randn(9, 6)])
    assert [each.status for each in report] == ["initialised", "not_reached"]
    assert torch.equal(model.get_submodule("base_model.model.unused").lora_A["default"].weight, kept)
    with pytest.raises(ValueError, match="does not reach"):
        run(model, loader=[torch.randn(9, 6)], unreached="raise")


def test_ambiguous_names_are_rebuilt_exactly(tmp_path):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            return self.proj(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.inner, self.deep = nn.Linear(6, 6), Inner(), nn.ModuleDict({"inner": Inner()})

        def forward(self, x):
            return self.proj(x) + self.inner(x * 2 + 1).tanh() + self.deep["inner"](x.exp())

    torch.manual_seed(0)
    base = Outer()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["proj"]))
    data = [torch.randn(50, 6) * torch.tensor([9.0, 4, 2, 1, 0.1, 0.1])]
    run(model, loader=data, method=lk.init.EVA(rho=3.0, min_rank=0))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert ranks(loaded) == ranks(model)
    # Force every mixture of ranks and removals on names of which one is the tail of another.
    from lora_kernels.adapters.layers import find_lora_layers
    from lora_kernels.adapters.writing import write

    for wanted in ((1, 2, 3), (3, 1, 2), (0, 2, 1), (2, 0, 0), (0, 0, 1), (3, 0, 3)):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["proj"]))
        layers = find_lora_layers(model)
        names = [layer.name for layer in layers.supported]
        factors = {name: (torch.randn(rank, 6), torch.randn(6, rank)) for name, rank in zip(names, wanted, strict=True)}
        write(model, layers, factors, "default", adjust_scaling_factors=True)
        model.save_pretrained(tmp_path / str(wanted))
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(wanted))
        assert ranks(loaded) == ranks(model), wanted
        assert torch.equal(loaded(data[0]), model(data[0])), wanted


def test_report():
    report = run(adapted())
    loaded = json.loads(report.to_json())
    assert loaded["method"] == "eva" and loaded["settings"]["rho"] == 2.0 and len(loaded["layers"]) == 14
    one = loaded["layers"][0]
    assert one["explained_variance"] + one["residual_variance"] == pytest.approx(1.0)
    assert one["shared_with"] == ["base_model.model.model.layers.0.self_attn." + k for k in ("k_proj", "v_proj")]
    assert set(loaded["seconds"]) == {"collect", "decompose", "write", "total"}
    assert loaded["trainable"] == sum(
        each["rank"] * sum(adapted().get_submodule(each["name"]).base_layer.weight.shape) for each in loaded["layers"]
    )
    printed = str(report)
    assert "layers.1.mlp.down_proj" in printed and "initialised" in report.summary()


def test_not_a_peft_model():
    with pytest.raises(TypeError, match="must be a PEFT model"):
        lk.initialize(llama(), text())
    with pytest.raises(ValueError, match="adapter_name is 'x', but the model has 'default'"):
        lk.initialize(adapted(), text(), adapter_name="x")
