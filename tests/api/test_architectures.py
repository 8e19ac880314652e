"""Default settings on tiny models of other architectures than decoders of text."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from tests.conftest import relative_error

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 32}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}


def make(name, config, *arguments, **settings):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(*arguments, **settings))


def images(size=16):
    return torch.randn(3, 3, size, size)


def tokens(length=9):
    ids, mask = torch.randint(5, 60, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def deberta():
    settings = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
    }
    settings |= {"norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
    model = make("DebertaV2ForSequenceClassification", "DebertaV2Config", **TEXT, **settings)
    return model, {**tokens(), "labels": torch.tensor([0, 1, 0])}, ["query_proj", "value_proj"], None


def vit():
    model = make("ViTForImageClassification", "ViTConfig", **IMAGE, num_labels=3)
    return model, {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}, "all-linear", None


def detr():
    backbone = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    if not hasattr(transformers, "ResNetConfig"):
        pytest.skip("needs ResNetConfig")
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5, "dropout": 0.0}
    model = make("DetrModel", "DetrConfig", backbone_config=resnet, **backbone, **sizes)
    mask = torch.ones(3, 32, 32, dtype=torch.long)
    mask[0, 20:] = 0
    batch = {"pixel_values": images(32), "pixel_mask": mask}
    return model, batch, ["q_proj", "v_proj", "fc1", "fc2"], lambda out, _batch: out.last_hidden_state.square().mean()


def qwen3_next():
    settings = {"num_key_value_heads": 2, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    settings |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_experts": 4}
    settings |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
    settings |= {"layer_types": ["linear_attention", "full_attention"]}
    model = make("Qwen3NextForCausalLM", "Qwen3NextConfig", **TEXT, **settings)
    batch = tokens()
    return (
        model,
        {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)},
        "all-linear",
        None,
    )


def sam():
    if not hasattr(transformers, "SamConfig"):
        pytest.skip("needs SamConfig")
    vision = {
        **IMAGE,
        "output_channels": 32,
        "num_pos_feats": 16,
        "mlp_dim": 48,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    prompt = {"hidden_size": 32, "image_size": 16, "patch_size": 4, "mask_input_channels": 4, "image_embedding_size": 4}
    decoder = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "mlp_dim": 48,
        "iou_head_hidden_dim": 16,
    }
    model = make(
        "SamModel", "SamConfig", vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    batch = {"pixel_values": images(), "input_points": torch.rand(3, 1, 2, 2) * 16}
    return model, batch, ["qkv", "q_proj", "v_proj", "lin1"], lambda out, _batch: out.pred_masks.square().mean()


def siglip():
    model = make("SiglipModel", "SiglipConfig", text_config=TEXT, vision_config=IMAGE)
    return model, {**tokens(16), "pixel_values": images()}, ["q_proj", "v_proj", "fc1"], lambda out, _b: _pairs(out)


def _pairs(out):
    logits = out.logits_per_text
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def wav2vec2():
    settings = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}
    settings |= {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2, "classifier_proj_size": 16}
    settings |= {"mask_time_prob": 0.0, "num_labels": 3}
    model = make("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **{**SIZES, "vocab_size": 20}, **settings)
    mask = torch.ones(3, 400, dtype=torch.long)
    mask[0, 200:] = 0
    batch = {"input_values": torch.randn(3, 400) * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
    return model, batch, ["q_proj", "v_proj", "intermediate_dense"], None


ARCHITECTURES = [deberta, vit, detr, qwen3_next, sam, siglip, wav2vec2]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", ["eva", "lora_ga"])
@pytest.mark.parametrize("build", ARCHITECTURES)
def test_default_settings_give_a_start(build, method):
    base, batch, targets, loss = build()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    options = {} if loss is None or method == "eva" else {"loss": loss}
    report = lk.initialize(model, [batch], method=method, progress=False, **options)
    statuses = [layer.status for layer in report.layers if layer.status != "unsupported"]
    # Some layers are not called, or the loss does not depend on them.
    assert statuses.count("initialised") >= max(4, 0.6 * len(statuses)), report
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_the_mask_of_a_text_is_not_that_of_image_patches(weighting):
    """SigLIP with as many tokens as patches."""
    model, batch, _, loss = siglip()
    names = ["text_model.encoder.layers.0.self_attn.q_proj", "vision_model.encoder.layers.0.self_attn.q_proj"]
    rows = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: rows.update({name: next(iter([*args, *kwargs.values()])).detach()}),
            with_kwargs=True,
        )
    wants = ("input_second", "fisher")
    settings = {"targets": names, "loss": loss, "weighting": weighting, "reduction": lambda b: torch.ones(3)}
    stats = lk.collect(model, [batch], wants, progress=False, **settings)
    text, image = (rows[name] for name in names)
    text = text[batch["attention_mask"].bool()]
    for name, x in zip(names, (text, image.flatten(0, 1)), strict=True):
        assert stats[name].sums["fisher"].tokens == stats[name].input.tokens == len(x) and not stats[name].notes
        assert relative_error(stats[name].input_covariance(), (x.mT @ x / len(x)).double()) < 1e-5


def test_the_mask_of_sound_is_that_of_its_frames():
    model, batch, *_ = wav2vec2()
    name, rows = "wav2vec2.encoder.layers.0.attention.q_proj", []
    model.get_submodule(name).register_forward_pre_hook(lambda _m, args: rows.append(args[0].detach()))
    stats = lk.collect(model, [batch], targets=[name], progress=False)
    (x,) = rows
    counted = model.wav2vec2._get_feature_vector_attention_mask(x.shape[1], batch["attention_mask"]).bool()
    x = x[counted]
    assert stats[name].input.tokens == len(x) < counted.numel() and not stats[name].notes
    assert relative_error(stats[name].input_covariance(), (x.mT @ x / len(x)).double()) < 1e-5
