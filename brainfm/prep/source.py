"""What is to be prepared: an image file, the folder of a DICOM series, a BIDS data set; read, or refused by content.

Nothing of a DICOM header but its geometry and its modality is looked at, and nothing of it is ever written or shown.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainfm.contract import Reorient, Volume
from brainfm.errors import ScanError
from brainfm.files import file_sha256
from brainfm.prep.image import affine_of, largest_part, locale_kept, sitk, to_array, to_itk
from brainfm.scan.kinds import first_bytes, is_dicom
from brainfm.scan.read import read_image

MIN_EXTENT_MM = 100.0  # along every axis; adults' brains are 110 mm or more
MAX_VOXEL_MM = 6.0
AIR_IN_HOUNSFIELD = -500.0  # below it there is nothing in an MR image
STRIPPED_LITRES = (0.6, 2.4)  # of voxels that are not background; a head has 3 or more

_SUFFIXES = re.compile(r"\.(nii|nii\.(gz|bz2|xz|zst)|mgz|mgh)$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One scan to be prepared.

    Attributes:
        path: Its image file, or the folder of its DICOM series.
        name: Of its folder in the output.
    """

    path: Path
    name: str


@dataclass(frozen=True, eq=False)
class Head:
    """A scan as it was read.

    Attributes:
        image: float32, its axes turned nearly R, A, S; not resampled.
        stripped: Whether the skull was removed already.
        found: What the file holds, in words: size, voxels.
    """

    image: sitk.Image
    stripped: bool
    found: str


def find_sources(inputs: Iterable[str | Path]) -> list[Source]:
    """The scans that paths name: a BIDS folder stands for its T1w images, every other path for itself.

    Raises:
        ScanError: A BIDS folder without a T1w image, or two inputs that cannot be told apart by name.
    """
    paths = [path for item in inputs for path in _expanded(Path(item))]
    unique = list(dict.fromkeys(path.absolute() for path in paths))  # a link keeps its name: DataLad's have none
    short = [_name(path) for path in unique]
    often = Counter(short)
    names = [
        name if often[name] == 1 else _clean(f"{path.parent.name}_{name}")
        for path, name in zip(unique, short, strict=True)
    ]
    for name, count in Counter(names).items():
        if count > 1:
            same = [str(path) for path, other in zip(unique, names, strict=True) if other == name]
            raise ScanError(f"{same[0]} and {same[1]} would share the folder {name}; rename one, or use two outputs")
    return [Source(path, name) for path, name in zip(unique, names, strict=True)]


def source_sha256(path: Path) -> str:
    """The sha256 of a file, or of the hashes of the files in a folder. Raises ScanError where there is nothing."""
    if not path.exists():
        raise ScanError(f"{path}: no such file or folder; check the path")
    if not path.is_dir():
        first_bytes(path, "scan")  # refuses what would be waited for: a pipe, a device
        return file_sha256(path)
    hashes = sorted(file_sha256(file) for file in path.iterdir() if file.is_file())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_source(path: Path) -> Head:
    """Read a scan and check that it can be a T1w image of a head.

    Raises:
        ScanError: It cannot be read, is 4-D, CT, a slab, coarse, constant or not finite, or a folder with several DICOM
            series or none. The message says what was found.
    """
    array, affine = _read_dicom(path) if path.is_dir() else _read_file(path)
    _check(array, affine, str(path))
    volume = Reorient("RAS")(Volume(array[None], None, affine))
    spacing = "×".join(f"{mm:.3g}" for mm in volume.spacing)
    found = f"{'×'.join(map(str, volume.shape))} voxels of {spacing} mm (right, anterior, superior)"
    return Head(to_itk(volume.image[0], volume.affine), _is_stripped(volume), found)


def _expanded(path: Path) -> list[Path]:
    if not path.is_dir() or not (any(path.glob("sub-*/")) or (path / "dataset_description.json").exists()):
        return [path]
    found = sorted(p for p in path.glob("sub-*/**/*_T1w.*") if _SUFFIXES.search(p.name) and p.name[:2] != "._")
    if not found:
        raise ScanError(f"{path}: a BIDS data set without a T1w image (sub-*/…/anat/*_T1w.nii.gz)")
    return found


def _name(path: Path) -> str:
    return _clean(re.sub(r"_T1w$", "", _SUFFIXES.sub("", path.name)))


