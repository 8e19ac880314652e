import pytest
import torch


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory):
    """A two-layer Llama of width 16 whose words are those of generated problems, as a model folder."""
    pytest.importorskip("peft")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from benchmarks.demo.problems import problems
    from benchmarks.demo.texts import PROMPT

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    texts = [PROMPT.format(question=one.question) + " " + one.answer for one in problems(100)]
    words = {word for text in texts for word, _ in Whitespace().pre_tokenize_str(text)}
    tokens = ["<end>", "<unknown>", *sorted(words)]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>").save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": len(tokens)}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True, initializer_range=0.2)
    config.bos_token_id, config.eos_token_id = None, 0
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
