"""Lists of scans: files, a CSV manifest, a TurboPrep folder, a BIDS-derivatives folder."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from brainfm.errors import ScanError
from brainfm.scan import ImageLike, ScanLike
from brainfm.scan.load import image_of, name_of
from brainfm.scan.read import is_dicom

# A path (of an image, a manifest or a folder), or a list of images, scans of several channels, and pairs with masks.
ScansLike: TypeAlias = "str | os.PathLike[str] | Sequence[ScanLike | tuple[ScanLike, ImageLike] | ScanRecord]"

_IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
_TURBOPREP_IMAGE, _TURBOPREP_MASK = "normalized.nii.gz", "mask.nii.gz"


@dataclass(frozen=True, slots=True)
class ScanRecord:
    """One scan of a list.

    Attributes:
        image: The scan: a path, an image in memory, or of several channels {channel: path or image}.
        mask: Its brain mask, or None.
        patient_id: Who was scanned, where known.
        scan_id: Which scan of that patient, where known.
        extra: Further columns of the manifest.
    """

    image: ScanLike
    mask: ImageLike | None = None
    patient_id: str = ""
    scan_id: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> dict[str, ImageLike]:
        """The image of each channel; of a scan of one, under the name ""."""
        return dict(self.image) if isinstance(self.image, Mapping) else {"": self.image}

    @property
    def name(self) -> str:
        """What the scan is called in messages: its path or paths; empty for images in memory."""
        return name_of(self.image)

    def columns(self) -> dict[str, str]:
        """The record as a row of text, without the images themselves; a channel is named in small letters."""
        paths = {
            f"{channel.lower()}_path" if channel else "image_path": image for channel, image in self.images.items()
        }
        texts = {
            column: str(item) if isinstance(item, str | os.PathLike) else ""
            for column, item in (paths | {"mask_path": self.mask}).items()
        }
        return texts | {"patient_id": self.patient_id, "scan_id": self.scan_id} | self.extra

    @classmethod
    def from_columns(cls, row: Mapping[str, str], folder: Path | None = None) -> ScanRecord:
        """The record that `columns` described; relative paths are relative to `folder`, and `~` is who runs this.

        The scan is in `image_path` or, where that is empty or no column, in one a channel, such as `t1w_path` and
        `flair_path`. A channel whose field is empty is missing.
        """

        def path(text: str) -> str | Path:
            return folder / Path(text).expanduser() if folder else text

        values = dict(row)
        mask, patient, scan = (values.pop(name, "") for name in ("mask_path", "patient_id", "scan_id"))
        one = values.pop("image_path", "")
        channels = [] if one else [name for name in values if is_channel_column(name)]
        several = {name.removesuffix("_path"): path(text) for name in channels if (text := values.pop(name))}
        return cls(several or (path(one) if one else ""), path(mask) if mask else None, patient, scan, values)


def is_channel_column(name: str) -> bool:
    """Whether a manifest's column names the images of a channel, such as `t1w_path`."""
    named = re.fullmatch(r"[\w -]+_path", name)  # and no header line that other marks than commas divide
    return named is not None and name not in ("image_path", "mask_path", "dense_path")


def list_scans(scans: ScansLike) -> list[ScanRecord]:
    """Every scan that `scans` names, in order.

    Args:
        scans: A path of an image, of a manifest (.csv), of a TurboPrep folder (`normalized.nii.gz` beside
            `mask.nii.gz`, at any depth) or of a BIDS-derivatives folder (`sub-*` with T1w images in MNI152 space); or a
            list of images, scans of several channels, pairs of one of these with its mask, and records.

    A scan that `brainfm prep` made has its verdict (pass, look, fail) as the column `qc`.

    Raises:
        ScanError: There is no such path, the manifest has no rows, no column of images or a row twice, or a folder
            holds no scans; the message says what was looked for.
    """
    if isinstance(scans, str | os.PathLike):
        return [_with_verdict(record) for record in _from_path(Path(scans))]
    if isinstance(scans, ScanRecord | Mapping) or not isinstance(scans, Iterable):
        raise ScanError(f"scans must be a path or a list, not one {type(scans).__name__}; put it in a list")
    return [_with_verdict(_record(item)) for item in scans]


