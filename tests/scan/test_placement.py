"""A brain that lies where the template's does is taken; anything else is refused, whatever its header says."""

from dataclasses import replace
from itertools import product

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from published_contracts import SYNTHBA
from scipy import ndimage

from brainfm import ScanError, load_scan

CENTRE = np.array([0.0, -18.0, 8.0])  # of the template's brain, mm


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


@pytest.mark.parametrize(("mm", "off"), [(4, 2), (5, 0), (6, 3), (8, 4)])
def test_brain_in_its_place_is_taken_on_coarse_grids_wherever_their_voxels_lie(mm, off, coarse, coarse_spec):
    grid = coarse_spec.grid
    shape = tuple(round(n * 4 / mm) + 1 for n in grid.shape)
    grid = replace(grid, shape=shape, spacing=(mm,) * 3, origin=tuple(start - off for start in grid.origin))
    load_scan(coarse, spec=replace(coarse_spec, grid=grid))


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


@pytest.mark.parametrize("degrees", [-5, 5])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_small_turn_is_taken(load, moved, axis, degrees):
    load(moved(turn(axis, degrees)))


def test_small_brain_shifted_and_turned_a_little_is_taken(load, moved):
    load(moved(0.9 * turn(0, 4) @ turn(2, -4), shift=(2, -2, 2)))


def test_left_and_right_cannot_be_told_apart(load, moved):
    load(moved(np.diag([-1, 1, 1])))


@pytest.mark.parametrize("mm", [-15, 15])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shift_is_refused(load, moved, axis, mm):
    with pytest.raises(ScanError, match=r"its centre is \d+ mm from the template's"):
        load(moved(shift=along(axis, mm)))


@pytest.mark.parametrize("degrees", [-20, 9, 20])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nod_roll_and_turn_are_refused(load, moved, axis, degrees):
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
    mm = origin[axis] + 2.0 * np.arange(voxels.shape[axis]) - CENTRE[axis]
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


def test_whole_head_is_refused_without_its_brain_mask(load, head):
    with pytest.raises(ScanError, match=r"not skull-stripped.*pass mask="):
        load(head)


def test_whole_head_is_taken_with_its_brain_mask(load, head, coarse):
    load(head, coarse[0] > 0)


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


# --- What the header says of its space ------------------------------------------------------------


@pytest.fixture
def coded(saved, coarse_spec):
    """A function that loads voxels from a file whose sform has a code."""

    def run(voxels, code):
        path = saved(voxels)
        image = nib.load(path)
        image.set_sform(image.affine, code)
        image.set_qform(image.affine, 0)
        nib.Nifti1Image(voxels, None, image.header).to_filename(path)
        return load_scan(path, spec=coarse_spec)

    return run


@pytest.mark.parametrize("code", [1, 2, 4])
def test_brain_in_its_place_is_taken_whatever_space_its_header_names(coded, coarse, code):
    coded(coarse[0], code)


@pytest.mark.parametrize(("code", "cause"), [(1, "scanner's own space"), (2, "space of another image")])
@pytest.mark.parametrize(("matrix", "shift"), [(turn(0, 5), (0, 0, 0)), (np.eye(3), (0, 3, 4))])
def test_doubtful_place_is_decided_by_the_headers_space(coded, moved, matrix, shift, code, cause):
    brain = moved(matrix, shift)
    coded(brain, 4)
    with pytest.raises(
        ScanError, match=rf"does not lie where the template's does.*{cause} \(code {code}\).*brainfm prep"
    ):
        coded(brain, code)


def test_talairach_header_is_refused_for_mni152(coded, coarse, moved):
    with pytest.raises(ScanError, match=r"Talairach space \(code 3\).*differs from MNI152.*brainfm prep"):
        coded(coarse[0], 3)
    with pytest.raises(ScanError, match=r"turned by \d+°.*Talairach space \(code 3\).*brainfm prep"):
        coded(moved(turn(0, 9)), 3)


# From MNI152 (FSL's) to Talairach space, by Lancaster et al. 2007.
TALAIRACH = [[0.9464, 0.0034, -0.0026, -1.068], [-0.0083, 0.9479, -0.058, 1.0239], [0.0053, 0.0617, 0.901, 3.1883]]


@pytest.mark.parametrize("change", [np.eye(3), np.diag([1.03, 0.98, 1.02]), np.diag([0.97, 1.02, 0.99]), turn(0, 1)])
def test_brain_in_talairach_space_is_refused_where_no_header_says_mni152(coded, load, moved, change):
    matrix, shift = np.array(TALAIRACH)[:, :3], np.array(TALAIRACH)[:, 3]
    brain = moved(change @ matrix, shift + matrix @ CENTRE - CENTRE)
    for code in (1, 2):
        with pytest.raises(ScanError, match=r"Talairach|does not lie where the template's does.*brainfm prep"):
            coded(brain, code)
    with pytest.raises(ScanError, match=r"lies as in Talairach space.* mm of that and .*brainfm prep"):
        load(brain)
    coded(brain, 4)


