"""Outlines as every picture here draws them: told apart by the colour-blind, and in greyscale by their dashes.

The colours are yellow and sky blue of Okabe & Ito's palette (https://jfly.uni-koeln.de/color).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK_COLOUR, TEMPLATE_COLOUR = (240, 228, 66), (86, 180, 233)

_DASH = 4  # pixels


def edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a mask [rows, columns] that have a neighbour outside it."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    return mask & ~inner


def dashed(line: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A line [rows, columns] with gaps as long as its dashes."""
    shown: NDArray[np.bool_] = line & (np.indices(line.shape).sum(axis=0) // _DASH % 2 == 0)
    return shown
