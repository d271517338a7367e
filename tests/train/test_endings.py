"""How a run ends: within seconds, with one line and its exit code, and with no process left over."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks

SETTINGS = [
    *("model=test_resnet_3d", "epochs=200", "batch_size=2", "workers=1", "save_every=1000"),
    *("augmentation.crop_min=[27,32,32]", "input_size=[16,16,16]"),
]
SOON = 900  # seconds, of a machine however busy, after which a process hangs

COMMAND = "from brainfm.cli.training import pretrain_command as command; command()"

FAILS = f"""
from brainfm.train.trainer import Trainer
step = Trainer._step

def fails(self, batch):
    if self._step_of_run == 2:
        raise RuntimeError("of a step")
    return step(self, batch)

Trainer._step = fails
{COMMAND}
"""


class Run:
    """A pretraining process, and all that it starts, which are known by a mark in their environment."""

    def __init__(self, cohort: Path, folder: Path, *settings: str, code: str = COMMAND, **options):
        self.folder, self.mark = folder, uuid.uuid4().hex
        arguments = ["test_resnet_3d", f"manifest={cohort}", f"output={folder}", *SETTINGS, *settings]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"BRAINFM_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def wait_for_steps(self, steps: int) -> None:
        log, until = self.folder / "log.jsonl", time.monotonic() + SOON
        while not log.is_file() or len(log.read_text().splitlines()) < steps:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < until, "the run makes no steps"
            time.sleep(0.02)

    def processes(self) -> list[int]:
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                mine = self.mark.encode() in environment.read_bytes()
            except OSError:
                continue
            if mine:
                found.append(int(environment.parent.name))
        return found

    def end(self) -> tuple[int, str, list[int]]:
        """Its exit code, what it said, and what is left of it, which is then killed."""
        try:
            _, said = self.process.communicate(timeout=SOON)
            until = time.monotonic() + SOON
            while self.processes() and time.monotonic() < until:
                time.sleep(0.1)
            return self.process.returncode, said, self.processes()
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()


def largest_file(size: int) -> None:
    """Let writes beyond a file's size fail, those to shared memory too, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@needs_proc
def test_exception_in_a_step_ends_the_run(cohort, tmp_path):
    code, said, left = Run(cohort, tmp_path / "run", code=FAILS).end()
    assert (code, left) == (1, [])
    assert said.splitlines()[-1] == "RuntimeError: of a step (--debug shows where)"
    assert "Traceback" not in said


@needs_proc
def test_disk_that_is_full_at_a_checkpoint_ends_the_run_and_keeps_the_last_one(cohort, tmp_path):
    code, said, left = Run(cohort, tmp_path / "run", preexec_fn=lambda: largest_file(900_000)).end()
    assert (code, left) == (1, [])
    assert "best.pt: cannot be written (File too large); make room" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
@needs_proc
def test_shared_memory_that_is_too_small_ends_the_run(cohort, tmp_path):
    code, said, left = Run(cohort, tmp_path / "run", preexec_fn=lambda: largest_file(50_000)).end()
    assert (code, left) == (1, [])
    assert "no shared memory for a batch" in said
    assert "or set workers=0" in said
    assert "Traceback" not in said


