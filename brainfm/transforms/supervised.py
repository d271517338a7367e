"""The augmentation of the paper's supervised baselines and of MAE fine-tuning, on MONAI's random transforms.

The paper (Kaczmarek et al. 2025, arXiv 2509.10620, downstream evaluation) states which transforms and their ranges; no
code of it was released. What it does not state is marked.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from monai import transforms as monai
from torch import Tensor

from brainfm.contract import InputSpec, Volume
from brainfm.contract.volume import with_image
from brainfm.scan import Scan
from brainfm.transforms import InputTransform, checked_spec

_PUBLISHED = (150, 192, 192)
_INTENSITIES = "brainfm.contract.intensity"


class SupervisedAugmentation:
    """Random crop, flip, affine, shift and noise, of an image as it is stored and of its brain mask.

    Crop to at least 60 % of each axis (90×115×115 of 150×192×192) and resize back; flip left–right, p=0.5; affine with
    rotations to ±0.1 rad, scales to ±15 % and shifts to ±5 voxels (in proportion on another grid), p=0.7; intensity
    shift to ±0.1, p=0.5; Gaussian noise of 0.1, p=0.2. The mask moves with the geometry, to the nearest voxel.

    The paper is silent on two things. What an affine moves in from outside: here the border's voxels go on, as in the
    rotation of the released SimCLR code (MONAI's own default for an affine is to reflect). The law of the noise: here
    MONAI's, which draws the std of each scan's noise from U(0, 0.1).

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
        both = {"keys": ["image", "mask"], "allow_missing_keys": True}
        self._augment = monai.Compose(
            [
                monai.RandSpatialCropd(roi_size=smallest, max_roi_size=shape, random_size=True, **both),
                monai.Resized(spatial_size=shape, mode=["trilinear", "nearest"], **both),
                monai.RandFlipd(prob=0.5, spatial_axis=2, **both),
                monai.RandAffined(
                    prob=0.7,
                    rotate_range=[0.1] * 3,
                    scale_range=[0.15] * 3,
                    translate_range=[5 * n / whole for n, whole in zip(shape, _PUBLISHED, strict=True)],
                    mode=["bilinear", "nearest"],
                    padding_mode="border",
                    **both,
                ),
                monai.RandShiftIntensityd("image", 0.1, prob=0.5),
                monai.RandGaussianNoised("image", prob=0.2, std=0.1, sample_std=True),
                monai.EnsureTyped(track_meta=False, **both),
            ]
        )

    def __call__(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Another view of an image [C, D, H, W] and its mask [D, H, W] bool, of the same shapes.

        A channel that is 0 all over, as a missing one is, stays so.
        """
        self._augment.set_random_state(seed=int(torch.randint(2**31, ())))
        item = {"image": image} if mask is None else {"image": image, "mask": mask[None].float()}
        view = self._augment(item)
        missing = ~image.flatten(1).any(dim=1)
        return view["image"].masked_fill(missing[:, None, None, None], 0), view["mask"][
            0
        ] > 0.5 if "mask" in view else None


class SupervisedTransform(InputTransform):
    """Scan → an augmented view of the tensor that a contract's weights expect.

    The order is that of the released SimCLR code: what comes before the contract's last intensity steps (for its models
    reorientation and crop), then `SupervisedAugmentation` of the image as it is stored, what lies outside the brain
    too, and the intensity steps (the z-score inside the mask, which sets the outside to 0) at the end. The affine of
    `volume` is the scan's, and not that of the view.

    Args:
        spec: As of `SupervisedAugmentation`, which says what is raised.
    """

    def __init__(self, spec: InputSpec) -> None:
        super().__init__(spec)
        self.augmentation = SupervisedAugmentation(spec)
        steps = spec.operations
        last = len(steps)
        while last and type(steps[last - 1]).__module__ == _INTENSITIES:
            last -= 1
        self._before, self._after = (replace(spec, operations=part) for part in (steps[:last], steps[last:]))

    def steps(self, scan: Scan) -> Volume:
        """The contract's operations, with the augmentation in its place."""
        volume = self._before.apply(scan)
        mask = None if volume.mask is None else torch.tensor(volume.mask)
        image, mask = self.augmentation(torch.tensor(volume.image), mask)
        moved = with_image(volume, image.numpy())
        return self._after.apply(replace(moved, mask=None if mask is None else mask.numpy()))
