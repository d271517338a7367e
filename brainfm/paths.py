"""Names of files: as people write them, as disks spell them, as tables keep them; and folders gone through."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from brainfm.errors import ScanError

_IMAGES = (".nii", ".nii.gz", ".nii.bz2", ".nii.xz", ".nii.zst", ".mgz", ".mgh")  # in any case
_PLAIN = re.compile(r"[\w./][\w ./+=-]*", re.ASCII)  # of a path: nothing that may mean something else; most are so
_NOT_AS_PATH = re.compile(r"//|(^|/)\.(/|$)|/$")  # what `Path` takes out of a text
_PASSED_OVER = ("__MACOSX", "@eaDir", "lost+found")  # folders of systems, beside those that begin with a dot


def printable(text: str) -> str:
    r"""A text as every file can hold it: bytes that are not UTF-8 as `\udcXX`, which `path_of` reads back; no NUL."""
    text = text.replace("\0", "\ufffd")  # which no name of a file has, and Python 3.10 writes to no CSV
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def unprinted(text: str) -> str:
    """The name that `printable` wrote."""
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda found: chr(int(found[1], 16)), text)


def path_of(text: str, folder: Path) -> Path:
    r"""The path that a field of a table names, relative to a folder, as the disk spells it.

    `~` is the home of who runs this; quotes around it and `file://` are taken off, and `\` is `/` where that finds it.
    Raises ScanError for a path of Windows on another system.
    """
    text = text if _PLAIN.fullmatch(text) else _as_meant(text)
    return on_disk(folder / text)


def path_text(text: str, folder: Path) -> str:
    """The same as text. A plain one, such as most are, is not made a `Path` on the way: tables have many."""
    start = os.fspath(folder)
    if os.name == "nt" or not start.isascii() or not _PLAIN.fullmatch(text) or _NOT_AS_PATH.search(text):
        return str(path_of(text, folder))
    return text if text[0] == "/" or start == "." else os.path.join(start, text)  # noqa: PTH118


def _as_meant(text: str) -> str:
    text = unprinted(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    if text[:7].lower() == "file://":
        text = url2pathname(urlsplit(text).path)
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        raise ScanError(f"{text}: a path of Windows, and this is another system; write where the file is here")
    return os.path.expanduser(text)  # noqa: PTH111 - which raises where there is no home


def on_disk(path: Path) -> Path:
    """The path as its names are spelled on the disk; as it is where it is there, or where nothing is found.

    Accents are one character or two (NFC, NFD), by the system that wrote them; a name may be in Latin-1; and on systems
    with `/`, a table of Windows divides by backslashes.
    """
    if (str(path).isascii() and "\\" not in str(path)) or os.path.lexists(path):
        return path
    found, parts = Path(path.anchor), path.parts[bool(path.anchor) :]
    if os.name != "nt":
        parts = tuple(part for name in parts for part in name.split("\\") if part)
    for part in parts:
        spelled = next((each for name in _spellings(part) if os.path.lexists(each := found / name)), None)
        if spelled is None:
            return path
        found = spelled
    return found


def _spellings(name: str) -> Iterator[str]:
    yield name
    for form in ("NFC", "NFD"):
        yield unicodedata.normalize(form, name)
    for encoding in ("cp1252", "latin-1"):
        with suppress(UnicodeEncodeError):
            yield os.fsdecode(name.encode(encoding))


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an image, by its ending."""
    return os.fspath(path).lower().endswith(_IMAGES)


def walk_folder(*tops: Path) -> tuple[list[Path], list[Path], dict[str, str]]:
    """As `walk_texts`, with a `Path` for each file and folder."""
    files, folders, closed = walk_texts(*tops)
    return list(map(Path, files)), list(map(Path, folders)), closed


def walk_texts(*tops: Path | os.DirEntry[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """The files and folders below one or more folders, in the order of `Path`, and why which of them cannot be read.

    Links to folders are followed after all else, so that what a link leads to twice, or back to, is there once. What
    systems keep for themselves is passed over: `._…`, `.DS_Store`, `.git`, `.Trashes` and all that begins with a dot,
    `__MACOSX`, `@eaDir`. The link of an image that is not there is one of the files.

    Of the disk each folder is asked once, for its entries, as long as there are no links: scans are many. No folder of
    `tops` may lie in another.
    """
    files: list[str] = []
    folders: list[str] = []
    closed: dict[str, str] = {}
    links: list[str] = []

    def walk(top: str, seen: set[tuple[int, int]] | None) -> None:
        inner = [top]
        while inner:
            place = inner.pop()
            try:
                if seen is not None:
                    if (identity := _identity(place)) in seen:
                        continue
                    seen.add(identity)
                with os.scandir(place) as entries:
                    found = sorted(entries, key=_NAME)
            except OSError as error:
                closed[str(error.filename)] = f"cannot be read: {error.strerror}"
                continue
            folders.append(place)
            below: list[str] = []
            for entry in found:
                name = entry.name
                if name[0] == ".":
                    continue
                if is_folder(entry):
                    if name not in _PASSED_OVER:
                        (links if entry.is_symlink() else below).append(entry.path)
                elif name.lower().endswith(_IMAGES) or not leads_nowhere(entry):
                    files.append(entry.path)
                else:
                    closed[str(Path(entry.path))] = "a link that leads nowhere"
            inner += reversed(below)

    for top in tops:
        if top.is_symlink():
            links.append(os.fspath(top))
        else:
            walk(os.fspath(top), None)
    seen = {_identity(place) for place in folders} if links else set()
    for link in links:  # which grows
        walk(link, seen)
    return _in_order(files), _in_order(folders), closed


_NAME = attrgetter("name")


def _identity(folder: str) -> tuple[int, int]:
    """What a folder has in common with what a link leads to. Raises OSError where it is not there."""
    state = os.stat(folder)  # noqa: PTH116
    return state.st_dev, state.st_ino


def _in_order(paths: list[str]) -> list[str]:
    """Paths in the order of `Path`, which compares them by their parts, and as that writes them."""
    here = os.path.join(os.curdir, "")  # noqa: PTH118
    return sorted((path.removeprefix(here) for path in paths), key=lambda path: path.replace(os.sep, "\0"))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a link to what is not there."""
    try:
        return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110
    except OSError:
        return False
