"""Find the file of a cfg's weights: on this machine, on the Hugging Face Hub, or at a URL.

The Hub's files stay in the Hub's own cache, fetched by its own client. A file from a URL is checked against its hash
and converted once to safetensors in the cache; the download itself is not kept.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from brainfm.errors import WeightsError, WeightsNotFoundError
from brainfm.files import file_git_blob, file_sha256, one_line, write_text
from brainfm.pretrained import PretrainedCfg
from brainfm.system import expanded
from brainfm.weights.licence import check_licence
from brainfm.weights.url import download

logger = logging.getLogger("brainfm")

HUB_WEIGHTS = "model.safetensors"
HUB_CONFIG = "config.json"
_PIN = "sha256"  # beside weights from a URL of which no digest is published: that of the first file

_PATIENCE_S = 15  # how long a fault of the Hub that may pass is given, beyond what its client does by itself


def default_cache_dir() -> Path:
    """`$BRAINFM_CACHE`, else `brainfm` in `$XDG_CACHE_HOME`, else `~/.cache/brainfm`. The Hub keeps its own cache.

    Who has no home, or one that is not theirs to write to, gets a folder that is gone at the end of this process.
    """
    if os.environ.get("BRAINFM_CACHE"):
        return expanded(os.environ["BRAINFM_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "brainfm"
    home = expanded("~")
    place = home / ".cache" / "brainfm"
    if place.is_dir():
        return place
    there = next(folder for folder in (*place.parents, Path()) if folder.exists())
    return place if home.is_absolute() and os.access(there, os.W_OK | os.X_OK) else _passing_cache()


@cache
def _passing_cache() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="brainfm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning(
        "there is no home folder to keep weights in: what is fetched is kept until this process ends; set "
        "BRAINFM_CACHE to a folder to keep it in"
    )
    return folder


def find_weights(
    cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None = None, accept_licence: bool = False
) -> Path:
    """The local file of a cfg's weights, fetched first where it is not here yet.

    Raises:
        LicenceError: Their licence asks something that nobody has accepted yet.
        WeightsNotFoundError: The cfg names no source, or the source cannot be reached; the message says what to do.
        WeightsError: The file at the source is not the one the cfg describes.
    """
    if cfg.file:
        path = Path(cfg.file)
        if not path.is_file():
            raise WeightsNotFoundError(f"{cfg.name}: its weight file {path} is not there")
        check_digest(path, cfg)
        return path
    if cfg.has_weights:
        check_licence(cfg, expanded(cache_dir) if cache_dir else default_cache_dir(), accept_licence)
    if cfg.hub_id:
        return _from_hub(cfg, cache_dir)
    if cfg.url:
        return _from_url(cfg, cache_dir)
    if cfg.page:
        what = f" ({cfg.container})" if cfg.container else ""
        raise WeightsNotFoundError(
            f"{cfg.name}: its weights are for people to take: get {cfg.hub_filename}{what} at {cfg.page}, then "
            f"create_model({cfg.name!r}, checkpoint_path=FILE) or 'brainfm convert FILE DIR --model {cfg.name}'"
        )
    if cfg.is_drawn:
        raise WeightsNotFoundError(
            f"the weights of {cfg.name} are no file, but those of an untrained control: create_model draws them"
        )
    from brainfm.registry import list_pretrained

    known = ", ".join(list_pretrained()) or "none"
    recipe = f"The recipe {cfg.recipe} of brainfm.train pretrains one. " if cfg.recipe else ""
    raise WeightsNotFoundError(
        f"no weights of {cfg.name or 'this model'} are published; models that have some: {known}. {recipe}"
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


def check_digest(path: Path, cfg: PretrainedCfg) -> None:
    """Raises WeightsError where the file's digest is not the cfg's; a cfg without one has nothing to check."""
    if wrong := wrong_digest(path, cfg):
        kind, digest, expected = wrong
        raise WeightsError(
            f"{path}: {kind} is {digest}, and {cfg.name} expects {expected}; the file is damaged or "
            f'not the published one. If you trust it, pass pretrained_cfg_overlay={{"{kind}": None}}'
        )


def wrong_digest(path: Path, cfg: PretrainedCfg) -> tuple[str, str, str] | None:
    """The kind of digest, the file's and the cfg's, where these differ; None where they agree or the cfg has none."""
    for kind, expected, digest_of in (("sha256", cfg.sha256, file_sha256), ("git_blob", cfg.git_blob, file_git_blob)):
        if expected is not None and not is_digest(digest := digest_of(path), expected):
            return kind, digest, expected
    return None


def is_digest(digest: str, expected: str) -> bool:
    """Whether a digest is the expected one, or begins with it where only the first digits, 8 or more, are published."""
    return len(expected) >= 8 and digest.lower().startswith(expected.lower())


# --- The Hub --------------------------------------------------------------------------------------


def _from_hub(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> Path:
    path = hub_file(str(cfg.hub_id), cfg.hub_filename, cfg.hub_revision, cache_dir)
    if cfg.sha256 and path.resolve().name == cfg.sha256.lower():
        return path  # hub_file has just held it to this name
    if cfg.sha256 and not path.is_symlink() and wrong_digest(path, cfg):
        path.unlink()  # a cache without links does not say what was announced: once more, then it is the Hub's
        path = hub_file(str(cfg.hub_id), cfg.hub_filename, cfg.hub_revision, cache_dir)
    check_digest(path, cfg)
    return path


def hub_file(
    repo: str, filename: str, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """One file of a Hub repository, from the Hub's own cache where it is there; a damaged copy is fetched anew.

    Raises:
        WeightsNotFoundError: No such repository, revision or file, no access, or no network; the message says which.
        WeightsError: The file does not arrive as the Hub announces it.
    """
    place = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")

    def get(force: bool) -> Path:
        from huggingface_hub import hf_hub_download

        patience = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return Path(
                    hf_hub_download(repo, filename, revision=revision, cache_dir=_path(cache_dir), force_download=force)
                )
            except Exception as error:  # what breaks on the way is another class in each version of the client
                if not _may_pass(error) or time.monotonic() > patience:
                    raise WeightsNotFoundError(f"{place}: cannot get {filename}: {hub_reason(error)}") from error
            time.sleep(1)

    path = get(force=False)
    if not _is_damaged(path):
        return path
    logger.warning("%s: damaged in the cache; fetching it again", path)
    try:
        path = get(force=True)
    except WeightsNotFoundError as error:
        raise WeightsError(f"{path}: damaged in the cache, and not fetched again. {error}") from error
    if _is_damaged(path):
        path.resolve().unlink()
        raise WeightsError(f"{place}: {filename} does not arrive as the Hub announces it; try again later")
    return path


def _is_damaged(path: Path) -> bool:
    """Whether a file in the Hub's cache is not what was announced: a large one is kept under its sha256, others Git's.

    A cache without symbolic links has other names, and cannot say.
    """
    announced = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        return file_sha256(path) != announced
    return re.fullmatch(r"[0-9a-f]{40}", announced) is not None and file_git_blob(path) != announced


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    error = _root(error)
    if isinstance(error, LocalEntryNotFoundError):  # no answer, and nothing in the cache
        return not HF_HUB_OFFLINE
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (
            error.response.status_code >= 500 or error.response.status_code in (408, 429)
        )
    # A connection that broke: an error of the HTTP library, or a length that is wrong. A full disk is neither.
    return not isinstance(error, ValueError) and getattr(error, "errno", None) is None


def _root(error: Exception) -> Exception:
    """The Hub's answer, where the client hides it behind its own "not in the cache", or behind a forced fetch."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hidden = isinstance(error, LocalEntryNotFoundError) or type(error) is ValueError
    cause = error.__cause__
    return cause if hidden and isinstance(cause, HfHubHTTPError) else error


