"""White matter as the unit of brightness (WhiteStripe, Shinohara et al. 2014)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BINS = 200
_WIDTH = 0.05  # of the brain's voxels on each side of the peak, by rank


def white_peak(values: NDArray[np.floating]) -> float:
    """The brightness of white matter: the last large peak of a T1w brain's smoothed histogram."""
    low, high = np.percentile(values, (1, 99))
    if high <= low:
        return float(high)
    counts, edges = np.histogram(values, bins=_BINS, range=(float(low), float(high)))
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / 4.0) ** 2)
    smooth = np.convolve(counts, kernel / kernel.sum(), mode="same")
    inner = smooth[1:-1]
    peaks = np.flatnonzero((inner >= smooth[:-2]) & (inner > smooth[2:])) + 1
    large = peaks[smooth[peaks] >= 0.3 * smooth.max()]
    peak = int(large[-1]) if len(large) else int(smooth.argmax())
    return float((edges[peak] + edges[peak + 1]) / 2)


def white_stripe(image: NDArray[np.float32], brain: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The image with white matter at 0 and its std as 1.

    What is outside the brain is set to 0 first and then shifted with all the rest, as TurboPrep's scans have it: a
    negative constant. The std is that of the voxels whose rank is at most 5 % of the brain's from the peak's.
    """
    values = image[brain]
    peak = white_peak(values)
    rank = float((values < peak).mean())
    low, high = np.quantile(values, (max(0.0, rank - _WIDTH), min(1.0, rank + _WIDTH)))
    stripe = values[(values >= low) & (values <= high)]
    std = float(stripe.std()) or 1.0
    shifted: NDArray[np.float32] = (image * brain - np.float32(stripe.mean())) / np.float32(std)
    return shifted
