"""A cache of scans for training: each read, checked and cropped once; then any crop of it is a few reads.

A cache is a folder: `cache.json` says for which contract it was built, `index.jsonl` (of a shard `index.3-of-8.jsonl`)
has a line a scan, `quarantine.csv` (of a shard `quarantine.3-of-8.csv`) the scans that failed twice, and `scans/` two
arrays a scan: `<key>.image.npy`, uint16 [z, y, x], or of several channels [C, z, y, x], in steps that the index has
from the channel's lowest intensity to its highest; and `<key>.mask.npy`, eight voxels a byte along the last axis. Both
are memory-mapped. The image is as stored outside the brain too: the released code augments it so, and a crop that is
resized or turned mixes the brain's rim with what is around it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainfm.contract import InputSpec, ZScore
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import atomic_path, held, progress_bar, sweep, write_csv, write_json, write_text
from brainfm.manifest import ScanRecord
from brainfm.scan import load_scan
from brainfm.scan.memory import is_mapping
from brainfm.schema import Checked
from brainfm.shards import Shard
from brainfm.sources import is_clip
from brainfm.stage import Stage, files_of
from brainfm.tabular import read_rows
from brainfm.train.quarantine import files_by_channel, state_of
from brainfm.train.video import check_readers, read_volume

logger = logging.getLogger("brainfm")

INDEX = "index.jsonl"
_WAITING = 4  # scans a worker that are sent to it before they are asked for
_FORMAT = 2  # 1 held 0 outside the brain, as float16
_LEVELS = 2**16 - 1  # steps of a uint16


def before_normalisation(spec: InputSpec) -> InputSpec:
    """A contract without its last step, the z-score inside the mask, which views have after their augmentation.

    Raises:
        BrainfmError: The contract ends in another step or in one over all channels together, or has no mask or no fixed
            shape.
    """
    last = spec.operations[-1] if spec.operations else None
    if not isinstance(last, ZScore) or last.region != "mask" or spec.output_shape is None:
        raise BrainfmError(
            "pretraining needs an input contract of a fixed shape that ends in a z-score inside the brain mask"
        )
    if len(spec.channels) > 1 and not last.per_channel:
        raise BrainfmError(
            "pretraining standardises each channel by itself, and this input contract all together: give its ZScore "
            "per_channel=True"
        )
    return replace(spec, operations=spec.operations[:-1])


def contract_digest(spec: InputSpec) -> str:
    """Six letters that name the contract of a cache."""
    text = json.dumps(before_normalisation(spec).to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def read_whole(
    record: ScanRecord, spec: InputSpec, stage: Stage | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A scan's voxels before normalisation [C, z, y, x], as stored outside the brain too, and its mask [z, y, x].

    Of a video clip, its frames: see `brainfm.train.video`. What the cache and the loader read, they read with this;
    with a stage, of the scan's copy there.

    Raises:
        ScanError: As `brainfm.load_scan` or `read_volume`, and where no brain is in the contract's crop.
    """
    if stage is not None:
        return stage.read(record, lambda local: read_whole(local, spec))
    if is_clip(record.image):
        return read_volume(str(record.image), before_normalisation(spec))
    volume = before_normalisation(spec).apply(load_scan(record.image, record.mask, spec=spec))
    brain = volume.mask
    if brain is None or not brain.any():
        raise ScanError(f"{record.name}: no voxel of the brain mask is in the contract's crop")
    return volume.image, brain


@dataclass(frozen=True)
class CacheReport:
    """What a build did.

    Attributes:
        written: Scans.
        found: Scans that an earlier build wrote.
        refused: Scans that cannot be read, by name, and why.
        quarantined: Those of them that failed twice, and are passed over from now on.
    """

    written: int
    found: int
    refused: dict[str, str]
    quarantined: dict[str, str]


@dataclass(frozen=True)
class _Entry(Checked):
    """A line of the index.

    Attributes:
        key: Of the scan.
        image: Its path or paths, for people.
        state: Bytes and time of the last change of each of its files that was there; not where it was, since data move.
        error: Why it could not be read.
        levels: The lowest intensity of each channel, and the step from one stored number to the next.
        failures: How often, one after another, it could not be read as it is.
    """

    key: str
    image: str
    state: tuple[tuple[int, int], ...]
    error: str | None = None
    levels: tuple[tuple[float, float], ...] = ()
    failures: int = 0


