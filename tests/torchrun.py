"""Run modules in two processes: `torchrun --nproc-per-node 2 -m tests.torchrun OUT MODULE ...`."""

import datetime
import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def two_processes(module, *arguments):
    """`torchrun --nproc-per-node 2 -m MODULE ARGUMENTS`; returns what it printed, or raises with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def main():
    """`main(OUT / MODULE)` of every module, in one process group."""
    import torch  # noqa: PLC0415  (the process that starts these may not need it)
    from torch import distributed  # noqa: PLC0415

    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    for name in sys.argv[2:]:
        torch.manual_seed(0)
        out = Path(sys.argv[1], name)
        out.mkdir(exist_ok=True)
        importlib.import_module(name).main(out)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
