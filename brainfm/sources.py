"""What a volume is of: a scan of a person, a phantom, a synthetic MRI, or a video clip; so that each table can say it.

A manifest says it in its column `source`; a clip shows it by its name, as does what `brainfm synthesize` drew, prepared
or not; phantoms by the README that lies above them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from brainfm.manifest import ScanRecord
from brainfm.scan.load import image_of

Kind: TypeAlias = Literal["scans", "phantom", "synthetic", "video"]

CLIPS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")  # the containers that Kinetics and its mirrors come in

_DRAWN = re.compile(r"synth\d+-\d{6}(_T1w\b|$)")  # how `brainfm.synthesis` calls its volumes

# What is said of a number of them.
SAID: dict[Kind, str] = {
    "scans": "scans",
    "phantom": "phantom scans, not of people",
    "synthetic": "synthetic volumes, drawn by a model and not of people",
    "video": "video clips, no scans",
}


def is_clip(image: Any) -> bool:
    """Whether what a record names as its image is a video clip, by the end of its path."""
    return isinstance(image, str | os.PathLike) and os.fspath(image).lower().endswith(CLIPS)


def kind_of(record: ScanRecord) -> Kind:
    """What a record is of; a scan where nothing says otherwise."""
    if is_clip(record.image):
        return "video"
    said = record.extra.get("source", "").strip().casefold()
    for kind in get_args(Kind):
        if said == kind:
            return kind  # type: ignore[no-any-return]
    path = Path(str(image_of(record.image)))
    if any(_DRAWN.match(part) for part in path.parts):
        return "synthetic"
    return "phantom" if _is_below_phantoms(path) else "scans"


def kind_of_all(records: Iterable[ScanRecord]) -> Kind:
    """What a list is of: of several kinds the first that is no scan of a person, since one makes the list no people's.

    By paths and READMEs only the first record is looked at.
    """
    kinds = {kind_of(record) if record.extra.get("source") or is_clip(record.image) else "scans" for record in records}
    others = [kind for kind in get_args(Kind) if kind in kinds and kind != "scans"]
    if others:
        return others[0]  # type: ignore[no-any-return]
    first = next(iter(records), None)
    return "scans" if first is None else kind_of(first)


def _is_below_phantoms(path: Path) -> bool:
    """Whether the path, or a README above it, says so."""
    readmes = [folder / "README.txt" for folder in list(path.parents)[:4]]
    return any("phantom" in part for part in path.parts) or any(
        readme.is_file() and "phantoms" in readme.read_text(errors="replace")[:200] for readme in readmes
    )
