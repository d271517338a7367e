"""Published input contracts on the packaged brain, against plain NumPy and SciPy."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from published_contracts import BRAINIAC, CONTRACTS, MEDICALNET, SFCN, SYNTHBA
from scipy import ndimage

import brainfm
from brainfm import InputSpec, ScanError
from brainfm.contract import Volume

NATIVE = np.diag([1.25, 0.9, 1.2, 1.0])  # another scanner's voxels, for the contracts of native space
every_contract = pytest.mark.parametrize("name", CONTRACTS)


@pytest.fixture(scope="module")
def volume_for(brain):
    """A function (contract's name) → the packaged brain as a scan that keeps the contract's identity fields."""
    image, mask, affine = brain
    mask = mask.astype(bool)
    three = np.stack([image, np.where(mask, 255 - image, 0), np.sqrt(image, dtype=np.float32)]).astype(np.float32)
    flipped = np.array([[1, 0, 0, -96], [0, -1, 0, 96], [0, 0, -1, 114], [0, 0, 0, 1.0]])

    def make(name: str) -> Volume:
        if name == "sfcn":
            return Volume(image[None, 186:4:-1, 6:224, 6:188], None, SFCN.grid.affine("LAS"))
        if name == "brainiac":
            return Volume(image[None, 180:10:-1, 13:219, 9:171], None, BRAINIAC.grid.affine("LAS"))
        if name in ("openmind", "medicalnet"):
            return Volume(image[None], None, NATIVE)
        if name.startswith("swinbrain"):
            return Volume(three, mask, affine)
        if name == "synthba":
            spotted = image[None].astype(np.float32)
            spotted[0, 0, 110, 70] = 2000  # outside the centre crop: it must not set the range
            return Volume(spotted, None, affine)
        if name == "neurovfm":
            return Volume(image[None, :, ::-1, ::-1], None, flipped)
        return Volume(image[None], mask, affine)

    return make


@pytest.fixture(scope="module")
def applied(volume_for):
    """A function (contract's name) → the volume after its operations."""
    return cache(lambda name: CONTRACTS[name].apply(volume_for(name)))


def centres(before: int, after: int) -> np.ndarray:
    """Where the centres of `after` voxels lie among `before` voxels that cover the same length."""
    return (np.arange(after) + 0.5) * before / after - 0.5


def linear(image: np.ndarray, shape: tuple[int, ...], step: float | None = None) -> np.ndarray:
    """`image` at the centres of the new voxels, or at every `step` from the first, by np.interp's weights."""
    for axis, size in enumerate(shape):
        old = image.shape[axis]
        points = centres(old, size) if step is None else np.arange(size) * step
        weights = [np.interp(points, np.arange(old), unit) for unit in np.eye(old)]
        image = np.moveaxis(np.tensordot(image, weights, axes=(axis, 0)), -1, axis)
    return image


def area(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mean of the old voxels that each new voxel touches, one axis after the other."""
    for axis, size in enumerate(shape):
        old, new, edges = image.shape[axis], np.arange(size)[:, None], np.arange(image.shape[axis])
        touched = (edges + 1 > new * old / size) & (edges < (new + 1) * old / size)
        weights = touched / touched.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(image, weights, axes=(axis, 1)), -1, axis)
    return image


def zscored(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    return (image - image[where].mean()) / image[where].std()


def scaled(image: np.ndarray) -> np.ndarray:
    return (image - image.min()) / (image.max() - image.min())


def swapped(spec: InputSpec, first: int, second: int) -> InputSpec:
    steps = list(spec.operations)
    steps[first], steps[second] = steps[second], steps[first]
    return replace(spec, operations=tuple(steps))


# --- Contracts are data ---------------------------------------------------------------------------


@every_contract
def test_a_contract_survives_json(name):
    spec = CONTRACTS[name]
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@every_contract
def test_a_contract_gives_the_float32_shape_it_promises(name, applied):
    image = applied(name).image
    assert image.dtype == np.float32
    assert image.shape == (CONTRACTS[name].output_shape or image.shape)
    assert np.isfinite(image).all()


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("simclr", 1, 2),
        ("sfcn", 0, 1),
        ("brainiac", 0, 1),
        ("openmind", 1, 2),
        ("openmind", 2, 3),
        ("medicalnet", 0, 1),
        ("synthba", 2, 3),
        ("swinbrain-pretraining", 1, 2),
        ("swinbrain-fine-tuning", 1, 2),
        ("neurovfm", 3, 4),
    ],
)
def test_swapped_order_gives_another_tensor(name, first, second, applied, volume_for):
    image = applied(name).image
    other = swapped(CONTRACTS[name], first, second).apply(volume_for(name)).image
    assert other.shape == image.shape
    assert np.abs(other - image).max() > 1e-4


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("simclr", ["T1w", "rigid", "193×229×193", "[10:160, 19:211, 1:193]", "brain mask", "1e-12", "0 elsewhere"]),
        ("sfcn", ["T1w", "MNI152NLin6Asym", "LAS", "(90, -126, -72)", "skull removed", "mean of the whole array"]),
        ("sfcn", ["[11:171, 13:205, 11:171]", "[1, 160, 192, 160]"]),
        ("brainiac", ["N4 → rigid registration → HD-BET", "170×206×162", "96×96×96", "trilinear", "non-zero voxels"]),
        ("openmind", ["any contrast", "in its own space", "with skull", "as stored", "(2, 1, 0)", "bounding box"]),
        ("openmind", ["at least 1e-08", "1×1×1 mm", "order 3", "at most 160×160×160"]),
        ("medicalnet", ["CT or MR", "as stored", "56×112×112", "nearest", "voxels above 0", "seeded noise"]),
        ("synthba", ["SynthStrip", "affine", "1.4×1.4×1.4 mm", "at least 130×130×130", "minimum", "0…1"]),
        ("swinbrain-pretraining", ["T1w, T2w, FLAIR", "refuse", "HD-BET", "from a file", "128×128×64", "area"]),
        ("swinbrain-fine-tuning", ["bounding box of the brain mask", "all channels together"]),
        ("neurovfm", ["RPI", "1×1×4 mm", "(4, 16, 16)", "0.5–99.5 percentiles", "0.3141", "0.2623"]),
    ],
)
def test_describe_states_the_facts_of_a_contract(name, facts):
    text = brainfm.describe(CONTRACTS[name])
    assert [fact for fact in facts if fact not in text] == []


@every_contract
def test_describe_numbers_the_operations_in_their_order(name):
    text = brainfm.describe(CONTRACTS[name])
    for number, operation in enumerate(CONTRACTS[name].operations, start=1):
        assert f"step {number}" in next(line for line in text.splitlines() if line.endswith(f" {operation}"))


# --- Each contract's tensor -----------------------------------------------------------------------


def test_simclr_crops_the_reversed_axes_then_scores_the_mask(applied, brain):
    image, mask, _ = brain
    box = np.s_[10:160, 19:211, 1:193]
    image, mask = image.T[box].astype(np.float64), mask.T[box] > 0
    expected = np.where(mask, zscored(image, mask), 0)
    np.testing.assert_allclose(applied("simclr").image[0], expected, atol=1e-5)


def test_sfcn_divides_by_the_mean_of_the_full_grid_then_crops(applied, volume_for):
    full = volume_for("sfcn").stored[0].astype(np.float64)
    np.testing.assert_allclose(applied("sfcn").image[0], (full / full.mean())[11:171, 13:205, 11:171], rtol=1e-5)


def test_brainiac_resizes_then_scores_what_is_not_zero(applied, volume_for):
    image = linear(volume_for("brainiac").stored[0].astype(np.float64), (96, 96, 96))
    expected = np.where(image != 0, zscored(image, image != 0), 0)
    np.testing.assert_allclose(applied("brainiac").image[0], expected, atol=1e-4)


def test_openmind_crops_scores_the_crop_then_resamples_to_1_mm(applied, brain):
    image = brain[0].T
    hits = [np.flatnonzero(image.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
    image = image[tuple(slice(h[0], h[-1] + 1) for h in hits)].astype(np.float64)
    image = zscored(image, np.ones_like(image, dtype=bool))
    shape = [round(n * mm) for n, mm in zip(image.shape, (1.2, 0.9, 1.25), strict=True)]
    assert min(shape) > 160

    draw = np.random.default_rng(0).integers(0, 160, (3, 5000))
    points = [centres(n, m)[(m - 160) // 2 + chosen] for n, m, chosen in zip(image.shape, shape, draw, strict=True)]
    expected = ndimage.map_coordinates(image, points, order=3, mode="nearest").clip(image.min(), image.max())
    result = applied("openmind").image[0]
    assert result.shape == (160, 160, 160)
    np.testing.assert_allclose(result[tuple(draw)], expected, atol=1e-5)


def test_medicalnet_resizes_then_scores_what_is_positive_and_fills_the_zeros_with_noise(applied, brain):
    image = ndimage.zoom(brain[0].astype(np.float64), np.divide((56, 112, 112), brain[0].shape), order=0)
    result = applied("medicalnet").image[0]
    np.testing.assert_allclose(result[image > 0], zscored(image, image > 0)[image > 0], atol=1e-5)
    assert abs(result[image == 0].mean()) < 0.01
    assert abs(result[image == 0].std() - 1) < 0.01


def test_medicalnet_fills_only_the_zeros_of_a_ct():
    image = np.random.default_rng(0).integers(-50, 100, (56, 112, 112))
    result = MEDICALNET.apply(Volume(image[None].astype(np.int16), None, np.eye(4))).image[0]
    np.testing.assert_allclose(result[image != 0], zscored(image, image > 0)[image != 0], atol=1e-5)


def test_synthba_resamples_then_pads_and_crops_then_scales(applied, volume_for):
    image = linear(volume_for("synthba").stored[0].astype(np.float64), (138, 164, 138), step=1.4)
    expected = scaled(image[4:134, 17:147, 4:134])
    np.testing.assert_allclose(applied("synthba").image[0], expected, atol=1e-5)


def test_synthba_pads_a_short_scan_with_its_minimum(brain):
    image = brain[0][40:150, :, 40:150].astype(np.float64) - 20
    result = SYNTHBA.apply(Volume(image[None].astype(np.float32), None, np.eye(4))).image[0]
    small = linear(image, (79, 164, 79), step=1.4)[:, 17:147]
    expected = scaled(np.pad(small, ((25, 26), (0, 0), (25, 26)), constant_values=small.min()))
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["pretraining", "fine-tuning"])
def test_swinbrain_crops_to_the_mask_and_scales_on_its_side_of_the_resize(variant, applied, volume_for):
    volume = volume_for("swinbrain-pretraining")
    hits = [np.flatnonzero(volume.mask.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
    cropped = volume.stored[(slice(None), *(slice(h[0], h[-1] + 1) for h in hits))].astype(np.float64)
    if variant == "pretraining":
        expected = [scaled(area(channel, (128, 128, 64))) for channel in cropped]
    else:
        expected = [area(channel, (128, 128, 64)) for channel in scaled(cropped)]
    np.testing.assert_allclose(applied(f"swinbrain-{variant}").image, expected, atol=1e-5)


def test_neurovfm_thickens_slices_clips_scales_and_standardizes(applied, volume_for):
    image = volume_for("neurovfm").stored[0]
    grid = np.meshgrid(np.arange(193.0), np.arange(229.0), centres(193, 48), indexing="ij")
    slices = ndimage.map_coordinates(image.astype(np.float64), grid, order=3, mode="nearest").T[:, 2:226, :192]
    expected = (scaled(np.clip(slices, *np.percentile(slices, (0.5, 99.5)))) - 0.3141) / 0.2623
    np.testing.assert_allclose(applied("neurovfm").image[0], expected, atol=1e-5)


# --- The tensor's place in the world --------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONTRACTS if name != "medicalnet"])
def test_each_voxel_of_the_tensor_shows_what_lay_at_its_place(name, applied, volume_for):
    before, after = volume_for(name), applied(name)
    index = np.random.default_rng(0).integers(0, np.array(after.shape)[:, None], (3, 20000))
    world = after.affine[:3, :3] @ index + after.affine[:3, 3:]
    place = np.linalg.solve(before.affine[:3, :3], world - before.affine[:3, 3:])
    seen = ndimage.map_coordinates(before.image[0], place, order=1)
    brain = seen > 0
    assert (
        np.corrcoef(after.image[0][tuple(index)][brain], seen[brain])[0, 1] > 0.98
    )  # a shift by one voxel leaves 0.95


def test_a_scan_on_another_grid_is_brought_to_sfcns(brain, volume_for):
    image, _, affine = brain
    scan = brainfm.load_scan((image, affine), spec=SFCN)
    np.testing.assert_array_equal(scan.image, volume_for("sfcn").image)
    np.testing.assert_array_equal(scan.affine, volume_for("sfcn").affine)


def test_brainiacs_own_space_takes_a_scan_on_its_grid_alone(brain, volume_for):
    image, _, affine = brain
    volume = volume_for("brainiac")
    scan = brainfm.load_scan((volume.stored[0], volume.affine), spec=BRAINIAC)
    np.testing.assert_array_equal(scan.image, volume.image)
    with pytest.raises(ScanError, match=r"not on the grid of the space 'BrainIAC head template'.*register it to that"):
        brainfm.load_scan((image, affine), spec=BRAINIAC)
