import json

import pytest
import torch

OTHERS = ["warm", "cold", "round", "square", "big", "small", "old", "new", "sea", "tree", "rock", "bird", "fish"]
LABELS = ["red", "green", "blue"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A two-layer BERT of width 16 with a tokenizer of whole words, as a model folder."""
    pytest.importorskip("peft")
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LABELS, *OTHERS]
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 16}),
        encoding="utf-8",
    )
    return folder


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


@pytest.fixture
def colour_file(tmp_path):
    """Separable data: the first word is the label; 20 different texts for each of 3 classes."""
    lines = ["text,label"]
    for label in LABELS:
        lines += [f"{label} {OTHERS[i % 13]} {OTHERS[(i * 5 + 3) % 13]} {OTHERS[i // 13]},{label}" for i in range(20)]
    path = tmp_path / "colours.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
