"""Who and which scan, by the BIDS entities in names of files and folders; and the images of a BIDS data set.

A file alone is known by its name, whatever folder it lies in and whatever else is installed; a name that may mean two
says neither. A data set is read as the standard has it, by the packages of the extra [bids].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from brainfm.errors import MissingExtraError
from brainfm.paths import is_folder, is_image, leads_nowhere, walk_texts

# What BIDS calls an acquisition by; entities of derivatives (space, res, desc, …) are named where they differ alone.
ACQUISITION = ("ses", "sample", "task", "acq", "ce", "rec", "dir", "run", "echo", "flip", "inv", "mt", "part", "proc")
_SUFFIX = r"(?:T1w|T2w|T2starw|FLAIR|PDw|PDT2|UNIT1|MPRAGE|mask|brain)"
_AFTER_LABEL = re.compile(rf"_(?=[A-Za-z0-9]+-)|_{_SUFFIX}$")
_ENDING = re.compile(r"(?i)\.(nii|mgz|mgh|dcm)(\.\w+)?$")


def bids_ids(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Patient and scan of a file's name, or of the folders right above it; empty without any."""
    names = _names_of(path)
    found = _entities_in(names)
    return _patient(names), "_".join(f"{key}-{found[key]}" for key in ACQUISITION if key in found)


def entities(path: str | os.PathLike[str]) -> dict[str, str]:
    """The BIDS entities of a file, without the patient, and its suffix; what its name says goes before its folders."""
    return _entities_in(_names_of(path))


def _entities_in(names: list[str]) -> dict[str, str]:
    found = {"suffix": names[0].rpartition("_")[2]}
    for name in names:
        for part in name.split("_"):
            key, dash, value = part.partition("-")
            if dash and key.isalnum() and value and key != "sub":
                found.setdefault(key, value)
    return found


def stem(path: Path) -> str:
    """A file's name without the ending of an image."""
    return _ENDING.sub("", path.name)


def _names_of(path: str | os.PathLike[str]) -> list[str]:
    """A file's name without its ending, and those of the folders that may say whose it is.

    Only `anat` and `ses-…` may stand between a file and its `sub-…` folder: a folder further up is no patient.
    """
    *folders, file = os.fspath(path).split(os.sep)  # noqa: PTH206 - here and below no Path, for there are many
    names = [_ENDING.sub("", file)]
    for folder in reversed(folders):
        names.append(folder)
        if folder != "anat" and not folder.startswith("ses-"):
            break
    return names


def _patient(names: list[str]) -> str:
    """`sub-…` of a file's name, or of its folder's: whole where that is more, as `sub-002_S_0295`, which is no BIDS."""
    file, *folders = names
    named = re.search(r"(?:^|_)sub-[^_]+", file)
    for folder in folders:
        if folder.startswith("sub-"):
            whole = _AFTER_LABEL.split(folder)[0]
            if named is None or f"{file}_".startswith(f"{whole}_"):
                return whole
    return next((_label(name) for name in (file, *folders) if re.search(r"(?:^|_)sub-[^_]", name)), "")


def _label(name: str) -> str:
    """The patient of a flat name, with the numbers of `sub-002_S_0295` (ADNI) and `sub-OAS_30001`.

    "" of `sub-002_0295`: a site and a patient, or a patient and a date?
    """
    found = re.search(r"(?:^|_)(sub-[^_]+_S_\d+|sub-[A-Za-z]+_\d+|sub-[^_]+)(_\d+(?=_|$))?", name)
    return found[1] if found and not found[2] else ""


# --- Data sets: their images by an index of the standard's own names -------------------------------


DESCRIPTION = "dataset_description.json"
# Of each contrast that is looked for, the suffix, and whether contrast agent was given.
SUFFIXES = {"T1w": "T1w", "T2w": "T2w", "FLAIR": "FLAIR", "T1c": "T1w"}
_OWN_SPACES = ("individual", "native", "orig", "scanner", "T1w")  # of the person, and no template's


class Rightly(str):
    """Why something is left out that by the standard is no scan to be taken, such as a phase image: all is well."""

    __slots__ = ()


class Piece(Rightly):
    """Of a piece of an image, where a whole one of the same visit is there; where there is none, a scan is missing."""

    __slots__ = ()


