"""The picture of a preparation: nine slices with the mask's outline, to be judged at a glance.

What surrounds the brain is shown for a finger's breadth only: enough to see whether the skull is off, too little for a
face.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainfm.files import atomic_path
from brainfm.picture import MASK_COLOUR, TEMPLATE_COLOUR, dashed, edge
from brainfm.prep.image import sitk, template, to_array
from brainfm.prep.quality import Prepared

SHOWN_MM = 8  # around the brain
_SLICES_MM = {2: (-30, 5, 40), 1: (-60, -20, 25), 0: (-35, 2, 35)}  # RAS: axial, coronal, sagittal


def draw(prepared: Prepared, path: Path) -> None:
    """Write a PNG: axial, coronal and sagittal slices, a row each.

    The mask's outline is yellow, that of the template's brain blue and dashed. Left is on the left, front and
    top are up.
    """
    from PIL import Image

    brain = prepared.brain
    usual = to_array(template()) > 0
    near = _around(brain | usual)
    low, high = np.percentile(prepared.image[brain], (1, 99.5))
    origin = np.array((-96, -132, -78))
    rows = []
    for axis, places in _SLICES_MM.items():
        panels = []
        for place in places:
            n = int(place - origin[axis])
            volumes = (prepared.image, near, brain, usual)
            image, shown, *outlined = (np.moveaxis(volume, axis, 0)[n].T[::-1] for volume in volumes)
            grey = np.clip((image - low) / max(float(high - low), 1e-9), 0, 1) * shown
            panels.append(_panel(grey, *outlined))
        rows.append(np.concatenate(panels, axis=1))
    width = max(row.shape[1] for row in rows)
    picture = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
    with atomic_path(path) as temporary:
        Image.fromarray(picture).quantize(64).save(temporary, format="PNG", optimize=True)


def _around(brain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The brain and what lies within `SHOWN_MM` of it, to a voxel: it is looked for on every other one."""
    coarse = sitk.GetImageFromArray(np.ascontiguousarray(brain[::2, ::2, ::2]).astype(np.uint8))
    grown = sitk.GetArrayFromImage(sitk.BinaryDilate(coarse, [SHOWN_MM // 2] * 3)) > 0
    for axis, size in enumerate(brain.shape):
        grown = grown.repeat(2, axis).take(range(size), axis)
    return np.asarray(grown)


def _panel(grey: NDArray[np.float32], brain: NDArray[np.bool_], usual: NDArray[np.bool_]) -> NDArray[np.uint8]:
    rgb = np.repeat((grey * 255).astype(np.uint8)[..., None], 3, axis=2)
    rgb[dashed(edge(usual))] = TEMPLATE_COLOUR
    rgb[edge(brain)] = MASK_COLOUR
    return np.pad(rgb, ((2, 2), (2, 2), (0, 0)))
