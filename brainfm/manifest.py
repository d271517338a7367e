"""Lists of scans: files, a CSV manifest, a TurboPrep folder, a BIDS-derivatives folder."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from brainfm.errors import ScanError
from brainfm.scan import ImageLike, ScanLike
from brainfm.scan.kinds import is_dicom
from brainfm.scan.load import image_of, name_of
from brainfm.scan.memory import is_mapping
from brainfm.scan.verdict import verdict_of

logger = logging.getLogger("brainfm")

# A path (of an image, a manifest or a folder), or a list of images, scans of several channels, and pairs with masks.
ScansLike: TypeAlias = "str | os.PathLike[str] | Sequence[ScanLike | tuple[ScanLike, ImageLike] | ScanRecord]"

_IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nii.bz2", ".nii.xz", ".nii.zst", ".mgz", ".mgh")  # in any case
_TURBOPREP_IMAGE, _TURBOPREP_MASK = "normalized.nii.gz", "mask.nii.gz"
_NO_ID = {"n/a", "na", "#n/a", "nan", "<na>", "none", "null", "-"}  # as programs write a field without a value
# What BIDS calls an acquisition by; entities of derivatives (space, res, desc, …) are named where they differ alone.
_ACQUISITION = ("ses", "sample", "task", "acq", "ce", "rec", "dir", "run", "echo", "flip", "inv", "mt", "part", "proc")
_BIDS_SUFFIX = r"(?:T1w|T2w|T2starw|FLAIR|PDw|PDT2|UNIT1|MPRAGE|mask|brain)"


@dataclass(frozen=True, slots=True)
class ScanRecord:
    """One scan of a list.

    Attributes:
        image: The scan: a path, an image in memory, or of several channels {channel: path or image}.
        mask: Its brain mask, or None.
        patient_id: Who was scanned; empty where nobody says, which "n/a" and the like become.
        scan_id: Which scan of that patient, or empty.
        extra: Further columns of the manifest.
    """

    image: ScanLike
    mask: ImageLike | None = None
    patient_id: str = ""
    scan_id: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("patient_id", "scan_id"):
            if str(getattr(self, name)).strip().casefold() in ("", *_NO_ID):
                object.__setattr__(self, name, "")

    @property
    def images(self) -> dict[str, ImageLike]:
        """The image of each channel; of a scan of one, under the name ""."""
        return dict(self.image) if is_mapping(self.image) else {"": self.image}

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


class Listing(list[ScanRecord]):
    """Scans in their order, and what a folder holds beside them.

    Attributes:
        left_out: Folders of which no scan is in the list, and why: unreadable ones, and those without the image that
            is looked for.
    """

    def __init__(self, records: Iterable[ScanRecord] = (), left_out: Mapping[str, str] | None = None) -> None:
        super().__init__(records)
        self.left_out = dict(left_out or {})


def is_channel_column(name: str) -> bool:
    """Whether a manifest's column names the images of a channel, such as `t1w_path`."""
    named = re.fullmatch(r"[\w -]+_path", name)  # and no header line that other marks than commas divide
    return named is not None and name not in ("image_path", "mask_path", "dense_path")


def list_inputs(inputs: Sequence[str | os.PathLike[str]]) -> Listing:
    """Every scan of several paths, each as in `list_scans`."""
    parts = [list_scans(item) for item in inputs]
    records = [record for part in parts for record in part]
    if not any(Path(item).suffix.lower() in (".csv", ".tsv") for item in inputs):
        records = _told_apart(records)
    return Listing(records, {folder: why for part in parts for folder, why in part.left_out.items()})


def list_scans(scans: ScansLike) -> Listing:
    """Every scan that `scans` names, in order.

    Folders are gone through with the links in them, each folder once. What is left out of one is counted and named in a
    warning. Patients and scans are those of a manifest, or else of BIDS names; a scan's name has every entity in which
    it differs from another of the same patient.

    Args:
        scans: A path of an image, of a manifest (.csv), of a TurboPrep folder (`normalized.nii.gz` beside
            `mask.nii.gz`, at any depth) or of a BIDS-derivatives folder (`sub-*` with T1w images in MNI152 space); or a
            list of images, scans of several channels, pairs of one of these with its mask, and records.

    A scan that `brainfm prep` made has its verdict (pass, look, fail) as the column `qc`, or, where a person decided of
    it by `brainfm qc`, "accepted" or "rejected".

    Raises:
        ScanError: There is no such path, the manifest has no rows, no column of images or a row twice, a folder holds
            no scans, or two files would be one scan of one patient; the message says what was looked for.
    """
    if isinstance(scans, str | os.PathLike):
        found = _from_path(Path(scans))
        _refuse_one_id_of_two(found)
        return Listing(map(_with_verdict, found), getattr(found, "left_out", {}))
    if isinstance(scans, ScanRecord | Mapping) or not isinstance(scans, Iterable):
        raise ScanError(f"scans must be a path or a list, not one {type(scans).__name__}; put it in a list")
    items = list(scans)
    named = iter(_told_apart([_record(item) for item in items if not isinstance(item, ScanRecord)]))
    records = [item if isinstance(item, ScanRecord) else next(named) for item in items]
    _refuse_one_id_of_two(records)
    return Listing(map(_with_verdict, records), getattr(scans, "left_out", {}))


