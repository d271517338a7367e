"""Register two scans of one person: another contrast to the T1w scan, or one visit to another. By SimpleITK.

Mutual information, rigid. Both scans stay in their own space; what is found is a matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.prep.image import itk_threads, sitk
from brainfm.prep.registration import SEED

# Of each step: voxels and smoothing in mm, and the fraction of the voxels near the brain that are looked at.
_COARSE, _MIDDLE, _FINE = (4.0, 2.0, 1.0), (2.0, 1.0, 0.5), (1.0, 0.0, 0.05)
_NEAR_MM = 12  # around the brain: skull and scalp move with it
_STEP_MM, _LEAST_STEP_MM, _STEPS = 2.0, 1e-3, 100
_BINS = 32

SETTINGS: dict[str, Any] = {
    "measure": f"mutual information, {_BINS} bins",
    "levels_mm": [level[0] for level in (_COARSE, _MIDDLE, _FINE)],
    "starts": ["as the scanner has it", "centres of mass together"],
    "seed": SEED,
}


def coregister(moving: sitk.Image, fixed: sitk.Image, brain: sitk.Image) -> NDArray[np.float64]:
    """The matrix [4, 4] from points of `fixed` to points of `moving`, RAS mm, rigid.

    It begins where the scanner says that both lie, and with the centres of mass together, and goes on from the better.
    One thread does it: the same images give the same matrix, to the bit.

    Args:
        moving: A head, or a brain with 0 around it, of any contrast.
        fixed: Another of the same person.
        brain: The fixed one's brain, 1 on its voxels and 0 elsewhere.
    """
    with itk_threads(1):  # several add up in the order in which they happen to end
        moments = sitk.CenteredTransformInitializerFilter.MOMENTS
        together = sitk.Euler3DTransform(
            sitk.CenteredTransformInitializer(fixed, moving, sitk.Euler3DTransform(), moments)
        )
        as_scanned = sitk.Euler3DTransform()
        as_scanned.SetCenter(together.GetCenter())
        ends = [_climbed(start, moving, fixed, brain, _COARSE) for start in (as_scanned, together)]
        best, _ = min(ends, key=lambda end: end[1])
        for level in (_MIDDLE, _FINE):
            best, _ = _climbed(best, moving, fixed, brain, level)
    return _matrix(best)


def _climbed(
    start: sitk.Euler3DTransform,
    moving: sitk.Image,
    fixed: sitk.Image,
    brain: sitk.Image,
    level: tuple[float, float, float],
) -> tuple[sitk.Euler3DTransform, float]:
    """The best transform near one, and its cost: the lower, the better."""
    mm, smoothing, fraction = level
    target, source = (_coarse(image, mm, smoothing) for image in (fixed, moving))
    near = sitk.Resample(brain, target, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32) > 0.5
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    radius = [max(1, round(_NEAR_MM / spacing)) for spacing in target.GetSpacing()]
    method.SetMetricFixedMask(sitk.BinaryDilate(near, radius))
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(fraction, SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(_STEP_MM, _LEAST_STEP_MM, _STEPS, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    found = sitk.Euler3DTransform(start)
    method.SetInitialTransform(found, inPlace=True)
    method.Execute(target, source)
    return found, float(method.GetMetricValue())


def _coarse(image: sitk.Image, mm: float, smoothing: float) -> sitk.Image:
    image = sitk.Cast(image, sitk.sitkFloat32)
    if smoothing:
        image = sitk.SmoothingRecursiveGaussian(image, smoothing / 2)
    factors = [max(1, round(mm / spacing)) for spacing in image.GetSpacing()]
    return sitk.Shrink(image, factors) if max(factors) > 1 else image


def _matrix(transform: sitk.Euler3DTransform) -> NDArray[np.float64]:
    """[4, 4] in RAS mm, of a transform in LPS."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    lps = np.eye(4)
    lps[:3, :3] = np.stack([np.array(transform.TransformPoint(tuple(axis))) - origin for axis in np.eye(3)], axis=1)
    lps[:3, 3] = origin
    flip = np.diag((-1.0, -1.0, 1.0, 1.0))
    ras: NDArray[np.float64] = flip @ lps @ flip
    return ras
