"""Lists of scans: files, manifests, DataFrames, a TurboPrep folder, a BIDS-derivatives folder; and who is who in them.

The rule of ids: patient and scan are those of a manifest or, with a line in the log, of BIDS names; one patient is
written one way; two files are never the same scan of the same patient; what a listing leaves out is counted and named.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from brainfm.bids import ACQUISITION, BidsDataset, BidsImage, bids_ids, entities, is_bids, read_bids, stem
from brainfm.errors import ScanError
from brainfm.paths import is_image, on_disk, path_text, printable, unprinted, walk_texts
from brainfm.scan import ImageLike, ScanLike
from brainfm.scan.kinds import is_dicom
from brainfm.scan.layout import BRAIN, HEAD, RECORD, TURBOPREP_IMAGE, TURBOPREP_MASK, is_prepared
from brainfm.scan.load import image_of, name_of
from brainfm.scan.memory import is_mapping
from brainfm.scan.verdict import verdict_of
from brainfm.system import expanded, uncollected
from brainfm.tabular import is_frame, is_missing, is_table, read_rows, rows_of

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("brainfm")

# A path (of an image, a table or a folder), a DataFrame, or a list of images, scans of several channels, pairs with
# masks, and paths.
ScansLike: TypeAlias = (
    "str | os.PathLike[str] | pd.DataFrame | Sequence[ScanLike | tuple[ScanLike, ImageLike] | ScanRecord]"
)

_OWN = ("image_path", "mask_path", "patient_id", "scan_id")
# What else a column of patients, or of scans, is called, by its letters; the first that is there is taken.
_PATIENT_COLUMNS = ("participantid", "subjectid", "subject", "sub", "srcsubjectid", "ptid", "eid", "rid")
_SCAN_COLUMNS = ("sessionid", "session", "ses")
_OF_PREPARED = (RECORD, HEAD, TURBOPREP_IMAGE)
_THEIR_OWN = ("desc", "suffix", "ext")  # of what BIDS names have, not what an image and its mask have in common


@dataclass(frozen=True, slots=True)
class ScanRecord:
    """One scan of a list.

    Attributes:
        image: The scan: a path (of an image, or of the folder of a prepared scan), an image in memory, or of several
            channels {channel: path or image}. Paths become str: a `Path` takes five times the memory, and scans are
            many.
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
            text = str(getattr(self, name))
            object.__setattr__(self, name, "" if is_missing(text) else printable(text))
        images = self.image
        image = {channel: _text(each) for channel, each in images.items()} if is_mapping(images) else _text(images)
        object.__setattr__(self, "image", image)
        object.__setattr__(self, "mask", _text(self.mask))

    @property
    def images(self) -> dict[str, ImageLike]:
        """The image of each channel; of a scan of one, under the name ""."""
        return dict(self.image) if is_mapping(self.image) else {"": self.image}

    @property
    def brain_mask(self) -> ImageLike | None:
        """The mask that is given, or a prepared scan's own; None where there is neither."""
        first: Any = image_of(self.image)
        return os.path.join(first, BRAIN) if is_prepared(first) else self.mask  # noqa: PTH118

    @property
    def name(self) -> str:
        """What the scan is called in messages: its path or paths; empty for images in memory."""
        return name_of(self.image)

    def columns(self) -> dict[str, str]:
        """The record as a row of text, without the images themselves; a channel is named in small letters.

        Names of files that are not UTF-8 are as `brainfm.paths.printable` has them.
        """
        paths = {
            f"{channel.lower()}_path" if channel else "image_path": image for channel, image in self.images.items()
        }
        texts = {
            column: printable(str(item)) if isinstance(item, str | os.PathLike) else ""
            for column, item in (paths | {"mask_path": self.mask}).items()
        }
        extra = {name: printable(value) for name, value in self.extra.items()}
        return texts | {"patient_id": self.patient_id, "scan_id": self.scan_id} | extra

    @classmethod
    def from_columns(cls, row: Mapping[str, str], folder: Path | None = None) -> ScanRecord:
        """The record that `columns` described; with a `folder`, paths are those of `brainfm.paths.path_of`.

        The scan is in `image_path` or, where that is empty or no column, in one a channel, such as `t1w_path` and
        `flair_path`. A channel whose field is empty is missing. Raises ScanError as `path_of` does.
        """

        def path(text: str) -> str:
            return unprinted(text) if folder is None else path_text(text, folder)

        values = dict(row)
        mask, patient, scan = (values.pop(name, "") for name in ("mask_path", "patient_id", "scan_id"))
        one = values.pop("image_path", "")
        channels = [] if one else [name for name in values if is_channel_column(name)]
        several = {name.removesuffix("_path"): path(text) for name in channels if (text := values.pop(name))}
        return cls(several or (path(one) if one else ""), path(mask) if mask else None, patient, scan, values)


