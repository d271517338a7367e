"""Fetch and read weights: a file, the Hugging Face Hub, a URL. Nothing that is read here is ever executed.

Whatever the source, a weight ends as one flat state dict that loads strictly. A checkpoint downloaded from a URL is
checked against its hash and converted once to safetensors in the cache; the download itself is not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import logging
import lzma
import os
import pickle
import re
import secrets
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from brainfm.errors import WeightsError, WeightsNotFoundError
from brainfm.models.encoder import Encoder
from brainfm.pretrained import PretrainedCfg

logger = logging.getLogger("brainfm")

HUB_WEIGHTS = "model.safetensors"
HUB_CONFIG = "config.json"

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_STATE_KEYS = ("model_state_dict", "state_dict", "model")  # where checkpoints keep the network

_TRIES, _TIMEOUT_S = 5, 30  # of a download: tries without progress, seconds of silence


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds, read and checked, nothing of it left out but what `dropped` names.

    Attributes:
        state: Tensors by name, the prefixes of DDP and torch.compile removed.
        dropped: What the file holds beside the network, such as "optimizer_state_dict".
        metadata: Text that a safetensors file carries.
    """

    state: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightsReport:
    """What `create_model` loaded: `model.weights_report`.

    Attributes:
        source: Where the weights came from.
        file: The local file that was read.
        dropped: What the file held that the encoder does not need: a projector, a decoder, an optimiser's state.
    """

    source: str
    file: str
    dropped: tuple[str, ...] = ()


def default_cache_dir() -> Path:
    """`$BRAINFM_CACHE`, else `brainfm` in `$XDG_CACHE_HOME`, else `~/.cache/brainfm`. The Hub keeps its own cache."""
    if os.environ.get("BRAINFM_CACHE"):
        return Path(os.environ["BRAINFM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brainfm"


# --- Reading --------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, a `torch.save` checkpoint, or a tar archive that holds one such file.

    Raises:
        WeightsNotFoundError: There is no such file.
        WeightsError: The file is none of these, is damaged, asks to run code, or holds something else than named
            tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; name the file in it, or use 'local-dir:'" if path.is_dir() else "no such weight file"
        raise WeightsNotFoundError(f"{path}: {what}")
    if _is_safetensors(path):
        return _read_safetensors(path)
    if _is_tar(path):  # before zip: a tar that ends with a zip looks like one
        return _read_tar(path)
    if zipfile.is_zipfile(path):
        return _unwrap(_torch_load(path, str(path)), str(path))
    with path.open("rb") as file:
        head = file.read(64)
    if head[:1] == b"\x80":  # a pickle: torch.save's format before 1.6
        return _unwrap(_torch_load(path, str(path)), str(path))
    if head.startswith(b"PK\x03\x04"):
        raise WeightsError(f"{path}: an incomplete PyTorch checkpoint: its end is missing; fetch or copy it again")
    found = "is empty" if not head else f"begins with {head[:16]!r}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        found = "is a web page: the download went to a login or an error page"
    elif head.startswith(b"version https://git-lfs"):
        found = "is a Git LFS pointer; run 'git lfs pull'"
    raise WeightsError(f"{path}: not a weight file (safetensors, PyTorch checkpoint, or a tar of one): it {found}")


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: damaged safetensors file ({error}); fetch or copy it again") from error
    return Checkpoint(_stripped(state), (), metadata)


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise WeightsError(f"{path}: damaged compressed archive ({_one_line(error)}); fetch it again") from error


def _read_tar(path: Path) -> Checkpoint:
    """Read the one weight file in a tar, without unpacking it."""
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive.getmembers() if not m.isdir()]
            for member in members:
                if not member.isreg() or member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise WeightsError(
                        f"{path}: refused: a tar archive with a link or an outside path, {member.name!r}"
                    )
            if len(members) != 1:
                names = ", ".join(m.name for m in members[:5]) or "none"
                raise WeightsError(
                    f"{path}: a tar archive with {len(members)} files ({names}); it must hold one weight file"
                )
            name = f"{path}:{members[0].name}"
            file = archive.extractfile(members[0])
            if file is None:
                raise WeightsError(f"{name}: cannot be read")
            head = file.read(9)
            file.seek(0)
            if head[8:9] != b"{":
                return _unwrap(_torch_load(file, name), name)
            from safetensors import SafetensorError
            from safetensors.torch import load

            try:
                return Checkpoint(_stripped(load(file.read())))
            except SafetensorError as error:
                raise WeightsError(f"{name}: damaged safetensors file ({error})") from error
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise WeightsError(f"{path}: damaged tar archive ({error}); fetch it again") from error


def _torch_load(file: Path | IO[bytes], name: str) -> Any:
    """`torch.load(weights_only=True)`, after the checksums that it does not look at, its long answers made one line."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if (member := archive.testzip()) is not None:
                    raise WeightsError(f"{name}: damaged: {member} does not match its checksum; fetch or copy it again")
        if not isinstance(file, Path):
            file.seek(0)
        mmap = isinstance(file, Path) and zipfile.is_zipfile(file)
        with _plain_namespaces():
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|global)[: ]+(?:GLOBAL )?([\w.]+)", str(error))
        if asked:
            wanted = asked.group(1) or asked.group(2)
            raise WeightsError(
                f"{name}: refused: beside tensors the file asks to run {wanted}; "
                "ask its authors for safetensors or a plain state dict"
            ) from error
        raise WeightsError(f"{name}: not a PyTorch checkpoint, or a damaged one; fetch or copy it again") from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
    ) as error:
        raise WeightsError(
            f"{name}: not a PyTorch checkpoint, or a damaged one ({_one_line(error)}); fetch or copy it again"
        ) from error


def _plain_namespaces() -> AbstractContextManager[None]:
    """Let argparse.Namespace through, a bag of values in which the MAE family keeps its options (from torch 2.5 on)."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    return safe_globals([argparse.Namespace]) if safe_globals else nullcontext()


def _unwrap(content: Any, name: str) -> Checkpoint:
    """The network's tensors out of a checkpoint's dictionary."""
    dropped: tuple[str, ...] = ()
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            if isinstance(content.get(key), Mapping):
                dropped = tuple(str(other) for other in content if other != key)
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{name}: holds a {type(content).__name__}, not a dictionary of named tensors")
    strange = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(
            f"{name}: no state dict found: {', '.join(strange[:5])} are not tensors; "
            f"brainfm looks at the top and under {', '.join(_STATE_KEYS)}"
        )
    return Checkpoint(_stripped({str(key): value for key, value in content.items()}), dropped)


def _stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES * 2:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


# --- Loading --------------------------------------------------------------------------------------


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], source: str = "") -> WeightsReport:
    """Load a weight file into a model, strictly, after the filter of the model's family (`filter_state_dict`).

    Raises:
        WeightsError: The file cannot be read, its names or shapes are not the model's (they are listed), or it holds
            values that are not finite.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    family_filter = getattr(model, "filter_state_dict", None)
    if callable(family_filter):
        state = family_filter(state)
    _match_head(model, state)
    _check_fit(model, state, str(path))
    model.load_state_dict(state, strict=True)
    unused = sorted(
        {key.split(".")[0] for key in checkpoint.state} - {key.split(".")[0] for key in state} - {"encoder"}
    )
    report = WeightsReport(source or str(path), str(path), (*unused, *checkpoint.dropped))
    if report.dropped:
        logger.info("%s: left out %s", path, ", ".join(report.dropped))
    return report


def _match_head(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give an encoder the classifier that the file has, or none, so that the rest can be loaded strictly."""
    if not isinstance(model, Encoder):
        return
    weight = state.get(f"{model.classifier}.weight")
    classes = len(weight) if weight is not None and weight.ndim == 2 else 0
    if classes != model.num_classes:
        model.reset_classifier(classes)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    wanted = model.state_dict()
    faults = [
        ("missing", [key for key in wanted if key not in state]),
        ("unexpected", [key for key in state if key not in wanted]),
        (
            "of another shape",
            [
                f"{key} {list(value.shape)} for {list(wanted[key].shape)}"
                for key, value in state.items()
                if key in wanted and value.shape != wanted[key].shape
            ],
        ),
        (
            "not finite",
            [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()],
        ),
    ]
    found = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults if keys]
    if found:
        kind = type(model).__name__
        raise WeightsError(f"{name}: these weights do not fit this {kind}; " + "; ".join(found))


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