def _with_verdict(record: ScanRecord) -> ScanRecord:
    """The record with the verdict of `brainfm prep` as its column `qc`, where a `prep.json` lies beside the scan."""
    if not isinstance(record.image, str | os.PathLike):
        return record
    beside = Path(record.image).with_name("prep.json")
    if Path(record.image).name != _TURBOPREP_IMAGE or not beside.exists():
        return record
    try:
        verdict = str(json.loads(beside.read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        verdict = "unreadable"
    return replace(record, extra=record.extra | {"qc": verdict})


def _record(item: Any) -> ScanRecord:
    if isinstance(item, ScanRecord):
        return item
    if isinstance(item, tuple) and len(item) == 2 and not _is_array_and_affine(item):
        return ScanRecord(item[0], item[1], *_bids_ids(image_of(item[0])))
    return ScanRecord(item, None, *_bids_ids(image_of(item)))


def _is_array_and_affine(item: tuple[Any, Any]) -> bool:
    return getattr(item[1], "shape", None) == (4, 4)


def _from_path(path: Path) -> list[ScanRecord]:
    if path.is_dir():
        return _from_folder(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return read_manifest(path)
    if not path.exists() and not path.name.endswith(_IMAGE_SUFFIXES):
        raise ScanError(f"{path}: no such file or folder; check the path")
    return [_record(path)]  # a missing image is one bad scan of the batch


def read_manifest(path: Path) -> list[ScanRecord]:
    """The rows of a CSV (or TSV) manifest.

    `image_path` is needed, or a column a channel such as `t1w_path` and `flair_path`, which count where there is no
    `image_path`. `mask_path`, `patient_id` and `scan_id` are optional, and other columns are kept. Relative paths are
    relative to the manifest. Raises ScanError as `list_scans` does.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            names = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = names
            rows = [(reader.line_num, row) for row in reader if any((row.get(name) or "").strip() for name in names)]
    except FileNotFoundError as error:
        raise ScanError(f"{path}: no such manifest") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScanError(f"{path}: not a readable CSV manifest ({error})") from error
    if not names:
        raise ScanError(f"{path}: the manifest is empty; it needs a header line with image_path (and mask_path)")
    channels = [name for name in names if is_channel_column(name)]
    if "image_path" not in names and not channels:
        raise ScanError(
            f"{path}: the manifest has no column image_path, nor one a channel such as t1w_path (it has "
            f"{', '.join(names)})"
        )
    paths = ["image_path"] if "image_path" in names else channels
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ScanError(f"{path}: the manifest has the column {', '.join(twice)} twice")
    if not rows:
        raise ScanError(f"{path}: the manifest has a header but no rows")
    records, seen = [], dict[tuple[str, ...], int]()
    for line, row in rows:
        if None in row:
            raise ScanError(f"{path}, line {line}: more fields than the header has; quote fields that hold a comma")
        values = {name: (row[name] or "").strip() for name in names}
        images = [values[name] for name in paths if values[name]]
        if not images:
            raise ScanError(f"{path}, line {line}: {' and '.join(paths)} {'are' if len(paths) > 1 else 'is'} empty")
        same = tuple(os.path.normpath(values.get(name, "")) for name in (*paths, "mask_path"))
        if same in seen:
            raise ScanError(
                f"{path}, line {line}: {', '.join(images)} is already in line {seen[same]}; remove one of them"
            )
        seen[same] = line
        records.append(ScanRecord.from_columns(values, path.parent))
    return records


def _from_folder(folder: Path) -> list[ScanRecord]:
    prepared = sorted(folder.rglob(_TURBOPREP_IMAGE))
    if prepared:
        return [_turboprep_record(image, folder) for image in prepared]
    template_space = [
        path
        for path in sorted(folder.glob("sub-*/**/*_T1w.nii*"))
        if "_space-MNI152" in path.name and path.name.endswith(_IMAGE_SUFFIXES)
    ]
    if template_space:
        return [_bids_record(image) for image in _finest(template_space)]
    _refuse_folder(folder)
    raise AssertionError  # not reached


def _refuse_folder(folder: Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if any(is_dicom(path) for path in files[:3]):
        raise ScanError(f"{folder}: a folder of DICOM files; convert them first, for example with dcm2niix")
    if any("_T1w.nii" in path.name for path in files):
        raise ScanError(
            f"{folder}: a BIDS folder with no T1w image in MNI152 space; give the derivatives folder of a run with "
            "fMRIPrep's --output-spaces MNI152NLin2009cAsym:res-1, or prepare the scans: brainfm prep"
        )
    images = [path for path in files if path.name.endswith(_IMAGE_SUFFIXES)]
    if images:
        raise ScanError(
            f"{folder}: neither a TurboPrep folder (no {_TURBOPREP_IMAGE}) nor BIDS derivatives (no sub-*/); "
            f"name its {len(images)} image files one by one, or list them in a manifest"
        )
    raise ScanError(f"{folder}: no scans in this folder")


def _turboprep_record(image: Path, folder: Path) -> ScanRecord:
    mask = image.with_name(_TURBOPREP_MASK)
    patient, scan = _bids_ids(image)
    if not patient:
        parts = image.parent.relative_to(folder).parts or (folder.resolve().name,)
        patient, scan = parts[0], "_".join(parts[1:])
    return ScanRecord(image, mask if mask.exists() else None, patient, scan)


def _bids_record(image: Path) -> ScanRecord:
    mask = image.with_name(re.sub(r"(_desc-[^_]+)?_T1w\.", "_desc-brain_mask.", image.name))
    return ScanRecord(image, mask if mask.exists() else None, *_bids_ids(image))


def _finest(images: list[Path]) -> list[Path]:
    """One image a scan and space: the smallest `res-` where there are several."""
    best: dict[str, Path] = {}
    for image in sorted(images, key=_resolution):
        best.setdefault(str(image.with_name(re.sub(r"_res-[^_]+", "", image.name))), image)
    return sorted(best.values())


def _resolution(path: Path) -> tuple[int, str]:
    found = re.search(r"_res-0*(\d+)", path.name)
    return (int(found.group(1)) if found else 0, path.name)


def _bids_ids(image: Any) -> tuple[str, str]:
    """Patient and scan from the BIDS entities in a file's name, or in the folders right above it; empty without any.

    Only `anat` and `ses-…` may stand between a file and its `sub-…` folder: a folder further up is no patient.
    """
    if not isinstance(image, str | os.PathLike):
        return "", ""
    path = Path(image)
    names = [path.name]
    for folder in path.parents:
        names.append(folder.name)
        if folder.name != "anat" and not folder.name.startswith("ses-"):
            break
    found = {}
    for entity in ("sub", "ses", "acq", "run"):
        hits = (re.search(rf"(?:^|_)({entity}-[A-Za-z0-9]+)", name) for name in names)
        found[entity] = next((hit.group(1) for hit in hits if hit), "")
    patient = found.pop("sub")
    return patient, "_".join(value for value in found.values() if value)