def _with_verdict(record: ScanRecord) -> ScanRecord:
    """The record with `verdict_of` as its column `qc`, where a `prep.json` lies beside the scan."""
    if not isinstance(record.image, str | os.PathLike):
        return record
    path = Path(record.image)
    verdict = verdict_of(path.parent) if path.name == _TURBOPREP_IMAGE else ""
    return replace(record, extra=record.extra | {"qc": verdict}) if verdict else record


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
    if not path.exists() and not path.name.lower().endswith(_IMAGE_SUFFIXES):
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
    records, seen = [], dict[str, int]()
    labels: dict[str, str] = {}  # each kept once
    rows.reverse()
    while rows:  # not two lists of all at once: they may be long
        line, row = rows.pop()
        if None in row:
            raise ScanError(f"{path}, line {line}: more fields than the header has; quote fields that hold a comma")
        values = {name: (row[name] or "").strip() for name in names}
        values |= {name: labels.setdefault(value, value) for name, value in values.items() if len(value) < 8}
        images = [values[name] for name in paths if values[name]]
        if not images:
            raise ScanError(f"{path}, line {line}: {' and '.join(paths)} {'are' if len(paths) > 1 else 'is'} empty")
        same = "\0".join(os.path.normpath(values.get(name, "")) for name in (*paths, "mask_path"))
        if same in seen:
            raise ScanError(
                f"{path}, line {line}: {', '.join(images)} is already in line {seen[same]}; remove one of them"
            )
        seen[same] = line
        records.append(ScanRecord.from_columns(values, path.parent))
    return records


def _from_folder(folder: Path) -> Listing:
    files, folders, left_out = _walk(folder)
    prepared = [path for path in files if path.name == _TURBOPREP_IMAGE]
    in_mni = [path for path in files if _is_bids_t1w(path, folder) and "_space-MNI152" in path.name]
    if prepared:
        records = [_turboprep_record(image, folder) for image in prepared]
        missing = f"no {_TURBOPREP_IMAGE} in it"
        alone = folder / _TURBOPREP_IMAGE in prepared  # what is below is the one scan's
        inner = [path.relative_to(folder).parts for path in files if path.name == "prep.json" or _is_image(path)]
        of_scans = {folder / parts[0] for parts in inner if len(parts) > 1 and not alone}
    elif in_mni:
        records = [_bids_record(image) for image in _finest(in_mni)]
        missing = "no T1w image in MNI152 space in it"
        of_scans = {path.parent for path in files if _is_bids_t1w(path, folder)}
        subjects = {path for path in folders if path.parent == folder and path.name.startswith("sub-")}
        of_scans |= {path for path in subjects if not any(path in place.parents for place in of_scans)}
    else:
        _refuse_folder(folder, files, left_out)
    listed = {place for record in records for place in Path(str(record.image)).parents}
    listed |= {place for closed in left_out for place in Path(closed).parents}
    left_out |= {str(place): missing for place in sorted(of_scans - listed)}
    if left_out:
        first = ", ".join(f"{place} ({why})" for place, why in [*left_out.items()][:3])
        logger.warning("%s: %d left out: %s%s", folder, len(left_out), first, ", …" if len(left_out) > 3 else "")
    return Listing(_told_apart(records), left_out)


def _walk(folder: Path) -> tuple[list[Path], list[Path], dict[str, str]]:
    """The files and folders below a folder, in order, and why which of them cannot be read.

    Links to folders are followed after all else, so that what a link leads to twice, or back to, is there once.
    """
    files: list[Path] = []
    folders: list[Path] = []
    closed: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    tops = [folder]

    def note(error: OSError) -> None:
        closed[str(error.filename)] = f"cannot be read: {error.strerror}"

    for top in tops:  # which grows
        for name, inner, names in os.walk(top, onerror=note):
            place = Path(name)
            state = place.stat()
            if (state.st_dev, state.st_ino) in seen:
                inner.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            folders.append(place)
            tops += [place / link for link in sorted(inner) if (place / link).is_symlink()]
            for path in (place / file for file in names if not file.startswith("._")):  # which macOS writes
                if _is_image(path) or not _leads_nowhere(path):
                    files.append(path)
                else:
                    closed[str(path)] = "a link that leads nowhere"
    return sorted(files), sorted(folders), closed


def _leads_nowhere(path: Path) -> bool:
    try:
        return path.is_symlink() and not path.exists()
    except OSError:
        return False


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(_IMAGE_SUFFIXES)


def _is_bids_t1w(path: Path, folder: Path) -> bool:
    inner = path.relative_to(folder).parts
    return len(inner) > 1 and inner[0].startswith("sub-") and "_T1w.nii" in path.name and _is_image(path)


