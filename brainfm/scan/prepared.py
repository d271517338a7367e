"""A scan that `brainfm prep` prepared, which serves every contract that starts from a T1w head or brain.

A contract's grid is reached from the stored voxels by one interpolation, whatever its template and registration.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.spec import InputSpec
from brainfm.contract.volume import Triple, Volume
from brainfm.errors import ScanError
from brainfm.files import file_sha256
from brainfm.scan.layout import BRAIN, FIELD, HEAD, RECORD
from brainfm.scan.read import read_image
from brainfm.scan.resample import reach, resample
from brainfm.scan.spaces import space_of
from brainfm.scan.stored import StoredImage

FORMAT = 2  # of prep.json; before it a folder held TurboPrep's files alone
# Which of the two matrices brings a scan to a contract, by the contract's registration.
_MATRICES = {"rigid": "rigid", "none": "rigid", "affine": "affine", "linear": "affine"}

_CONTRASTS = ("T1w", "T2w", "FLAIR", "T1c")  # that `brainfm prep` makes

PathLike: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True, eq=False)
class PreparedScan:
    """What the folder of a prepared scan holds.

    Attributes:
        folder: Its path.
        record: Its `prep.json`.
        head: The whole head without its bias field, as stored.
        brain: [i, j, k] booleans, the brain mask, on the head's voxels.
    """

    folder: Path
    record: dict[str, Any]
    head: StoredImage
    brain: NDArray[np.bool_]

    def image(self, *, with_bias: bool = False) -> NDArray[np.float32]:
        """[i, j, k]: the head's intensities; `with_bias` as the scanner gave them, to the precision of the steps."""
        stored = Volume(self.head.array[None], None, self.head.affine, self.head.slope, self.head.inter)
        head: NDArray[np.float32] = stored.intensities[0]
        if not with_bias or not (self.folder / FIELD).is_file():
            return head
        field = read_image(self.folder / FIELD)
        to_field = np.linalg.inv(field.affine) @ self.head.affine
        i, j, k = head.shape
        log_field = resample(field.array.astype(np.float32), to_field, (i, j, k), beyond="border")
        raw: NDArray[np.float32] = head * np.exp(log_field) + np.float32(self.record["bias_field"]["lifted_by"])
        return raw

    def matrix(self, name: str) -> NDArray[np.float64]:
        """[4, 4] from points of MNI152 2009c to points of the scan, RAS mm; `name` is "rigid" or "affine"."""
        found = self.record.get(name)
        if found is None:
            raise ScanError(f"{self.folder}: {name} registration went astray when the scan was prepared; {_again()}")
        inverse: NDArray[np.float64] = np.linalg.inv(np.asarray(found, dtype=np.float64))
        return inverse

    def from_space(self, spec: InputSpec) -> NDArray[np.float64]:
        """[4, 4] from points of a contract's space to points of the scan, RAS mm; the scan's own space stays as it is.

        Raises:
            ScanError: The scan was not registered to that space, or not in this way.
        """
        if spec.space is None:
            return np.eye(4)
        if not spec.in_mni152:
            raise ScanError(
                f"{self.folder}: prepared against MNI152, and this contract lies in the space {spec.space!r}, whose "
                "template is not at hand; register the scan to that template"
            )
        if spec.registration not in _MATRICES:
            raise ScanError(
                f"{self.folder}: prepared by rigid and affine registration, and this contract takes "
                f"{spec.registration} registration; give a scan that was registered so"
            )
        matrix: NDArray[np.float64] = self.matrix(_MATRICES[spec.registration]) @ space_of(spec.space).to_2009c
        return matrix


def read_prepared(folder: PathLike) -> PreparedScan:
    """The prepared scan in a folder. Raises ScanError where it is damaged or of a later version."""
    path = Path(folder)
    record = read_record(path)
    if record is None or record.get("format") != FORMAT:
        raise ScanError(f"{path}: not the folder of a prepared scan of format {FORMAT}; {_again()}")
    head, brain = read_image(path / HEAD), read_image(path / BRAIN, "mask")
    if brain.array.shape != head.array.shape:
        raise ScanError(f"{path}: {BRAIN} has {brain.array.shape} voxels and {HEAD} {head.array.shape}; {_again()}")
    return PreparedScan(path, record, head, brain.array > 0)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `prep.json` of a scan's folder, or None without one. Raises ScanError for one that is damaged."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"input", "settings", "verdict", "quality"} <= record.keys():
            raise ValueError("fields are missing")
        if record.get("format", 1) > FORMAT:
            raise ScanError(f"{path}: written by a later version of brainfm; update brainfm")
        for name in ("rigid", "affine"):
            if record.get("format") == FORMAT and np.shape(record[name] or np.eye(4)) != (4, 4):
                raise ValueError(f"{name} is no matrix of 4 by 4")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ScanError(
            f"{path}: not a record of 'brainfm prep' ({error}); delete the folder and run it again"
        ) from error
    return dict(record)


