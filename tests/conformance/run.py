"""PEFT's own tests, stock and on accelerated layers: `make conformance`. What passes stock must pass fused.

    python tests/conformance/run.py [--out FOLDER] [--tests FOLDER] [--workers N] [arguments of pytest]

The tests are those of the sdist of the installed PEFT. `--out` gets `summary.md`, `summary.json` and both logs. The
exit status is 0 if no test passes stock and fails fused, twice in a row.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import selection


def peft_tests(folder: Path) -> Path:
    """PEFT's tests, as its sdist has them."""
    name = f"peft-{version('peft')}"
    tests = folder / name / "tests"
    if not (tests / "testing_common.py").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, name.replace("-", "=="), "-d", str(folder)], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        (tests / "__init__.py").touch()  # its modules import each other relatively
    return tests


def files(tests: Path) -> list[str]:
    """Those that are selected, of those that are there."""
    known = {*selection.FILES, *(name for names in selection.NOT_RUN.values() for name in names)}
    unknown = sorted(path.name for path in tests.glob("test_*.py") if path.name not in known)
    if unknown:
        print(f"in neither list of selection.py, hence run: {', '.join(unknown)}")
    return [str(tests / name) for name in (*selection.FILES, *unknown) if (tests / name).exists()]


def environment(out: Path) -> dict[str, str]:
    """Of all processes: offline, with the stand-ins as the hub's cache."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE), str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "HF_HOME": str(out / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "LORA_KERNELS_CACHE": str(out / "no-such-table.json"),
    }


def session(mode: str, tests: Path, out: Path, arguments: list[str], name: str = "") -> dict[str, dict]:
    """Run the tests, and return what came of each."""
    record, log = out / f"{mode}{name}.json", out / f"{mode}{name}.log"
    record.unlink(missing_ok=True)
    variables = {**environment(out), "CONFORMANCE_MODE": mode, "CONFORMANCE_RECORD": str(record)}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "conformance_plugin", "-p", "no:cacheprovider", "-W", "ignore",
        "-c", os.devnull, "--rootdir", str(tests.parent), "-k", selection.EXPRESSION, *arguments,
    ]  # fmt: skip
    with log.open("w") as file:
        done = subprocess.run(command, cwd=tests.parent, env=variables, stdout=file, stderr=subprocess.STDOUT)
    if not record.exists() or done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with status {done.returncode}:\n{log.read_text()[-3000:]}")
    return json.loads(record.read_text())


def passed(results: dict[str, dict], name: str) -> bool:
    return results.get(name, {}).get("outcome") in ("passed", "xfailed")


def differing(stock: dict[str, dict], fused: dict[str, dict]) -> list[str]:
    """The tests that pass stock and not fused."""
    return sorted(name for name in stock if passed(stock, name) and not passed(fused, name))


def summary(stock: dict[str, dict], fused: dict[str, dict], broken: list[str], unsteady: list[str]) -> dict:
    """What is written, and printed."""
    counts = {mode: dict(Counter(each["outcome"] for each in results.values()))
              for mode, results in (("stock", stock), ("fused", fused))}  # fmt: skip
    return {
        "peft": version("peft"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "tests": len(stock),
        **counts,
        "with_lora_layers": sum(each["layers"] > 0 for each in stock.values()),
        "with_accelerated_layers": sum(each["accelerated"] > 0 for each in fused.values()),
        "pass_stock_fail_fused": {name: fused.get(name, {}).get("message", "did not run") for name in broken},
        "unsteady": unsteady,
        "fail_stock": {
            name: each["message"]
            for name, each in stock.items()
            if not passed(stock, name) and each["outcome"] != "skipped"
        },  # fmt: skip
        "not_run": {reason: list(names) for reason, names in selection.NOT_RUN.items()},
    }


def page(found: dict) -> str:
    """The summary in Markdown."""
    outcomes = sorted({*found["stock"], *found["fused"]})
    lines = [
        f"# PEFT {found['peft']}'s tests on accelerated layers",
        "",
        f"torch {found['torch']}, transformers {found['transformers']}; {found['tests']} tests, of which "
        f"{found['with_lora_layers']} make LoRA layers and {found['with_accelerated_layers']} accelerated ones.",
        "",
        "| | " + " | ".join(outcomes) + " |",
        "| --- |" + " --- |" * len(outcomes),
        *(f"| {mode} | " + " | ".join(str(found[mode].get(each, 0)) for each in outcomes) + " |"
          for mode in ("stock", "fused")),
        "",
        f"## Pass stock and fail fused: {len(found['pass_stock_fail_fused'])}",
        "",
        *(f"- `{name}`: {message.splitlines()[0] if message else ''}"
          for name, message in found["pass_stock_fail_fused"].items()),
        "",
        f"## Neither steadily: {len(found['unsteady'])}",
        "",
        *(f"- `{name}`" for name in found["unsteady"]),
        "",
        f"## Fail stock: {len(found['fail_stock'])}",
        "",
        *(f"- `{name}`: {message.splitlines()[0] if message else ''}" for name, message in found["fail_stock"].items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Run both, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "conformance")
    parser.add_argument("--tests", type=Path, help="a folder of tests in place of PEFT's")
    parser.add_argument("--workers", type=int, default=2)
    options, more = parser.parse_known_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    tests = options.tests.resolve() if options.tests else peft_tests(out)
    if not options.tests:
        command = [sys.executable, "-W", "ignore", str(HERE / "stand_ins.py"), str(out / "home" / "hub")]
        with (out / "stand_ins.log").open("w") as log:
            subprocess.run(command, env=environment(out), check=True, stdout=log, stderr=subprocess.STDOUT)
    targets = [str(tests)] if options.tests else files(tests)
    workers = ["-n", str(options.workers), "--dist", "worksteal"] if options.workers > 1 else []
    stock, fused = (session(mode, tests, out, [*targets, *workers, *more]) for mode in ("stock", "fused"))
    suspects = differing(stock, fused)
    unsteady = []
    if suspects:  # once more, by themselves
        again = [session(mode, tests, out, [*suspects, *more], "-again") for mode in ("stock", "fused")]
        unsteady = [name for name in suspects if not passed(again[0], name) or passed(again[1], name)]
    broken = [name for name in suspects if name not in unsteady]
    found = summary(stock, fused, broken, unsteady)
    (out / "summary.json").write_text(json.dumps(found, indent=1))
    (out / "summary.md").write_text(page(found))
    print(page({**found, "fail_stock": {}}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
