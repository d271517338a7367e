"""What a contract says of a scan's values is held against them: intensities, tissue, skull."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from published_contracts import OPENMIND, SFCN, SWINBRAIN_PRETRAINING
from scipy import ndimage

from brainfm import Grid, InputSpec, ScanError, load_scan
from brainfm.contract import DivideByMean, Resize, ZScore
from brainfm.prep.normalize import white_stripe

COARSE_SFCN = replace(
    SFCN, grid=Grid((91, 109, 91), (2.0, 2.0, 2.0), (90.0, -126.0, -72.0)), operations=(DivideByMean(),)
)
RAW = InputSpec(intensities="raw", operations=(DivideByMean(),))  # any contrast, in any space
STANDARDISED = InputSpec(intensities="standardised", preparation=("z-score over the brain",))


def tensor_of(path, spec):
    """[C, i, j, k]: a file as the encoder sees it."""
    return spec.apply(load_scan(path, spec=spec)).image


def z_scored(image, where, outside="zero"):
    scored = (image - image[where].mean()) / image[where].std()
    return np.where(where, scored, 0) if outside == "zero" else scored


NORMALISED = {
    "WhiteStripe": lambda image: white_stripe(image, image > 0),
    "z-score, 0 outside": lambda image: z_scored(image, image > 0),
    "z-score, kept outside": lambda image: z_scored(image, image > 0, "keep"),
    "z-score of all voxels": lambda image: z_scored(image, np.ones_like(image, dtype=bool)),
    "less its median": lambda image: np.where(image > 0, image - np.median(image[image > 0]), 0),
}


# --- Raw intensities ------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", ["WhiteStripe", "z-score, 0 outside"])
def test_sfcn_refuses_an_image_that_was_normalised_and_takes_it_from_before(brain, saved, normalised):
    voxels, mask, affine = brain
    image = (voxels * mask).astype(np.float32)
    taken = tensor_of(saved(image, affine), SFCN)
    assert taken.shape == SFCN.output_shape
    assert taken.min() == 0
    with pytest.raises(ScanError, match=r"scan\.nii: .*normalised already.*use the scan from before"):
        tensor_of(saved(NORMALISED[normalised](image).astype(np.float32), affine), SFCN)


@pytest.mark.parametrize("normalised", NORMALISED)
def test_normalised_brain_is_refused_where_intensities_must_be_raw(coarse, saved, normalised):
    path = saved(NORMALISED[normalised](coarse[0]).astype(np.float32))
    with pytest.raises(ScanError, match="normalised already"):
        tensor_of(path, RAW)


@pytest.mark.parametrize("normalised", list(NORMALISED)[1:])
def test_normalised_head_is_refused_where_intensities_must_be_raw(head, saved, normalised):
    with pytest.raises(ScanError, match="normalised already"):
        tensor_of(saved(NORMALISED[normalised](head).astype(np.float32)), RAW)


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "scaled", "scaled and shifted", "scaled by -1"])
def test_raw_brain_is_taken_however_it_is_stored(coarse, saved, kind, tmp_path):
    voxels, affine = coarse
    if kind.startswith("scaled"):
        slope, inter = {"scaled": (0.01, 0), "scaled and shifted": (0.05, -50.0), "scaled by -1": (-1.0, 0)}[kind]
        nifti = nib.Nifti1Image(np.rint((voxels - inter) / slope).astype(np.int16), affine)
        nifti.header.set_slope_inter(slope, inter)
        path = tmp_path / "scaled.nii"
        nifti.to_filename(path)
        assert nib.load(path).dataobj.inter == inter
    else:
        path = saved(voxels.astype(kind))
    expected = tensor_of(saved(voxels), COARSE_SFCN)
    np.testing.assert_allclose(tensor_of(path, COARSE_SFCN), expected, atol=1e-3)


@pytest.mark.parametrize("order", [3, 5])
def test_raw_brain_with_the_overshoot_of_splines_is_taken(coarse, saved, order):
    voxels = coarse[0]
    moved = ndimage.shift(voxels, (0.4, 0.5, 0.3), order=order)
    near = ndimage.binary_dilation(voxels > 0, iterations=2)
    image = np.where(near, moved, 0).astype(np.float32)
    assert image.min() < -0.1 * np.percentile(image, 99)
    assert tensor_of(saved(image), COARSE_SFCN).min() < 0
    tensor_of(saved(moved), RAW)


@pytest.mark.parametrize("constant", [-1024, -100, 100, 1024])
def test_image_that_a_constant_was_added_to_is_refused_where_intensities_must_be_raw(head, saved, constant):
    with pytest.raises(ScanError, match=r"about 0|a constant was added"):
        tensor_of(saved(head + constant), RAW)


@pytest.mark.parametrize(
    ("slope", "inter", "reason"),
    [
        (1, 2.0**33, "the same value|float32 cannot tell them apart"),
        (1, 1e8, "float32 cannot tell them apart; use the scan from before that"),
        (1, -1e7, "float32 cannot tell them apart"),
        (1e-8, 0, "too small for float32 arithmetic"),
        (1e-30, 0, "too small for float32 arithmetic"),
    ],
)
def test_scaling_beyond_what_float32_holds_is_refused(slope, inter, reason, brain, tmp_path, small_spec):
    """Of a damaged header, as a rule: it gave a tensor of rounding errors, or of zeros."""
    voxels, mask, affine = brain
    nifti = nib.Nifti1Image(voxels, affine)
    nifti.header.set_slope_inter(slope, inter)
    nifti.to_filename(tmp_path / "scan.nii")
    written = bytearray((tmp_path / "scan.nii").read_bytes())
    written[112:120] = np.array([slope, inter], "<f4").tobytes()
    written[352:] = voxels.tobytes(order="F")
    (tmp_path / "scan.nii").write_bytes(written)
    with pytest.raises(ScanError, match=reason):
        load_scan(tmp_path / "scan.nii", (mask, affine), spec=small_spec)


@pytest.mark.parametrize("constant", [-100, 100])
def test_sfcn_refuses_a_background_that_is_not_0(coarse, saved, constant):
    with pytest.raises(
        ScanError, match=r"normalised already|a constant was added|background is not 0; .*strip it first"
    ):
        tensor_of(saved(coarse[0] + constant), COARSE_SFCN)


def test_ct_is_refused_where_intensities_must_be_raw(coarse, head, saved):
    brain = coarse[0] > 0
    hounsfield = np.where(brain, 35, np.where(head > 0, 60, -1000)) + np.random.default_rng(0).normal(0, 5, head.shape)
    with pytest.raises(ScanError, match="is no MR image"):
        tensor_of(saved(hounsfield.astype(np.float32)), RAW)


def test_contract_that_cancels_normalisation_takes_it(coarse, coarse_spec, saved):
    voxels = coarse[0]
    plain = tensor_of(saved(voxels), coarse_spec)
    mask = voxels > 0
    scan = load_scan(saved(white_stripe(voxels, mask)), mask.astype(np.uint8), spec=coarse_spec)
    np.testing.assert_allclose(coarse_spec.apply(scan).image, plain, atol=1e-4)


# --- Standardised intensities, and ranges ---------------------------------------------------------


@pytest.mark.parametrize("normalised", list(NORMALISED)[:4])
def test_standardised_image_is_taken_where_it_must_be(coarse, saved, normalised):
    image = NORMALISED[normalised](coarse[0]).astype(np.float32)
    np.testing.assert_array_equal(tensor_of(saved(image), STANDARDISED)[0], image)


@pytest.mark.parametrize("scale", [1 / 255, 1, 16])
def test_raw_image_is_refused_where_it_must_be_standardised(coarse, saved, scale):
    with pytest.raises(ScanError, match=r"were standardised.*prepared by z-score over the brain"):
        tensor_of(saved(coarse[0] * np.float32(scale)), STANDARDISED)


def test_overshoot_of_splines_is_no_standardisation(coarse, saved):
    with pytest.raises(ScanError, match="were standardised"):
        tensor_of(saved(ndimage.shift(coarse[0], (0.4, 0.5, 0.3), order=3)), STANDARDISED)


def test_intensities_within_their_range_are_taken(coarse, saved):
    spec = InputSpec(intensity_range=(0, 255))
    for highest in (110, 180, 255):  # FreeSurfer's white matter, its brightest voxels, all of uint8
        tensor_of(saved((coarse[0] / coarse[0].max() * highest).astype(np.uint8)), spec)


@pytest.mark.parametrize(
    "change",
    [lambda v: v / 255, lambda v: v * 16, lambda v: v - 128, lambda v: z_scored(v, v > 0)],
    ids=["0 to 1", "0 to 4000", "from -128", "z-score"],
)
def test_intensities_that_leave_their_range_or_hardly_fill_it_are_refused(coarse, saved, change):
    with pytest.raises(ScanError, match=r"the intensities are .* to .*, and this contract takes 0 to 255"):
        tensor_of(saved(change(coarse[0]).astype(np.float32)), InputSpec(intensity_range=(0, 255)))


# --- Grey matter ----------------------------------------------------------------------------------

GREY = {
    f"{words} in {space}": InputSpec(
        representation=words,
        channels=("grey matter",),
        space=space,
        registration="nonlinear" if space else "none",
        operations=(Resize((32, 40, 32)), ZScore("all")),
    )
    for words in ("VBM grey matter", "grey matter", "Gray matter")
    for space in ("MNI152NLin2009cAsym", None)
}
every_grey_contract = pytest.mark.parametrize("name", GREY)


def tissue(voxels, low, high, sigma=0.0):
    """The fraction of a tissue, by its intensities in the average brain, smoothed by `sigma` voxels and modulated."""
    fraction = ndimage.gaussian_filter(((voxels >= low) & (voxels < high)).astype(np.float32), sigma)
    x = np.linspace(0, np.pi, voxels.shape[0])[:, None, None]
    return (fraction * (1 + 0.4 * np.sin(3 * x))).astype(np.float32)


@every_grey_contract
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.7])  # voxels of 2 mm: up to 8 mm full width at half maximum
def test_modulated_and_smoothed_map_of_grey_matter_is_taken(coarse, saved, name, sigma):
    assert tensor_of(saved(tissue(coarse[0], 120, 180, sigma)), GREY[name]).shape == (1, 32, 40, 32)


@every_grey_contract
@pytest.mark.parametrize("other", ["T1w", "T1w of 0 to 1", "T1w of 0 to 4", "white matter", "fluid", "brain mask"])
def test_what_is_no_map_of_grey_matter_is_refused(coarse, saved, name, other):
    voxels = coarse[0]
    image = {
        "T1w": voxels,
        "T1w of 0 to 1": voxels / 255,
        "T1w of 0 to 4": voxels / 64,
        "white matter": tissue(voxels, 180, 256),
        "fluid": tissue(voxels, 1, 110),
        "brain mask": (voxels > 0).astype(np.float32),
    }[other]
    with pytest.raises(ScanError, match=r"no fractions of grey matter|do not follow a map of grey matter"):
        tensor_of(saved(image), GREY[name])


@every_grey_contract
def test_map_of_grey_matter_that_lies_elsewhere_is_refused(coarse, saved, name):
    affine = coarse[1].copy()
    affine[:3, 3] += (10, 15, -20)
    with pytest.raises(ScanError, match="in another space"):
        tensor_of(saved(tissue(coarse[0], 120, 180), affine), GREY[name])


# --- Skull ----------------------------------------------------------------------------------------


WHOLE_HEAD = replace(OPENMIND, operations=OPENMIND.operations[:3])  # without its slow resampling


def defaced(head):
    """The head without what lies before and below the eyes."""
    cut = head.copy()
    cut[:, 90:, :45] = 0
    return cut


@pytest.mark.parametrize(
    "change",
    [lambda h: h, defaced, lambda h: h[:, :, :75], lambda h: h[:, :, 45:60]],
    ids=["whole", "defaced", "without its crown", "a slab"],
)
def test_head_is_taken_where_the_skull_must_be_there(head, saved, change):
    assert tensor_of(saved(change(head)), WHOLE_HEAD).ndim == 4


def test_noisy_head_is_taken_where_the_skull_must_be_there(head, saved):
    noise = np.abs(np.random.default_rng(0).normal(0, 3, head.shape)).astype(np.float32)
    tensor_of(saved(head + noise), WHOLE_HEAD)


@pytest.mark.parametrize("change", ["as it is", "cropped", "shifted", "z-scored", "scaled"])
def test_skull_stripped_scan_is_refused_where_the_skull_must_be_there(coarse, saved, change, tmp_path):
    voxels, affine = coarse
    if change == "scaled":  # its 0 is stored as 1000
        nifti = nib.Nifti1Image((voxels * 10 + 1000).astype(np.int16), affine)
        nifti.header.set_slope_inter(0.1, -100.0)
        path = tmp_path / "scaled.nii.gz"
        nifti.to_filename(path)
    else:
        hits = [np.flatnonzero(voxels.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
        box = tuple(slice(max(h[0] - 1, 0), h[-1] + 2) for h in hits)
        image = {"cropped": voxels[box], "shifted": voxels + 7, "z-scored": z_scored(voxels, voxels > 0, "keep")}
        path = saved(image.get(change, voxels).astype(np.float32))
    with pytest.raises(ScanError, match=r"only 1\.\d litres.*skull-stripped.*takes the whole head"):
        tensor_of(path, WHOLE_HEAD)


NATIVE = InputSpec(skull_strip="required", operations=(ZScore("nonzero", background="zero"),))


@pytest.mark.parametrize("change", [lambda h: h, defaced], ids=["whole", "defaced"])
def test_head_is_refused_in_its_own_space_where_the_skull_must_be_gone(head, saved, change):
    with pytest.raises(ScanError, match=r"not skull-stripped.*litres count as brain.*strip it first"):
        tensor_of(saved(change(head), np.diag([-2.0, 2.0, 2.0, 1.0])), NATIVE)


def test_stripped_scan_in_its_own_space_is_taken_where_the_skull_must_be_gone(coarse, saved):
    tensor_of(saved(coarse[0], np.diag([-2.0, 2.0, 2.0, 1.0])), NATIVE)


def test_brain_mask_is_enough_only_where_the_contract_blanks_what_is_outside_it(head, coarse, saved):
    path, mask = saved(head, np.diag([-2.0, 2.0, 2.0, 1.0])), (coarse[0] > 0).astype(np.uint8)
    blanks = replace(NATIVE, mask="file", operations=(ZScore("mask", background="zero"),))
    assert (blanks.apply(load_scan(path, mask, spec=blanks)).image[0][mask == 0] == 0).all()
    keeps = replace(SWINBRAIN_PRETRAINING, channels=("T1w",), output_shape=None)
    with pytest.raises(ScanError, match=r"not skull-stripped.*strip it first, and make the rest 0"):
        load_scan(path, mask, spec=keeps)
    load_scan(saved(coarse[0], np.diag([-2.0, 2.0, 2.0, 1.0])), mask, spec=keeps)
