"""Names of files: as people write them, as disks spell them, as tables keep them; and folders gone through."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from brainfm.errors import ScanError

_IMAGES = (".nii", ".nii.gz", ".nii.bz2", ".nii.xz", ".nii.zst", ".mgz", ".mgh")  # in any case
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
    text = unprinted(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    if text[:7].lower() == "file://":
        text = url2pathname(urlsplit(text).path)
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        raise ScanError(f"{text}: a path of Windows, and this is another system; write where the file is here")
    return on_disk(folder / os.path.expanduser(text))  # noqa: PTH111 - which raises where there is no home


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


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its ending."""
    return path.name.lower().endswith(_IMAGES)


def walk_folder(*tops: Path) -> tuple[list[Path], list[Path], dict[str, str]]:
    """The files and folders below one or more folders, in order, and why which of them cannot be read.

    Links to folders are followed after all else, so that what a link leads to twice, or back to, is there once. What
    systems keep for themselves is passed over: `._…`, `.DS_Store`, `.git`, `.Trashes` and all that begins with a dot,
    `__MACOSX`, `@eaDir`. The link of an image that is not there is one of the files.
    """
    files: list[Path] = []
    folders: list[Path] = []
    closed: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    places = [*tops]

    def note(error: OSError) -> None:
        closed[str(error.filename)] = f"cannot be read: {error.strerror}"

    for top in places:  # which grows
        for name, inner, names in os.walk(top, onerror=note):
            place = Path(name)
            state = place.stat()
            if (state.st_dev, state.st_ino) in seen:
                inner.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            inner[:] = [each for each in inner if not each.startswith(".") and each not in _PASSED_OVER]
            folders.append(place)
            places += [place / link for link in sorted(inner) if (place / link).is_symlink()]
            for path in (place / file for file in names if not file.startswith(".")):
                if is_image(path) or not _leads_nowhere(path):
                    files.append(path)
                else:
                    closed[str(path)] = "a link that leads nowhere"
    return sorted(files), sorted(folders), closed


def _leads_nowhere(path: Path) -> bool:
    try:
        return path.is_symlink() and not path.exists()
    except OSError:
        return False
