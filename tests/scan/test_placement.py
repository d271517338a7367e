"""A brain that lies where the template's does is taken; anything else is refused, whatever its header says."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy import ndimage

from brainfm import Grid, ScanError, load_scan
from brainfm.contract import Transpose

CENTRE = np.array([0.0, -18.0, 8.0])  # of the template's brain, mm
SPACING = 2.0


@pytest.fixture(scope="module")
def coarse_spec(spec):
    """The published contract at 2 mm: a quick one that leaves the voxels as they are."""
    grid = Grid((97, 115, 97), (SPACING,) * 3, spec.grid.origin)
    return replace(spec, grid=grid, operations=(Transpose((2, 1, 0)),), output_shape=None)


@pytest.fixture(scope="module")
def coarse(brain):
    """Every second voxel of the packaged brain, and their affine."""
    image, mask, affine = brain
    strided = (image * mask)[::2, ::2, ::2].astype(np.float32)
    return strided, affine @ np.diag([SPACING, SPACING, SPACING, 1])


@pytest.fixture
def load(coarse, coarse_spec):
    """A function that loads voxels as if they were the brain's."""

    def run(voxels, mask=None):
        return load_scan((voxels, coarse[1]), mask, spec=coarse_spec)

    return run


@pytest.fixture
def moved(coarse):
    """A function that moves the brain about its centre: `matrix`, then `shift` in mm along x, y, z."""

    def run(matrix=np.eye(3), shift=(0, 0, 0)):  # noqa: B008 - never changed
        voxels, affine = coarse
        world = from_matvec(matrix, CENTRE - matrix @ CENTRE + shift)
        back = np.linalg.inv(affine) @ np.linalg.inv(world) @ affine
        found = ndimage.affine_transform(voxels, back[:3, :3], back[:3, 3], order=1)
        return np.where(found > voxels[voxels > 0].min() / 2, found, 0)  # without the rim that interpolation adds

    return run


def turn(axis, degrees):
    """A turn about one world axis: 0 nods, 1 tilts the head to a shoulder, 2 turns it to a side."""
    first, second = (a for a in range(3) if a != axis)
    matrix, angle = np.eye(3), np.radians(degrees)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def along(axis, mm):
    return tuple(mm * np.eye(3)[axis])


def test_sample_is_taken(load, coarse):
    np.testing.assert_array_equal(load(coarse[0]).image[0], coarse[0])


@pytest.mark.parametrize("scale", [0.85, 0.9, 0.95, 1.05])
def test_smaller_or_larger_brain_is_taken(load, moved, scale):
    load(moved(scale * np.eye(3)))


@pytest.mark.parametrize("scales", list(product((0.85, 1.05), repeat=3)))
def test_brain_of_another_shape_is_taken(load, moved, scales):
    load(moved(np.diag(scales)))


@pytest.mark.parametrize("mm", [-5, 5])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_small_shift_is_taken(load, moved, axis, mm):
    load(moved(shift=along(axis, mm)))


@pytest.mark.parametrize("degrees", [-8, 8])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_small_turn_is_taken(load, moved, axis, degrees):
    load(moved(turn(axis, degrees)))


def test_small_brain_shifted_and_turned_a_little_is_taken(load, moved):
    load(moved(0.9 * turn(0, 6) @ turn(2, -6), shift=(3, -3, 3)))


def test_left_and_right_cannot_be_told_apart(load, moved):
    load(moved(np.diag([-1, 1, 1])))


@pytest.mark.parametrize("mm", [-15, 15])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shift_is_refused(load, moved, axis, mm):
    with pytest.raises(ScanError, match=r"its centre is \d+ mm from the template's"):
        load(moved(shift=along(axis, mm)))


@pytest.mark.parametrize("degrees", [-20, 20])
@pytest.mark.parametrize("axis", [0, 2])
def test_nod_and_turn_are_refused(load, moved, axis, degrees):
    with pytest.raises(ScanError, match=r"turned by \d+° against the template's"):
        load(moved(turn(axis, degrees)))


@pytest.mark.parametrize("degrees", [45, 60, 75, 90])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_large_turn_is_refused(load, moved, axis, degrees):
    with pytest.raises(ScanError, match=r"register it to the template|turned upside down"):
        load(moved(turn(axis, degrees)))


