"""The MNI152 templates that a prepared scan can be brought to: their grids at 1 mm, and the matrices between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.spec import Grid


@dataclass(frozen=True, eq=False)
class Space:
    """A template.

    Attributes:
        grid: Its own at 1 mm, axes RAS.
        to_2009c: [4, 4] from its points to those of MNI152 2009c, RAS mm.
        note: What is not exact about that, or empty.
    """

    grid: Grid
    to_2009c: NDArray[np.float64]
    note: str = ""


MNI152_2009C = Space(Grid((193, 229, 193), (1.0, 1.0, 1.0), (-96.0, -132.0, -78.0)), np.eye(4))

# Fitted by SimpleITK (affine, Mattes mutual information of the whole heads, FSL's MNI152_T1_2mm to the 2009a head). It
# moves the brain by 1.3 mm on average, 2.4 at most.
FSL_MNI152 = Space(
    Grid((182, 218, 182), (1.0, 1.0, 1.0), (-91.0, -126.0, -72.0)),
    np.array(
        [
            [1.01303, 0.00029, -0.00079, -0.54005],
            [-0.01575, 1.01170, 0.00852, 0.35138],
            [0.00046, -0.01213, 1.02396, -0.20205],
            [0.0, 0.0, 0.0, 1.0],
        ]
    ),
    "to MNI152 2009c and from there by one matrix to FSL's MNI152, which leaves about a millimetre",
)


def space_of(name: str) -> Space:
    """The template that a contract's `space` of MNI152 means; of "MNI152NLin6…" it is FSL's, else 2009's."""
    return FSL_MNI152 if name.startswith("MNI152NLin6") else MNI152_2009C
