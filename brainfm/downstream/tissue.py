"""Fluid, grey and white matter of a T1w brain by its intensities alone, and tissue of it turned into fluid."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import MissingExtraError, ScanError

try:
    from scipy import ndimage, optimize
    from sklearn.mixture import GaussianMixture
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "scikit-learn", "eval") from error

Image: TypeAlias = NDArray[np.float32]  # [i, j, k] real intensities
Mask: TypeAlias = NDArray[np.bool_]  # [i, j, k], True in the brain

CLASSES = ("CSF", "grey matter", "white matter")
_STARTS = (5.0, 40.0, 85.0)  # percentiles of the brain's intensities at which the classes' means begin (ours)
_VOXELS = 5_000  # that a mixture is fitted to: its means are sure to about a per cent
_BLUR_MM = 4.0  # of the map of fluid: how far from it tissue is near to it (ours)


def tissues(image: Image, mask: Mask) -> NDArray[np.float32]:
    """[3, i, j, k] fractions of `CLASSES` in a T1w brain, 0 outside the mask: a mixture of three Gaussians.

    It knows intensities and no anatomy: good for planting a change and for tasks that are said to be of it, not for
    volumes of patients.

    Raises:
        ScanError: The brain has fewer than three intensities.
    """
    values = image[mask].astype(np.float64)[:, None]
    means = np.percentile(values, _STARTS)[:, None]
    if len(np.unique(means)) < len(CLASSES):
        raise ScanError("the brain has no three intensities: is it a T1w scan in its mask?")
    # One variance for all: noise is the same everywhere, and a class is then the likelier the nearer its mean is.
    mixture = GaussianMixture(len(CLASSES), covariance_type="tied", means_init=means, random_state=0, tol=1e-4)
    mixture.fit(values[:: max(1, len(values) // _VOXELS)])
    order = np.argsort(mixture.means_[:, 0])
    chances = mixture.predict_proba(values)
    found = np.zeros((len(CLASSES), *mask.shape), dtype=np.float32)
    found[:, mask] = chances[:, order].T
    return found


def lose(image: Image, fractions: NDArray[np.float32], nearness: NDArray[Any], edge: float, voxels: float) -> Image:
    """The image with tissue turned into fluid where `nearness` is highest, until so much of it is lost.

    What is lost at a smaller volume is lost at a larger one too.

    Args:
        image: [i, j, k] T1w intensities.
        fractions: Of `tissues`.
        nearness: [i, j, k]; the highest first.
        edge: Over how much of it tissue becomes fluid.
        voxels: How many voxels of tissue are lost; all of them where it has fewer.
    """
    csf, grey, white = fractions
    tissue = grey + white
    fluid = np.float32(np.average(image, weights=csf))

    def lost(level: float) -> NDArray[np.float32]:
        part: NDArray[np.float32] = tissue * np.clip((nearness - level) / edge + 0.5, 0, 1, dtype=np.float32)
        return part

    low, high = float(nearness[tissue > 0].min()) - edge, float(nearness[tissue > 0].max()) + edge
    if lost(low).sum(dtype=np.float64) <= voxels:
        gone = lost(low)
    else:
        gone = lost(optimize.brentq(lambda level: lost(level).sum(dtype=np.float64) - voxels, low, high, rtol=1e-6))
    changed: Image = image + gone * (fluid - image)
    return changed


def near_fluid(fractions: NDArray[np.float32], spacing: NDArray[np.float64]) -> NDArray[np.float32]:
    """[i, j, k]: how much of what is about a voxel is fluid, or lies outside the brain."""
    tissue = fractions[1] + fractions[2]
    near: NDArray[np.float32] = 1 - ndimage.gaussian_filter(tissue, _BLUR_MM / spacing)
    return near