@pytest.mark.parametrize(
    "matrix",
    [np.diag(signs) for signs in ((1, 1, -1), (1, -1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))],
    ids=["upside down", "front to back", "both", "upside down turned", "front to back turned"],
)
def test_upside_down_or_front_to_back_is_refused(load, moved, matrix):
    with pytest.raises(ScanError, match=r"register it to the template|turned upside down"):
        load(moved(matrix))


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_swapped_axes_are_refused(load, moved, order):
    with pytest.raises(ScanError, match=r"register it to the template|turned upside down"):
        load(moved(np.eye(3)[list(order)]))


def cut(voxels, axis, low, high):
    """The voxels from `low` to `high` mm along an axis, 0 elsewhere; `low` and `high` are measured from the centre."""
    origin = np.array([-96.0, -132.0, -78.0])
    mm = origin[axis] + SPACING * np.arange(voxels.shape[axis]) - CENTRE[axis]
    keep = (mm >= low) & (mm <= high)
    return voxels * np.expand_dims(keep, [a for a in range(3) if a != axis])


@pytest.mark.parametrize("half", [(-200, 0), (0, 200)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_a_brain_is_refused(load, coarse, axis, half):
    with pytest.raises(ScanError, match=r"brain does not lie|litres of brain"):
        load(cut(coarse[0], axis, *half))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slab_is_refused(load, coarse, axis):
    with pytest.raises(ScanError, match=r"brain does not lie|litres of brain"):
        load(cut(coarse[0], axis, -15, 15))


@pytest.mark.parametrize("scale", [0.4, 0.6, 0.7])
def test_brain_of_a_small_animal_is_refused(load, moved, scale):
    with pytest.raises(ScanError, match=r"brain does not lie|litres of brain"):
        load(moved(scale * np.eye(3)))


def with_scalp(voxels):
    """The brain in a dark skull and a bright scalp 12 mm thick."""
    mm = np.stack(np.indices(voxels.shape), axis=-1) * SPACING + (-96.0, -132.0, -78.0) - CENTRE

    def ellipsoid(*radii):
        return (np.square(mm / radii).sum(axis=-1) <= 1) & (voxels == 0)

    inner, outer = ellipsoid(80, 98, 88), ellipsoid(92, 110, 100)
    return np.where(outer & ~inner, 240, voxels).astype(np.float32)


def test_whole_head_is_refused_without_its_brain_mask(load, coarse):
    with pytest.raises(ScanError, match=r"not skull-stripped.*pass mask="):
        load(with_scalp(coarse[0]))


def test_whole_head_is_taken_with_its_brain_mask(load, coarse):
    load(with_scalp(coarse[0]), coarse[0] > 0)


def test_background_of_another_value_is_refused_without_a_mask(load, coarse):
    with pytest.raises(ScanError, match=r"background is not 0.*pass mask="):
        load(coarse[0] - 1000)


def test_background_of_another_value_is_taken_with_a_mask(load, coarse):
    load(coarse[0] - 1000, coarse[0] > 0)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_inverted_contrast_is_refused(load, coarse, scale):
    voxels = coarse[0]
    with pytest.raises(ScanError, match=r"do not follow a T1w image.*use the T1w scan"):
        load(np.where(voxels > 0, (voxels.max() + 10 - voxels) * scale, 0))


def test_noise_in_the_shape_of_a_brain_is_refused(load, coarse):
    random = np.random.default_rng(0).uniform(1, 255, coarse[0].shape).astype(np.float32)
    with pytest.raises(ScanError, match="do not follow a T1w image"):
        load(random * (coarse[0] > 0))


@pytest.mark.parametrize("contrast", ["noise", "inverted"])
def test_wrong_contrast_is_refused_on_a_finer_grid_too(coarse, small_spec, contrast):
    """Averaging darkens the brain's rim, as it is dark in the template: that alone is no likeness."""
    voxels, affine = coarse
    other = np.random.default_rng(0).uniform(1, 255, voxels.shape) if contrast == "noise" else 5000 - voxels
    with pytest.raises(ScanError, match="do not follow a T1w image"):
        load_scan((np.where(voxels > 0, other, 0), affine), spec=small_spec)


def test_other_representations_are_not_judged_as_t1w(coarse, coarse_spec):
    voxels, affine = coarse
    spec = replace(coarse_spec, representation="T2w")
    load_scan((np.where(voxels > 0, 260 - voxels, 0), affine), spec=spec)