def _text(item: Any) -> Any:
    """A path as text; everything else as it is."""
    return os.fsdecode(item) if isinstance(item, os.PathLike) else item


class Listing(list[ScanRecord]):
    """Scans in their order, and what a folder holds beside them.

    Attributes:
        left_out: Folders of which no scan is in the list, and why: unreadable ones, and those without the image that
            is looked for; and of a BIDS data set, the images that are not what their names' ends say.
        rows: Of a manifest, the number of each scan's row, as a spreadsheet program counts them; else empty.
    """

    def __init__(
        self,
        records: Iterable[ScanRecord] = (),
        left_out: Mapping[str, str] | None = None,
        rows: Sequence[Any] = (),
    ) -> None:
        super().__init__(records)
        self.left_out = dict(left_out or {})
        self.rows = rows


def is_channel_column(name: str) -> bool:
    """Whether a manifest's column names the images of a channel, such as `t1w_path`."""
    named = re.fullmatch(r"[\w -]+_path", name)  # and no header line that other marks than commas divide
    return named is not None and name not in ("image_path", "mask_path", "dense_path")


def list_scans(scans: ScansLike) -> Listing:
    """Every scan that `scans` names, in order.

    Folders are gone through with the links in them, each folder once. What is left out of one is counted and named in a
    warning. Patients and scans are those of a manifest, or else of BIDS names; a scan's name has every entity in which
    it differs from another of the same patient.

    Args:
        scans: A path of an image, of a manifest (.csv, .tsv, .txt, .xlsx, .parquet), of a folder of prepared scans
            (`brainfm prep`; at any depth), of a TurboPrep folder (`normalized.nii.gz` beside `mask.nii.gz`) or of a
            BIDS-derivatives folder (T1w images in MNI152 space; see `brainfm.bids`); a DataFrame with a manifest's
            columns, whose paths are relative to the working folder; or a list of such paths, images, scans of several
            channels, pairs of one of these with its mask, and records.

    A scan that `brainfm prep` made has its verdict (pass, look, fail) as the column `qc`, or, where a person decided of
    it by `brainfm qc`, "accepted" or "rejected".

    Raises:
        ScanError: There is no such path, the manifest has no rows, no column of images or a row twice, a folder holds
            no scans, two files would be one scan of one patient, or one patient is written in two ways; the message
            says what was looked for.
        MissingExtraError: A folder is a BIDS data set, and the packages of the extra [bids] are not installed.
    """
    with uncollected():
        return _listing(scans)


def _listing(scans: ScansLike) -> Listing:
    if is_frame(scans):
        listed = _from_rows(rows_of(scans), "the DataFrame", Path())
    elif isinstance(scans, str | os.PathLike):
        listed = _from_path(Path(scans))
    elif isinstance(scans, ScanRecord | Mapping) or not isinstance(scans, Iterable) or getattr(scans, "ndim", 1) > 1:
        raise ScanError(f"scans must be a path or a list, not one {type(scans).__name__}; put it in a list")
    else:
        listed = _from_list(scans)
    _refuse_one_id_of_two(listed)
    check_patients(listed)
    return Listing(map(_with_verdict, listed), listed.left_out, listed.rows)