def build_cache(
    records: Sequence[ScanRecord],
    folder: str | os.PathLike[str],
    spec: InputSpec,
    *,
    root: str | os.PathLike[str] = ".",
    workers: int = 1,
    shard: Shard | None = None,
    stage: Stage | None = None,
    progress: bool = False,
) -> CacheReport:
    """Write every scan of a list to a cache. A scan that is there already is left, unless its file has changed.

    One that failed in two builds is listed in the cache's `quarantine.csv` (of a shard `quarantine.3-of-8.csv`), and
    passed over until its file has changed or its line is taken out of there.

    Args:
        records: The scans, by their paths.
        folder: The cache.
        spec: The input contract; a cache of another one is refused.
        root: The folder that the scans' keys are relative to: the manifest's, so that data and manifest can move.
        workers: Processes.
        shard: Which of several equal parts of the scans to write. Shards share the folder, and none locks it.
        stage: Where copies of the scans are read, which are made ahead; None reads the scans themselves.
        progress: Show a progress bar.

    Raises:
        BrainfmError: The folder is a cache of another contract, or another command is writing it.
        MissingExtraError: There are clips, and PyAV is not installed.
    """
    check_readers(records)
    folder = Path(folder)
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    if shard is not None:
        sweep(folder)
        mine = [records[n] for n in shard.numbers(len(records))]
        index = folder / f"index.{shard.index + 1}-of-{shard.count}.jsonl"
        return _build(mine, folder, index, spec, root, workers, stage, progress)
    with held(folder):
        return _build(records, folder, folder / INDEX, spec, root, workers, stage, progress)


def _build(
    records: Sequence[ScanRecord],
    folder: Path,
    index: Path,
    spec: InputSpec,
    root: str | os.PathLike[str],
    workers: int,
    stage: Stage | None,
    progress: bool,
) -> CacheReport:
    if (folder / "cache.json").is_file() and next((folder / "scans").glob("*.image.npy"), None) is not None:
        _check_contract(folder, spec)
    else:  # a cache without one scan, such as of a build by the wrong contract, stands in nobody's way
        index.unlink(missing_ok=True)
        write_json(folder / "cache.json", {"format": _FORMAT, "contract": before_normalisation(spec).to_dict()})
    known = _read_index(folder)
    jobs = [(key_of(record, root), record) for record in records]
    listed = _quarantined(folder)
    kept_out = {key for key, record in jobs if key in listed and _fails_as_before(known.get(key), record)}
    if kept_out:
        logger.warning(
            "%s: %d scans that failed twice are passed over; take them out of quarantine*.csv there to try them again",
            *(folder, len(kept_out)),
        )
    todo = [job for job in jobs if job[0] not in kept_out and not _is_current(folder, known.get(job[0]), *job)]
    found = len(jobs) - len(todo) - len(kept_out)
    with index.open("a", encoding="utf-8") as lines:
        written = _written(todo, folder, spec, workers, stage)
        for entry in progress_bar(written, total=len(todo), unit="scan", doing="caching", shown=progress):
            before = known.get(entry.key)
            if entry.error is not None:
                again = before is not None and before.error is not None and before.state == entry.state
                entry = replace(entry, failures=1 + (before.failures if before and again else 0))
            known[entry.key] = entry
            lines.write("\n" + _line(entry))
            lines.flush()
    own = known.values() if index.name == INDEX else [known[key] for key, _ in jobs]
    write_text(index, "\n".join(map(_line, own)) + "\n")
    _write_quarantine(index, [known[key] for key, _ in jobs])
    refused = {record.name: error for key, record in jobs if (error := known[key].error) is not None}
    twice = {record.name: refused[record.name] for key, record in jobs if known[key].failures > 1}
    return CacheReport(sum(known[key].error is None for key, _ in todo), found, refused, twice)


def _quarantined(folder: Path) -> set[str]:
    """The keys of the scans that are listed as having failed twice."""
    return {key for path in folder.glob("quarantine*.csv") for key in read_rows(path)["key"]}


def _fails_as_before(entry: _Entry | None, record: ScanRecord) -> bool:
    return entry is not None and entry.error is not None and entry.state == state_of(record)


