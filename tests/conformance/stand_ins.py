"""Tiny random models in place of those of the hub that PEFT's tests name, in a cache as huggingface_hub lays it out.

Same architecture, few and narrow layers; vocabularies as large as the tests index. Tokenizers split bytes. Adapters
are fresh LoRA adapters of a stand-in. What must be the very file of the hub (old formats, trained numbers) has none
here, and its tests fail in both runs.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REVISION = "0" * 40
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
BERT = {**SMALL, "num_hidden_layers": 5, "vocab_size": 1124, "max_position_embeddings": 512}
OPT = {
    "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "ffn_dim": 32,
    "max_position_embeddings": 128, "vocab_size": 50265,
}  # fmt: skip
OPT_DEEP = {**OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 12, "vocab_size": 50272}
GPT2 = {
    "n_embd": 32,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 512,
    "vocab_size": 1000,
    "bos_token_id": 98,
    "eos_token_id": 98,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
T5 = {
    "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4, "vocab_size": 1103,
    "decoder_start_token_id": 0,
}  # fmt: skip

# Repository: architecture (the class of the model) and config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": ("OPTForCausalLM", {**OPT, "vocab_size": 50268}),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", OPT_DEEP),
    "facebook/opt-125m": ("OPTForCausalLM", OPT_DEEP),
    "facebook/opt-350m": ("OPTForCausalLM", {**OPT_DEEP, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "openai-community/gpt2": ("GPT2LMHeadModel", {**GPT2, "vocab_size": 50257}),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "vocab_size": 50257}),
    "bert-base-uncased": ("BertForMaskedLM", BERT),
    "tiiuae/falcon-mamba-tiny-dev": ("FalconMambaForCausalLM", {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 1024}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", {
        "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", {**SMALL, "vocab_size": 1024}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {**SMALL, "vocab_size": 32000}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {**GROUPED, "vocab_size": 32000}),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {**GROUPED, "vocab_size": 32000}),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {
        **GROUPED, "vocab_size": 1024, "pad_token_id": 0}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {**GROUPED, "vocab_size": 32000}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**GROUPED, "vocab_size": 1024}),
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", {**GROUPED, "vocab_size": 1024}),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", {**GROUPED, "vocab_size": 1024}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8, "vocab_size": 1024}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {
        **GROUPED, "head_dim": 8, "vocab_size": 2048, "sliding_window": 16}),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", {
        **GROUPED, "num_local_experts": 4, "vocab_size": 1024}),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "vocab_size": 1024}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", {
        **GROUPED, **EXPERTS, "vocab_size": 1024}),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", {
        **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "vocab_size": 1024}),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", {
        **GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8, "vocab_size": 1024,
        "pad_token_id": 0, "interleave_moe_layer_step": 1}),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "vocab_size": 1024,
        "max_position_embeddings": 100}),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", {
        **BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", {
        **BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": ("ResNetForImageClassification", {
        "embedding_size": 10, "hidden_sizes": [10, 20], "depths": [1, 1], "num_labels": 3}),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModelWithProjection", {**SMALL, "vocab_size": 1000}),
    "peft-internal-testing/tiny-random-Whisper": ("WhisperForConditionalGeneration", {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "vocab_size": 200,
        "max_source_positions": 30, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1}),
}  # fmt: skip

OPT_NAME = "peft-internal-testing/tiny-random-OPTForCausalLM"
# Repository: the base model's, the class that loads it, the task, and more of the config.
ADAPTERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (OPT_NAME, "AutoModelForCausalLM", "CAUSAL_LM", {}),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        OPT_NAME, "AutoModelForSequenceClassification", "SEQ_CLS", {}),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        OPT_NAME, "AutoModelForQuestionAnswering", "QUESTION_ANS", {}),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (OPT_NAME, "AutoModel", "FEATURE_EXTRACTION", {}),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", {}),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "peft-internal-testing/tiny-random-GPT2LMHeadModel", "AutoModelForTokenClassification", "TOKEN_CLS", {}),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "peft-internal-testing/tiny-random-Whisper", "WhisperForConditionalGeneration", None, {
            "target_modules": ["q_proj", "v_proj"]}),
    "peft-internal-testing/gpt2-lora-random": ("openai-community/gpt2", "AutoModelForCausalLM", "CAUSAL_LM", {}),
    "peft-internal-testing/opt-125m-dummy-lora": (
        "peft-internal-testing/opt-125m", "AutoModelForCausalLM", "CAUSAL_LM", {}),
    "peft-internal-testing/tiny-random-BertModel-lora": (
        "peft-internal-testing/tiny-random-BertModel", "AutoModel", "FEATURE_EXTRACTION", {}),
}  # fmt: skip


def snapshot(folder: Path, repository: str, fill: Callable[[Path], None]) -> None:
    """Make a repository's snapshot in the cache, unless it is there."""
    root = folder / f"models--{repository.replace('/', '--')}"
    if (root / "refs" / "main").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    files = root / "snapshots" / REVISION
    files.mkdir(parents=True)
    fill(files)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(REVISION)  # last: what is unfinished is made anew


def tokenizer(files: Path) -> None:
    """One that splits bytes, with the special tokens of all families."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", cls_token="<s>", sep_token="</s>",
    ).save_pretrained(files)  # fmt: skip


def model(files: Path, architecture: str, settings: dict[str, Any]) -> None:
    """A random one."""
    import transformers  # noqa: PLC0415

    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    kind(kind.config_class(**settings)).save_pretrained(files)
    if architecture not in ("ResNetForImageClassification",):
        tokenizer(files)


def pipeline(files: Path) -> None:
    """Stable Diffusion, tiny."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: PLC0415
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: PLC0415

    torch.manual_seed(0)
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*ends, *(f"{chr(i)}</w>" for i in range(33, 127))])}
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SMALL, vocab_size=1000, bos_token_id=0, eos_token_id=1)),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=2, sample_size=32, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(files)  # fmt: skip


def adapter(files: Path, base: str, loader: str, task: str | None, settings: dict[str, Any]) -> None:
    """A random one of a stand-in."""
    import transformers  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    torch.manual_seed(0)
    loaded = getattr(transformers, loader).from_pretrained(base)
    get_peft_model(loaded, LoraConfig(task_type=task, init_lora_weights=False, **settings)).save_pretrained(files)


def write(folder: Path) -> None:
    """Write what is missing; in a process of its own, which finds the models of adapters in the folder.

    Args:
        folder: that of the cache, `hub` of `HF_HOME`.
    """
    for repository, (architecture, settings) in MODELS.items():
        snapshot(folder, repository, lambda files, a=architecture, s=settings: model(files, a, s))
    snapshot(folder, "hf-internal-testing/tiny-sd-pipe", pipeline)
    for repository, arguments in ADAPTERS.items():
        snapshot(folder, repository, lambda files, a=arguments: adapter(files, *a))


if __name__ == "__main__":
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    write(Path(sys.argv[1]))
