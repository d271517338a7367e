"""Which scans a call of the BIDS App is of: participants, sessions, the filters of a file, and derivatives given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from brainfm.bids import DESCRIPTION, BidsDataset, BidsImage, is_bids, read_bids, stem
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import one_line
from brainfm.manifest import ScanRecord, bids_scans
from brainfm.prep.source import bids_heads

RAW = "raw"  # what a data set's own description calls the one that is read


@dataclass(frozen=True)
class Scan:
    """One scan that is asked for.

    Attributes:
        image: Its file, with its entities.
        root: The data set that it is in.
        dataset: What that is called in BIDS URIs: "raw", or the name of the derivatives.
        record: As `brainfm.embed` takes it; of a raw scan None until it is prepared.
    """

    image: BidsImage
    root: Path
    dataset: str = RAW
    record: ScanRecord | None = None

    @property
    def name(self) -> str:
        """Of its files, but for description and suffix, such as `sub-01_ses-1_run-2`."""
        parts = stem(self.image.path).split("_")[:-1]
        return "_".join(part for part in parts if not part.startswith("desc-"))

    @property
    def place(self) -> Path:
        """Of its files within a data set, such as `sub-01/ses-1/anat`."""
        return self.image.path.parent.relative_to(self.root)

    @property
    def uri(self) -> str:
        """Where it is, as a BIDS URI."""
        return f"bids:{self.dataset}:{self.image.path.relative_to(self.root).as_posix()}"


@dataclass(frozen=True)
class Wanted:
    """What of a data set is wanted; nothing said is everything.

    Attributes:
        participants: Labels, with or without `sub-`.
        sessions: Labels, with or without `ses-`.
        filters: Entities, by their long names in BIDS (`acquisition`) or short ones (`acq`), and the values that are
            wanted: one or a list, None for images without, "*" for images with any.
    """

    participants: Sequence[str] = ()
    sessions: Sequence[str] = ()
    filters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = {"participants": "sub-", "sessions": "ses-"}
        for name, prefix in labels.items():
            without = tuple(str(label).removeprefix(prefix) for label in getattr(self, name))
            object.__setattr__(self, name, without)
        known = _short_names()
        if unknown := [name for name in self.filters if name not in known]:
            raise BrainfmError(f"the filter {unknown[0]!r} is no entity of BIDS; there are {', '.join(known)}")
        short = {known[name]: value for name, value in self.filters.items()}
        object.__setattr__(self, "filters", short)

    def of(self, dataset: BidsDataset) -> BidsDataset:
        """The data set, as if it had only what is wanted. Raises ScanError for participants or sessions it has not."""
        subjects = [name for name in dataset.subjects if self._takes_subject(name)]
        found = {name.removeprefix("sub-") for name in subjects}
        if missing := [label for label in self.participants if label not in found]:
            raise ScanError(f"{dataset.root}: no participant {', '.join(missing)} (a folder sub-{missing[0]})")
        kept = set(subjects)
        images = [image for image in dataset.images if dataset.subject_of(image.file) in kept]
        sessions = {image.entities.get("ses") for image in images}
        if missing := [label for label in self.sessions if label not in sessions]:
            raise ScanError(f"{dataset.root}: no session {', '.join(missing)} of the participants")
        images = [image for image in images if self._takes(image)]
        left_out = {path: why for path, why in dataset.left_out.items() if dataset.subject_of(path) in kept}
        if self.sessions or self.filters:  # of the others nothing is wanted
            having = {dataset.subject_of(image.file) for image in images if not _is_mask(image)}
            subjects = [name for name in subjects if name in having]
        return BidsDataset(dataset.root, images, dataset.files, subjects, left_out)

    def _takes_subject(self, folder: str) -> bool:
        return not self.participants or folder.removeprefix("sub-") in self.participants

    def _takes(self, image: BidsImage) -> bool:
        if _is_mask(image):
            return True  # of the images that are taken
        if self.sessions and image.entities.get("ses") not in self.sessions:
            return False
        return all(_matches(image.entities.get(name), value) for name, value in self.filters.items())


def read_filters(path: Path) -> dict[str, Any]:
    """The filters of T1w images in a file such as fMRIPrep's `--bids-filter-file`; those of other images are not ours.

    Raises BrainfmError for a file that holds no such filters.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.get("t1w", {})
        return dict(found.items())
    except (OSError, ValueError, AttributeError) as error:
        raise BrainfmError(
            f'{path}: no filters of BIDS entities ({one_line(error)}); write such as {{"t1w": {{"session": "1"}}}}'
        ) from error


def select(bids_dir: Path, derivatives: Mapping[str, Path], wanted: Wanted) -> tuple[list[Scan], dict[str, str]]:
    """The scans that a call is of, and what is left out of the data sets, and why.

    They are the T1w images of `bids_dir`, or, where derivatives are given, the T1w images in MNI152 space in these.

    Raises:
        ScanError: There is no such data set, participant or session, or no scan of them.
    """
    left_out: dict[str, str] = {}
    scans: list[Scan] = []
    if not derivatives:
        heads = bids_heads(wanted.of(_dataset(bids_dir)), left_out)
        scans = [Scan(image, bids_dir) for image in heads]
    for name, folder in derivatives.items():
        dataset = wanted.of(_dataset(folder))
        images = {image.file: image for image in dataset.images}
        listing = bids_scans(dataset)
        left_out |= listing.left_out
        scans += [Scan(images[str(record.image)], folder, name, record) for record in listing]
    return list(_told_apart(scans, left_out)), left_out


def _told_apart(scans: Iterable[Scan], left_out: dict[str, str]) -> Iterable[Scan]:
    """The first of those scans whose files would have the same name."""
    seen: dict[tuple[Path, str], Scan] = {}
    for scan in scans:
        first = seen.setdefault((scan.place, scan.name.casefold()), scan)
        if first is scan:
            yield scan
        else:
            left_out[str(scan.image.path)] = f"its files would be called as those of {first.image.path}; filter one out"


def _dataset(folder: Path) -> BidsDataset:
    if not folder.is_dir():
        raise ScanError(f"{folder}: no such folder; check the path")
    if not is_bids(folder):
        raise ScanError(f"{folder}: no BIDS data set with subjects ({DESCRIPTION}, sub-*/)")
    return read_bids(folder)


def _is_mask(image: BidsImage) -> bool:
    return image.entities.get("suffix") == "mask"


def _matches(value: str | None, wanted: Any) -> bool:
    """Whether an entity's value is one that is wanted, in the words of pybids that fMRIPrep's users write."""
    if wanted is None or wanted == "Query.NONE":
        return value is None
    if wanted in ("*", "Query.ANY"):
        return value is not None
    if wanted == "Query.OPTIONAL":
        return True
    if isinstance(wanted, list):
        return any(_matches(value, each) for each in wanted)
    if isinstance(wanted, int) and value is not None and value.isdecimal():
        return int(value) == wanted  # run-01
    return value is not None and value.removeprefix(".") == str(wanted).removeprefix(".")


@cache
def _short_names() -> dict[str, str]:
    """The entities of BIDS by their long and their short names → these."""
    from bidsschematools.schema import load_schema

    schema = load_schema()
    short = {entity: str(schema.objects.entities[entity].name) for entity in schema.rules.entities}
    special = {"suffix": "suffix", "datatype": "datatype", "extension": "ext"}
    return short | {name: name for name in short.values()} | special
