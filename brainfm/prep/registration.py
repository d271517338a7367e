"""Registration of a brain to the template by SimpleITK: rigid, as the released weights want it, or affine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Literal, TypeAlias

import numpy as np

from brainfm.errors import ScanError
from brainfm.prep.image import sitk, template

TransformType: TypeAlias = Literal["rigid", "affine"]

STARTS_DEG = (-25.0, 0.0, 25.0)  # about each axis, from the centres of mass
LEVELS = ((4, 2.0, 1.0), (2, 1.0, 0.5), (1, 0.5, 0.1))  # voxels a step, smoothing in mm, fraction of voxels looked at
MOST_STRETCH = 1.5  # of a head against the template, either way
SEED = 1  # of where between the voxels the image is looked at
_COARSE_MM = 6.0
_KEPT_STARTS = 3


@contextmanager
def _one_thread() -> Iterator[None]:
    """All of ITK on one thread: a registration's own setting does not reach its metric's filters."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


@_one_thread()
def register(brain: sitk.Image, transform_type: TransformType = "rigid") -> sitk.AffineTransform:
    """The transform from points of the template to points of the scan.

    The similarity is mutual information, which no change of brightness misleads. On voxels of 6 mm every one of 27
    rotations about the centre of mass is looked at, and the best three are followed; the best of these goes on to 4, 2
    and 1 mm. Only voxels in and near the template's brain count. The same brain gives the same transform, to the bit:
    the seed is fixed, and one thread does it, for several add up in the order in which they happen to end.

    Args:
        brain: The scan, 0 outside the brain.
        transform_type: Six degrees of freedom, or twelve.

    Raises:
        ScanError: The affine one would stretch the brain beyond what heads differ by.
    """
    fixed = template()
    near = sitk.BinaryDilate(sitk.Cast(fixed > 0, sitk.sitkUInt8), [5, 5, 5])
    transform: sitk.Transform = _best_start(fixed, near, brain)
    transform = _optimise(fixed, near, brain, transform)
    if transform_type == "affine":
        loose = sitk.AffineTransform(3)
        loose.SetCenter(transform.GetCenter())
        loose.SetMatrix(transform.GetMatrix())
        loose.SetTranslation(transform.GetTranslation())
        # In larger steps it can shrink the brain to nothing.
        transform = _optimise(fixed, near, brain, loose, step_mm=0.25)
    found = as_affine(transform)
    sizes = np.linalg.svd(np.reshape(found.GetMatrix(), (3, 3)), compute_uv=False)
    if sizes.min() < 1 / MOST_STRETCH or sizes.max() > MOST_STRETCH:
        raise ScanError(
            f"the affine registration went astray (it would stretch the brain by {sizes.min():.2f} to "
            f"{sizes.max():.2f}); use the rigid one"
        )
    return found


def as_affine(transform: sitk.Transform) -> sitk.AffineTransform:
    """A rigid or affine transform as a plain affine one about the origin."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.stack([np.array(transform.TransformPoint(tuple(axis))) - origin for axis in np.eye(3)], axis=1)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(matrix.ravel().tolist())
    affine.SetTranslation(origin.tolist())
    return affine


def _best_start(fixed: sitk.Image, near: sitk.Image, brain: sitk.Image) -> sitk.Euler3DTransform:
    coarse_fixed, coarse_near, coarse = (_coarse(image) for image in (fixed, near, brain))
    coarse_near = sitk.Cast(coarse_near > 0.5, sitk.sitkUInt8)
    centred = sitk.CenteredTransformInitializer(
        coarse_fixed, coarse, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    starts = []
    for angles in product(np.radians(STARTS_DEG), repeat=3):
        start = sitk.Euler3DTransform(centred)
        start.SetRotation(*(float(angle) for angle in angles))
        starts.append((_method(coarse_near, start).MetricEvaluate(coarse_fixed, coarse), start))
    starts.sort(key=lambda pair: pair[0])
    ends = []
    for _, start in starts[:_KEPT_STARTS]:
        method = _method(coarse_near, start)
        method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-2, 60, relaxationFactor=0.6)
        method.SetOptimizerScalesFromPhysicalShift()
        method.Execute(coarse_fixed, coarse)
        ends.append((method.GetMetricValue(), start))
    return min(ends, key=lambda pair: pair[0])[1]


def _optimise(
    fixed: sitk.Image, near: sitk.Image, brain: sitk.Image, transform: sitk.Transform, step_mm: float = 1.0
) -> sitk.Transform:
    shrink, sigmas, fractions = zip(*LEVELS, strict=True)
    method = _method(near, transform)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel(fractions, SEED)
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel(sigmas)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(step_mm, 1e-3, 100, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.Execute(fixed, brain)
    return transform


def _method(near: sitk.Image, transform: sitk.Transform) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricFixedMask(near)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform, inPlace=True)
    return method


def _coarse(image: sitk.Image) -> sitk.Image:
    """The image smoothed and averaged to voxels of about 6 mm."""
    smooth = sitk.SmoothingRecursiveGaussian(sitk.Cast(image, sitk.sitkFloat32), _COARSE_MM / 2)
    return sitk.Shrink(smooth, [max(1, round(_COARSE_MM / spacing)) for spacing in image.GetSpacing()])