# --- Fetching -------------------------------------------------------------------------------------


def find_weights(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The local file of a cfg's weights, fetched first where it is not here yet.

    Raises:
        WeightsNotFoundError: The cfg names no source, or the source cannot be reached; the message says what to do.
        WeightsError: The file at the source is not the one the cfg describes.
    """
    if cfg.file:
        path = Path(cfg.file)
        if not path.is_file():
            raise WeightsNotFoundError(f"{cfg.name}: its weight file {path} is not there")
        if cfg.sha256:
            check_hash(path, cfg)
        return path
    if cfg.hub_id:
        path = hub_file(cfg.hub_id, cfg.hub_filename, cfg.hub_revision, cache_dir)
        if cfg.sha256:
            check_hash(path, cfg)
        return path
    if cfg.url:
        return _from_url(cfg, cache_dir)
    from brainfm.registry import list_pretrained

    known = ", ".join(list_pretrained()) or "none"
    raise WeightsNotFoundError(
        f"no weights of {cfg.name or 'this model'} are published; models that have some: {known}. "
        "Give your own with checkpoint_path=, or leave out pretrained=True for initial ones"
    )


def cached_weights(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The local file of a cfg's weights if it is here already, without any network."""
    if cfg.file:
        return Path(cfg.file) if Path(cfg.file).is_file() else None
    if cfg.hub_id:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(cfg.hub_id, cfg.hub_filename, _path(cache_dir), cfg.hub_revision)
        return Path(found) if isinstance(found, str) else None
    converted, downloaded = _cache_paths(cfg, cache_dir)
    return next((path for path in (converted, downloaded) if path.is_file()), None) if cfg.url else None


def check_hash(path: Path, cfg: PretrainedCfg) -> None:
    """Raises WeightsError where the file's sha256 is not the cfg's."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha256.update(block)
    digest = sha256.hexdigest()
    if cfg.sha256 is not None and digest != cfg.sha256.lower():
        raise WeightsError(
            f"{path}: sha256 is {digest}, and {cfg.name} expects {cfg.sha256}; the file is damaged or "
            'not the published one. If you trust it, pass pretrained_cfg_overlay={"sha256": None}'
        )


def hub_file(
    repo: str, filename: str, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """One file of a Hub repository, from the Hub's own cache where it is there.

    Raises:
        WeightsNotFoundError: No such repository, revision or file, no access, or no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repo, filename, revision=revision, cache_dir=_path(cache_dir)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        place = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
        reason = _one_line(error)
        raise WeightsNotFoundError(
            f"{place}: cannot get {filename} ({type(error).__name__}: {reason}). Check the name and, for a private "
            "one, HF_TOKEN; with no network, copy the repository's folder here and use 'local-dir:FOLDER'"
        ) from error


def _from_url(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The converted copy of a file behind a URL; downloaded, checked and converted once, by one process."""
    from filelock import FileLock

    converted, downloaded = _cache_paths(cfg, cache_dir)
    if converted.is_file():  # before the lock: a shared cache may be read-only
        return converted
    converted.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(converted.with_suffix(".lock")):
        if converted.is_file():
            return converted
        brought_by_user = downloaded.is_file()
        if not brought_by_user:
            _download(cfg, downloaded)
        try:
            if cfg.sha256:
                check_hash(downloaded, cfg)
            _convert(downloaded, converted, cfg)
        finally:
            if not brought_by_user:  # neither a wrong file nor a gigabyte of optimiser state is worth keeping
                downloaded.unlink(missing_ok=True)
    return converted


def _cache_paths(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """Where a URL's weights are kept, in a folder of its own: the converted copy, and the file as downloaded."""
    url = str(cfg.url)
    key = hashlib.sha256(f"{url} {cfg.sha256}".encode()).hexdigest()[:12]
    folder = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / f"{cfg.name}-{key}"
    return folder / HUB_WEIGHTS, folder / (url.rsplit("/", 1)[-1].partition("?")[0] or "download")


def _download(cfg: PretrainedCfg, target: Path) -> None:
    """Download to a `.part` file, going on where an earlier call stopped, and rename it when it is whole."""
    url = str(cfg.url)
    partial = target.with_name(target.name + ".part")
    try:
        _fetch(url, partial)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if partial.is_file() and partial.stat().st_size == 0:
            partial.unlink()
        raise WeightsNotFoundError(
            f"cannot download {url} ({_one_line(error)}). On a machine with a network: curl -LO {url} ; then put "
            f"the file at {target}, or pass it as checkpoint_path="
        ) from error
    partial.replace(target)


def _fetch(url: str, partial: Path) -> None:
    """Fetch what a partial file lacks, trying again after a fault that may pass, as long as there is some progress."""
    tries = 0
    while True:
        have = partial.stat().st_size if partial.is_file() else 0
        try:
            return _fetch_rest(url, partial, have)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # a leftover as long as the file, or longer: nothing can be added to it
                partial.unlink()
                continue
            if error.code < 500 and error.code not in (408, 429):
                raise
            fault: Exception = error
        except (OSError, http.client.HTTPException) as error:
            fault = error
        grown = partial.is_file() and partial.stat().st_size > have
        tries = 0 if grown else tries + 1
        if tries == _TRIES:
            raise fault
        logger.debug("%s: %s; trying again", url, _one_line(fault))
        time.sleep(1)


def _fetch_rest(url: str, partial: Path, have: int) -> None:
    from tqdm import tqdm

    headers = {"User-Agent": "brainfm"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
        have = have if response.status == 206 else 0  # a server that does not know ranges sends all of it again
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        shown = {"total": total, "initial": have, "unit": "B", "unit_scale": True, "desc": partial.stem}
        with partial.open("ab" if have else "wb") as file, tqdm(**shown) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and partial.stat().st_size != total:
        raise ConnectionError(f"the connection broke after {partial.stat().st_size} of {total} bytes")


def _convert(source: Path, target: Path, cfg: PretrainedCfg) -> None:
    """Write the network's tensors as safetensors, whole: the encoder is taken out of them at each load."""
    checkpoint = read_checkpoint(source)
    metadata = {
        "source": cfg.url or str(source),
        "source_sha256": cfg.sha256 or "",
        "left_out": json.dumps(checkpoint.dropped),
    }
    save_state(checkpoint.state, target, metadata)
    logger.info("%s: converted to %s, left out %s", source.name, target, ", ".join(checkpoint.dropped) or "nothing")


def save_state(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically, with some text beside them."""
    from safetensors.torch import save_file

    with atomic_path(Path(path)) as temporary:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, temporary, metadata=metadata)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; moved there, synced, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
