"""Images as ITK has them (LPS, [z, y, x]) and as this library has them (RAS, [x, y, z]); the template and its grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.assets import TEMPLATE
from brainfm.errors import MissingExtraError
from brainfm.registry import get_pretrained_cfg
from brainfm.scan.nrrd import locale_kept

try:
    import SimpleITK as sitk
except ModuleNotFoundError as error:
    raise MissingExtraError("SimpleITK", "prep") from error

__all__ = [
    "TEMPLATE",
    "affine_of",
    "itk_threads",
    "largest_part",
    "like",
    "locale_kept",
    "sitk",
    "template",
    "to_array",
    "to_itk",
]

_LPS = np.diag((-1.0, -1.0, 1.0, 1.0))

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings quote headers, and headers hold names


@contextmanager
def itk_threads(count: int) -> Iterator[None]:
    """Within the block ITK has so many threads, and after it as many as before."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(count)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def to_itk(array: NDArray[Any], affine: NDArray[np.float64]) -> sitk.Image:
    """An array [x, y, z] with its affine to RAS mm as an ITK image."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def to_array(image: sitk.Image) -> NDArray[Any]:
    """The voxels [x, y, z] of an ITK image."""
    array: NDArray[Any] = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    return array


def affine_of(image: sitk.Image) -> NDArray[np.float64]:
    """The affine [4, 4] of an ITK image from voxels to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    ras: NDArray[np.float64] = _LPS @ affine
    return ras


def like(array: NDArray[Any], image: sitk.Image) -> sitk.Image:
    """An array [x, y, z] as an ITK image that lies where `image` does."""
    made = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    made.CopyInformation(image)
    return made


@cache
def template() -> sitk.Image:
    """MNI152 2009c symmetric T1w, brain only, 0…255, on the contract's grid: what scans are registered to."""
    import nibabel as nib

    stored = nib.load(TEMPLATE)
    spec = get_pretrained_cfg("simclr_resnet18_3d").input_spec
    grid = spec.grid if spec else None
    assert grid is not None
    return to_itk(np.asanyarray(stored.dataobj).astype(np.float32), grid.affine("RAS"))


def largest_part(mask: sitk.Image) -> sitk.Image:
    """The largest connected part of a mask, its holes filled; an empty mask stays empty."""
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(mask), sortByObjectSize=True)
    part = sitk.Cast(parts == 1, sitk.sitkUInt8)
    voxels = sitk.GetArrayViewFromImage(part).view(np.bool_)
    hits = [np.flatnonzero(voxels.any(axis=others)) for others in ((0, 1), (0, 2), (1, 2))]  # x, y, z
    if not len(hits[0]):
        return part
    start, size = [int(each[0]) for each in hits], [int(each[-1] - each[0]) + 1 for each in hits]
    filled = sitk.BinaryFillhole(sitk.RegionOfInterest(part, size, start))  # no hole is beyond it
    return sitk.Paste(part, filled, size, destinationIndex=start)