def hub_reason(error: Exception) -> str:
    """What an error of the Hub's client means, and what to do next, in one line."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    error = _root(error)
    elsewhere = "on a machine with a network, 'brainfm fetch NAME --to FOLDER', then 'local-dir:FOLDER' here"
    unanswered = isinstance(error, LocalEntryNotFoundError) or type(error) is ValueError
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if isinstance(error, GatedRepoError):
        meaning = f"the repository is gated; ask for access at {ENDPOINT}, then set HF_TOKEN to a token of that account"
    elif isinstance(error, RepositoryNotFoundError):
        meaning = "no such repository, or a private one; check the name, and for a private one set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        meaning = "the repository has no such branch, tag or commit"
    elif unanswered and HF_HUB_OFFLINE:
        here = "it is not in the cache, and " if isinstance(error, LocalEntryNotFoundError) else ""
        meaning = f"{here}HF_HUB_OFFLINE forbids to fetch it; {elsewhere}"
    elif unanswered:
        meaning = f"{ENDPOINT} cannot be reached ({one_line(error.__cause__ or error)}); {elsewhere}"
    elif isinstance(error, EntryNotFoundError):
        meaning = "the repository has no such file; 'brainfm convert' and 'brainfm push' make a model's repository"
    elif isinstance(error, HFValidationError):
        meaning = f"not a repository's name ({one_line(error)})"
    elif status in (401, 403):
        meaning = f"the token was refused ({status}); check HF_TOKEN and what it may do"
    elif status:
        meaning = f"{ENDPOINT} answers {status} ({one_line(error)}); try again later"
    elif getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
        meaning = (
            f"nothing can be written to the Hub's cache ({one_line(error)}); set HF_HOME to a folder of your own with "
            "room in it"
        )
    else:
        meaning = f"the download broke ({one_line(error)}); try again"
    return f"{meaning} ({type(error).__name__})"


# --- A URL ----------------------------------------------------------------------------------------


def _from_url(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The converted copy of a file at a URL; downloaded, checked and converted once, by one process."""
    from filelock import FileLock

    converted, by_hand = _cache_paths(cfg, cache_dir)
    if _is_whole(converted):  # before the lock: a shared cache may be read-only
        return converted
    with _writing(converted.parent), FileLock(converted.with_suffix(".lock")):
        if _is_whole(converted):
            return converted
        for leftover in converted.parent.glob(f".{converted.stem}-*"):  # of a process that was killed
            leftover.unlink()
        if by_hand.is_file():
            check_digest(by_hand, cfg)
            _convert(by_hand, converted, cfg)
            return converted
        partial = by_hand.with_name(by_hand.name + ".part")
        download(str(cfg.url), partial, by_hand)
        try:
            check_digest(partial, cfg)
            pin = _seen_before(partial, cfg, converted.parent)
            _convert(partial, converted, cfg)
            _keep(pin, cfg, converted.parent)
        finally:  # neither a wrong file nor a gigabyte of optimiser state is worth keeping
            partial.unlink(missing_ok=True)
    return converted