def check_found(records: Sequence[ScanRecord]) -> None:
    """Raise ScanError where there is no scan, or no file of any is there: not the scans are bad then, but the list."""
    if not records:
        raise ScanError("the list of scans is empty; name images, a manifest or a folder")
    files = ([item for item in record.images.values() if item is not None] for record in records)
    if any(not isinstance(item, str | os.PathLike) or os.path.exists(item) for each in files for item in each):  # noqa: PTH110
        return
    raise ScanError(
        f"{records[0].name}: no such file{f', nor any of the other {len(records) - 1}' if len(records) > 1 else ''}; "
        "check the paths: in a manifest they are relative to it, else to the working folder"
    )


def check_patients(records: Iterable[ScanRecord]) -> None:
    """Raise ScanError where what may be one patient is written in two ways, such as 007, 7 and sub-007."""
    ways: dict[str, dict[str, None]] = {}
    for patient in dict.fromkeys(record.patient_id for record in records if record.patient_id):
        bare = re.sub(r"^sub(-|_|(?=\d))", "", patient.casefold()).removesuffix(".0")
        ways.setdefault(re.sub(r"(?<!\d)0+(?=\d)", "", bare), {})[patient] = None
    several = [list(each) for each in ways.values() if len(each) > 1]
    if several:
        raise ScanError(
            f"the patients {', '.join(map(repr, several[0]))} may be one, written in {len(several[0])} ways"
            f"{f' (and so {len(several) - 1} more)' if len(several) > 1 else ''}; write each patient one way, and "
            "different ones in ways that differ by more than case, sub- and leading zeros"
        )


def _from_list(scans: Iterable[Any]) -> Listing:
    records: list[ScanRecord] = []
    named: list[int] = []  # by their files' names
    given: list[int] = []
    left_out = dict(getattr(scans, "left_out", {}))
    for item in scans:
        is_path = isinstance(item, str | os.PathLike)
        part = _from_path(item) if is_path else [_record(item)]
        if isinstance(item, ScanRecord):
            given += [len(records)] if item.patient_id and not item.scan_id else []
        elif not (is_path and is_table(Path(item))):
            named += range(len(records), len(records) + len(part))
        records += part
        left_out |= getattr(part, "left_out", {})
    _tell_apart(records, named)
    _tell_apart(records, given, by_place=True)
    return Listing(records, left_out, getattr(scans, "rows", ()))


def _with_verdict(record: ScanRecord) -> ScanRecord:
    """The record with `verdict_of` as its column `qc`, where the scan is a prepared one."""
    if not isinstance(record.image, str | os.PathLike):
        return record
    folder, name = os.path.split(record.image)
    if is_prepared(record.image):
        verdict = verdict_of(Path(record.image))
    else:
        verdict = verdict_of(Path(folder)) if name == TURBOPREP_IMAGE else ""
    return replace(record, extra=record.extra | {"qc": verdict}) if verdict else record


def _record(item: Any) -> ScanRecord:
    if isinstance(item, ScanRecord):
        return item
    if isinstance(item, tuple) and len(item) == 2 and not _is_array_and_affine(item):
        return ScanRecord(_found(item[0]), _found(item[1]), *_ids_of(item[0]))
    return ScanRecord(_found(item), None, *_ids_of(item))


def _found(item: Any) -> Any:
    """A path where the disk has it; everything else, and what is there as it is named, unchanged."""
    if not isinstance(item, str | os.PathLike):
        return item
    found = on_disk(expanded(item))
    return item if found == Path(item) else found


def _ids_of(image: ScanLike) -> tuple[str, str]:
    first = image_of(image)
    return bids_ids(Path(first)) if isinstance(first, str | os.PathLike) else ("", "")


def _is_array_and_affine(item: tuple[Any, Any]) -> bool:
    return getattr(item[1], "shape", None) == (4, 4)


