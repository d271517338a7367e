"""The augmentation of the paper's supervised baselines and of MAE fine-tuning, on MONAI's random transforms."""

from __future__ import annotations

import torch
from monai import transforms as monai
from torch import Tensor

from brainfm.contract import InputSpec
from brainfm.transforms import checked_spec

_PUBLISHED = (150, 192, 192)


class SupervisedAugmentation:
    """Random crop, flip, affine, shift and noise of Kaczmarek et al. 2025, for the tensors of a contract.

    Crop to at least 60 % of each axis (90×115×115 of 150×192×192) and resize back; flip left–right, p=0.5; affine with
    rotations to ±0.1 rad, scales to ±15 % and shifts to ±5 voxels (in proportion on another grid), p=0.7; intensity
    shift to ±0.1, p=0.5; Gaussian noise of 0.1, p=0.2.

    Every call takes its randomness from torch's generator, so that `torch.manual_seed` repeats it, and the worker
    processes of a DataLoader, which torch seeds apart, draw different views.

    Args:
        spec: A contract with a fixed output shape, whose last axis runs left–right.

    Raises:
        TypeError: `spec` is no input contract.
        ValueError: The contract's output shape depends on the scan.
    """

    def __init__(self, spec: InputSpec) -> None:
        spec = checked_spec(spec)
        if spec.output_shape is None:
            raise ValueError("this augmentation needs an input contract with a fixed output shape")
        shape = spec.output_shape[1:]
        smallest = [max(1, round(n * m / k)) for n, m, k in zip(shape, (90, 115, 115), _PUBLISHED, strict=True)]
        self._augment = monai.Compose(
            [
                monai.RandSpatialCrop(smallest, max_roi_size=shape, random_size=True),
                monai.Resize(shape, mode="trilinear"),
                monai.RandFlip(prob=0.5, spatial_axis=2),
                monai.RandAffine(
                    prob=0.7,
                    rotate_range=[0.1] * 3,
                    scale_range=[0.15] * 3,
                    translate_range=[5 * n / whole for n, whole in zip(shape, _PUBLISHED, strict=True)],
                    mode="bilinear",
                    padding_mode="border",
                ),
                monai.RandShiftIntensity(0.1, prob=0.5),
                monai.RandGaussianNoise(prob=0.2, std=0.1),
                monai.EnsureType(track_meta=False),
            ]
        )

    def __call__(self, tensor: Tensor) -> Tensor:
        """[C, D, H, W] → another view of the same shape."""
        self._augment.set_random_state(seed=int(torch.randint(2**31, ())))
        view: Tensor = self._augment(tensor)
        return view
