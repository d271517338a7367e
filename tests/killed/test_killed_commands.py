"""Commands that are killed in the middle of their work: the same command goes on, and ends as if nothing had been.

A process that has imported brainfm makes one for each command. Each is killed once; `BRAINFM_TEST_TIMES=7 pytest
tests/killed -n 0 -s` kills each of them seven times, and says when.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.phantom import make_cohort

KILLS = int(os.environ.get("BRAINFM_TEST_TIMES", "1"))
KINDS = ("embed", "prep", "pretrain", "cache", "probe", "finetune", "benchmark")

# Makes a process, with a session of its own, for every command that it is given. Its work begins when it opens the
# first scan or, where other processes read them, the record of what they did or the folder that they work in. It says
# so, and counts from then on each time that it opens, moves or removes a file; at number `die` it kills itself before
# it does. The processes of `prep`, one a scan, are forked, so that they need not import all anew: which of prep's they
# are is the same, and they too are in that session.
COMMANDS = """
import json, multiprocessing, os, signal, sys, traceback, types

import torch, monai, nibabel, pandas, scipy, scipy.stats, sklearn, sklearn.linear_model, SimpleITK, matplotlib
matplotlib.use("svg")
import matplotlib.pyplot
import brainfm, brainfm.train, brainfm.downstream.benchmark, brainfm.downstream.report, brainfm.downstream.finetuning
import brainfm.train.pretraining, brainfm.cli.training, brainfm.train.cache, brainfm.prep.batch, brainfm.parts
from brainfm.cli.main import main

brainfm.parts.SECONDS = 0  # these scans take a hundredth of one: keep each, as of those that take long
torch.set_num_threads(1)
forked = multiprocessing.get_context("fork")
brainfm.prep.batch.multiprocessing = types.SimpleNamespace(
    **{name: getattr(multiprocessing, name) for name in ("current_process", "parent_process")},
    get_context=lambda method: forked,
)

FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def watch(scans, die):
    done, me = 0, os.getpid()

    def hook(event, arguments):
        nonlocal done
        if os.getpid() != me or event not in FILES:
            return
        path = str(arguments[0])
        begins = path.startswith(scans) and ".nii" in path or path.endswith(("index.jsonl", "log.jsonl"))
        begins = begins or (event == "os.mkdir" and "/.scratch-" in path)
        if not done and not begins:
            return
        if done and not path.startswith(os.path.dirname(os.path.dirname(scans))):
            return
        done += 1
        if done == 1:
            os.write(1, b'"work"\\n')
        if done == die:
            os.kill(me, signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: done


for line in sys.stdin:
    arguments, scans, die = json.loads(line)
    process = os.fork()
    if not process:
        os.setsid()
        os.write(1, (json.dumps(os.getpid()) + "\\n").encode())
        count = watch(scans, die)
        code = 1
        try:
            sys.stderr = open(os.devnull, "w") if not os.environ.get("SHOW") else sys.stderr
            main(arguments)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        os.write(1, (json.dumps(["files", count()]) + "\\n").encode())
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.write(1, (json.dumps(["ended", status]) + "\\n").encode())
"""


class Commands:
    """The process that makes the others."""

    def __init__(self, programs):
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
            text=True,
        )

    def run(self, arguments, scans, *, after=None, die=0):
        """Run a command, and kill it `after` seconds of its work or at a file; its exit code, seconds, and files.

        The seconds are of its work, None where that never began.
        """
        self.process.stdin.write(json.dumps([list(map(str, arguments)), str(scans), die]) + "\n")
        self.process.stdin.flush()
        pid, files, began = None, 0, 0.0
        while line := self.process.stdout.readline():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # what the command itself says
            if isinstance(said, int):
                pid = said
            elif said == "work":
                began = time.monotonic()
                if after is not None:
                    time.sleep(after)
                    with suppress(ProcessLookupError):  # it has ended
                        os.kill(pid, signal.SIGKILL)
            elif isinstance(said, list) and said[:1] == ["files"]:
                files = said[1]
            elif isinstance(said, list) and said[:1] == ["ended"]:
                assert alone(pid), "a process of it is left"
                return said[1], time.monotonic() - began if began else None, files
        raise AssertionError("the process that starts commands has ended")


def alone(session):
    """Whether no process of a session is left, within seconds."""
    until = time.monotonic() + 900
    while time.monotonic() < until:
        sessions = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                sessions.append(int(fields[3]))
        if session not in sessions:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """With a TurboPrep on PATH that gives the packaged scan for any."""
    sitk = pytest.importorskip("SimpleITK")
    folder = tmp_path_factory.mktemp("bin")
    sitk.WriteTransform(sitk.AffineTransform(3), str(folder / "affine.mat"))
    copies = {SAMPLE_SCAN: "normalized.nii.gz", SAMPLE_MASK: "mask.nii.gz", folder / "affine.mat": "affine_transf.mat"}
    lines = ["#!/bin/sh", *(f'cp "{source}" "$2/{name}"' for source, name in copies.items())]
    (folder / "turboprep").write_text("\n".join(lines) + "\n")
    (folder / "turboprep").chmod(0o755)
    made = Commands(folder)
    yield made
    made.process.stdin.close()
    made.process.wait(900)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A manifest of 20 phantoms at 4 mm."""
    folder = tmp_path_factory.mktemp("killed") / "scans"
    manifest = make_cohort(20, folder, spacing=4.0, seed=5)
    (folder / "raw").mkdir()
    for name in ("a", "b"):
        shutil.copy(SAMPLE_SCAN, folder / "raw" / f"{name}.nii.gz")
    return manifest


TRAINED = ["workers=0", "lr=1e-3", "device=cpu"]


def command(kind, manifest, out):
    evaluation = [
        "--label",
        "sex",
        "--kind",
        "binary",
        "--models",
        "test_resnet_3d",
        "-o",
        out,
        "--seeds",
        min(KILLS, 2),
    ]
    evaluation += ["--epochs-scale", "0.01", "--set", *TRAINED]
    fields = ["epochs=4", "batch_size=4", "workers=1", "save_every=2", "augmentation.crop_min=[27,32,32]"]
    fields += ["input_size=[16,16,16]", "device=cpu"]
    return {
        "embed": ["embed", manifest, "--model", "test_resnet_3d", "-o", out / "table.csv", "--dense", out / "dense"],
        "prep": ["prep", manifest.parent / "raw", "-o", out, "--backend", "turboprep"],
        "cache": ["cache", "build", manifest, out, "--model", "test_resnet_3d", "--workers", 2],
        "pretrain": ["pretrain", "test_resnet_3d", f"manifest={manifest}", f"output={out}", *fields],
        "probe": ["probe", manifest, *evaluation],
        "finetune": ["finetune", manifest, *evaluation, "--no-controls"],
        "benchmark": [
            "benchmark",
            "phantom_sex",
            "--manifest",
            manifest,
            *evaluation[4:],
            "--modes",
            "probe",
            "scratch",
        ],
    }[kind]


# Numbers that are of the run, not of its result: seconds, dates, digests of them.
VOLATILE = (
    "seconds",
    "time",
    "date",
    "wait",
    "since",
    "peak",
    "rate",
    "scans_per",
    "data_s",
    "data_fraction",
    "step_s",
)


def plain(data):
    if isinstance(data, dict):
        return {k: plain(v) for k, v in data.items() if not any(word in str(k).lower() for word in VOLATILE)}
    return [plain(item) for item in data] if isinstance(data, list) else data


def content(path, out):
    """What a file holds, without the times of the run and its own folder's name."""
    import torch

    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        rows = [plain(json.loads(line)) for line in lines if line.strip()]
        if path.name == "index.jsonl":  # in whatever order the processes ended
            rows.sort(key=str)
        return json.dumps(rows).replace(str(out), "OUT")
    if path.suffix == ".pt":
        held = torch.load(path, weights_only=True)["model_state_dict"]
        return {key: value.numpy().tobytes() for key, value in held.items()}
    return path.read_bytes().replace(str(out).encode(), b"OUT")


def tree(out):
    """What an output holds; TensorBoard's files have the time and a process in their names, a file a start."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.parent.name != "tensorboard"]
    return {str(path.relative_to(out)): content(path, out) for path in files}


def check(commands, kind, arguments_for, scans, tmp_path):
    """Kill a command at random moments of its work until it was hit often enough, and compare what it ends with."""
    whole = tmp_path / "whole"
    whole.mkdir()
    code, seconds, files = commands.run(arguments_for(whole), scans)
    assert (code, seconds is not None) == (0, True)
    assert files > 3
    expected = tree(whole)
    draw, hits, rounds, moments = random.Random(kind), 0, 0, []
    while hits < KILLS:
        rounds += 1
        assert rounds <= 4 * KILLS + 4, f"of {moments}, {hits} hit its work"
        out = tmp_path / f"out{rounds}"
        out.mkdir()
        for _ in range(min(KILLS - hits, draw.choice([1, 1, 2]))):
            by_time = {"after": draw.uniform(0, 0.9 * seconds)}
            moment = by_time if draw.random() < 0.5 else {"die": draw.randint(1, files)}
            moments.append(moment)
            code, worked, _ = commands.run(arguments_for(out), scans, **moment)
            hits += code == -signal.SIGKILL and worked is not None
            assert code in (0, -signal.SIGKILL), moment
        code, _, _ = commands.run(arguments_for(out), scans)
        assert code == 0, moments
        found = tree(out)
        assert list(found) == list(expected), moments
        differing = [name for name in found if found[name] != expected[name]]
        assert not differing, (moments, differing)
        shutil.rmtree(out)
    print(f"{kind}: {hits} kills hit its work ({moments})")
    return hits


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_command_that_is_killed_at_its_work_ends_as_an_unbroken_one(kind, commands, scans, tmp_path):
    assert check(commands, kind, lambda out: command(kind, scans, out), scans.parent, tmp_path) >= KILLS


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_shards_that_are_killed_again_and_again_merge_to_the_table_of_one_run(commands, scans, tmp_path):
    embed = ["embed", scans, "--model", "test_resnet_3d", "-o"]
    assert commands.run([*embed, tmp_path / "whole" / "t.csv"], scans.parent)[0] == 0
    draw, hits, out = random.Random("shard"), 0, tmp_path / "out"

    def shard(number, **moment):
        return commands.run([*embed, out / "parts", "--shard", f"{number}/2"], scans.parent, **moment)

    def check_merged():
        assert [shard(number)[0] for number in (1, 2)] == [0, 0]
        assert commands.run(["merge", out / "parts", "-o", out / "t.csv"], scans.parent)[0] == 0
        for name in ("t.csv", "t.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert {path.suffix for path in (out / "parts").iterdir()} <= {".parquet", ".npz"}  # nothing half-written
        shutil.rmtree(out)

    while hits < KILLS:
        code, _, _ = shard(draw.choice((1, 2)), die=draw.randint(1, 12))
        assert code in (0, -signal.SIGKILL)
        hits += code == -signal.SIGKILL
        if code == 0:  # all of it was done before
            check_merged()
    check_merged()
    print(f"shards: {hits} kills hit their work")