def _seen_before(path: Path, cfg: PretrainedCfg, folder: Path) -> str:
    """The sha256 of a file of which no whole digest was published, held to that of the first; else an empty string.

    Raises:
        WeightsError: It is another file than the first time.
    """
    if _is_whole_sha256(cfg.sha256) or cfg.git_blob:
        return ""
    digest, pin = file_sha256(path), folder / _PIN
    seen = pin.read_text(encoding="utf-8").strip() if pin.is_file() else digest
    if seen != digest:
        raise WeightsError(
            f"{cfg.url}: its sha256 is {digest}, and was {seen} when it was first fetched: another file is there now; "
            f"if that is meant, delete {pin}"
        )
    return digest


def _keep(digest: str, cfg: PretrainedCfg, folder: Path) -> None:
    """Write down the digest of the first file that was fetched, and could be read."""
    if digest and not (folder / _PIN).is_file():
        write_text(folder / _PIN, f"{digest}\n")
        logger.warning(
            "%s: no whole digest of %s is published; its sha256 is %s, kept in %s", cfg.name, cfg.url, digest, folder
        )


def _is_whole_sha256(digest: str | None) -> bool:
    return digest is not None and len(digest) == 64


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make a folder of the cache; say what to do where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WeightsNotFoundError(
            f"{folder}: the weights are not there yet, and nothing can be written there ({error.strerror}); set "
            "BRAINFM_CACHE to a folder of your own, or have them fetched by somebody who may write there"
        ) from error
    yield


def _is_whole(converted: Path) -> bool:
    """Whether a converted copy is there, as long as its header says."""
    from brainfm.weights.checkpoint import safetensors_header

    try:
        return bool(safetensors_header(converted))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _cache_paths(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """Where a URL's weights are kept, in a folder of its own: the converted copy, and the file as downloaded."""
    url = str(cfg.url)
    what = f"{url} {cfg.sha256 or cfg.git_blob}" + (f" {cfg.keys.take}" if cfg.keys.take else "")
    key = hashlib.sha256(what.encode()).hexdigest()[:12]
    folder = (expanded(cache_dir) if cache_dir else default_cache_dir()) / f"{cfg.name}-{key}"
    return folder / HUB_WEIGHTS, folder / (url.rsplit("/", 1)[-1].partition("?")[0] or "download")


def _convert(source: Path, target: Path, cfg: PretrainedCfg) -> None:
    """Write the network's tensors as safetensors, whole: the encoder is taken out of them at each load."""
    from brainfm.weights.checkpoint import read_checkpoint, save_state

    checkpoint = read_checkpoint(source, cfg.keys.take)
    digest = cfg.sha256 if _is_whole_sha256(cfg.sha256) else file_sha256(source)
    provenance = {"source": cfg.url, "source_sha256": digest, "left_out": checkpoint.dropped}
    provenance |= {"source_git_blob": cfg.git_blob} if cfg.git_blob else {}
    save_state(checkpoint.state, target, provenance)
    logger.info("%s: converted to %s, left out %s", source.name, target, ", ".join(checkpoint.dropped) or "nothing")


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else expanded(value)
