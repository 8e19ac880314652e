import hashlib
import json
import re

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoTokenizer

from benchmarks.demo.problems import TEMPLATES, problems
from benchmarks.demo.texts import IGNORED, Encoder, Example, predicted, read_task, word_problems

SIGNS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "/": lambda x, y: x / y}


def test_every_step_of_every_answer_is_right():
    for problem in problems(40 * len(TEMPLATES), seed=3):
        *steps, last = problem.answer.splitlines()
        known = {int(number) for number in re.findall(r"\d+", problem.question)} | {2, 12, 100}
        for step in steps:
            ((x, sign, y, result),) = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", step)
            assert SIGNS[sign](int(x), int(y)) == int(result) > 0
            assert {int(x), int(y)} <= known, problem
            known.add(int(result))
        assert 2 <= len(steps) <= 4 and last == f"#### {result}"
        assert not re.search(r"[{}]", problem.question + problem.answer)


def test_problems_are_varied_and_the_same_for_the_same_seed():
    made = problems(360)
    assert problems(20) == made[:20] and problems(20, seed=1) != made[:20]
    assert len({problem.question for problem in made}) == 360
    # The same on every machine and Python: what is quoted was measured on these texts.
    text = json.dumps([(problem.question, problem.answer) for problem in made])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "8e4c2efd06bd551106fee2c2ed9dd4f49e5f005589102231f796bf7e9f6f2850"
    )


def test_no_held_out_problem_is_trained_on():
    task = word_problems(30)
    assert len(task.test) == 30 and not {example.prompt for example in task.test} & {
        example.prompt for example in task.train
    }


def test_files_of_questions_or_of_texts(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.", "more": 1} for i in range(20)]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    task = read_task(file, held_out=100)
    assert (len(task.train), len(task.test)) == (16, 4)
    assert Example("Question: What is 7?\nAnswer:", " It is 7.") in task.train + task.test
    assert len(read_task(file, held_out=3).test) == 3
    file.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(5)))
    assert len(read_task(file, 1).train) == 4 and read_task(file, 1).test[0].prompt == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"own\.jsonl:1: 'answer' is None, but must be a text that is not empty"),
        ({"question": "a", "answer": " "}, r"'answer' is ' '"),
        ({"other": "a"}, r"'text' is None"),
        ({"text": 3}, r"'text' is 3"),
        ({"text": "alone"}, r"data has 1 different texts, but must have at least 2"),
    ],
)
def test_what_cannot_be_used_is_named(row, message, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_task(file, 4)


@pytest.fixture
def tokenizer(tiny_decoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_answers_are_learned_with_their_end_and_nothing_else(tokenizer):
    encoder = Encoder(tokenizer, max_tokens=7)
    short, long = Example("How many", " dollars"), Example("How", " dollars in the end ? How much money")
    batch = encoder.encode([short, long])
    words = tokenizer.convert_ids_to_tokens
    assert words(batch["input_ids"][0])[:4] == ["How", "many", "dollars", "<end>"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert batch["labels"][0].tolist() == [IGNORED] * 2 + batch["input_ids"][0, 2:4].tolist() + [IGNORED] * 3
    assert torch.equal(batch["labels"][1, 1:], batch["input_ids"][1, 1:])
    assert predicted(batch) == 2 + 6


def test_texts_without_room_for_an_answer_are_left_out(tokenizer):
    encoder = Encoder(tokenizer, max_tokens=4)
    whole, full = Example("", "How many dollars"), Example("How many dollars in", " the end")
    assert encoder.usable([whole, full, Example("How", " many")]) == (whole, Example("How", " many"))
    assert predicted(encoder.encode([whole])) == 3  # the first token of a text cannot be predicted


def test_the_order_is_that_of_the_seed_and_every_pass_sees_all(tokenizer):
    encoder = Encoder(tokenizer, 8)
    examples = [Example("How", f" {word}") for word in ("many", "much", "in", "the", "end")]
    streams = [encoder.shuffled(examples, 2, seed=0), encoder.shuffled(examples, 2, seed=0)]
    for _ in range(5):
        first, second = (next(stream)["input_ids"] for stream in streams)
        assert torch.equal(first, second) and len(first) == 2
    (all_of_them,) = {len(next(encoder.shuffled(examples, 50, 0))["input_ids"])}
    assert all_of_them == 5
    batches = encoder.by_length([*examples, Example("How many", " dollars in the end")] * 2)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 4]
    assert batches[0]["input_ids"].shape[1] == 3 < batches[1]["input_ids"].shape[1]