def _from_path(item: str | os.PathLike[str]) -> Listing:
    path = Path(_found(item))
    if os.path.isdir(path):  # noqa: PTH112 - here and below not of pathlib, which raises for a name too long
        return _from_folder(path)
    if is_table(path):
        return read_manifest(path)
    if not os.path.exists(path) and not is_image(path):  # noqa: PTH110
        raise ScanError(f"{path}: no such file or folder; check the path")
    return Listing([_record(item)])  # a missing image is one bad scan of the batch


# --- Manifests ------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Listing:
    """The rows of a manifest: a table that `brainfm.tabular.read_rows` reads.

    `image_path` is needed, or a column a channel such as `t1w_path` and `flair_path`, which count where there is no
    `image_path`. `mask_path`, `patient_id` and `scan_id` are optional, and other columns are kept; case, blanks and
    underscores in these names do not matter. Relative paths are relative to the manifest.

    Where there is no `patient_id`, `participant_id`, `subject_id`, `subject`, `PTID`, `RID` or the like is taken, and
    where none says who, BIDS names of the files do; each with a line in the log. Likewise `session_id` or `session` for
    `scan_id`; scans of a patient that still have one id are told apart by their names. Raises ScanError as `list_scans`
    does.
    """
    path = expanded(path)
    if not os.path.exists(path):  # noqa: PTH110
        raise ScanError(f"{path}: no such manifest; check the path")
    return _from_rows(read_rows(path), str(path), path.parent)


def _from_rows(rows: pd.DataFrame, where: str, folder: Path) -> Listing:
    rows = rows.rename(columns=_own_names(list(rows.columns), where))
    names = list(rows.columns)
    channels = [name for name in names if is_channel_column(name)]
    if "image_path" not in names and not channels:
        raise ScanError(
            f"{where}: the manifest has no column image_path, nor one a channel such as t1w_path (it has "
            f"{', '.join(names)})"
        )
    if rows.empty:
        raise ScanError(f"{where}: the manifest has a header but no rows")
    paths = ["image_path"] if "image_path" in names else channels
    _refuse_same_files(rows[[name for name in (*paths, "mask_path") if name in names]], where)
    records: list[ScanRecord] = []
    labels: dict[str, str] = {}  # each kept once
    for row, *fields in rows.itertuples(name=None):
        values = {name: labels.setdefault(v, v) if len(v) < 8 else v for name, v in zip(names, fields, strict=True)}
        if not any(values[name] for name in paths):
            raise ScanError(f"{where}, row {row}: {' and '.join(paths)} {'are' if len(paths) > 1 else 'is'} empty")
        try:
            records.append(ScanRecord.from_columns(values, folder))
        except ScanError as error:
            raise ScanError(f"{where}, row {row}: {error}") from error
    records = _identified(records, _patients(rows, where), _scans(rows), where)
    _refuse_one_id_of_two(records)
    check_patients(records)
    return Listing(records, rows=rows.index.to_numpy())  # a list of int takes five times the memory


def _refuse_same_files(paths: pd.DataFrame, where: str) -> None:
    """Raise ScanError where two rows name the same files."""
    seen: dict[str, Any] = {}
    for row, *files in paths.itertuples(name=None):
        images = [file for name, file in zip(paths.columns, files, strict=True) if file and name != "mask_path"]
        same = "\0".join(map(os.path.normpath, files))
        if images and same in seen:
            raise ScanError(
                f"{where}, row {row}: {', '.join(images)} is already in row {seen[same]}; remove one of them"
            )
        seen[same] = row


