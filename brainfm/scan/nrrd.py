"""NRRD files, read by SimpleITK where that is installed: `pip install ".[prep]"`."""

from __future__ import annotations

import locale
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from brainfm.errors import ScanError
from brainfm.scan.kinds import first_bytes, refusal
from brainfm.scan.memory import from_itk
from brainfm.scan.stored import StoredImage, check_voxels, damaged

_TYPES = {1: np.uint8, 2: np.uint16, 4: np.float32, 8: np.float64}  # by size: what a voxel takes is what counts


def is_nrrd(head: bytes) -> bool:
    """Whether bytes are the first of an NRRD file, or of the header of one whose voxels lie in another."""
    return head.startswith(b"NRRD000")


def read_nrrd(path: Path) -> StoredImage:
    """The image in an NRRD file; what its header says of its size is judged before anything of that size is read.

    Raises:
        ScanError: It does not say where left is, its voxels lie in several files, it is damaged, or SimpleITK, which
            reads it, is not installed.
    """
    try:
        import SimpleITK as sitk
    except ModuleNotFoundError:
        raise refusal(first_bytes(path, "scan"), path) from None
    fields = _fields(path)
    if not {"space", "space directions"} <= fields.keys():
        raise ScanError(
            f"{path}: the NRRD header does not say how the image lies (no 'space' or no 'space directions'): left and "
            "right would be a guess; convert it again from DICOM, or pass (array, affine) if you know it"
        )
    if (voxels := fields.get("data file")) is not None:
        if "%" in voxels or voxels.split()[0] == "LIST":
            raise ScanError(f"{path}: an NRRD header whose voxels lie in several files; write them as one .nrrd")
        first_bytes(path.parent / voxels, "scan")  # refuses what would be waited for: a pipe, a device
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO")
    try:
        with locale_kept():
            reader.ReadImageInformation()
            size = sitk.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
            check_voxels(reader.GetSize(), np.dtype(_TYPES[size]), str(path))
            image = reader.Execute()
    except RuntimeError as error:
        raise damaged(str(path), ValueError("ITK cannot read it")) from error
    if image.GetMetaData("NRRD_space") != "left-posterior-superior":  # which ITK makes of every space that it knows
        raise ScanError(
            f"{path}: the NRRD header's space, {fields['space']!r:.60}, does not say where left is; convert it again "
            "from DICOM, or pass (array, affine) if you know it"
        )
    return from_itk(image, "scan", str(path))


def _fields(path: Path) -> dict[str, str]:
    """The fields of the header, which is text up to an empty line; "datafile" is "data file" written otherwise."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(1 << 16), b""):
            if not line.strip() or len(fields) > 1000:
                break
            name, mark, value = line.decode("utf-8", "replace").partition(":")
            if mark and not name.startswith("#"):
                fields[name.strip().lower()] = value.strip()
    if "datafile" in fields:
        fields["data file"] = fields["datafile"]
    return fields


@contextmanager
def locale_kept() -> Iterator[None]:
    """Put the process's locale back, which ITK sets to C when it reads a file: text would be ASCII from then on."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)
