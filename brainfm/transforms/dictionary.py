"""An input contract as a MONAI dictionary transform."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray

from brainfm.contract import InputSpec
from brainfm.scan import load_scan
from brainfm.transforms import InputTransform


class InputTransformd(MapTransform):  # type: ignore[misc]
    """`InputTransform` inside a MONAI `Compose`: the scan under `image_key` becomes the tensor of the contract.

    The item may hold paths, or what MONAI's `LoadImaged` makes of them, with or without a channel axis. The result is a
    `MetaTensor` with the affine of the new voxels, the original metadata and, where the contract has one, the brain
    mask under `mask_key` as [1, D, H, W] uint8 on the same voxels.

    Args:
        spec: The input contract.
        image_key: Where the scan is.
        mask_key: Where its mask is; an item without this key is taken as skull-stripped. None leaves masks alone.
        on_mismatch: See `brainfm.load_scan`.

    Example:
        >>> spec = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec
        >>> Compose([LoadImaged(["image", "mask"]), InputTransformd(spec)])({"image": image, "mask": mask})
    """

    def __init__(
        self,
        spec: InputSpec,
        image_key: Hashable = "image",
        mask_key: Hashable | None = "mask",
        on_mismatch: Literal["resample", "raise"] = "resample",
    ) -> None:
        super().__init__(image_key if mask_key is None else (image_key, mask_key), allow_missing_keys=True)
        self.transform = InputTransform(spec, on_mismatch)
        self.image_key = image_key
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with its scan and mask replaced. Raises ScanError as `brainfm.load_scan` does."""
        item = dict(data)
        image = item[self.image_key]
        mask = item.get(self.mask_key) if self.mask_key is not None else None
        scan = load_scan(image, mask, spec=self.transform.spec, on_mismatch=self.transform.on_mismatch)
        volume = self.transform.apply(scan)
        item[self.image_key] = _meta_tensor(volume.image, volume.affine, image, scan.source)
        if self.mask_key is not None and volume.mask is not None:
            brain = np.ascontiguousarray(volume.mask[None], dtype=np.uint8)
            item[self.mask_key] = _meta_tensor(brain, volume.affine, mask, _name(mask) or f"{scan.source} (mask)")
        return item


def _meta_tensor(voxels: NDArray[Any], affine: NDArray[np.float64], original: Any, name: str) -> MetaTensor:
    """New voxels with their own affine, and the metadata of the image they came from."""
    meta = {key: value for key, value in getattr(original, "meta", {}).items() if key != "affine"}
    writable = voxels if voxels.flags.writeable else voxels.copy()
    meta["filename_or_obj"] = name
    return MetaTensor(torch.from_numpy(writable), affine=torch.from_numpy(affine.copy()), meta=meta)


def _name(image: Any) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return str(getattr(image, "meta", {}).get("filename_or_obj", ""))
