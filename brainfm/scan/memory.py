"""Images that others hold in memory: arrays with an affine, tensors of MONAI and TorchIO, images of SimpleITK."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError
from brainfm.files import one_line
from brainfm.scan.stored import StoredImage, check_codes, check_voxels, checked, space_code

_FROM_LPS = np.diag((-1.0, -1.0, 1.0, 1.0))


def is_tensor(image: Any) -> bool:
    """Whether an object is a tensor or image that carries its affine: MONAI's MetaTensor, TorchIO's images."""
    return hasattr(type(image), "affine") and hasattr(type(image), "numpy")  # asked of the type: TorchIO's reads a file


def is_mapping(image: Any) -> TypeGuard[Mapping[Any, Any]]:
    """Whether an object is {channel: image}. TorchIO's images are dictionaries too, of something else."""
    return isinstance(image, Mapping) and not is_tensor(image)


def is_itk(image: Any) -> bool:
    """Whether an object is an image of SimpleITK."""
    return hasattr(image, "GetDirection") and hasattr(image, "GetMetaDataKeys")


def split_channels(image: Any, count: int) -> list[Any] | None:
    """The channels of a tensor [count, x, y, z] that carries its affine; None of others."""
    if not is_tensor(image) or len(image.shape) != 4 or image.shape[0] != count:
        return None
    if hasattr(image, "detach"):
        return list(image)
    affine = _affine_of(image, "the scan tensor")
    return [(channel, affine) for channel in image.numpy()]


def file_of(image: Any) -> Path | None:
    """The file that a tensor says it was read from, where that is still there."""
    name = getattr(image, "meta", {}).get("filename_or_obj") or getattr(image, "path", None)
    try:
        return Path(name) if name and Path(name).is_file() else None
    except (TypeError, ValueError, OSError):  # several files, or no name at all
        return None


def from_pair(pair: tuple[Any, Any], what: str) -> StoredImage:
    """An array [x, y, z] and its affine to RAS millimetres."""
    try:
        array, affine = (np.asarray(item.detach().cpu() if hasattr(item, "detach") else item) for item in pair)
        affine = affine.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ScanError(
            f"the {what} is a pair, but not of an array and an affine ({one_line(error, 160)}); pass such a pair"
        ) from error
    return checked(array, affine, f"the {what} array")


def from_tensor(image: Any, what: str) -> StoredImage:
    """A tensor that carries its affine, [x, y, z] or [1, x, y, z]."""
    name = str(file_of(image) or f"the {what} tensor")
    array = np.asarray((image.detach().cpu() if hasattr(image, "detach") else image).numpy())
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    return checked(array, _affine_of(image, name), name, code=space_code(getattr(image, "meta", {})))


def _affine_of(image: Any, name: str) -> NDArray[np.float64]:
    """A tensor's affine to RAS millimetres; refused where nobody gave it one."""
    meta = getattr(image, "meta", {})
    check_codes(meta, name)
    affine = np.asarray(image.affine, dtype=np.float64)
    if affine.shape == (4, 4) and (affine == np.eye(4)).all() and file_of(image) is None:
        raise ScanError(
            f"{name}: its affine is the identity, as of a tensor that was given none, and does not say where left is; "
            "give it the scan's affine, or pass (array, affine)"
        )
    space = meta.get("space") or "RAS"  # as MONAI says where nothing is said
    space = getattr(space, "value", space)
    if space not in ("RAS", "LPS"):
        raise ScanError(f"{name}: its affine leads to the space {space!s:.50}, not RAS or LPS; convert it to RAS")
    return _FROM_LPS @ affine if space == "LPS" and affine.shape == (4, 4) else affine


def from_itk(image: Any, what: str, name: str = "") -> StoredImage:
    """An image of SimpleITK, whose world is LPS."""
    import SimpleITK as sitk

    name = name or f"the {what} image of SimpleITK"
    check_voxels(image.GetSize(), np.dtype(np.uint8), name)
    while image.GetDimension() > 3:  # each further axis is of one voxel
        image = image[..., 0]
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(f"{name}: its voxels are not grey values; convert to one number a voxel")
    keys = image.GetMetaDataKeys()
    codes = {key: image.GetMetaData(key) for key in keys if key.endswith("form_code")}
    check_codes(codes, name)
    affine = np.eye(4)
    if image.GetDimension() == 3:
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
    if (affine == np.eye(4)).all() and not keys:
        raise ScanError(
            f"{name}: its direction, spacing and origin are those of an image that was given none, and do not say "
            "where left is; set them (CopyInformation), or pass (array, affine)"
        )
    return checked(sitk.GetArrayFromImage(image).T, _FROM_LPS @ affine, name, code=space_code(codes))
