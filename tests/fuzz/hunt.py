"""A long search: `python tests/fuzz/hunt.py [--factor N] [names]`.

Each function is searched in a process of its own, so that a crash of the interpreter is one finding more, with the call
that made it, and not the end.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["HYPOTHESIS_PROFILE"] = "long"
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def search(what, run, seconds):
    """Whether a search found nothing; it is done in a copy of this process."""
    with tempfile.TemporaryDirectory() as folder:
        trace, found = Path(folder) / "call", Path(folder) / "found"
        child = os.fork()
        if child == 0:
            import outcomes

            outcomes.TRACE = str(trace)
            status = 0
            try:
                run()
            except BaseException as error:
                every = getattr(error, "exceptions", (error,))  # a group, where hypothesis found several kinds
                found.write_text("\n".join(f"{type(each).__name__}: {each}" for each in every))
                status = 1
            os._exit(status)
        started = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() - started > seconds:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                print(f"late  {what}: last call {trace.read_text() if trace.exists() else 'none'}", flush=True)
                return True
            time.sleep(0.05)
        if status == 0:
            print(f"ok    {what} ({time.monotonic() - started:.0f} s)", flush=True)
            return True
        call = trace.read_text() if trace.exists() else "no call\n"
        text = found.read_text() if found.exists() else ""
        why = f"SIGNAL {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        print(f"FOUND {what}: {text}" if text else f"FOUND {what}: {why} in {call}", flush=True)
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=int, default=20, help="how many times the usual number of examples")
    parser.add_argument("--seconds", type=float, default=300, help="for each search")
    parser.add_argument("names", nargs="*", help="parts of names of functions; all by default")
    options = parser.parse_args()
    os.environ["FUZZ_FACTOR"] = str(options.factor)
    import test_fuzz_functions as suite

    good = True
    for parameters in suite.RUNS:
        case, backend = parameters.values
        if options.names and not any(each in parameters.id for each in options.names):
            continue
        for test in (
            suite.test_valid_calls_give_the_right_answer,
            suite.test_hostile_calls_give_a_documented_error_or_the_right_answer,
        ):
            what = f"{parameters.id} {test.__name__.split('_')[1]}"
            good &= search(what, lambda test=test, case=case, backend=backend: test(case, backend), options.seconds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
