"""What a path is that holds no scan: said by name, with what converts it, from its first bytes and its ending."""

from __future__ import annotations

import os
import re
import stat
import struct
from pathlib import Path

from brainfm.errors import ScanError

_DCM2NIIX = "convert it first, for example with dcm2niix"
_SIMPLEITK = "convert it first, for example with SimpleITK: WriteImage(ReadImage(file), 'scan.nii.gz')"
_AFNI = "convert it first, with AFNI: 3dAFNItoNIFTI"
_UNPACK = "get the image out of it first"

# How files begin, what they are then, and what to do with them.
_BEGINNINGS = (
    (b"NRRD000", "an NRRD file", _SIMPLEITK),
    (b"ObjectType", "a MetaImage header", _SIMPLEITK),
    (b"CDF\x01", "a MINC 1 file", "convert it first, with the MINC tools: mnc2nii"),
    (b"CDF\x02", "a MINC 1 file", "convert it first, with the MINC tools: mnc2nii"),
    (b"\x89HDF\r\n\x1a\n", "a MINC 2 or another HDF5 file", "convert it first; MINC with the MINC tools: mnc2nii"),
    (b"# === DATA DESC", "a Philips PAR file", _DCM2NIIX),
    (b"MATRIX7", "an ECAT file", "convert it first, to NIfTI"),
    (b"\x93NUMPY", "a NumPy array, which has no affine", "pass (array, affine) in Python, or convert it to NIfTI"),
    (b"\x00\x05\x16\x07", "what macOS keeps beside a file (its name begins with ._)", "name the file itself"),
    (b"version https://git-lfs", "a Git LFS pointer, not the image", "run 'git lfs pull'"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf'\x1c", "a 7z archive", _UNPACK),
    (b"\x1f\x9d", "compressed by 'compress'", "run 'uncompress' on it"),
    (b"\x89PNG", "a picture", "name the scan that it shows"),
    (b"\xff\xd8\xff", "a picture", "name the scan that it shows"),
    (b"<!DOCTYPE html", "a web page, not the image", "get the file again: the download may need a login"),
    (b"<html", "a web page, not the image", "get the file again: the download may need a login"),
    (b"<?xml", "an XML file, such as a GIFTI surface", "name the volume that it was made from"),
)
_ENDINGS = (
    (r"\.head", "an AFNI header", _AFNI),
    (r"\.brik", "an AFNI dataset", _AFNI),
    (r"\.mnc", "a MINC file", "convert it first, with the MINC tools: mnc2nii"),
    (r"\.nhdr|\.nrrd", "an NRRD file", _SIMPLEITK),
    (r"\.mha|\.mhd", "a MetaImage", _SIMPLEITK),
    (r"\.dcm|\.ima", "a DICOM file", _DCM2NIIX),
    (r"\.img", "the voxels of an Analyze or NIfTI pair, without the header (.hdr) beside them", "name the .hdr file"),
)
_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def first_bytes(path: Path, what: str, count: int = 1024) -> bytes:
    """How a file begins. Nothing but a plain file is opened: a pipe or a device could be waited for without end.

    Raises:
        ScanError: It is no file, cannot be opened, or is empty.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        hint = "the link leads nowhere: with DataLad or git-annex, get its content first"
        raise ScanError(f"{path}: no such file; {hint if path.is_symlink() else 'check the path'}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise _unopened(path, error) from error
    if stat.S_ISDIR(mode):
        try:
            children = sorted(path.iterdir())[:3]
        except OSError as error:
            raise _unopened(path, error) from error
        if any(is_dicom(child) for child in children):
            raise ScanError(f"{path}: a folder of DICOM files; {_DCM2NIIX}")
        raise ScanError(
            f"{path}: a folder, not a {what}; name the image in it, or embed the folder with 'brainfm embed'"
        )
    for is_kind, name in _SPECIAL:
        if is_kind(mode):
            raise ScanError(f"{path}: {name}, not a file; write the {what} to a file and name that")
    try:
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:
        raise _unopened(path, error) from error
    if not head:
        raise ScanError(f"{path}: the file is empty; copy or convert it again")
    return head


def _unopened(path: Path, error: Exception) -> ScanError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ScanError(f"{str(path)!r:.300}: cannot be opened ({reason}); check the path and its permissions")


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do, with their preamble or without."""
    try:
        return path.is_file() and begins_as_dicom(first_bytes(path, "scan", 132))
    except (OSError, ScanError):  # it is empty, or may not be read
        return False


def begins_as_dicom(head: bytes) -> bool:
    """Whether bytes are the first of a DICOM file: its mark after 128 others or, in old files, its first element."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 132:
        return False
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", head[:8])
        named = re.fullmatch(rb"AE|CS|DA|DT|IS|LO|OB|SH|TM|UI|UL|US", head[4:6]) is not None
        if group in (2, 8) and element < 0x100 and (named or length < 256):
            return True
    return False


def is_nifti(head: bytes) -> bool:
    """Whether bytes are the first of a NIfTI file, or of the header of a pair."""
    return head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2")


def is_mgh(head: bytes, path: Path) -> bool:
    """Whether a file is FreeSurfer's, which its first bytes alone say too little of."""
    return head[:4] == b"\x00\x00\x00\x01" and path.name.lower().endswith((".mgz", ".mgh", ".mgh.gz"))


def is_analyze(head: bytes) -> bool:
    """Whether bytes are the first of an Analyze header, also SPM's, which is NIfTI's without the mark."""
    return len(head) >= 348 and head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and not is_nifti(head)


def refusal(head: bytes, path: Path) -> ScanError:
    """What to say of a file that is neither NIfTI nor MGZ: its kind, where that is known."""
    if begins_as_dicom(head):
        return ScanError(f"{path}: a DICOM file; {_DCM2NIIX}")
    if is_analyze(head):
        return ScanError(
            f"{path}: an Analyze or SPM header, which does not say where left is; convert the scan again from DICOM, "
            "or pass (array, affine) if you know it"
        )
    for beginning, name, advice in _BEGINNINGS:
        if head.startswith(beginning):
            return ScanError(f"{path}: {name}; {advice}")
    for ending, name, advice in _ENDINGS:
        if re.search(rf"({ending})(\.gz|\.bz2|\.xz|\.zst)?$", os.fspath(path), re.IGNORECASE):
            return ScanError(f"{path}: {name}; {advice}")
    return ScanError(f"{path}: neither NIfTI nor MGZ (it begins with {head[:12]!r}); {_DCM2NIIX}")