def registered_before(scan: PreparedScan, t1w: PreparedScan) -> str:
    """Why a scan of another contrast no longer lies on its T1w scan, which was prepared again; empty where it does."""
    onto = scan.record.get("registration", {}).get("onto_sha256")
    if onto is None or t1w.record.get("contrast") != "T1w" or onto == file_sha256(t1w.folder / RECORD):
        return ""
    return f"{scan.folder}: registered to another preparation of its T1w scan than {t1w.folder}; {_again()}"


def for_contract(
    scan: PreparedScan, spec: InputSpec, channel: str, first: PreparedScan
) -> tuple[Volume, tuple[str, ...]]:
    """A prepared scan as a channel of a contract takes it, and in words what was done.

    It is resampled once onto the contract's grid; or left in its own space, where the contract has none, or brought to
    that of the contract's first channel.

    Raises:
        ScanError: No such scan can be made of it: the contract wants another contrast or a nonlinear registration, or
            lies in a space of its own, or its bias field was never taken away.
    """
    contrast = str(scan.record.get("contrast", "T1w"))
    if not _takes(channel, contrast):
        steps = (f"brainfm prep --contrast {channel}",) if channel in _CONTRASTS else spec.preparation
        made = f", made by {' → '.join(steps)}" if steps else ""
        raise ScanError(
            f"{scan.folder}: a prepared {contrast} scan, and this contract takes {channel} here; give it that{made}"
        )
    was_corrected = (scan.folder / FIELD).is_file()
    if spec.bias_field == "removed" and not was_corrected:
        raise ScanError(
            f"{scan.folder}: prepared without bias correction, which this contract takes; prepare it with --bias n4"
        )
    with_bias = spec.bias_field == "left" and was_corrected
    image, brain, affine = scan.image(with_bias=with_bias), scan.brain, first.head.affine
    notes = ["the bias field put back"] if with_bias else []
    strip = spec.skull_strip == "required"
    if spec.space is not None or scan is not first:
        affine, shape, to_scan, how = _place(scan, spec, first)
        to_head = np.linalg.inv(scan.head.affine) @ to_scan @ affine
        near = reach(brain, to_head, shape) if strip else None
        image, covered = resample([image, brain], to_head, shape, within=near)
        brain = covered > 0.5
        notes.insert(0, f"resampled once from its own {_mm(scan.head.affine)} mm voxels, {how}")
    if strip:
        image = image * brain
    return Volume(image[None], brain, affine), tuple(notes)


def _takes(channel: str, contrast: str) -> bool:
    words = re.split(r"[^a-z0-9]+", channel.casefold().replace("t1ce", "t1c"))
    return words[0] == "any" or not {"mr", "mri", contrast.casefold()}.isdisjoint(words)


def _place(
    scan: PreparedScan, spec: InputSpec, first: PreparedScan
) -> tuple[NDArray[np.float64], Triple, NDArray[np.float64], str]:
    """Where a scan is resampled to: affine and shape, the matrix from there to points of the scan, and in words how."""
    if spec.space is None:
        i, j, k = first.head.array.shape
        to_scan = scan.matrix("rigid") @ np.linalg.inv(first.matrix("rigid"))
        return first.head.affine, (i, j, k), to_scan, f"onto those of {first.folder}"
    to_scan, space = scan.from_space(spec), space_of(spec.space)
    grid = spec.grid or space.grid
    how = f"by its {_MATRICES[spec.registration]} registration{f' {space.note}' if space.note else ''}"
    return grid.affine(spec.orientation or "RAS"), grid.shape, to_scan, how


def _mm(affine: NDArray[np.float64]) -> str:
    return "×".join(f"{mm:.3g}" for mm in np.linalg.norm(affine[:3, :3], axis=0))


def _again() -> str:
    return "prepare the scan again: brainfm prep"
