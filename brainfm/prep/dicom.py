"""A DICOM series: the voxels as ITK reads them, the affine as every slice's own header has it.

ITK's affine of a series is not taken: it follows the order of the slices and the header's spacing between them, whose
sign mirrors a head. Nothing of a header but its geometry and its modality is looked at, and none of it is shown.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError
from brainfm.prep.image import locale_kept, sitk, to_array
from brainfm.scan.kinds import is_dicom

_MODALITY, _FRAMES, _THICKNESS = "0008|0060", "0028|0008", "0018|0050"
_POSITION, _ORIENTATION, _SPACING = "0020|0032", "0020|0037", "0028|0030"
# As PS3.5 and PS3.10 have them.
_PREAMBLE, _UNDEFINED, _ITEM, _PIXELS = 132, 2**32 - 1, 0xFFFE, 0x7FE0
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_IMPLICIT, _BIG_ENDIAN = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_FROM_LPS = np.diag((-1.0, -1.0, 1.0, 1.0))
_UNEVEN = 0.1  # of the distance between slices: what one may be off


@dataclass(frozen=True, eq=False)
class _Slice:
    """A file of a series.

    Attributes:
        file: Its path.
        size: Columns and rows.
        position: Of its first voxel, LPS mm [3].
        along: Unit vectors along a row and down a column, LPS [2, 3].
        spacing: Between rows and between columns, mm [2].
        thickness: Of the slice, mm; 1 where the header does not say.
    """

    file: str
    size: tuple[int, ...]
    position: NDArray[np.float64]
    along: NDArray[np.float64]
    spacing: NDArray[np.float64]
    thickness: float

    @property
    def name(self) -> str:
        return Path(self.file).name


def read_series(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The voxels [x, y, z] of the one series in a folder, and their affine to RAS mm; with a preamble or without.

    Raises:
        ScanError: There are several series, it is no MR, in one file of many frames, damaged, or its slices do not
            follow each other at one distance. The message names the files.
    """
    for file in sorted(folder.iterdir()):
        if is_dicom(file):
            _check_lengths(file)
    with locale_kept():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) != 1:
            counts = [len(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), one)) for one in series]
            raise ScanError(
                f"{folder}: {len(series)} DICOM series, of {', '.join(map(str, counts))} files; "
                "put the T1w series into a folder of its own"
            )
        try:
            names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
            slices, affine = _stacked([_slice(name, folder) for name in names], folder)
            reader = sitk.ImageSeriesReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetOutputPixelType(sitk.sitkFloat32)  # slices may be scaled differently
            reader.SetFileNames([one.file for one in slices])
            image = reader.Execute()
        except RuntimeError:
            # ITK's own words may quote the header.
            raise ScanError(f"{folder}: the DICOM series is damaged or compressed in an unknown way") from None
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetSize() != (*slices[0].size, len(slices)):
        raise ScanError(f"{folder}: the DICOM series is not one grey 3-D image")
    return to_array(image), affine