def with_ids(rows: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows of a table with its own columns under their names, and patient_id and scan_id from where it has them.

    Raises ScanError where columns disagree on who is who.
    """
    rows = rows.rename(columns=_own_names(list(rows.columns), where))
    return rows.assign(patient_id=_patients(rows, where), scan_id=_scans(rows))


def _letters(column: str) -> str:
    return re.sub(r"[^a-z0-9]", "", column.casefold())


def _own_names(columns: Sequence[str], where: str) -> dict[str, str]:
    """Columns that have a name of a manifest's own but for case, blanks and underscores → that name."""
    own = {_letters(name): name for name in _OWN}
    found: dict[str, str] = {}
    for column in columns:
        name = own.get(_letters(column))
        if name is None:
            continue
        if name in found.values():
            first = next(other for other in found if found[other] == name)
            raise ScanError(f"{where}: {first} and {column} are both the column {name}; rename or remove one")
        found[column] = name
    return found


def _patients(rows: pd.DataFrame, where: str) -> list[str]:
    """Who each row says was scanned, by the first column that says it; empty where none does."""
    if "patient_id" in rows and not rows["patient_id"].map(is_missing).all():
        return list(rows["patient_id"])
    named = {_letters(column): column for column in reversed(rows.columns)}
    found = [named[name] for name in _PATIENT_COLUMNS if name in named]
    found = [column for column in found if not rows[column].map(is_missing).all()]
    if not found:
        return [""] * len(rows)
    first, *others = found
    for other in others:
        pairs = rows[[first, other]][~rows[first].map(is_missing) & ~rows[other].map(is_missing)].drop_duplicates()
        if not (pairs[first].is_unique and pairs[other].is_unique):
            raise ScanError(
                f"{where}: there is no column patient_id, and {first} and {other} tell the patients apart in different "
                "ways; rename the right one to patient_id"
            )
    logger.warning("%s: no column patient_id; the patients are those of the column %s", where, first)
    return list(rows[first])


def _scans(rows: pd.DataFrame) -> list[str]:
    if "scan_id" in rows:
        return list(rows["scan_id"])
    named = {_letters(column): column for column in reversed(rows.columns)}
    column = next((named[name] for name in _SCAN_COLUMNS if name in named), None)
    return [""] * len(rows) if column is None else list(rows[column])


def _identified(records: list[ScanRecord], patients: list[str], scans: list[str], where: str) -> list[ScanRecord]:
    """A manifest's records with their ids: its own, else those of BIDS names; scans without one are told apart."""
    explicit = [bool(record.scan_id) for record in records]
    given = [not is_missing(patient) for patient in patients]
    for n, (patient, scan) in enumerate(zip(patients, scans, strict=True)):
        if is_missing(patient) or is_missing(scan):
            named_patient, named_scan = _ids_of(records[n].image)
            patient, scan = (
                named_patient if is_missing(patient) else patient,
                named_scan if is_missing(scan) else scan,
            )
        if (patient, scan) != (records[n].patient_id, records[n].scan_id):
            records[n] = replace(records[n], patient_id=patient, scan_id=scan)
    guessed = [
        record.patient_id for record, known in zip(records, given, strict=True) if record.patient_id and not known
    ]
    if guessed:
        logger.warning(
            "%s: the patient of %d of %d scans is that of its file's name, such as %s; say it in a column patient_id",
            *(where, len(guessed), len(records), guessed[0]),
        )
    for own in (True, False):
        _tell_apart(records, [n for n, e in enumerate(explicit) if not e and given[n] == own], by_place=own)
    return records


# --- Folders --------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Listing:
    if is_bids(folder):
        dataset = read_bids(folder)
        if not _prepared_scans(dataset.files):
            return bids_scans(dataset)
    texts, _, left_out = walk_texts(folder)
    prepared = _prepared_scans(texts)
    files = list(map(Path, texts))
    if not prepared:
        _refuse_folder(folder, files, left_out)
    records = [_prepared_record(scan, image, folder) for scan, image in prepared.items()]
    inner = [path.relative_to(folder).parts for path in files if path.name == RECORD or is_image(path)]
    # Where the folder itself is one, what is below is that one scan's.
    of_scans = {folder / parts[0] for parts in inner if len(parts) > 1 and folder not in prepared}
    listed = {place for scan in prepared for place in (scan, *scan.parents)}
    listed |= {place for closed in left_out for place in Path(closed).parents}
    left_out |= {str(place): "no prepared scan in it" for place in sorted(of_scans - listed)}
    return _listed(folder, records, left_out)


def bids_scans(dataset: BidsDataset) -> Listing:
    """The T1w images in MNI152 space of BIDS derivatives, each with its brain mask. Raises ScanError without one."""
    images, left_out = dataset.of_contrast("T1w")
    in_mni: list[BidsImage] = []
    others: list[BidsImage] = []
    for image in images:
        (in_mni if image.template.startswith("MNI152") else others).append(image)
    if not in_mni:
        _refuse_bids(dataset, images, left_out)
    masks = {_same_scan(image.entities): image.file for image in dataset.images if _is_brain_mask(image)}
    records = [ScanRecord(image.file, masks.get(same), *image.ids) for image, same in _finest(in_mni)]
    if others:
        elsewhere = {image.path.parent for image in others} - {image.path.parent for image in in_mni}
        left_out |= {str(place): "no T1w image in MNI152 space in it" for place in sorted(elsewhere)}
    return _listed(dataset.root, records, left_out)


def _listed(folder: Path, records: list[ScanRecord], left_out: dict[str, str]) -> Listing:
    if left_out:
        first = ", ".join(f"{place} ({why})" for place, why in [*left_out.items()][:3])
        logger.warning("%s: %d left out: %s%s", folder, len(left_out), first, ", …" if len(left_out) > 3 else "")
    _tell_apart(records, range(len(records)))
    return Listing(records, left_out)


def _refuse_bids(dataset: BidsDataset, images: Sequence[BidsImage], left_out: Mapping[str, str]) -> NoReturn:
    such = "".join(f"; left out: {place} ({why})" for place, why in [*left_out.items()][:1])
    if not images:
        raise ScanError(f"{dataset.root}: a BIDS data set without a T1w image{such}")
    inside = ", ".join(str(path) for path in dataset.inside())
    raise ScanError(
        f"{dataset.root}: a BIDS data set with no T1w image in MNI152 space; give the derivatives folder of a run with "
        f"fMRIPrep's --output-spaces MNI152NLin2009cAsym:res-1{f' (inside are {inside})' if inside else ''}, or "
        f"prepare the scans: brainfm prep{such}"
    )


def _refuse_folder(folder: Path, files: Sequence[Path], left_out: Mapping[str, str]) -> NoReturn:
    closed = "".join(f"; {place} {why}" for place, why in [*left_out.items()][:1])
    prepare = f"prepare scans that come from the scanner by 'brainfm prep {folder} -o prep/'"
    if any(is_dicom(path) for path in files[:3]):
        raise ScanError(f"{folder}: a folder of DICOM files; {prepare}, and give that folder{closed}")
    images = [path for path in files if is_image(path)]
    if images:
        raise ScanError(
            f"{folder}: neither prepared scans ({RECORD}, or TurboPrep's {TURBOPREP_IMAGE}) nor a BIDS data set (no "
            f"sub-*/anat); {prepare}; of prepared ones name its {len(images)} image files one by one, or list them in "
            f"a manifest{closed}"
        )
    raise ScanError(f"{folder}: no scans in this folder{closed}")


def _prepared_scans(files: Sequence[str]) -> dict[Path, Path]:
    """The folders of prepared scans among a folder's files, and what is read of each: itself, or TurboPrep's image."""
    names: dict[str, set[str]] = {}
    for path in files:
        if path.endswith(_OF_PREPARED):
            folder, name = os.path.split(path)
            names.setdefault(folder, set()).add(name)
    found = {Path(folder): their for folder, their in names.items()}
    whole = {folder: folder for folder, their in found.items() if {RECORD, HEAD} <= their}
    return whole | {
        folder: folder / TURBOPREP_IMAGE
        for folder, their in found.items()
        if folder not in whole and TURBOPREP_IMAGE in their
    }


def _prepared_record(scan: Path, image: Path, folder: Path) -> ScanRecord:
    patient, ses = bids_ids(scan / TURBOPREP_IMAGE)
    if not patient:
        parts = scan.relative_to(folder).parts or (folder.resolve().name,)
        patient, ses = parts[0], "_".join(parts[1:])
    mask = scan / TURBOPREP_MASK
    return ScanRecord(image, mask if image != scan and mask.exists() else None, patient, ses)


def _same_scan(entities: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """What an image and its mask have in common."""
    return frozenset([entity for entity in entities.items() if entity[0] not in _THEIR_OWN])


def _is_brain_mask(image: BidsImage) -> bool:
    return image.entities.get("suffix") == "mask" and image.entities.get("desc") == "brain"


def _finest(images: Sequence[BidsImage]) -> Iterator[tuple[BidsImage, frozenset[tuple[str, str]]]]:
    """One image a scan and space, in their order, and what it has in common with its mask.

    The one with the smallest `res-` where there are several.
    """
    same = [_same_scan(image.entities) for image in images]
    best: dict[Any, int] = {}
    for n in sorted(range(len(images)), key=lambda n: _resolution(images[n])):
        found = images[n].entities
        but_res = same[n] - {("res", found["res"])} if "res" in found else same[n]
        best.setdefault((found.get("desc"), but_res), n)
    return ((images[n], same[n]) for n in sorted(best.values()))


def _resolution(image: BidsImage) -> int:
    resolution = image.entities.get("res", "")
    return int(resolution) if resolution.isdecimal() else 0


# --- Who is who -----------------------------------------------------------------------------------


def _tell_apart(records: list[ScanRecord], numbers: Sequence[int], *, by_place: bool = False) -> None:
    """Give those records whose ids are of names, and the same, every entity in which they differ.

    With `by_place`, for patients that are known and not guessed, what entities leave the same has the end of its path.
    Raises ScanError for what is still the same.
    """
    told = [records[n] for n in numbers]
    for same in _with_one_id(told):
        found = {n: entities(_first_path(told[n])) for n in same}
        keys = dict.fromkeys(key for each in found.values() for key in each if key not in ACQUISITION)
        differ = [key for key in keys if len({each.get(key) for each in found.values()}) > 1]
        for n in same:
            more = [each if key == "suffix" else f"{key}-{each}" for key in differ if (each := found[n].get(key))]
            told[n] = _named_further(told[n], *more)
    for same in _with_one_id(told) if by_place else ():
        for n, end in zip(same, _ends([_first_path(told[n]) for n in same]), strict=True):
            told[n] = _named_further(told[n], end)
    _refuse_one_id_of_two(told)
    for n, record in zip(numbers, told, strict=True):
        records[n] = record


def _named_further(record: ScanRecord, *more: str) -> ScanRecord:
    return replace(record, scan_id="_".join(filter(None, (record.scan_id, *more))))


def _with_one_id(records: Sequence[ScanRecord]) -> list[list[int]]:
    """The numbers of records that are the same scan of the same patient, though of different files."""
    same: dict[tuple[str, str], list[int]] = {}
    for n, record in enumerate(records):
        if record.patient_id and record.name:
            same.setdefault((record.patient_id, record.scan_id), []).append(n)
    several = (numbers for numbers in same.values() if len(numbers) > 1)
    return [numbers for numbers in several if len({records[n].name for n in numbers}) > 1]


def _first_path(record: ScanRecord) -> Path:
    return Path(str(image_of(record.image)))


def _ends(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that differ, without the endings of images: `m00_t1` and `m12_t1`."""
    parts = [(*path.parent.parts, stem(path)) for path in paths]
    for length in count(1):
        ends = ["_".join(each[-length:]) for each in parts]
        if len(set(ends)) == len(set(paths)) or length >= max(map(len, parts)):
            return ends
    raise AssertionError


def _refuse_one_id_of_two(records: Sequence[ScanRecord]) -> None:
    """Raise ScanError where two files are the same scan of the same patient."""
    for numbers in _with_one_id(records):
        names = list(dict.fromkeys(records[n].name for n in numbers))
        record = records[numbers[0]]
        scan = f"scan {record.scan_id} of " if record.scan_id else "the scan of "
        raise ScanError(
            f"{' and '.join(names[:2])}: both would be {scan}patient {record.patient_id}; list them in a manifest that "
            "gives each its own patient_id and scan_id"
        )
