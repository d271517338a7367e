"""An input contract as a MONAI dictionary transform."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from brainfm.pretrained import InputSpec
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
        spec = self.transform.spec
        scan = load_scan(image, mask, spec=spec, on_mismatch=self.transform.on_mismatch)
        volume = spec.apply(scan)
        meta = dict(getattr(image, "meta", {})) | {"filename_or_obj": scan.source}
        meta.pop("affine", None)
        affine = torch.from_numpy(volume.affine)
        item[self.image_key] = MetaTensor(torch.from_numpy(volume.image), affine=affine, meta=meta)
        if self.mask_key is not None and volume.mask is not None:
            brain = torch.from_numpy(volume.mask[None].astype("uint8"))
            item[self.mask_key] = MetaTensor(brain, affine=affine, meta=meta)
        return item
