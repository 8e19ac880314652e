"""Kinds of models: quantized bases, vision, encoder-decoder, tied and stacked layers."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.statistics import STATISTICS
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama


def replace_linears(model, make):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def nf4(module):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    made.load_state_dict(module.state_dict())
    return made.to("cpu")


def eight_bit(module):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
    made.load_state_dict(module.state_dict())
    return made.to("cpu")


def quantized(kind):
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    if kind == "int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
        return model
    return replace_linears(model, {"nf4": nf4, "int8_bnb": eight_bit}[kind])


def retained(model, batch, names):
    """x and the gradient of the summed loss at each layer's output, by hooks of the test's own."""
    modules, kept = dict(model.named_modules()), {}
    handles = []

    def keep(name):
        def hook(_module, args, out):
            out.retain_grad()
            kept[name] = (args[0], out)

        return hook

    for name in names:
        handles.append(modules[name].register_forward_hook(keep(name)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    items = int((batch["labels"][:, 1:] != -100).sum())
    (model(**batch, use_cache=False).loss * items).backward()
    for handle in handles:
        handle.remove()
    return {
        name: (x.detach().flatten(0, -2).double(), out.grad.flatten(0, -2).double()) for name, (x, out) in kept.items()
    }


@pytest.mark.parametrize("kind", ["nf4", "int8_bnb", "int8"])
def test_quantized_bases_are_collected_like_any_other(kind):
    model = quantized(kind).eval()
    # Without it, bitsandbytes takes another kernel in the first layer, which rounds otherwise.
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
    batch = padded(samples(4), 4)[0]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"]
    truth = retained(copy.deepcopy(model) if kind != "int8" else model, batch, names)
    before = {name: type(module) for name, module in model.named_modules()}
    stats = lk.collect(model, [batch], STATISTICS, targets=names, progress=False)
    assert {name: type(module) for name, module in model.named_modules()} == before
    kept = batch["attention_mask"].flatten().bool()
    for name, (x, g) in truth.items():
        layer = stats[name]
        assert layer.in_features == x.shape[1] and layer.out_features == g.shape[1]
        n = int(kept.sum())
        assert layer.input.tokens == layer.sums["fisher"].tokens == n
        assert relative_error(layer.input.covariance(center=False) * n, x[kept].mT @ x[kept]) < 1e-5
        # bitsandbytes' int8 products round activations to 8 bit; x and g are what passed, whatever it made of them.
        assert relative_error(layer.sums["gradient"].total, g.mT @ x) < 1e-4
        assert relative_error(layer.sums["fisher"].total, g[kept].square().sum(0)) < 1e-4
    assert all(each.grad is None for each in model.parameters())


def test_a_packed_base_is_refused_and_none_is_packed_by_us():
    batches = padded(samples(4), 4)
    model = quantized("nf4")
    if not getattr(model.model.layers[0].mlp.up_proj, "support_avx512bf16_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing on this CPU")
    lk.collect(model.eval(), batches, progress=False)
    lk.collect(model, batches, "gradient", progress=False)  # the first collection has left it as it was
    with torch.no_grad():
        model(**batches[0])
    with pytest.raises(ValueError, match="packed a 4-bit weight for inference"):
        lk.collect(model, batches, "gradient", progress=False)
    assert lk.collect(model, batches, progress=False).tokens > 0


def test_peft_on_a_quantized_base_gets_eva():
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    model = get_peft_model(quantized("nf4"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    report = lk.initialize(model, padded(samples(8), 4), lk.init.EVA(rho=1.0), progress=False)
    assert all(layer.status == "initialised" for layer in report.layers)
    for layer in report.layers:
        a = model.get_submodule(layer.name).lora_A["default"].weight
        torch.testing.assert_close(a @ a.mT, torch.eye(4), rtol=0, atol=1e-5)


def test_vision_transformer():
    from transformers import ViTConfig, ViTForImageClassification  # noqa: PLC0415

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    model = ViTForImageClassification(config).double()
    batches = [
        {"pixel_values": torch.randn(n, 3, 16, 16).double(), "labels": torch.randint(0, 3, (n,))} for n in (4, 2)
    ]
    stats = lk.collect(model, batches, STATISTICS, dtype=torch.float64, progress=False)
    skipped = [name for name, why in stats.skipped_modules.items() if "patches" in why]
    assert skipped and all("Conv2d" in stats.skipped_modules[name] for name in skipped)
    assert stats.loss_items == stats.samples == 6
    mirror = copy.deepcopy(model).eval()
    total = sum(len(batch["labels"]) * mirror(**batch).loss for batch in batches)
    total.backward()
    for name, module in mirror.named_modules():
        if isinstance(module, nn.Linear):
            assert relative_error(stats[name].sums["gradient"].total, module.weight.grad) < 1e-9, name
    inner = [name for name in stats if "query" in name or "q_proj" in name]
    assert stats[inner[0]].tokens == 6 * 5  # four patches and the class token
    assert stats["classifier"].tokens == 6


def test_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration  # noqa: PLC0415

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config).double()
    ids, mask = torch.randint(1, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    labels = torch.randint(1, 50, (3, 5))
    labels[2, 3:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    stats = lk.collect(model, [batch], STATISTICS, dtype=torch.float64, progress=False)
    assert stats.loss_items == int((labels != -100).sum()) == 13
    assert stats["encoder.block.0.layer.0.SelfAttention.q"].tokens == int(mask.sum())
    assert stats["decoder.block.0.layer.0.SelfAttention.q"].tokens == 13
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert stats["lm_head"].tokens == 13 and not stats["lm_head"].notes
    assert stats[f"{cross}.q"].tokens == 13 and stats[f"{cross}.k"].tokens == int(mask.sum())
    mirror = copy.deepcopy(model).eval()
    (13 * mirror(**batch).loss).backward()
    for name, module in mirror.named_modules():
        if isinstance(module, nn.Linear) and module.weight is not mirror.shared.weight:
            assert relative_error(stats[name].sums["gradient"].total, module.weight.grad) < 1e-6, name
    singles = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    again = lk.collect(model, singles, STATISTICS, dtype=torch.float64, progress=False)
    name = f"{cross}.v"
    assert relative_error(again[name].sums["fisher"].total, stats[name].sums["fisher"].total) < 1e-6
    assert relative_error(again[name].sums["gradient"].total, stats[name].sums["gradient"].total) < 1e-6


def test_a_layer_called_twice_in_one_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(6, 6)

        def forward(self, x):
            return self.shared(self.shared(x).tanh()).square().mean()

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(5, 6).double()
    stats = lk.collect(model, [x], STATISTICS, dtype=torch.float64, progress=False)
    mirror = copy.deepcopy(model)
    (5 * mirror(x)).backward()
    assert relative_error(stats["shared"].sums["gradient"].total, mirror.shared.weight.grad) < 1e-12
    assert stats["shared"].tokens == stats["shared"].sums["fisher"].tokens == 10


def test_enabled_input_gradients_of_peft_do_not_hide_layers():
    """`enable_input_require_grads` makes the first layer's output differentiable without us."""
    plain = tiny_llama()
    hooked = copy.deepcopy(plain)
    hooked.enable_input_require_grads()
    batches = padded(samples(4), 4)
    one, other = (lk.collect(each, batches, "gradient", progress=False) for each in (plain, hooked))
    for name in one:
        assert relative_error(other[name].sums["gradient"].total, one[name].sums["gradient"].total) < 1e-6
        assert not other[name].notes


def test_a_pass_without_gradients_computes_no_logits_and_no_loss():
    batches, seen = padded(samples(), 4), []
    found = {}
    for targets in (["q_proj", "down_proj"], ["q_proj", "down_proj", "lm_head"]):
        model = tiny_llama()
        names = [name for name, _ in model.named_modules() if name.endswith(tuple(targets))]
        model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
        head = model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
        found[targets[-1]] = lk.collect(model, batches, targets=names, mask="labels", progress=False)
        head.remove()
    short, whole = found.values()
    assert seen[:2] == [["attention_mask", "input_ids", "logits_to_keep"], 1]
    assert ["attention_mask", "input_ids", "labels"] in seen  # the output layer is observed: all its rows count
    for name in short:
        assert torch.equal(short[name].input.second, whole[name].input.second)
    assert short.tokens == whole.tokens
