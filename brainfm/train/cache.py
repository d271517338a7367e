"""A cache of scans for training: each read, checked, cropped and masked once; then any crop of it is a few reads.

A cache is a folder: `cache.json` says for which contract it was built, `index.jsonl` has a line a scan, and `scans/`
two arrays a scan: `<key>.image.npy`, float16 (intensities divided by the largest, 0 outside the brain), and
`<key>.mask.npy`, eight voxels a byte along the last axis. Both are memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainfm.contract import InputSpec, ZScore
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import atomic_path
from brainfm.manifest import ScanRecord
from brainfm.scan import load_scan

_FORMAT = 1


def before_normalisation(spec: InputSpec) -> InputSpec:
    """A contract without its last step, the z-score inside the mask, which views have after their augmentation.

    Raises:
        BrainfmError: The contract ends in another step, or has no mask or no fixed shape.
    """
    last = spec.operations[-1] if spec.operations else None
    if not isinstance(last, ZScore) or last.region != "mask" or spec.output_shape is None:
        raise BrainfmError(
            "pretraining needs an input contract of a fixed shape that ends in a z-score inside the brain mask"
        )
    return replace(spec, operations=spec.operations[:-1])


def read_brain(record: ScanRecord, spec: InputSpec) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A scan's voxels before normalisation, 0 outside the brain, and its mask, both [z, y, x]. Raises ScanError."""
    volume = before_normalisation(spec).apply(load_scan(record.image, record.mask, spec=spec))
    brain = volume.mask
    if brain is None or not brain.any():
        raise ScanError(f"{record.image}: no voxel of the brain mask is in the contract's crop")
    return volume.image[0] * brain, brain


@dataclass(frozen=True)
class CacheReport:
    """What a build did: scans written, found from an earlier build, and refused with the reason."""

    written: int
    found: int
    refused: dict[str, str]


def build_cache(
    records: Sequence[ScanRecord],
    folder: str | os.PathLike[str],
    spec: InputSpec,
    *,
    root: str | os.PathLike[str] = ".",
    workers: int = 1,
    progress: bool = False,
) -> CacheReport:
    """Write every scan of a list to a cache. A scan that is there already is left, unless its file has changed.

    Args:
        records: The scans, by their paths.
        folder: The cache.
        spec: The input contract; a cache of another one is refused.
        root: The folder that the scans' keys are relative to: the manifest's, so that data and manifest can move.
        workers: Processes.
        progress: Show a progress bar.

    Raises:
        BrainfmError: The folder is a cache of another contract.
    """
    folder = Path(folder)
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    if (folder / "cache.json").is_file():
        _check_contract(folder, spec)
    else:
        content = {"format": _FORMAT, "contract": before_normalisation(spec).to_dict()}
        _write_text(folder / "cache.json", json.dumps(content, indent=1))
    known = _read_index(folder)
    jobs = [(key_of(record, root), record) for record in records]
    todo = [(key, record) for key, record in jobs if not _is_current(folder, known.get(key), key, record)]
    found = len(jobs) - len(todo)
    with (folder / "index.jsonl").open("a", encoding="utf-8") as index:
        for entry in _bar(_written(todo, folder, spec, workers), len(todo), progress):
            known[entry["key"]] = entry
            index.write("\n" + json.dumps(entry))
            index.flush()
    _write_text(folder / "index.jsonl", "\n".join(map(json.dumps, known.values())) + "\n")
    refused = {str(r.image): known[key]["error"] for key, r in jobs if "error" in known[key]}
    return CacheReport(len(todo) - sum("error" in known[key] for key, _ in todo), found, refused)


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
        self.errors = {key: str(entry["error"]) for key, entry in index.items() if "error" in entry}
        self._keys = index.keys() - self.errors.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def read(self, key: str, box: tuple[slice, slice, slice]) -> tuple[Tensor, Tensor]:
        """A box of a scan: image [z, y, x] float32 and mask [z, y, x] bool; only its voxels are read."""
        z, y, x = box
        image = np.load(self.folder / "scans" / f"{key}.image.npy", mmap_mode="r")
        packed = np.load(self.folder / "scans" / f"{key}.mask.npy", mmap_mode="r")
        first = x.start // 8
        bits = np.unpackbits(packed[z, y, first : -(-x.stop // 8)], axis=2)[..., x.start - 8 * first :]
        mask = bits[..., : x.stop - x.start].astype(bool)
        return torch.from_numpy(image[box].astype(np.float32)), torch.from_numpy(mask)


def key_of(record: ScanRecord, root: str | os.PathLike[str]) -> str:
    """A scan's name in a cache: a hash of its paths, relative to `root`."""
    parts = [os.path.relpath(item, root) if isinstance(item, str | os.PathLike) else "" for item in _paths(record)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _paths(record: ScanRecord) -> tuple[Any, Any]:
    return record.image, record.mask


def _written(
    jobs: Sequence[tuple[str, ScanRecord]], folder: Path, spec: InputSpec, workers: int
) -> Iterator[dict[str, Any]]:
    arguments = ((key, record, folder, spec) for key, record in jobs)
    if workers <= 1 or len(jobs) < 2:
        yield from map(_write_scan, arguments)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_write_scan, arguments, chunksize=4)


def _write_scan(job: tuple[str, ScanRecord, Path, InputSpec]) -> dict[str, Any]:
    """Write a scan's arrays, the image last: where it is, all is there. Returns its line of the index."""
    key, record, folder, spec = job
    entry: dict[str, Any] = {"key": key, "image": str(record.image), "state": _file_state(record)}
    try:
        image, mask = read_brain(record, spec)
    except ScanError as error:
        return entry | {"error": str(error)}
    except Exception as error:  # one bad scan never stops a build
        return entry | {"error": f"{record.image}: {type(error).__name__}: {error}"}
    image = (image / np.abs(image).max()).astype(np.float16)  # relative precision 2⁻¹¹, and no overflow
    for name, array in (("mask", np.packbits(mask, axis=2)), ("image", image)):
        with atomic_path(folder / "scans" / f"{key}.{name}.npy") as temporary:
            np.save(temporary, array)
    return entry


def _is_current(folder: Path, entry: dict[str, Any] | None, key: str, record: ScanRecord) -> bool:
    if entry is None or "error" in entry or not (folder / "scans" / f"{key}.image.npy").is_file():
        return False
    return bool(entry["state"] == _file_state(record))


def _file_state(record: ScanRecord) -> list[list[int]]:
    """Sizes and times of a scan's files; a file that is not there has none."""
    stats = [Path(item).stat() for item in _paths(record) if item is not None and Path(item).exists()]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line of each key; a line that was being written when a build was killed is not one."""
    entries: dict[str, dict[str, Any]] = {}
    path = folder / "index.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("key"), str):
            entries[entry["key"]] = entry
    return entries


def _check_contract(folder: Path, spec: InputSpec) -> None:
    try:
        content = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        same = content["format"] == _FORMAT and content["contract"] == before_normalisation(spec).to_dict()
    except (ValueError, KeyError, TypeError) as error:
        raise BrainfmError(f"{folder}: its cache.json is damaged ({error}); build the cache again") from error
    if not same:
        raise BrainfmError(f"{folder}: this cache was built for another input contract; build one for this model")


def _bar(entries: Iterator[dict[str, Any]], total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(entries, total=total, unit="scan", desc="caching", disable=not shown)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
