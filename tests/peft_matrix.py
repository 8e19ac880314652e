"""The adapter tests under every supported version of PEFT: `python tests/peft_matrix.py [pytest's arguments]`.

Each version is installed into a folder of its own under build/, with a transformers of its time where the installed one
does not fit, and put before the installed packages. Prints a line per version. Without arguments, adapters that each
version has written are then loaded by all others, as `tests/adapters/peft_files.py` says.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "peft"
TESTS = (
    "tests/adapters", "tests/api",
    *(
        f"tests/training/test_{name}.py"
        for name in ("accelerate", "dash", "dash_layers", "dash_saving", "experts", "verify")
    ),
    "-m", "not slow",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A version of PEFT, what it needs in other versions than the installed, and what it cannot be imported beside."""

    peft: str
    others: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def __str__(self) -> str:
        transformers = [each for each in self.others if each.startswith("transformers")]
        return ", ".join((f"peft {self.peft}", *(each.replace("==", " ") for each in transformers)))

    @property
    def folder(self) -> Path:
        return FOLDER / re.sub("[^0-9a-z.]+", "-", str(self))

    def install(self) -> None:
        """Into the folder, unless that is done already."""
        done = self.folder / "installed"
        wanted = "\n".join((f"peft=={self.peft}", *self.others))
        if not done.is_file() or done.read_text() != wanted:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*command, "--upgrade", "--target", str(self.folder), *wanted.split("\n")], check=True)
            done.write_text(wanted)
        # Python runs this first, in every process: a package that is None cannot be imported or found.
        lines = ("import sys", *(f"sys.modules[{name!r}] = None" for name in self.hidden))
        (self.folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python in this environment."""
        path = (str(self.folder), str(ROOT), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_WAIT_POLICY": "passive"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace"
        )


TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
NEED_NEWER = ("sentence_transformers", "datasets")
# The newest of each minor version, from `adapters.view.MINIMUM` on. The first two know torchao in older versions
# only; 0.19 converts mixtures of experts as the first transformers 5 did, and so gets transformers 4.
ENVIRONMENTS = (
    Environment("0.18.1", TRANSFORMERS_4, ("torchao", *NEED_NEWER)),
    Environment("0.18.1", hidden=("torchao",)),
    Environment("0.19.1", TRANSFORMERS_4, ("torchao", *NEED_NEWER)),
    Environment("0.20.0"),
    Environment("0.21.2"),
)


def tested(environment: Environment, arguments: tuple[str, ...]) -> bool:
    """Run the tests; print a line, and what failed."""
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    summary = re.findall(r"^\d+ .* in .*s.*$", done.stdout, re.MULTILINE)
    print(f"{environment!s:36} {summary[-1] if summary else 'did not run'}", flush=True)
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print("\n".join(f"    {line}" for line in failed or (done.stdout + done.stderr).splitlines()[-20:]))
    return done.returncode == 0


def exchanged(environments: tuple[Environment, ...]) -> bool:
    """Let each version write adapters, and each read those of all; print a line each."""
    good, files = True, FOLDER / "files"
    program = ("-m", "tests.adapters.peft_files")
    for action in ("write", "read"):
        for environment in environments:
            writers = environments if action == "read" else (environment,)
            done = environment.run(*program, action, *(str(files / writer.folder.name) for writer in writers))
            outcome = "failed" if done.returncode else f"those of {len(writers)}" if action == "read" else "done"
            print(f"{environment!s:36} {action}s adapters: {outcome}", flush=True)
            if done.returncode:
                print("\n".join(f"    {line}" for line in done.stderr.splitlines()[-8:]))
                good = False
    return good


def main(arguments: list[str]) -> int:
    """Run all versions."""
    parallel = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")
    good = True
    for environment in ENVIRONMENTS:
        environment.install()
        good &= tested(environment, (*parallel, *(arguments or TESTS)))
    if not arguments:
        good &= exchanged(ENVIRONMENTS)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