def _check_lengths(path: Path) -> None:
    """Raise ScanError where an element is longer than the file: GDCM takes memory for what the header says.

    The elements are walked as PS3.5 chapter 7 has them, those of sequences too, and nothing of them but their lengths
    is looked at. What another encoding hides (deflated, private) is left to GDCM.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_PREAMBLE)
        in_meta = head[-4:] == b"DICM"
        at = _PREAMBLE if in_meta else 0
        explicit, order, syntax, in_pixels = in_meta or head[4:6].isupper(), "<", b"", False
        while at + 8 <= size:
            file.seek(at)
            element = file.read(12)
            group, number = struct.unpack(f"{order}HH", element[:4])
            if in_meta and group != 2:
                if not syntax:
                    break  # a preamble, and after it no transfer syntax
                if syntax == _DEFLATED:
                    return
                in_meta, explicit, order = False, syntax != _IMPLICIT, ">" if syntax == _BIG_ENDIAN else "<"
                continue
            kind, at = element[4:6], at + 8
            (length,) = struct.unpack(f"{order}I", element[4:8])
            if group != _ITEM and explicit:
                if not (kind.isalpha() and kind.isupper()):
                    return
                (length,) = struct.unpack(f"{order}H", element[6:8])
                if kind in _LONG and len(element) == 12:
                    at, (length,) = at + 4, struct.unpack(f"{order}I", element[8:])
            if length == _UNDEFINED:
                in_pixels = in_pixels or group == _PIXELS
                continue
            if at + length > size:
                break
            if in_meta and number == 0x10:
                file.seek(at)
                syntax = file.read(length).rstrip(b"\0 ")
            if in_pixels or not (group == _ITEM or (explicit and kind == b"SQ")):
                at += length
        else:
            return
    raise ScanError(
        f"{path}: a damaged DICOM file: at byte {at} an element is longer than the file, or its "
        "transfer syntax is not said; export it again"
    )


def _slice(file: str, folder: Path) -> _Slice:
    header = sitk.ImageFileReader()
    header.SetImageIO("GDCMImageIO")  # which ITK does not find by itself for a file without preamble
    header.SetFileName(file)
    header.ReadImageInformation()

    def said(key: str) -> str:
        return header.GetMetaData(key).strip() if header.HasMetaDataKey(key) else ""

    def numbers(key: str, count: int) -> NDArray[np.float64]:
        values = np.array([float(value) for value in said(key).split("\\")])
        if len(values) != count or not np.isfinite(values).all():
            raise ValueError(key)
        return values

    modality = said(_MODALITY) or "MR"
    if modality != "MR":
        raise ScanError(f"{folder}: a DICOM series of modality {modality[:2]}, not MR; give the T1w series")
    try:
        if int(said(_FRAMES) or 1) > 1:
            raise ScanError(
                f"{folder}: an enhanced DICOM file of many frames ({Path(file).name}), which is not read here; "
                "convert it first, for example with dcm2niix"
            )
        along = numbers(_ORIENTATION, 6).reshape(2, 3)
        spacing = numbers(_SPACING, 2)
        position = numbers(_POSITION, 3)
        thickness = float(said(_THICKNESS) or 1)
    except ValueError:
        raise ScanError(
            f"{folder}: {Path(file).name} does not say where its slice lies (position, orientation or spacing of the "
            "voxels); export the series again"
        ) from None
    if not np.allclose(along @ along.T, np.eye(2), atol=1e-3) or spacing.min() <= 0:
        raise ScanError(f"{folder}: the header of {Path(file).name} is damaged: its axes are no right angle")
    return _Slice(file, header.GetSize()[:2], position, along, spacing, thickness)


def _stacked(slices: list[_Slice], folder: Path) -> tuple[list[_Slice], NDArray[np.float64]]:
    """The slices in the order of their positions, and the affine to RAS mm, which each of them agrees with."""
    first = slices[0]
    for one in slices:
        if not np.allclose(one.along, first.along, atol=1e-3):
            raise ScanError(
                f"{folder}: the slices {first.name} and {one.name} are not parallel (a localizer?); give the T1w series"
            )
        if one.size != first.size or not np.allclose(one.spacing, first.spacing, rtol=1e-3):
            raise ScanError(f"{folder}: the slices {first.name} and {one.name} have other voxels; export it again")
    normal = np.cross(*first.along)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    positions = np.array([one.position for one in slices])
    between = first.thickness * normal if len(slices) == 1 else (positions[-1] - positions[0]) / (len(slices) - 1)
    if len(slices) > 2:
        _check_distances(slices, np.diff(positions @ normal), folder)
    off = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * between, axis=1)
    if off.max() > max(_UNEVEN * float(np.linalg.norm(between)), 0.01):
        one = slices[int(off.argmax())]
        raise ScanError(
            f"{folder}: the slice {one.name} lies {off.max():.2f} mm from where the others put it; export it again"
        )
    lps = np.eye(4)
    lps[:3, 0] = first.along[0] * first.spacing[1]
    lps[:3, 1] = first.along[1] * first.spacing[0]
    lps[:3, 2] = between
    lps[:3, 3] = positions[0]
    affine: NDArray[np.float64] = _FROM_LPS @ lps
    return slices, affine


def _check_distances(slices: list[_Slice], steps: NDArray[np.float64], folder: Path) -> None:
    """Refuse slices that do not follow each other at one distance."""
    usual = float(np.median(steps))
    if steps.min() < 0.01:
        n = int(steps.argmin())
        raise ScanError(
            f"{folder}: {slices[n].name} and {slices[n + 1].name} lie at the same place: there is more than one image "
            "in the series (echoes, time points?); export the T1w image by itself"
        )
    if steps.max() - steps.min() > _UNEVEN * usual:
        n = int(np.abs(steps - usual).argmax())
        raise ScanError(
            f"{folder}: the distances between its {len(slices)} slices go from {steps.min():.2f} to "
            f"{steps.max():.2f} mm, as between {slices[n].name} and {slices[n + 1].name}: slices are missing, or there "
            "is more than one image; export the series again"
        )