def _refuse_folder(folder: Path, files: Sequence[Path], left_out: Mapping[str, str]) -> NoReturn:
    closed = "".join(f"; {place} {why}" for place, why in [*left_out.items()][:1])
    if any(is_dicom(path) for path in files[:3]):
        raise ScanError(f"{folder}: a folder of DICOM files; convert them first, for example with dcm2niix{closed}")
    if any("_T1w.nii" in path.name for path in files):
        raise ScanError(
            f"{folder}: a BIDS folder with no T1w image in MNI152 space; give the derivatives folder of a run with "
            f"fMRIPrep's --output-spaces MNI152NLin2009cAsym:res-1, or prepare the scans: brainfm prep{closed}"
        )
    images = [path for path in files if _is_image(path)]
    if images:
        raise ScanError(
            f"{folder}: neither a TurboPrep folder (no {_TURBOPREP_IMAGE}) nor BIDS derivatives (no sub-*/); "
            f"name its {len(images)} image files one by one, or list them in a manifest{closed}"
        )
    raise ScanError(f"{folder}: no scans in this folder{closed}")


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
    """Patient and scan from the BIDS entities in a file's name, or in the folders right above it; empty without any."""
    if not isinstance(image, str | os.PathLike):
        return "", ""
    entities = _entities(Path(image))
    return _patient(Path(image)), "_".join(f"{key}-{entities[key]}" for key in _ACQUISITION if key in entities)


def _names_of(path: Path) -> list[str]:
    """A file's name without its ending, and those of the folders that may say whose it is.

    Only `anat` and `ses-…` may stand between a file and its `sub-…` folder: a folder further up is no patient.
    """
    names = [re.sub(r"(?i)\.(nii|mgz|mgh|dcm)(\.\w+)?$", "", path.name)]
    for folder in path.parents:
        names.append(folder.name)
        if folder.name != "anat" and not folder.name.startswith("ses-"):
            break
    return names


def _entities(path: Path) -> dict[str, str]:
    """The BIDS entities of a file, without the patient, and its suffix; what its name says goes before its folders."""
    names = _names_of(path)
    found = {"suffix": names[0].rpartition("_")[2]}
    for name in names:
        for part in name.split("_"):
            key, dash, value = part.partition("-")
            if dash and key.isalnum() and value and key != "sub":
                found.setdefault(key, value)
    return found


def _patient(path: Path) -> str:
    """`sub-…` of a file's name, or of its folder's: whole where that is more, as `sub-002_S_0295`, which is no BIDS."""
    file, *folders = _names_of(path)
    named = re.search(r"(?:^|_)(sub-[^_]+(?:_S_\d+)?)", file)
    for folder in folders:
        if folder.startswith("sub-"):
            whole = re.split(rf"_(?=[A-Za-z0-9]+-)|_{_BIDS_SUFFIX}$", folder)[0]
            if named is None or f"{file}_".startswith(f"{whole}_"):
                return whole
    hits = (re.search(r"(?:^|_)(sub-[^_]+(?:_S_\d+)?)", name) for name in (file, *folders))
    return next((hit.group(1) for hit in hits if hit), "")


def _told_apart(records: Sequence[ScanRecord]) -> list[ScanRecord]:
    """Records whose ids are of their names: where two have the same, with every entity in which they differ."""
    same: dict[tuple[str, str], list[int]] = {}
    for n, record in enumerate(records):
        if record.patient_id and record.name:
            same.setdefault((record.patient_id, record.scan_id), []).append(n)
    told = list(records)
    for numbers in same.values():
        if len({records[n].name for n in numbers}) < 2:
            continue
        entities = {n: _entities(Path(str(image_of(records[n].image)))) for n in numbers}
        keys = dict.fromkeys(key for each in entities.values() for key in each if key not in _ACQUISITION)
        differ = [key for key in keys if len({each.get(key) for each in entities.values()}) > 1]
        for n in numbers:
            more = [each if key == "suffix" else f"{key}-{each}" for key in differ if (each := entities[n].get(key))]
            told[n] = replace(records[n], scan_id="_".join(filter(None, (records[n].scan_id, *more))))
    _refuse_one_id_of_two(told, named=True)
    return told


def _refuse_one_id_of_two(records: Sequence[ScanRecord], *, named: bool = False) -> None:
    """Raise ScanError where two files are the same scan of the same patient.

    Scans that a manifest gives no `scan_id` are no claim; `named` ones, by their BIDS names, are.
    """
    seen: dict[tuple[str, str], str] = {}
    for record in records:
        if not (record.patient_id and record.name and (record.scan_id or named)):
            continue
        first = seen.setdefault((record.patient_id, record.scan_id), record.name)
        if first != record.name:
            scan = f"scan {record.scan_id} of " if record.scan_id else "the scan of "
            raise ScanError(
                f"{first} and {record.name}: both would be {scan}patient {record.patient_id}; list them in a manifest "
                "that gives each its own patient_id and scan_id"
            )