def _write_quarantine(index: Path, entries: Sequence[_Entry]) -> None:
    """List the scans that failed twice, beside the index; no file where there are none."""
    path = index.with_name(index.name.replace("index", "quarantine")).with_suffix(".csv")
    rows = [(entry.key, entry.image, entry.error) for entry in entries if entry.failures > 1]
    if rows:
        write_csv(path, [("key", "image", "error"), *rows])
    else:
        path.unlink(missing_ok=True)


class ScanCache:
    """The scans of a cache, read by box.

    Args:
        folder: Of `build_cache`.
        spec: The contract of the model to be trained.

    Raises:
        BrainfmError: There is no cache, or it was built for another contract.
    """

    def __init__(self, folder: str | os.PathLike[str], spec: InputSpec) -> None:
        self.folder = Path(folder)
        if not (self.folder / "cache.json").is_file():
            raise BrainfmError(f"{folder}: no cache of scans; make one with 'brainfm cache build MANIFEST {folder}'")
        _check_contract(self.folder, spec)
        index = _read_index(self.folder)
        self.errors = {key: entry.error for key, entry in index.items() if entry.error is not None}
        self._levels = {key: entry.levels for key, entry in index.items() if entry.error is None}

    def __contains__(self, key: str) -> bool:
        return key in self._levels

    def files(self, key: str) -> list[str]:
        """A scan's image and mask."""
        return [f"{self.folder}/scans/{key}.{name}.npy" for name in ("image", "mask")]

    def read(self, key: str, box: tuple[slice, slice, slice], stage: Stage | None = None) -> tuple[Tensor, Tensor]:
        """A box of a scan: image [C, z, y, x] float32 and mask [z, y, x] bool; only its voxels are read.

        With a stage, of the scan's copy there.
        """
        z, y, x = box
        image, packed = (_mapped(file, stage) for file in self.files(key))
        first = x.start // 8
        bits = np.unpackbits(packed[z, y, first : -(-x.stop // 8)], axis=2)[..., x.start - 8 * first :]
        mask = bits[..., : x.stop - x.start].astype(bool)
        voxels = image[(..., *box)].astype(np.float32).reshape(-1, *mask.shape)
        for channel, (low, step) in zip(voxels, self._levels[key], strict=True):
            channel *= np.float32(step)
            channel += np.float32(low)
        return torch.from_numpy(voxels), torch.from_numpy(mask)


def _mapped(path: str, stage: Stage | None) -> NDArray[Any]:
    """An array in a file, or its copy; where the file system maps nothing, all of it is read."""
    try:
        array: NDArray[Any] = np.load(path if stage is None else stage.local(path), mmap_mode="r")
    except OSError:  # or the copy left the stage meanwhile
        array = np.load(path)
    return array


def key_of(record: ScanRecord, root: str | os.PathLike[str]) -> str:
    """A scan's name in a cache: a hash of its paths, relative to `root`, and of the channels where it has several."""
    files = files_by_channel(record) if is_mapping(record.image) else {"": record.image, "mask": record.mask}
    parts = [_relative(item, root) if isinstance(item, str | os.PathLike) else "" for item in files.values()]
    channels = [name for name in files if name not in ("", "mask")]
    return hashlib.sha256(os.fsencode("\0".join([*parts, *channels]))).hexdigest()[:20]


def _relative(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> str:
    """As `os.path.relpath`, in half the time; for there are many."""
    text, start = os.fspath(path), _start_of(root)
    inner = text[len(start) :]
    if text.startswith(start) and os.path.normpath(inner) == inner and not inner.startswith(("..", os.sep)):
        return inner
    return os.path.relpath(path, root)


@lru_cache(16)
def _start_of(root: str | os.PathLike[str]) -> str:
    start = os.path.join(root, "")  # noqa: PTH118
    return "" if start == os.path.join(".", "") else start  # noqa: PTH118


def _end_with_the_parent() -> None:
    """In a worker: end when the build does, however that ends; SIGKILL left the workers waiting for ever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _written(
    jobs: Sequence[tuple[str, ScanRecord]], folder: Path, spec: InputSpec, workers: int, stage: Stage | None
) -> Iterator[_Entry]:
    coming = iter(jobs) if stage is None else stage.ahead(jobs, lambda job: files_of(job[1]))
    if workers <= 1 or len(jobs) < 2:
        yield from (_write_scan(key, record, folder, spec, stage) for key, record in coming)
        return
    with ProcessPoolExecutor(workers, initializer=_end_with_the_parent) as pool:
        waiting: deque[Future[_Entry]] = deque()  # a few: `pool.map` would take all jobs before the first is done
        for key, record in coming:
            waiting.append(pool.submit(_write_scan, key, record, folder, spec, stage))
            if len(waiting) > _WAITING * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write_scan(key: str, record: ScanRecord, folder: Path, spec: InputSpec, stage: Stage | None) -> _Entry:
    """Write a scan's arrays, the image last: where it is, all is there. Returns its line of the index."""
    entry = _Entry(key, record.name, state_of(record))
    try:
        image, mask = read_whole(record, spec, stage)
    except ScanError as error:
        return replace(entry, error=str(error))
    except Exception as error:  # one bad scan never stops a build
        return replace(entry, error=f"{record.name}: {type(error).__name__}: {error}")
    levels, stored = _in_steps(image)
    for name, array in (("mask", np.packbits(mask, axis=2)), ("image", stored if len(stored) > 1 else stored[0])):
        with atomic_path(folder / "scans" / f"{key}.{name}.npy") as temporary:
            np.save(temporary, array)
    return replace(entry, levels=levels)


def _in_steps(image: NDArray[np.float32]) -> tuple[tuple[tuple[float, float], ...], NDArray[np.uint16]]:
    """The lowest intensity and the step of each channel, and the image [C, z, y, x] in such steps, to half a step.

    A step is 1/65535 of the channel's range. Whole numbers of a smaller range are kept as they are.
    """
    levels, stored = [], np.empty(image.shape, np.uint16)
    for channel, steps in zip(image, stored, strict=True):
        low, span = float(channel.min()), float(channel.max()) - float(channel.min())
        step = span / _LEVELS
        if span <= _LEVELS and (channel == np.rint(channel)).all():
            step = 1.0
        steps[...] = np.rint((channel.astype(np.float64) - low) / step) if span else 0
        levels.append((low, step))
    return tuple(levels), stored


def _is_current(folder: Path, entry: _Entry | None, key: str, record: ScanRecord) -> bool:
    if entry is None or entry.error is not None or not (folder / "scans" / f"{key}.image.npy").is_file():
        return False
    return entry.state == state_of(record)


def _line(entry: _Entry) -> str:
    return json.dumps(entry.to_dict(sparse=True))


def _read_index(folder: Path) -> dict[str, _Entry]:
    """The last line of each key, in the newest index; one that was being written when a build was killed is none."""
    entries: dict[str, _Entry] = {}
    for path in sorted(folder.glob("index*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = _Entry.from_dict(json.loads(line))
            except ValueError:
                continue
            entries[entry.key] = entry
    return entries


def _check_contract(folder: Path, spec: InputSpec) -> None:
    try:
        content = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        if content["format"] == 1:
            raise BrainfmError(
                f"{folder}: this cache was built by an earlier brainfm, with 0 outside the brain, where views of the "
                "released code have what is stored; build another (brainfm cache build MANIFEST FOLDER), and remove it"
            )
        built_for = InputSpec.from_dict(content["contract"])  # of an older cache: what it does not say is the default
        same = content["format"] == _FORMAT and built_for == before_normalisation(spec)
    except (ValueError, KeyError, TypeError) as error:
        raise BrainfmError(f"{folder}: its cache.json is damaged ({error}); build the cache again") from error
    if not same:
        ours = before_normalisation(spec)
        theirs, wanted = built_for.to_dict(), ours.to_dict()
        differ = [name for name in wanted if theirs.get(name) != wanted[name]]
        sizes = [" × ".join(map(str, one.output_shape or ())) for one in (built_for, ours)]
        raise BrainfmError(
            f"{folder}: this cache was built for another input contract, of {sizes[0]} voxels where this model takes "
            f"{sizes[1]} (they differ in {', '.join(differ) or 'its format'}); build this model's beside it: "
            f"brainfm cache build MANIFEST {folder}-{contract_digest(spec)} --model MODEL; or remove {folder}, if it "
            "was a mistake"
        )
