"""The pages: every block of code in them runs, every command named exists, and the site builds without a warning."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def run_shell(code, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)  # the tests' own, not a user's
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_python(code, names, path):
    exec(compile(code, name(path), "exec"), names)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=name)
def test_every_block_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = ROOT / "docs" / "getting-started.md"
    names = {"__name__": "__main__"}
    if path != start:
        run_python(blocks(start)[0][1], names, start)  # base, loader, model
    for language, code in blocks(path):
        assert language in ("python", "bash", "text", "json"), f"a block of {path.name} is in {language!r}"
        if language == "python":
            run_python(code, names, path)
        elif language == "bash":
            run_shell(code, tmp_path)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=name)
def test_a_page_says_where_its_names_come_from(path):
    python = any(language == "python" for language, _ in blocks(path))
    assert not python or path.name == "getting-started.md" or "getting-started.md#the-set-up" in path.read_text()


def test_every_make_target_and_module_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, flags=re.M), f"{name(path)}: make {target}"
        for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
            assert find_spec(module), f"{name(path)}: {module}"


def test_every_record_named_exists():
    for path in TEXTS:
        for record in re.findall(r"benchmarks/results/([a-z][\w*]*\.json)", path.read_text(encoding="utf-8")):
            assert list((ROOT / "benchmarks" / "results").glob(record)), f"{name(path)}: {record}"


def test_every_public_name_has_its_place_in_the_reference():
    import lora_kernels as lk

    said = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)$", said, flags=re.M))
    modules = {"lora_kernels": lk} | {
        f"lora_kernels.{each}": getattr(lk, each)
        for each in ("api", "init", "landscape", "linalg", "ops", "statistics", "training")
    }
    objects = {id(_resolve(each)) for each in listed}
    missing = [
        f"{where}.{each}"
        for where, module in modules.items()
        for each in module.__all__
        if f"{where}.{each}" not in modules
        and callable(getattr(module, each))
        and id(getattr(module, each)) not in objects
    ]
    assert not missing


def _resolve(path):
    module, _, attribute = path.rpartition(".")
    __import__(module)
    return getattr(sys.modules[module], attribute)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocs"), reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "Call it before the optimizer is created" in page  # docstrings are there
