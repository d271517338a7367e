"""What a system lacks or limits costs a feature, never the result."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pwd
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forked_ranks import run_ranks

import brainfm
from brainfm import WeightsNotFoundError, system
from brainfm.pretrained import PretrainedCfg
from brainfm.train.distributed import process_group
from brainfm.weights import fetch, save_state

SOON = 900  # seconds, of a machine however busy, after which a process hangs

# --- Cores and memory -----------------------------------------------------------------------------


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A function (line of /proc/self/cgroup, {file: content}) that lets this process be in such a control group."""
    monkeypatch.setattr(system, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(system, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def make(line, files):
        for path, content in {
            "proc/self/cgroup": line,
            **{f"cgroup/{name}": text for name, text in files.items()},
        }.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)

    return make


@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/", {"cpu.max": "max 100000\n"}, 8),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/slurm/job7/step", {"slurm/job7/cpu.max": "300000 100000\n"}, 3),
        (
            "4:cpu,cpuacct:/docker/ab",
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("nonsense", {}, 8),
    ],
)
def test_quota_of_a_container_counts_as_its_cores(line, files, cores, container):
    container(line, files)
    assert system.available_cores() == cores


@pytest.mark.parametrize("is_on", [True, False])
def test_garbage_is_collected_after_a_block_as_it_was_before_also_if_that_fails(is_on):
    was_on = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        with suppress(ZeroDivisionError), system.uncollected():
            assert not gc.isenabled()
            _ = 1 / 0
        assert gc.isenabled() == is_on
    finally:
        (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("count", [None, 2])
def test_threads_after_a_block_are_those_before_it_whoever_set_others(count):
    with system.torch_threads(3):
        with system.torch_threads(count):
            assert torch.get_num_threads() == (count or 3)
            torch.set_num_threads(1)
        assert torch.get_num_threads() == 3


def test_threads_are_no_more_than_a_quota_allows(container):
    container("0::/", {"cpu.max": "100000 100000\n"})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with process_group("cpu"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_cores_are_counted_on_systems_that_bind_no_process(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert system.available_cores() == 1


def test_peak_memory_is_in_bytes_everywhere_and_unknown_on_windows(monkeypatch):
    linux = system.peak_memory()
    assert linux > 50e6
    monkeypatch.setattr(sys, "platform", "darwin")
    assert system.peak_memory() == pytest.approx(linux / 1024, rel=0.5)  # there the call says bytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.peak_memory() is None


def test_shared_memory_without_the_folder_has_no_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "_SHARED_MEMORY", tmp_path / "none")
    assert system.free_shared_memory() == float("inf")


# --- Files that cannot be mapped ------------------------------------------------------------------


@pytest.fixture(params=[errno.ENODEV, errno.EINVAL], ids=["ENODEV", "EINVAL"])
def maps_nothing(request, monkeypatch):
    """A file system such as sshfs's; returns a function that puts it in place."""

    def refuse(*arguments, **options):
        raise OSError(request.param, os.strerror(request.param))

    def refuse_torch(*arguments, **options):
        raise RuntimeError(f"unable to mmap 100 bytes from file: {os.strerror(request.param)}")

    def start():
        monkeypatch.setattr(mmap, "mmap", refuse)
        monkeypatch.setattr("safetensors.safe_open", refuse)
        monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse_torch)

    return start


@pytest.mark.parametrize("kind", ["file", "pair", "image"])
def test_scan_that_cannot_be_mapped_is_read(kind, maps_nothing, small_sample, small_spec, tmp_path):
    image, mask = (nib.load(path) for path in small_sample)
    wanted = brainfm.load_scan(*small_sample, spec=small_spec).image
    if kind == "pair":
        nib.Nifti1Pair(image.get_fdata(dtype=np.float32), image.affine).to_filename(tmp_path / "scan.img")
        scan = tmp_path / "scan.img"
    else:
        image.to_filename(tmp_path / "scan.nii")
        scan = tmp_path / "scan.nii" if kind == "file" else nib.load(tmp_path / "scan.nii")
    maps_nothing()
    np.testing.assert_array_equal(brainfm.load_scan(scan, mask, spec=small_spec).image, wanted)


def test_weights_that_cannot_be_mapped_are_read(maps_nothing, tmp_path):
    wanted = brainfm.create_model("test_resnet_3d", pretrained=True).state_dict()
    torch.save(wanted, tmp_path / "weights.pt")
    maps_nothing()
    for model in (
        brainfm.create_model("test_resnet_3d", pretrained=True),
        brainfm.create_model("test_resnet_3d", checkpoint_path=tmp_path / "weights.pt"),
    ):
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


# --- No home, and a cache that is read-only -------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch):
    """A process without a home folder."""

    def unknown(*_):
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "BRAINFM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    fetch._passing_cache.cache_clear()
    yield
    fetch._passing_cache.cache_clear()


def test_without_a_home_weights_are_kept_for_the_process(nowhere, caplog):
    folder = fetch.default_cache_dir()
    assert folder.is_dir()
    assert fetch.default_cache_dir() == folder
    assert caplog.text.count("set BRAINFM_CACHE") == 1
    assert brainfm.create_model("test_resnet_3d", pretrained=True).num_features


def test_home_that_is_not_ours_to_write_to_is_no_cache(nowhere, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert tmp_path not in fetch.default_cache_dir().parents
    (tmp_path / ".cache" / "brainfm").mkdir(parents=True)
    assert fetch.default_cache_dir() == tmp_path / ".cache" / "brainfm"  # what is there can be read


def test_tilde_of_nobody_is_a_name_like_others(nowhere, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("~backup.csv").write_text("image_path\n")
    assert system.expanded("~backup.csv").is_file()
    with pytest.raises(brainfm.BrainfmError, match="~"):
        brainfm.create_model("local-dir:~/model")


def test_read_only_cache_gives_what_is_there_and_says_what_to_set_for_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINFM_CACHE", str(tmp_path))
    here, gone = (PretrainedCfg(url=f"http://127.0.0.1:9/{name}.pt") for name in ("here", "gone"))
    save_state({"weight": torch.ones(2)}, fetch._cache_paths(here, None)[0])

    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert fetch.find_weights(here).is_file()
    with pytest.raises(WeightsNotFoundError, match=r"Read-only file system.*set BRAINFM_CACHE") as caught:
        fetch.find_weights(gone)
    assert "\n" not in str(caught.value)


# --- Other processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "3"},
        {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
    ],
    ids=["rank", "local", "nonsense"],
)
def test_what_a_launch_left_in_the_environment_makes_nobody_wait(
    left, monkeypatch, small_model, small_sample, caplog, tmp_path
):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    system._launched.cache_clear()
    table = brainfm.embed([small_sample], small_model, output=tmp_path / "out.csv")
    assert len(table.vectors) == 1
    assert (tmp_path / "out.csv").is_file()
    assert caplog.text.count("ignored") == 1
    assert all(f"{name}={value}" in caplog.text for name, value in left.items())


MEMBER = """
import datetime, os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
import brainfm
from brainfm import system

here, what = Path(sys.argv[1]), sys.argv[2]
system.JOINING = datetime.timedelta(seconds=3)
rank = os.environ["RANK"]
(here / rank).touch()
while what != "alone" and len(list(here.iterdir())) < 2:  # imports take their time
    time.sleep(0.01)
try:
    with system.joined() as launch:
        dist.barrier()
        if launch.rank == 1:
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "fails":
                raise brainfm.BrainfmError("of its own")
            time.sleep(5)
        dist.barrier()
except brainfm.BrainfmError as error:
    line = str(error)
    print(f"{type(error).__name__}: {line}")
    sys.exit(1)
"""


def members(what, tmp_path, ranks=(0, 1)):
    """The exit code and output of each rank of a group, and how long it took."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "here").mkdir()
    (tmp_path / "member.py").write_text(MEMBER)
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, tmp_path / "member.py", tmp_path / "here", what],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    try:
        return [(process.communicate(timeout=SOON)[0], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("how", ["killed", "fails"])
def test_process_that_ends_ends_the_others_of_its_group_with_one_line(how, tmp_path):
    (said, code), (its_own, its_code) = members(how, tmp_path)
    assert code == 1
    assert said.splitlines() == [
        "BrainfmError: another process of the group has ended, and so do the rest; its own message says why"
    ]
    assert (its_code, its_own) == ((-9, "") if how == "killed" else (1, "BrainfmError: of its own\n"))


def test_process_that_works_longer_than_the_others_is_waited_for(tmp_path):
    assert members("works", tmp_path) == [("", 0), ("", 0)]


def test_process_whose_group_never_comes_says_so(tmp_path):
    ((said, code),) = members("alone", tmp_path, ranks=(1,))
    assert code == 1
    assert "process 1 of 2 does not reach the others at 127.0.0.1:" in said
    assert "unset RANK WORLD_SIZE" in said
    assert len(said.splitlines()) == 1


LATE = """
import time
from datetime import timedelta

import torch

from brainfm import system

system.WORKING = timedelta(seconds=20)
for _ in range(3):
    with system.joined() as launch:
        one = torch.ones(1)
        torch.distributed.all_reduce(one)
        print("together" if one == 2 else "alone")
    time.sleep(launch.rank)
"""


def test_next_group_of_a_launch_does_not_read_the_addresses_of_the_last(tmp_path):
    """As of a sweep's variants under torchrun, whose store outlives them: a process that came first could wait for
    ever for one that had gone.
    """
    (tmp_path / "late.py").write_text(LATE)
    done = run_ranks(2, tmp_path / "late.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("together") == 6


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="of torch 2.9")
@pytest.mark.parametrize("kind", ["ieee", "tf32"])
def test_switches_that_were_set_by_their_newer_names_are_put_back_too(kind):
    set_before = (
        f"import torch; m, c, r = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn; "
        f"m.fp32_precision = {kind!r}; c.fp32_precision = {kind!r}\n"
        "def now(): return m.fp32_precision, c.fp32_precision, r.fp32_precision\n"
        "from brainfm.system import tf32; before = now()\n"
        "for allowed, wanted in ((False, 'ieee'), (True, 'tf32')):\n"
        "    with tf32(allowed): assert now() == (wanted,) * 3, now()\n"
        "    assert now() == before, now()\n"
    )
    subprocess.run([sys.executable, "-c", set_before], check=True)


def test_switches_of_a_gpu_are_put_back_in_any_case():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def inside() -> None:
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
        raise KeyError

    for allowed in (True, False):
        with pytest.raises(KeyError), system.tf32(allowed):
            inside()
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