def wrongly(left_out: Mapping[str, str]) -> dict[str, str]:
    """Of what is left out, and why, that of which something is wrong: it cannot be read, or may be a scan."""
    return {path: why for path, why in left_out.items() if not isinstance(why, Rightly)}


@dataclass(frozen=True, slots=True)
class BidsImage:
    """An image of a data set.

    Attributes:
        file: Where it is, as text: a `Path` takes five times the memory, and images are many.
        entities: By the short names of the standard (`sub`, `ses`, `acq`, …), as written, with `suffix`, `datatype` and
            `ext`.
        ignored: Whether the data set's `.bidsignore` names it.
    """

    file: str
    entities: dict[str, str]
    ignored: bool = False

    @property
    def path(self) -> Path:
        """Its file."""
        return Path(self.file)

    @property
    def ids(self) -> tuple[str, str]:
        """Patient and scan, as `bids_ids` has them of the file alone: a scan is called the same however it is named."""
        return bids_ids(self.file)

    @property
    def template(self) -> str:
        """The template on whose grid it is; "" where it is in the person's own space."""
        space = self.entities.get("space", "")
        return "" if space in _OWN_SPACES else space


@dataclass(frozen=True)
class BidsDataset:
    """The images of a data set's subjects.

    Attributes:
        root: The data set's folder.
        images: In the order of their paths.
        files: All files of the subjects, as text.
        subjects: The names of their folders.
        left_out: What cannot be read, and why.
    """

    root: Path
    images: list[BidsImage]
    files: list[str]
    subjects: list[str]
    left_out: dict[str, str]

    def of_contrast(self, contrast: str = "T1w") -> tuple[list[BidsImage], dict[str, str]]:
        """The images of one contrast ("T1w", "T2w", "FLAIR", or "T1c": T1w after contrast agent).

        And what looks like one and is left out, and why: pieces, phases, names that the standard does not have.
        """
        taken, left_out = [], dict(self.left_out)
        for image in self.images:
            if image.entities.get("suffix") != SUFFIXES[contrast]:
                continue
            if why := self._misplaced(image) or _why_not(image, contrast):
                left_out[image.file] = why
            elif contrast != "T1c" or "ce" in image.entities:
                taken.append(image)
        visits = {self._visit_of(image.file) for image in taken}
        for path, why in left_out.items():
            if isinstance(why, Piece) and self._visit_of(path) not in visits:
                left_out[path] = str(why)  # a scan that was asked for, and is not there
        named = {self.subject_of(image.file) for image in taken} | {self.subject_of(path) for path in left_out}
        others: dict[str, set[str]] = {name: set() for name in self.subjects if name not in named}
        for image in self.images if others else ():
            if image.entities["datatype"] == "anat" and (subject := self.subject_of(image.file)) in others:
                others[subject].add(image.entities.get("suffix", "images without a suffix"))
        for subject, suffixes in others.items():
            has = f", but {', '.join(sorted(suffixes))}" if suffixes else ""
            left_out[str(self.root / subject)] = Rightly(f"no {contrast} image in it{has}")
        return taken, left_out

    def _misplaced(self, image: BidsImage) -> str:
        """Why an image is not where the standard has those of `anat`; "" where it is."""
        owner, *folders, name = self._inner(image.file)
        if (folders[1:] if folders[:1] and folders[0].startswith("ses-") else folders) != ["anat"]:
            return f"in {'/'.join([owner, *folders])}, and not in anat"
        if not f"{name}_".startswith(f"{owner}_"):
            return f"in the folder of {owner}, but its name does not say so: whose is it?"
        return ""

    def subject_of(self, path: str) -> str:
        """The name of the subject's folder that a path within the data set is of."""
        return path[self._start :].partition(os.sep)[0]

    def _visit_of(self, path: str) -> str:
        """The folder above `anat` that an image is in: the subject's, or the session's."""
        return path[: -len("/anat/") - len(path.rpartition(os.sep)[2])]

    def _inner(self, path: str) -> list[str]:
        """The parts of a path within the data set."""
        return path[self._start :].split(os.sep)  # noqa: PTH206 - not Path.parts, for there are many

    @cached_property
    def _start(self) -> int:
        return _start_of_inner(self.root)

    def inside(self) -> list[Path]:
        """The data sets in its `derivatives`, which are listed where they are named themselves."""
        found = _bids2table().find_bids_datasets(self.root, exclude=["sourcedata", "sub-*"], maxdepth=2)
        return sorted(Path(path) for path in found if path != self.root)


