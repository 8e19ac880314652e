"""Programs that are forked from a process with imports run as ones of their own do."""

import os
import signal

import pytest

from tests.helpers.warm import Warm

PROGRAM = """
import os, sys
print("json" in sys.modules, "shelve" in sys.modules, __name__, sys.argv[1:], os.getcwd(), os.environ["WARM"],
    os.environ.get("AND", "no more"))
left = globals().get("left", 0) + 1
sys.path.append("left")
print(left, sys.path.count("left"), sys.stdin.read() == "", file=sys.stderr)
import beside
if sys.argv[1:] == ["raise"]:
    raise ValueError("in so many words")
if sys.argv[1:] == ["hang"]:
    import time
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "beside.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def warm():
    with Warm(("shelve",), {**os.environ, "WARM": "set"}) as made:
        yield made


@pytest.mark.parametrize("program", ["program.py", "program"])
@pytest.mark.parametrize("status", [3, 0])
def test_output_and_exit_status(warm, folder, program, status):
    name = str(folder / program) if program.endswith(".py") else program
    done = warm.run(name, str(status), cwd=folder, environment={"AND": "more"})
    assert done.returncode == status
    assert done.stdout == f"True True __main__ ['{status}'] {folder} set more\n" and done.stderr == "1 1 True\n"


def test_errors_and_time_limits(warm, folder):
    done = warm.run("program", "raise", cwd=folder)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: in so many words\n")
    assert warm.run("program", "hang", cwd=folder, timeout=1).returncode == -signal.SIGALRM
    assert warm.run("program", "0", cwd=folder).returncode == 0


def test_imports_that_fail(folder):
    with Warm(("no_such_module",), os.environ) as warm, pytest.raises((AssertionError, BrokenPipeError)):
        warm.run("program", "0", cwd=folder)
