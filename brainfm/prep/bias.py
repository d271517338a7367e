"""Bias fields: the slow change of brightness that a coil leaves across a head."""

from __future__ import annotations

import numpy as np

from brainfm.prep.image import sitk

SHRINK_MM = 4.0  # the field is smooth: it is fitted on voxels of about this size
ITERATIONS = (50, 50, 30)  # at each of three levels of control points


def n4(head: sitk.Image) -> sitk.Image:
    """The head without its bias field, by N4 (Tustison et al. 2010) in SimpleITK, fitted on voxels of about 4 mm."""
    shrink = [max(1, round(SHRINK_MM / spacing)) for spacing in head.GetSpacing()]
    lifted = head - float(np.min(sitk.GetArrayViewFromImage(head)))  # logarithms want no negative values
    small = sitk.Shrink(lifted, shrink)
    inside = sitk.OtsuThreshold(small, 0, 1, 200)
    correction = sitk.N4BiasFieldCorrectionImageFilter()
    correction.SetMaximumNumberOfIterations(ITERATIONS)
    correction.SetConvergenceThreshold(1e-3)
    correction.Execute(small, inside)
    return lifted * sitk.Exp(-1.0 * sitk.Cast(correction.GetLogBiasFieldAsImage(lifted), sitk.sitkFloat32))


def none(head: sitk.Image) -> sitk.Image:
    """The head as it is."""
    return head