def _clean(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "scan"


def _read_file(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    stored = read_image(path)
    return Volume(stored.array[None], None, stored.affine, stored.slope, stored.inter).image[0], stored.affine


# --- DICOM ----------------------------------------------------------------------------------------

_MODALITY, _POSITION, _ORIENTATION = "0008|0060", "0020|0032", "0020|0037"


def _read_dicom(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    if not any(is_dicom(file) for file in folder.iterdir()):
        below = sorted(child.name for child in folder.iterdir() if child.is_dir())
        hint = f"; name one of the folders in it ({', '.join(below[:5])})" if below else ""
        raise ScanError(f"{folder}: a folder that holds neither a DICOM series nor a BIDS data set{hint}")
    with locale_kept():
        return _read_series(folder)


def _read_series(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        counts = [len(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), one)) for one in series]
        raise ScanError(
            f"{folder}: {len(series)} DICOM series, of {', '.join(map(str, counts))} files; "
            "put the T1w series into a folder of its own"
        )
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        _check_slices(names, folder)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(names)
        image = reader.Execute()
    except RuntimeError:
        # ITK's own words may quote the header.
        raise ScanError(f"{folder}: the DICOM series is damaged or compressed in an unknown way") from None
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise ScanError(f"{folder}: the DICOM series is not one grey 3-D image")
    return to_array(image).astype(np.float32), affine_of(image)


def _check_slices(names: tuple[str, ...], folder: Path) -> None:
    """Refuse another modality, and slices that do not follow each other at one distance."""
    positions = []
    normal = np.array((0.0, 0.0, 1.0))
    for name in names:
        header = sitk.ImageFileReader()
        header.SetFileName(name)
        header.ReadImageInformation()
        modality = header.GetMetaData(_MODALITY).strip() if header.HasMetaDataKey(_MODALITY) else "MR"
        if modality != "MR":
            raise ScanError(f"{folder}: a DICOM series of modality {modality[:2]}, not MR; give the T1w series")
        if header.HasMetaDataKey(_POSITION) and header.HasMetaDataKey(_ORIENTATION):
            along = np.array([float(value) for value in header.GetMetaData(_ORIENTATION).split("\\")])
            normal = np.cross(along[:3], along[3:])
            positions.append([float(value) for value in header.GetMetaData(_POSITION).split("\\")])
    if len(positions) < 3:
        return
    steps = np.diff(np.sort(np.array(positions) @ normal))
    if steps.max() - steps.min() > 0.1 * np.median(steps):
        raise ScanError(
            f"{folder}: the distances between its {len(positions)} slices go from {steps.min():.2f} to "
            f"{steps.max():.2f} mm: slices are missing, or there is more than one image; export the series again"
        )


# --- What it holds --------------------------------------------------------------------------------


def _check(array: NDArray[np.float32], affine: NDArray[np.float64], source: str) -> None:
    if not np.isfinite(array).all():
        raise ScanError(f"{source}: the image holds NaN or infinite values; replace them (0 outside the head)")
    if array.min() == array.max():
        raise ScanError(f"{source}: every voxel has the same value: there is no image; check the file")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for size, mm in zip(array.shape, spacing, strict=True):
        if size * mm < MIN_EXTENT_MM:
            raise ScanError(
                f"{source}: a slab: {size} slices of {mm:.3g} mm cover {size * mm:.0f} mm, and a brain needs "
                f"{MIN_EXTENT_MM:.0f} or more along each axis; give the T1w scan of the whole head"
            )
    if spacing.max() > MAX_VOXEL_MM:
        raise ScanError(
            f"{source}: voxels of up to {spacing.max():.3g} mm are too coarse for a contract of 1 mm "
            f"(at most {MAX_VOXEL_MM:g}); give the T1w scan with the thinnest slices"
        )
    air = float((array < AIR_IN_HOUNSFIELD).mean())
    if air > 0.05:
        raise ScanError(
            f"{source}: {air:.0%} of the voxels are below {AIR_IN_HOUNSFIELD:.0f}, down to {array.min():.0f}: "
            "Hounsfield units of CT, not MR; give the T1w scan"
        )


def _is_stripped(volume: Volume) -> bool:
    """Whether what is not background is one piece of a brain's size."""
    background = volume.stored.min()
    outside = volume.stored[0] == background
    litres = float((~outside).sum()) * abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1e6
    if not STRIPPED_LITRES[0] <= litres <= STRIPPED_LITRES[1]:
        return False
    piece = largest_part(to_itk((~outside).astype(np.uint8), volume.affine))
    return float(to_array(piece)[~outside].mean()) > 0.95
