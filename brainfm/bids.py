"""Who and which scan, by the BIDS entities in names of files and folders; a name that may mean two says neither."""

from __future__ import annotations

import re
from pathlib import Path

# What BIDS calls an acquisition by; entities of derivatives (space, res, desc, …) are named where they differ alone.
ACQUISITION = ("ses", "sample", "task", "acq", "ce", "rec", "dir", "run", "echo", "flip", "inv", "mt", "part", "proc")
_SUFFIX = r"(?:T1w|T2w|T2starw|FLAIR|PDw|PDT2|UNIT1|MPRAGE|mask|brain)"


def bids_ids(path: Path) -> tuple[str, str]:
    """Patient and scan of a file's name, or of the folders right above it; empty without any."""
    found = entities(path)
    return _patient(path), "_".join(f"{key}-{found[key]}" for key in ACQUISITION if key in found)


def entities(path: Path) -> dict[str, str]:
    """The BIDS entities of a file, without the patient, and its suffix; what its name says goes before its folders."""
    names = _names_of(path)
    found = {"suffix": names[0].rpartition("_")[2]}
    for name in names:
        for part in name.split("_"):
            key, dash, value = part.partition("-")
            if dash and key.isalnum() and value and key != "sub":
                found.setdefault(key, value)
    return found


def stem(path: Path) -> str:
    """A file's name without the ending of an image."""
    return re.sub(r"(?i)\.(nii|mgz|mgh|dcm)(\.\w+)?$", "", path.name)


def _names_of(path: Path) -> list[str]:
    """A file's name without its ending, and those of the folders that may say whose it is.

    Only `anat` and `ses-…` may stand between a file and its `sub-…` folder: a folder further up is no patient.
    """
    names = [stem(path)]
    for folder in path.parents:
        names.append(folder.name)
        if folder.name != "anat" and not folder.name.startswith("ses-"):
            break
    return names


def _patient(path: Path) -> str:
    """`sub-…` of a file's name, or of its folder's: whole where that is more, as `sub-002_S_0295`, which is no BIDS."""
    file, *folders = _names_of(path)
    named = re.search(r"(?:^|_)sub-[^_]+", file)
    for folder in folders:
        if folder.startswith("sub-"):
            whole = re.split(rf"_(?=[A-Za-z0-9]+-)|_{_SUFFIX}$", folder)[0]
            if named is None or f"{file}_".startswith(f"{whole}_"):
                return whole
    return next((_label(name) for name in (file, *folders) if re.search(r"(?:^|_)sub-[^_]", name)), "")


def _label(name: str) -> str:
    """The patient of a flat name, with the numbers of `sub-002_S_0295` (ADNI) and `sub-OAS_30001`.

    "" of `sub-002_0295`: a site and a patient, or a patient and a date?
    """
    found = re.search(r"(?:^|_)(sub-[^_]+_S_\d+|sub-[A-Za-z]+_\d+|sub-[^_]+)(_\d+(?=_|$))?", name)
    return found[1] if found and not found[2] else ""
