"""The system that a process runs on: its cores, its memory, its home, and the processes that it was started with."""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from brainfm.errors import BrainfmError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("brainfm")

# How long the processes of a group wait for one another. To find each other, they have minutes. After that a process
# waits as long as the others work, which may be hours where their work is unequal (one writes, one has the larger
# files); one that ends closes its connections, and that ends the others at once.
JOINING = timedelta(minutes=5)
WORKING = timedelta(days=30)
_groups = itertools.count()  # that this process joins, one after the other, as all of its launch do

_PROC, _CGROUPS, _SHARED_MEMORY = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev/shm")


# --- Cores and memory -----------------------------------------------------------------------------


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block, memory is not searched for cycles: of many objects that stay it takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def available_cores() -> int:
    """Processor cores that this process may use: those it is bound to, or fewer where its container has a quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas()])))


def _quotas() -> Iterator[float]:
    """The processor time, in cores, that each control group around this process allows (cgroup v2 and v1)."""
    with suppress(OSError, ValueError):  # ValueError: other lines than these
        for line in (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            inner = PurePosixPath(place.lstrip("/"))
            names = [controllers, "cpu", "cpu,cpuacct"] if "cpu" in controllers.split(",") else []
            for root in [_CGROUPS, _CGROUPS / "unified"] if not controllers else [_CGROUPS / name for name in names]:
                for folder in (inner, *inner.parents):  # a container may see its own group as the root
                    yield from _quota(root / folder)


def _quota(group: Path) -> Iterator[float]:
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        yield int(quota) / int(period)  # "max" is no number
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((group / f"cpu.cfs_{what}_us").read_text(encoding="utf-8") for what in ("quota", "period"))
        if int(quota) > 0:
            yield int(quota) / int(period)


@contextmanager
def torch_threads(count: int | None = None) -> Iterator[None]:
    """Within the block torch has so many threads, or as many as it has; after it as many as before, in any case."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within the block a GPU multiplies float32 numbers to three digits (TF32), or to all; after it as before.

    Torch's own default is three digits in convolutions.
    """
    import torch

    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    name: str = "allow_tf32"
    value: bool | str = allowed
    try:
        before = [getattr(switch, name) for switch in switches]
    except RuntimeError:  # whoever set them by their names of torch 2.9: the old ones refuse to be read then
        switches = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
        name, value = "fp32_precision", "tf32" if allowed else "ieee"
        before = [getattr(switch, name) for switch in switches]
    for switch in switches:
        setattr(switch, name, value)
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            setattr(switch, name, was)


@contextmanager
def own_cores(device: torch.device) -> Iterator[None]:
    """On a CPU compute with this process's part of the cores, which torch counts without quota and neighbours."""
    import torch

    count = None
    if device.type == "cpu":
        part = max(1, available_cores() // launched().local_world)
        count = part if launched().local_world > 1 else min(torch.get_num_threads(), part)
    with torch_threads(count):
        yield


def peak_memory() -> int | None:
    """Bytes of memory that this process has had at the most; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_memory() -> None:
    """Give back to the system what was freed between things that stay; glibc keeps it: 17 MB of 100,000 scans' list."""
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # another C library, or none by that name
        ctypes.CDLL(None).malloc_trim(0)


def free_shared_memory() -> float:
    """Bytes that this process may put into memory shared with its workers; infinite where nothing but memory ends it.

    A container has 64 MB where nobody says more, and a process that writes beyond that dies of a bus error.
    """
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free / launched().local_world
    except OSError:  # not Linux
        return float("inf")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has bfloat16: a GPU since Ampere, a processor with AVX-512 BF16, AMX or Arm's BF16.

    Others compute it by way of float32, and slower than that.
    """
    import torch

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, name)() for name in asked if hasattr(torch.cpu, name)):
        return True
    with suppress(OSError):
        said = (_PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace")
        return re.search(r"^Features\s*:.*\bbf16\b", said, re.MULTILINE) is not None
    return False


# --- A home ---------------------------------------------------------------------------------------


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with `~` as the home folder; as it is where there is no such home, which `Path.expanduser` raises for."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


# --- Other processes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Which of the processes this is that torchrun, or another launcher, started together.

    Attributes:
        rank: Of this process.
        world: How many there are.
        local_rank: Among those of this machine.
        local_world: How many those are.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # without one of them, processes cannot meet


def launched() -> Launch:
    """As the environment says; alone, which is said once, where that is what another launch left behind."""
    names = (*_VARIABLES, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return _launched(*(os.environ.get(name) or None for name in names))


@cache
def _launched(
    rank: str | None,
    world: str | None,
    address: str | None,
    port: str | None,
    local_rank: str | None,
    local_world: str | None,
) -> Launch:
    if (rank or "0", world or "1", local_rank or "0") == ("0", "1", "0"):
        return Launch()
    try:
        found = Launch(int(rank or ""), int(world or ""), int(local_rank or 0), int(local_world or 1))
    except ValueError:
        found = Launch(-1)
    if address and port and 0 <= found.rank < found.world and found.local_rank >= 0 < found.local_world:
        return found
    values = zip((*_VARIABLES, "LOCAL_RANK"), (rank, world, address, port, local_rank), strict=True)
    said = [f"{name}={value}" for name, value in values if value is not None]
    logger.warning(
        "%s in the environment: ignored, for no launcher starts processes with these alone; working as a single "
        "process (several are started by torchrun)",
        " ".join(said),
    )
    return Launch()


@contextmanager
def joined(backend: str = "gloo") -> Iterator[Launch]:
    """Join the processes that this one was started with, if any, into torch's default group, and leave it again.

    Raises:
        BrainfmError: The others do not come, or one of them has ended while this one needed it.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    launch = launched()
    if launch.world == 1 or not dist.is_available() or dist.is_initialized():
        yield launch
        return
    try:
        store, rank, world = next(rendezvous("env://", launch.rank, launch.world, timeout=JOINING))
        # torchrun's store outlives a group: a second one must not read the addresses of the first
        own: Any = dist.PrefixStore(f"brainfm group {next(_groups)}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=WORKING)
    except (RuntimeError, ValueError, OSError) as error:
        place, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", " ".join(str(error).split())[:160]
        raise BrainfmError(
            f"process {launch.rank} of {launch.world} does not reach the others at {place} ({reason}); "
            f"where nothing like torchrun started it, unset {' '.join(_VARIABLES)}"
        ) from error
    try:
        yield launch
    except RuntimeError as error:
        if re.search(r"gloo|nccl|Connection (closed|reset)", str(error), re.I):
            raise BrainfmError(
                "another process of the group has ended, and so do the rest; its own message says why"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def end_with_the_parent() -> None:
    """Let this process of `multiprocessing` end when the one that started it does, however that ends."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()


def says(line: str) -> bool:
    """Whether this process is the one to say a line that each process of its group may have: the first that asks."""
    launch = launched()
    if launch.world == 1:
        return True
    import torch.distributed as dist

    key = hashlib.sha256(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {line}".encode()).hexdigest()
    with suppress(RuntimeError, ValueError, OSError):  # who started them keeps no list of it
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=2),
            wait_for_workers=False,
        )
        return bool(store.add(f"brainfm said {key}", 1) == 1)
    return True