def is_bids(folder: Path) -> bool:
    """Whether a folder is a BIDS data set with subjects: `sub-*`, and a description of itself or an `anat` below."""
    patterns = ["sub-*"] if (folder / DESCRIPTION).is_file() else ["sub-*/anat", "sub-*/ses-*/anat"]
    with suppress(OSError):
        return any(found.is_dir() for pattern in patterns for found in folder.glob(pattern))
    return False


def read_bids(folder: Path) -> BidsDataset:
    """The images of a data set's subjects, by `bids2table`'s reading of their names.

    The folders are gone through as everywhere (`walk_texts`): bids2table's own index follows a link that leads back
    without end, passes over in silence what it cannot read, and knows no `.bidsignore`.

    Raises:
        MissingExtraError: bids2table is not installed. A guess from the names would list other scans than it does.
    """
    parse = _bids2table().parse_bids_entities
    parsed: dict[str, dict[str, str]] = {}  # by all but the subject: subjects are many, and what they have is alike
    start = _start_of_inner(folder)
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if entry.name.startswith("sub-")]
    gone = {str(folder / each.name): "a link that leads nowhere" for each in named if leads_nowhere(each)}
    files, folders, closed = walk_texts(*sorted(filter(is_folder, named), key=lambda each: each.name))
    is_ignored = _ignored(folder)
    images = []
    for path in filter(is_image, files):
        inner = path[start:].replace(os.sep, "/")
        owner, _, rest = inner.partition("/")
        label = owner[4:]
        standard = label.isalnum() and label.isascii()
        kind = rest.replace(f"/{owner}_", "/sub-_", 1) if standard else inner
        found = parsed.get(kind)
        if found is None:
            # A folder such as sub-002_S_0295 is none of the standard's, and what is in it has no datatype there.
            found = parsed[kind] = {"datatype": inner.split("/")[-2]} | parse(inner)
        own = {"sub": label} if standard and kind != rest else {}
        images.append(BidsImage(path, found | own, is_ignored(inner)))
    kept = [place[start:] for place in folders if os.sep not in place[start:]]
    return BidsDataset(folder, images, files, kept, gone | closed)


def _start_of_inner(root: Path) -> int:
    """Where in a path within a folder, as text, what is within it begins."""
    return len(os.fspath(root / "_")) - 1


def _why_not(image: BidsImage, contrast: str) -> str:
    """Why an image with the suffix of a contrast is not taken as one; "" where it is."""
    found = image.entities
    if image.ignored:
        return Rightly("named in .bidsignore")
    if found.get("part", "mag") != "mag":
        return Rightly(f"part-{found['part']}: no magnitude image")
    if contrast == "T1w" and "ce" in found:
        return Rightly(f"ce-{found['ce']}: after contrast agent, no plain T1w; name the file itself to take it as one")
    if "chunk" in found:
        kind = Piece if contrast != "T1c" or "ce" in found else Rightly
        return kind(f"chunk-{found['chunk']}: a piece of an image; join the pieces, and name the whole")
    foreign = _entities_foreign_to(found["suffix"])
    if wrong := [f"{name}-{found[name]}" for name in found if name in foreign]:
        return f"{' and '.join(wrong)}: an image called {found['suffix']} has no such entity in BIDS; what is it?"
    return ""


@cache
def _entities_foreign_to(suffix: str) -> frozenset[str]:
    """The short names of the standard's entities that no image in `anat` of a suffix may have."""
    from bidsschematools.schema import load_schema

    schema = load_schema()
    short = {entity: schema.objects.entities[entity].name for entity in schema.rules.entities}
    rules = [*schema.rules.files.raw.anat.values(), *schema.rules.files.deriv.imaging.values()]
    allowed = {short[entity] for rule in rules if suffix in rule.suffixes for entity in rule.entities}
    return frozenset(short.values()) - allowed


def _ignored(folder: Path) -> Callable[[str], bool]:
    """Whether a data set's `.bidsignore`, whose patterns are those of `.gitignore`, names a path within it."""
    try:
        lines = (folder / ".bidsignore").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return lambda _: False
    import pathspec

    return pathspec.GitIgnoreSpec.from_lines(lines).match_file


def _bids2table() -> Any:
    try:
        import bids2table
        import pathspec  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "bids2table", "bids") from error
    return bids2table