@needs_proc
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)],
    ids=str,
)
def test_signal_to_all_processes_ends_the_run_with_a_checkpoint(number, code, cohort, tmp_path):
    run = Run(cohort, tmp_path / "run", start_new_session=True)
    run.wait_for_steps(4)
    os.killpg(run.process.pid, number)  # as a terminal, Slurm and torchrun do: to the loader's workers too
    ended, said, left = run.end()
    assert (ended, left) == (code, [])
    assert f"stopped by {signal.Signals(number).name} in epoch" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert "Aborted" not in said
    progress = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["progress"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert progress["epoch"] * 6 + progress["step"] == steps[-1]


@pytest.mark.slow
@needs_proc
def test_second_ctrl_c_ends_the_run_at_once(cohort, tmp_path):
    slow = "import time\nfrom brainfm.train.trainer import Trainer\nstep = Trainer._step\n"
    slow += "Trainer._step = lambda self, batch: (step(self, batch), time.sleep(100))[0] if self.progress.epoch "
    slow += f"else step(self, batch)\n{COMMAND}"
    run = Run(cohort, tmp_path / "run", code=slow, start_new_session=True)
    run.wait_for_steps(6)
    time.sleep(1)
    os.killpg(run.process.pid, signal.SIGINT)
    while "Ctrl-C again stops at once" not in run.process.stderr.readline():
        assert run.process.poll() is None
    os.killpg(run.process.pid, signal.SIGINT)
    ended, said, left = run.end()
    assert (ended, left) == (130, [])
    assert said.splitlines()[-1] == "interrupted; the same command goes on from the last checkpoint"
    assert "Traceback" not in said


@needs_proc
def test_killed_run_takes_its_workers_with_it(cohort, tmp_path):
    run = Run(cohort, tmp_path / "run")
    run.wait_for_steps(2)
    assert len(run.processes()) >= 2
    run.process.kill()
    code, _, left = run.end()
    assert (code, left) == (-signal.SIGKILL, [])


@pytest.mark.slow
@needs_proc
def test_worker_that_hangs_in_a_read_does_not_hold_the_end_up(cohort, tmp_path):
    hangs = "import time\nfrom brainfm.train.data import PretrainingData\nread = PretrainingData.sample\n"
    hangs += "PretrainingData.sample = lambda self, key: read(self, key) if key[0] == 0 else time.sleep(1000)\n"
    run = Run(cohort, tmp_path / "run", code=hangs + FAILS.replace("== 2", "== 2 and not __import__('time').sleep(1)"))
    code, said, left = run.end()
    assert (code, left) == (1, [])
    assert "of a step" in said


# --- What is said meanwhile -----------------------------------------------------------------------

BROKEN = """
import sys, types

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorboard":
            raise TypeError("Descriptors cannot be created directly.")

sys.meta_path.insert(0, Broken())
from brainfm.cli.main import main
main()
"""


def test_console_says_loss_and_time_left_once_and_does_without_a_broken_tensorboard(cohort, tmp_path):
    fields = [
        *SETTINGS,
        "epochs=2",
        "workers=0",
        "precision=float32",
        f"manifest={cohort}",
        f"output={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, "pretrain", "test_resnet_3d", *fields],
        capture_output=True,
        text=True,
        timeout=SOON,
    )
    assert done.returncode == 0, done.stderr
    started, *lines = done.stderr.splitlines()
    assert started.endswith("pretrain: starting")
    assert len(lines) == len(set(lines)) == 3
    assert lines[0].startswith("going on without TensorBoard (TypeError: Descriptors cannot be created directly.)")
    for n, line in enumerate(lines[1:], start=1):
        assert re.fullmatch(
            rf"epoch {n} of 2: loss [\d.]+; a step waits .* s for data and takes .* s; [\d:]+ left", line
        )
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 12


@pytest.mark.slow
def test_terminal_has_a_bar_with_loss_and_time_left(cohort, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    fields = [*SETTINGS, "epochs=2", "workers=0", f"manifest={cohort}", f"output={tmp_path / 'run'}"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # 40 lines of 120
    with subprocess.Popen(
        [sys.executable, "-m", "brainfm", "pretrain", "test_resnet_3d", *fields],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as run:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # the terminal's other end is closed
                break
    os.close(ours)
    assert run.returncode == 0
    text = said.decode()
    assert re.search(r"training:.*12/12 \[\d\d:\d\d<\d\d:\d\d.*epoch=2, loss=", text)
    assert text.count("epoch 1 of 2: loss") == 1


# --- In several processes -------------------------------------------------------------------------

RANK = """
import json, os, sys, threading
from pathlib import Path
from brainfm.train.recipe import recipe_from_dict
from brainfm.train.pretraining import pretrain

export = pretrain(recipe_from_dict(json.loads(sys.argv[1])))
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
alive = [name for name in names if "gloo" in name]
alive += [thread.name for thread in threading.enumerate() if "QueueFeeder" in thread.name or "pin" in thread.name]
(export.parent / f"alive{os.environ['RANK']}.json").write_text(json.dumps(alive))
"""


def two_ranks(cohort: Path, folder: Path, by_torchrun: bool) -> subprocess.CompletedProcess[str]:
    (folder.parent / "rank.py").write_text(RANK)
    fields = {"method": "simclr", "model": "test_resnet_3d", "manifest": str(cohort), "output": str(folder)}
    fields |= {"epochs": 1, "batch_size": 6, "workers": 1, "input_size": [16, 16, 16]}
    fields |= {"augmentation": {"crop_min": [27, 32, 32]}}
    script = str(folder.parent / "rank.py"), json.dumps(fields)
    if not by_torchrun:
        return run_ranks(2, *script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON)


@needs_proc
@pytest.mark.parametrize("by_torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("time_of", range(int(os.environ.get("BRAINFM_TEST_TIMES", "1"))))
def test_finished_ranks_end_with_0_and_no_thread_of_the_process_group_or_the_loader_outlives_them(
    time_of, by_torchrun, cohort, tmp_path
):
    """Gloo's threads at the end of Python could abort a finished process: "terminate called", exit code -6."""
    done = two_ranks(cohort, tmp_path / "run", by_torchrun)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / "run" / f"alive{rank}.json").read_text()) == []
