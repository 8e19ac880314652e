"""Python programs in processes that begin with some modules imported: torch, transformers and PEFT take ten seconds.

Run by its path, this file is the process that they are forked from. It has imported, and has started no thread.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


class Warm:
    """Runs programs.

    Args:
        imports: modules.
        environment: of all programs; what is read on import is read once.
    """

    def __init__(self, imports: tuple[str, ...], environment: Mapping[str, str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), *imports]
        self.parent = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        program: str,
        *arguments: str,
        cwd: str | Path = ".",
        environment: Mapping[str, str] | None = None,
        timeout: int = 300,
    ) -> subprocess.CompletedProcess[str]:
        """What `python program arguments` does, or `python -m program arguments` if it is no `.py` file."""
        assert self.parent.stdin is not None and self.parent.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            job = {"program": program, "arguments": arguments, "cwd": str(Path(cwd).resolve()), "timeout": timeout}
            job["environment"] = dict(environment or {})
            print(json.dumps({**job, "files": list(map(str, files))}), file=self.parent.stdin, flush=True)
            answer = self.parent.stdout.readline()
            assert answer, "the imports failed"
            stdout, stderr = (file.read_text() for file in files)
        return subprocess.CompletedProcess([program, *arguments], int(answer), stdout, stderr)

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *error: object) -> None:
        self.parent.communicate()  # at the end of its input it ends


def serve() -> dict:
    """Fork for every job, and answer with the exit status; only in the children it returns, with the job."""
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            return job
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(job: dict) -> None:
    """What a new process is given."""
    for number, name in enumerate((os.devnull, *job["files"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    sys.argv = [job["program"], *job["arguments"]]
    signal.alarm(job["timeout"])


if __name__ == "__main__":
    del sys.path[0]  # of this file
    for each in sys.argv[1:]:
        importlib.import_module(each)
    gc.freeze()
    job = serve()
    become(job)
    if job["program"].endswith(".py"):
        sys.path.insert(0, str(Path(job["program"]).resolve().parent))
        runpy.run_path(job["program"], run_name="__main__")
    else:
        sys.path.insert(0, job["cwd"])
        runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
