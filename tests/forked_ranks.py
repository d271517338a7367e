"""`python forked_ranks.py N SCRIPT [ARGUMENT ...]`: a script in N processes, with the environment that torchrun gives.

They are forked from one interpreter that has imported what most of them need, so that a test waits for one start and
not for N + 1. That a run ends well under torchrun itself is tested in `train/test_endings.py`.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path


def run_ranks(
    world: int, script: str | Path, *arguments: object, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Both streams of all ranks, and 0 or the exit code of the first that failed."""
    command = [sys.executable, __file__, str(world), str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def rank_environment(rank: int, world: int, port: str) -> dict[str, str]:
    """As torchrun's agent sets it, which holds the store at the port."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in (places | store).items()} | {"TORCHELASTIC_RESTART_COUNT": "0"}


def main(world: int, script: str, *arguments: str) -> int:
    """The first exit code that is not 0; the others are then told to end."""
    import torch.distributed as dist

    import brainfm.downstream.finetuning
    import brainfm.train.pretraining  # noqa: F401

    children, started = set[int](), []
    for rank in range(world):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.environ |= rank_environment(rank, world, os.read(reader, 16).decode())
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            return 0
        children.add(child)
        started.append(writer)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for writer in started:
        os.write(writer, str(store.port).encode())
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            for other in children:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
