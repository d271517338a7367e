"""An input contract as a MONAI dictionary transform."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray

from brainfm.contract import InputSpec
from brainfm.scan import ScanLike, load_scan
from brainfm.scan.load import image_of
from brainfm.transforms import InputTransform


class InputTransformd(MapTransform):  # type: ignore[misc]
    """`InputTransform` inside a MONAI `Compose`: the scan under `image_key` becomes the tensor of the contract.

    The item may hold paths, or what MONAI's `LoadImaged` makes of them, with or without a channel axis. The result is a
    `MetaTensor` with the affine of the new voxels, the original metadata (of several channels, the first one's) and,
    where the contract has one, the brain mask under `mask_key` as [1, D, H, W] uint8 on the same voxels.

    Args:
        spec: The input contract.
        image_key: Where the scan is. Of several channels each under a key of its own: {channel: key}, or the keys as a
            list in the order of the contract's channels. The images stay under these keys; one that an item lacks is
            missing.
        mask_key: Where its mask is; an item without this key is taken as skull-stripped. None leaves masks alone.
        on_mismatch: See `brainfm.load_scan`.
        output_key: Where the tensor goes; None is `image_key`, or of several keys "image".

    Raises:
        TypeError: `spec` is no input contract, or a key cannot be one.
        ValueError: The keys are not those of the contract's channels, or two of them are the same.

    Example:
        >>> spec = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec
        >>> Compose([LoadImaged(["image", "mask"]), InputTransformd(spec)])({"image": image, "mask": mask})
        >>> InputTransformd(two_channels, {"T1w": "t1", "FLAIR": "flair"})({"t1": t1, "flair": flair, "mask": mask})
    """

    def __init__(
        self,
        spec: InputSpec,
        image_key: Hashable | Mapping[str, Hashable] | Sequence[Hashable] = "image",
        mask_key: Hashable | None = "mask",
        on_mismatch: Literal["resample", "raise"] = "resample",
        output_key: Hashable | None = None,
    ) -> None:
        self.transform = InputTransform(spec, on_mismatch)
        self.channel_keys = _channel_keys(image_key, spec)
        keys = list(self.channel_keys.values()) if self.channel_keys else [image_key]
        keys += [] if mask_key is None else [mask_key]
        if len(set(keys)) != len(keys):  # a key that cannot be one is a TypeError here
            raise ValueError(f"each channel and the mask need a key of their own, not {keys}")
        super().__init__(keys, allow_missing_keys=True)
        self.image_key = image_key
        self.mask_key = mask_key
        default = "image" if self.channel_keys else image_key
        self.output_key: Any = default if output_key is None else output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with its scan and mask replaced. Raises ScanError as `brainfm.load_scan` does."""
        item = dict(data)
        image: ScanLike
        if self.channel_keys:
            image = {channel: item[key] for channel, key in self.channel_keys.items() if key in item}
        else:
            image = item[self.image_key]
        mask = item.get(self.mask_key) if self.mask_key is not None else None
        scan = load_scan(image, mask, spec=self.transform.spec, on_mismatch=self.transform.on_mismatch)
        volume = self.transform.apply(scan)
        original = image_of(image, self.transform.spec)
        item[self.output_key] = _meta_tensor(volume.image, volume.affine, original, scan.source)
        if self.mask_key is not None and volume.mask is not None:
            brain = np.ascontiguousarray(volume.mask[None], dtype=np.uint8)
            item[self.mask_key] = _meta_tensor(brain, volume.affine, mask, _name(mask) or f"{scan.source} (mask)")
        return item


def _channel_keys(image_key: Any, spec: InputSpec) -> dict[str, Hashable]:
    """The key of each channel; empty where one key holds the scan."""
    if isinstance(image_key, Mapping):
        if "any" not in spec.channels and (unknown := image_key.keys() - set(spec.channels)):
            raise ValueError(
                f"image_key names {min(unknown)!r}; the contract's channels are {', '.join(spec.channels)}"
            )
        return dict(image_key)
    if not isinstance(image_key, list | tuple):
        return {}
    if len(image_key) != len(spec.channels):
        raise ValueError(
            f"image_key has {len(image_key)} keys, and the contract takes {len(spec.channels)} channels, "
            f"{', '.join(spec.channels)}: give one key for each, or {{channel: key}}"
        )
    return dict(zip(spec.channels, image_key, strict=True))


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