@pytest.mark.parametrize("scales", [(0.95, 0.95, 0.9), (0.92, 0.95, 0.88), (1.0, 0.95, 0.9)])
@pytest.mark.parametrize("degrees", [-1.5, 0, 1.5])
def test_upright_brain_of_talairachs_size_is_taken_for_what_it_is(load, moved, scales, degrees):
    load(moved(turn(0, degrees) @ np.diag(scales), shift=(0.5, 1, 1)))


def test_space_is_read_of_images_in_memory_too(coarse, coarse_spec):
    image = nib.Nifti1Image(coarse[0], coarse[1])
    image.set_sform(coarse[1], 3)
    with pytest.raises(ScanError, match="Talairach"):
        load_scan(image, spec=coarse_spec)


# --- Contrasts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["T2w", "T2", "t2w"])
def test_t1w_scan_is_refused_by_a_t2w_contract_which_takes_t2w(coarse, coarse_spec, words):
    voxels, affine = coarse
    spec = replace(coarse_spec, representation=words)
    load_scan((np.where(voxels > 0, 260 - voxels, 0), affine), spec=spec)
    with pytest.raises(ScanError, match=r"do not follow a T2w image.*use the T2w scan"):
        load_scan((voxels, affine), spec=spec)


def test_t2w_head_is_held_against_its_contract_too(coarse, coarse_spec, head):
    spec = replace(coarse_spec, representation="T2w", skull_strip="any", mask="none")
    brain = coarse[0] > 0
    load_scan((np.where(brain, 260 - head, head), coarse[1]), spec=spec)
    with pytest.raises(ScanError, match="do not follow a T2w image"):
        load_scan((head, coarse[1]), spec=spec)


def test_contract_of_any_contrast_takes_every_contrast(coarse, coarse_spec):
    voxels, affine = coarse
    spec = replace(coarse_spec, representation="any contrast")
    for image in (voxels, np.where(voxels > 0, 260 - voxels, 0)):
        load_scan((image, affine), spec=spec)


# --- What registration left -----------------------------------------------------------------------


@pytest.mark.parametrize("registration", ["affine", "linear", "nonlinear"])
@pytest.mark.parametrize("scales", [(0.85, 0.85, 0.85), (0.9, 0.9, 0.9), (0.95, 0.95, 0.87), (1.0, 1.1, 1.0)])
def test_brain_of_another_size_is_refused_where_registration_should_have_changed_it(
    coarse, coarse_spec, moved, scales, registration
):
    scan = moved(np.diag(scales)), coarse[1]
    load_scan(scan, spec=replace(coarse_spec, registration="rigid"))
    with pytest.raises(ScanError, match=r"its size is [\d., ]+ of the template's.*register it.*(affine|nonlinear)"):
        load_scan(scan, spec=replace(coarse_spec, registration=registration))


@pytest.mark.parametrize("registration", ["affine", "linear", "nonlinear"])
def test_brain_of_the_templates_size_is_taken(coarse, coarse_spec, moved, registration):
    spec = replace(coarse_spec, registration=registration)
    for matrix in (np.eye(3), np.diag([0.97, 1.03, 1.0]), turn(0, 3)):
        load_scan((moved(matrix), coarse[1]), spec=spec)


@pytest.mark.parametrize("mm", [2, 4])
def test_tightly_stripped_brain_of_the_templates_size_is_taken(coarse, coarse_spec, mm):
    voxels, affine = coarse
    inside = ndimage.binary_erosion(voxels > 0, iterations=mm // 2)
    load_scan((voxels * inside, affine), spec=replace(coarse_spec, registration="affine"))


# --- A space without a grid -----------------------------------------------------------------------


def test_contract_of_mni152_without_a_grid_takes_a_brain_in_its_place_on_any_grid(coarse):
    voxels, affine = coarse
    shifted = affine @ from_matvec(np.eye(3), (0.3, -0.2, 0.4))
    assert SYNTHBA.apply(load_scan((voxels[5:, :-3, ::-1], flipped_last(affine, 97, 5)), spec=SYNTHBA)).image.max() == 1
    load_scan((voxels, shifted), spec=SYNTHBA)


def flipped_last(affine, size, start):
    """The affine of voxels [start:, :, ::-1] of `size` along the last axis."""
    return affine @ from_matvec(np.diag([1, 1, -1]), (start, 0, size - 1))


@pytest.mark.parametrize(
    ("matrix", "shift"), [(np.eye(3), (0, 20, 0)), (turn(0, 25), (0, 0, 0)), (np.diag([1, -1, 1]), (0, 0, 0))]
)
def test_contract_of_mni152_without_a_grid_refuses_a_brain_elsewhere(coarse, moved, matrix, shift):
    with pytest.raises(ScanError, match="the brain does not lie where the template's does"):
        load_scan((moved(matrix, shift), coarse[1]), spec=SYNTHBA)


def test_contract_of_mni152_without_a_grid_refuses_a_scan_in_the_scanners_space(coarse):
    voxels, affine = coarse
    scanner = from_matvec(turn(0, 20), (3, 40, -25)) @ affine
    with pytest.raises(ScanError, match="the brain does not lie where the template's does"):
        load_scan((voxels, scanner), spec=SYNTHBA)
