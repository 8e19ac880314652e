"""The examples, run as a user runs them; what they print has to be true of what they show."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.warm import Warm
from tests.torchrun import two_processes

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NUMBER = r"([-+]?\d+\.?\d*(?:e[-+]?\d+)?)"


def numbers(pattern, text):
    """Every match of a pattern, `#` standing for a number."""
    found = re.findall(pattern.replace("#", NUMBER), text)
    assert found, f"nothing like {pattern!r} in:\n{text}"
    return [[float(each) for each in ((match,) if isinstance(match, str) else match)] for match in found]


def falls(text, *, share=0.9, times=1):
    losses = numbers("loss:? # -> #", text)
    assert len(losses) == times
    assert all(last < share * first for first, last in losses), losses


def below(pattern, limit, text):
    assert all(value < limit for (value,) in numbers(pattern, text)), text


def plain_loop(text):
    falls(text, share=0.7)
    assert "14 LoRA layers: 14 fused" in text and "as accurate as PEFT: True" in text
    below("difference of the logits #", 1e-4, text)


def trainer(text):
    falls(text, times=2)
    (_, early), (_, late) = numbers(r"step \d+: rank #, \|s B A\| / \|W\| #", text)
    assert 0 < early < late
    below("export of rank 16: logits differ by #", 1e-4, text)
    assert "14 LoRA layers: 14 fused" in text and "14 layers have learned 4 coordinates each" in text


def several_layers_fused(text):
    falls(text)
    assert "14 LoRA layers: 14 fused" in text


def fsdp2(text):
    assert "2,048 tokens in 16 batches" in text  # of both processes
    falls(text, share=0.7)
    assert "start: same bits in 2 processes: True" in text and "end: same bits in 2 processes: True" in text


def experts(text):
    falls(text)
    assert text.count("8 of 8 experts initialised") == 4 and "8 LoRA layers: 4 fused, 4 delta" in text
    rows = numbers(r"experts(?:\.base_layer)?: # rows", text)
    assert rows == [[4 * 8 * 24 * 2.0]] * 4  # each token twice
    below("in stock PEFT: logits differ by #", 1e-4, text)


def qlora(text):
    falls(text, share=0.8)
    assert "14 LoRA layers: 14 delta" in text and "base intact: True" in text
    below("start: logits differ by #", 1e-4, text)
    below("export of rank 16: logits differ by #", 1e-4, text)


def vision(text):
    ((before, after),) = numbers("negatives: accuracy # -> #", text)
    assert before < 0.3 and after > 0.6
    ranks = numbers("rank # -> #:", text)
    assert ranks[0][1] < 4 < ranks[-1][1]  # redistributed


def without_peft(text):
    falls(text, share=0.2)
    below("function is kept within #", 1e-5, text)
    # The first layer was off by a matrix of rank 2.
    first, second, third = numbers("layer 0: .* singular values #, #, #,", text)[0]
    assert first > second > 2 * third


def many_inits(text):
    rows = numbers(r"(?m)^\w+ +#, # +#, # +#$", text)
    assert len(rows) == 6
    for start, start_measured, step, step_measured, _ in rows:
        assert start_measured == pytest.approx(start, rel=0.2, abs=2e-4)
        assert step_measured == pytest.approx(step, rel=0.1, abs=3e-5) and step < 0
    assert sum(start != 0 for start, *_ in rows) == 1  # LoRA-DA alone starts a step on
    assert len({step for _, _, step, _, _ in rows}) == 6


CASES = {
    "plain_loop": (plain_loop, ("peft",)),
    "trainer": (trainer, ("peft",)),
    "sft_trainer": (several_layers_fused, ("trl",)),
    "lightning_fit": (several_layers_fused, ("lightning", "pytorch_lightning")),
    "fsdp2": (fsdp2, ("peft",)),
    "experts": (experts, ("peft",)),
    "qlora": (qlora, ("bitsandbytes",)),
    "vision": (vision, ("sklearn",)),
    "without_peft": (without_peft, ()),
    "many_inits": (many_inits, ("peft",)),
}
INSTALLED_AS = {"sklearn": "scikit-learn"}
SLOW = ("trainer", "fsdp2", "qlora", "vision", "many_inits")


# Nearly all examples begin with these, which takes most of their time.
IMPORTS = ("torch", "peft", "transformers")


@pytest.fixture(scope="module")
def environment():
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables.pop("TRITON_INTERPRET", None)  # the tests' own, not a user's
    return variables


@pytest.fixture(scope="module")
def warm(environment):
    with Warm(IMPORTS, environment) as made:
        yield made


@pytest.fixture
def run(environment, request):
    def run(name):
        script = EXAMPLES / f"{name}.py"
        if imported(script).issuperset(IMPORTS):  # elsewhere, an import that is missing would not show
            done = request.getfixturevalue("warm").run(str(script))
        else:
            command = [sys.executable, str(script)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def imported(script):
    """The packages that a script imports when it starts."""
    body = ast.parse(script.read_text()).body
    names = [each.module for each in body if isinstance(each, ast.ImportFrom)]
    names += [alias.name for each in body if isinstance(each, ast.Import) for alias in each.names]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in CASES])
def test_example_runs_and_shows_what_it_says(name, run):
    check, packages = CASES[name]
    if packages and not any(find_spec(each) for each in packages):
        if packages != ("peft",):
            assert f"pip install {INSTALLED_AS.get(packages[0], packages[0])}" in run(name)  # and is no failure
        pytest.skip(f"{packages[0]} is not installed")
    check(two_processes("examples.fsdp2") if name == "fsdp2" else run(name))


def test_every_example_is_tested_and_listed():
    files = {each.stem for each in EXAMPLES.glob("*.py")}
    assert files == set(CASES)
    listed = re.findall(r"^\| \[(\w+)\.py\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert all(name == link for name, link in listed) and sorted(name for name, _ in listed) == sorted(files)


@pytest.mark.parametrize("name", CASES)
def test_every_example_says_how_it_is_run_and_changed_and_is_short(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    said = ast.get_docstring(ast.parse(source))
    assert f"examples/{name}.py" in said and "For your own model" in said
    assert len(source.splitlines()) <= 90
