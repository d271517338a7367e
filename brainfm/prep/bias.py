"""Bias fields: the slow change of brightness that a coil leaves across a head."""

from __future__ import annotations

from typing import Any

import numpy as np

from brainfm.prep.image import sitk

# The field is smooth: voxels this far apart are enough, and more iterations fit tissue. Of a known field on the noisy
# head of benchmarks/prep.py this left in the brain as much as 4 mm and (50, 50, 30), or less, in a tenth of the time.
SHRINK_MM = 6.0
ITERATIONS = (10, 10, 10)  # at most, at each of three levels of control points
CONVERGENCE = 1e-3


def settings() -> dict[str, Any]:
    """What N4 is run with, for the record."""
    return {"voxels_mm": SHRINK_MM, "iterations": list(ITERATIONS), "convergence": CONVERGENCE}


def n4(head: sitk.Image) -> tuple[sitk.Image, sitk.Image | None]:
    """The head without its bias field, and the field, by N4 (Tustison et al. 2010) in SimpleITK.

    The field is fitted on voxels 6 mm apart and looked up there: between them it is interpolated linearly, for its
    splines bend over centimetres.

    Args:
        head: The scan, in any brightness.

    Returns:
        `(head − its minimum) · exp(−field)`, float32 on the head's voxels; and the field, the logarithm of a factor,
        float32 on voxels of about 6 mm in the same space: linear between their centres, as the nearest beyond them.
    """
    lifted = sitk.Cast(head, sitk.sitkFloat32) - float(np.min(sitk.GetArrayViewFromImage(head)))  # for logarithms
    small = sitk.Shrink(lifted, [max(1, round(SHRINK_MM / spacing)) for spacing in head.GetSpacing()])
    correction = sitk.N4BiasFieldCorrectionImageFilter()
    correction.SetMaximumNumberOfIterations(ITERATIONS)
    correction.SetConvergenceThreshold(CONVERGENCE)
    correction.Execute(small, sitk.OtsuThreshold(small, 0, 1, 200))
    field = sitk.Cast(correction.GetLogBiasFieldAsImage(small), sitk.sitkFloat32)
    return corrected(lifted, field), field


def corrected(lifted: sitk.Image, field: sitk.Image) -> sitk.Image:
    """An image whose lowest value is 0, without a field that lies on coarse voxels."""
    wide = sitk.Resample(
        field, lifted, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32, useNearestNeighborExtrapolator=True
    )
    factor = sitk.GetArrayFromImage(wide)
    np.exp(np.negative(factor, out=factor), out=factor)
    factor *= sitk.GetArrayViewFromImage(lifted)
    image = sitk.GetImageFromArray(factor)
    image.CopyInformation(lifted)
    return image


def none(head: sitk.Image) -> tuple[sitk.Image, sitk.Image | None]:
    """The head as it is, and no field."""
    return head, None
