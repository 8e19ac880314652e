"""Which of PEFT's tests `make conformance` runs, by file and expression, and why not the others."""

# Files with tests that make LoRA layers.
FILES = (
    "test_arrow.py", "test_auto.py", "test_bdlora.py", "test_custom_models.py", "test_decoder_models.py",
    "test_encoder_decoder_models.py", "test_feature_extraction_models.py", "test_helpers.py", "test_hub_features.py",
    "test_initialization.py", "test_integrations.py", "test_lora_conversion.py", "test_lora_ga.py",
    "test_lora_intruders.py", "test_lora_variants.py", "test_lorafa.py", "test_loraplus.py", "test_low_level_api.py",
    "test_mapping.py", "test_mixed.py", "test_other.py", "test_riemannian_lora.py", "test_seq_classifier.py",
    "test_stablediffusion.py", "test_target_parameters.py", "test_token_classification_qa.py", "test_torch_compile.py",
    "test_trainable_tokens.py", "test_tuners_utils.py", "test_velora.py", "test_xlora.py",
)  # fmt: skip

# The others by reason; files that PEFT adds later are reported as unknown until they are in one of the two.
NOT_RUN = {
    "make no LoRA layer": (
        "test_adamss_asa.py", "test_adaption_prompt.py", "test_boft.py", "test_bufferdict.py", "test_cartridge.py",
        "test_config.py", "test_cpt.py", "test_deft.py", "test_frod.py", "test_incremental_pca.py",
        "test_multitask_prompt_tuning.py", "test_osf.py", "test_poly.py", "test_pvera.py", "test_quantization.py",
        "test_randlora.py", "test_shadow.py", "test_shira.py", "test_supertuning.py", "test_unilora.py",
        "test_vblora.py", "test_vera.py",
    ),
    "need a GPU": ("test_common_gpu.py", "test_gpu_examples.py", "test_gptqmodel.py"),
    "need Megatron": ("test_lora_megatron.py",),
    "need a data set of the hub when they are imported": ("test_vision_models.py",),
}  # fmt: skip

# Classes of test_initialization.py that test other methods.
OTHER_METHODS = (
    "Shadow", "Lokr", "Adamss", "PromptTuning", "Vera", "Frod", "VBLora", "C3A", "WaveFT", "Road", "DeLoRA", "GraLoRA",
    "Psoft", "Miss", "Peanut", "Beft", "Supertuning", "Hira", "Hra", "Lily", "TinyLora",
)  # fmt: skip
# Tests of how PEFT works, not of what it does.
INSIDES = (
    "test_target_parameter_result_caching_works",
)  # counts sums of all experts' weights, of which there are none
EXPRESSION = "not (" + " or ".join((*(f"Test{name}Initialization" for name in OTHER_METHODS), *INSIDES)) + ")"


def other_method(item) -> bool:
    """Whether a parameter of a test is the config of a method that is not LoRA (or derived from it, as AdaLora)."""
    from peft import LoraConfig, PeftConfig  # noqa: PLC0415  (the plugin is imported before the environment is set)

    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    kinds = [value if isinstance(value, type) else type(value) for value in parameters]
    configs = [kind for kind in kinds if issubclass(kind, PeftConfig)]
    return bool(configs) and not any(issubclass(kind, LoraConfig) for kind in configs)
