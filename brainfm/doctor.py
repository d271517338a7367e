"""What of a machine brainfm works with: Python, torch, GPU, packages, caches, the Hub, the weights that are here."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brainfm.errors import BrainfmError, lacking
from brainfm.files import one_line
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import get_pretrained_cfg, list_pretrained
from brainfm.system import available_cores, computes_in_bfloat16, free_shared_memory
from brainfm.version import __version__
from brainfm.weights import HUB_WEIGHTS, cached_weights, default_cache_dir, read_checkpoint, wrong_digest
from brainfm.weights.fetch import is_digest

_LEAST_FREE_GB = 2.0  # in a cache: the largest weights of the zoo have 1.6 GB
_LEAST_SHARED_GB = 0.5  # for the workers of a training
_REMOTE = ("nfs", "cifs", "smb", "fuse", "lustre", "gpfs", "beegfs", "9p", "afs", "ceph")
_EXTRAS = ("train", "eval", "prep", "export", "fast", "keras", "bids")
_SECONDS = 3  # that the Hub has for an answer

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What it is.
        state: "ok"; "note", where something is missing that only some need; or "problem", where something is wrong.
        said: What was found.
        advice: What to do, where there is something to be done.
    """

    subject: str
    state: State
    said: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Look at everything, one after the other. Each cache gets a file that is removed at once; nothing else is written.

    Weights that are in the cache are read whole, to compare their digests: seconds for each GB. The Hub is asked for an
    answer, unless HF_HUB_OFFLINE forbids it.
    """
    yield Finding("brainfm", "ok", f"{__version__}, {Path(__file__).parent}")
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}, {platform.platform()}")
    yield _dependencies()
    yield from _torch()
    yield from (_extra(name) for name in _EXTRAS)
    yield from _places()
    yield from _hub()
    yield from _weights()


def _dependencies() -> Finding:
    missing = lacking()
    if missing is None:
        return Finding(
            "packages", "note", "brainfm runs from a folder and is not installed: what it needs is not known"
        )
    if missing:
        said = f"missing, or in another version than brainfm needs: {', '.join(missing)}"
        return Finding("packages", "problem", said, f"pip install {' '.join(missing.values())}")
    return Finding("packages", "ok", "all that brainfm needs is installed")


def _torch() -> Iterator[Finding]:
    import torch

    bfloat16 = "bfloat16" if computes_in_bfloat16(torch.device("cpu")) else "no bfloat16 of its own"
    instructions = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "torch", "ok", f"{torch.__version__}; {instructions}, {bfloat16}; {available_cores()} cores for this process"
    )
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = (
            "this build of torch is for processors alone"
            if not built
            else f"torch was built for {built}, and sees none"
        )
        yield Finding("GPU", "note", f"none: {why}")
        return
    for number in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(number)
            bfloat16 = "bfloat16" if computes_in_bfloat16(torch.device("cuda", number)) else "no bfloat16"
            said = f"{torch.cuda.get_device_name(number)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {bfloat16}"
            torch.ones(8, device=f"cuda:{number}").sum().item()
            yield Finding(f"GPU {number}", "ok", said)
        except RuntimeError as error:
            yield Finding(
                f"GPU {number}", "problem", f"does not compute: {one_line(error)}", "compare torch with the driver"
            )


def _extra(name: str) -> Finding:
    missing = lacking(name)
    if missing:
        return Finding(
            f"extra {name}", "note", f"without {', '.join(missing)}", f"pip install {' '.join(missing.values())}"
        )
    return Finding(f"extra {name}", "ok", "complete" if missing is not None else "not known")


# --- Places ---------------------------------------------------------------------------------------


def _places() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _place("cache", default_cache_dir(), "BRAINFM_CACHE")
    yield _place("Hub's cache", Path(HF_HUB_CACHE), "HF_HOME")
    yield _place("temporary files", Path(tempfile.gettempdir()), "TMPDIR")
    shared = free_shared_memory()
    if shared < _LEAST_SHARED_GB * 1e9:
        advice = "start the container with more (docker run --shm-size=2g), or train with workers=0"
        yield Finding("shared memory", "note", f"{shared / 1e9:.2f} GB for the workers of a training", advice)


def _place(subject: str, folder: Path, variable: str) -> Finding:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free / 1e9
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        said = f"{folder}: nothing can be written there ({error.strerror})"
        return Finding(subject, "problem", said, f"set {variable} to a folder of your own")
    kind = _file_system(there)
    said = f"{folder}, {free:.1f} GB free" + (f", {kind}" if kind else "")
    if free < _LEAST_FREE_GB:
        return Finding(subject, "note", said, f"make room, or set {variable} to a folder on a larger disk")
    if kind.startswith(_REMOTE):
        return Finding(subject, "note", f"{said}: over a network or through another program, so slower than a disk")
    return Finding(subject, "ok", said)


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on, as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, best = folder.resolve(), ("", "")
    for line in lines:
        _, mounted, kind, *_ = line.split()
        mounted = mounted.replace("\\040", " ")
        if place.is_relative_to(mounted) and len(mounted) >= len(best[0]):
            best = mounted, kind
    return best[1]


# --- The Hub and weights --------------------------------------------------------------------------


def _hub() -> Iterator[Finding]:
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if get_token():
        yield Finding("token", "ok", "one is set for the Hub")
    else:
        yield Finding("token", "note", "none is set: gated and private repositories are refused", "set HF_TOKEN")
    if mirror := os.environ.get("BRAINFM_HUB_ORG"):
        yield Finding("BRAINFM_HUB_ORG", "ok", f"weights are taken from {mirror}")
    if HF_HUB_OFFLINE:
        yield Finding("Hub", "note", f"HF_HUB_OFFLINE is set: only what is in the cache is used, not {ENDPOINT}")
        return
    try:
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        get_session().head(ENDPOINT, timeout=_SECONDS)
        yield Finding("Hub", "ok", f"{ENDPOINT} answers")
    except Exception as error:  # of whichever HTTP library the client uses
        advice = "on a machine with a network 'brainfm fetch NAME --to FOLDER', then 'local-dir:FOLDER' here"
        yield Finding("Hub", "note", f"{ENDPOINT} does not answer ({one_line(error, 120)})", advice)


def _weights() -> Iterator[Finding]:
    found = 0
    for name in list_pretrained():
        cfg = get_pretrained_cfg(name)
        path = None if cfg.is_drawn else cached_weights(cfg)
        if path is None:
            continue
        found += 1
        yield _weight(cfg, path)
    if not found:
        yield Finding("weights", "note", "none are here yet; they are fetched at their first use")


def _weight(cfg: PretrainedCfg, path: Path) -> Finding:
    subject, again = f"weights {cfg.name}", "delete the file: it is fetched again"
    try:
        said = f"{path}, {path.stat().st_size / 1e6:.0f} MB"
        is_copy = bool(cfg.url) and not cfg.file and path.name == HUB_WEIGHTS
        other = _made_of_another(cfg, path) if is_copy else wrong_digest(path, cfg) is not None
    except (OSError, ValueError, BrainfmError) as error:
        return Finding(subject, "problem", f"{path}: cannot be read ({one_line(error)})", again)
    if other:
        return Finding(subject, "problem", f"{said}: its digest is not that of the published file", again)
    known = "the digest is the published one" if cfg.sha256 or cfg.git_blob else "no digest is published"
    return Finding(subject, "ok", f"{said}, {known}")


def _made_of_another(cfg: PretrainedCfg, converted: Path) -> bool:
    """Whether a converted copy, which is read whole, says that it was made of another file than the published one."""
    said = read_checkpoint(converted).provenance
    known = {"source_sha256": cfg.sha256, "source_git_blob": cfg.git_blob}
    return any(value and not is_digest(str(said.get(key)), value) for key, value in known.items())
