"""Operations that make channels of other channels, by filters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.operation import Operation, register_operation
from brainfm.contract.volume import Volume
from brainfm.errors import MissingExtraError

Filter = Literal["median", "unsharp", "sobel"]
_WORDS = {"median": "its median of 3×3×3, scaled", "unsharp": "unsharp-masked", "sobel": "its edges by Sobel, scaled"}


@register_operation
@dataclass(frozen=True)
class AddFiltered(Operation):
    """Add channels that are made of the first, which lies in 0…1 (un-CNN's way). Needs SciPy ([eval]).

    Attributes:
        filters: One a channel. "median": of 3×3×3 voxels, scaled to 0…1. "unsharp": the image and what it differs by
            from itself blurred (Gaussian, σ of 1 voxel), clipped to 0…1. "sobel": the length of the Sobel gradient,
            scaled to 0…1. All reflect the image at its edges; what is constant is scaled to 0.
    """

    filters: tuple[Filter, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.filters:
            raise ValueError("AddFiltered: filters names none")

    def __call__(self, volume: Volume) -> Volume:
        try:
            from scipy import ndimage
        except ModuleNotFoundError as error:
            raise MissingExtraError("scipy", "eval") from error
        image = volume.image
        added = [_filtered(image[0], name, ndimage) for name in self.filters]
        return replace(volume, stored=np.stack([*image, *added]), slope=1.0, inter=0.0)

    def __str__(self) -> str:
        return "add to the image, as channels: " + ", ".join(_WORDS[name] for name in self.filters)


def _filtered(image: NDArray[np.float32], name: Filter, ndimage: Any) -> NDArray[np.float32]:
    if name == "unsharp":
        sharp: NDArray[np.float32] = np.clip(image + (image - ndimage.gaussian_filter(image, sigma=1.0)), 0, 1)
        return sharp
    if name == "median":
        return _scaled(ndimage.median_filter(image, size=3))
    edges = [ndimage.sobel(image, axis=axis) for axis in range(3)]
    return _scaled(np.sqrt(edges[0] ** 2 + edges[1] ** 2 + edges[2] ** 2))


def _scaled(image: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high - low > 1e-8 else np.zeros_like(image)
