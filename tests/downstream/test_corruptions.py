"""Scans corrupted on purpose: by as much as was asked, reproducibly, and through the whole path to an embedding."""

from __future__ import annotations

import gc
import importlib
import sys
import tracemalloc
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations
from scipy import ndimage

import brainfm
from brainfm.downstream import corruptions
from brainfm.downstream.corruptions import CORRUPTIONS, corrupted
from brainfm.manifest import ScanRecord
from brainfm.scan.placement import measure

NAMES = list(CORRUPTIONS)
OUTSIDE_ONLY, GEOMETRY = {"residual_skull"}, {"rotation", "crop", "flip"}


@pytest.fixture(scope="module")
def scan(small_sample):
    """The sample scan at 4 mm: image, mask, affine, read-only."""
    image, mask = (nib.load(path) for path in small_sample)
    arrays = image.get_fdata(dtype=np.float32), np.asarray(mask.dataobj) > 0, image.affine
    for array in arrays:
        array.setflags(write=False)
    return arrays


def draw(seed=0):
    return np.random.default_rng(seed)


def smooth_blob(shape, centre, std):
    """A Gaussian of this std along each axis."""
    exponent = sum(((i - c) / s) ** 2 for i, c, s in zip(np.indices(shape), centre, std, strict=True))
    return np.exp(-exponent / 2).astype(np.float32)


# --- What holds of all ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_strength_0_is_untouched_and_levels_rise_from_it(name, scan):
    corruption = CORRUPTIONS[name]
    image, mask = corruption(*scan, 0.0, draw())
    assert image is scan[0]
    assert mask is scan[1]
    assert corruption.levels[0] == 0
    assert len(set(corruption.levels)) == 5
    assert list(corruption.levels) == sorted(corruption.levels)
    assert corruption.levels[-1] <= corruption.limit


@pytest.mark.parametrize("name", NAMES)
def test_more_strength_changes_more(name, scan):
    image, mask, _ = scan
    region = ~mask if name in OUTSIDE_ONLY else mask
    changes = []
    for strength in CORRUPTIONS[name].levels:
        altered = [CORRUPTIONS[name](*scan, strength, draw(seed))[0] for seed in range(12)]
        changes.append([float(np.abs(other - image)[region].mean()) for other in altered])
    steps = np.diff(changes, axis=0)
    if name == "flip":  # a scan is flipped or it is not; of many, more are
        assert (steps >= 0).all()
        assert (steps.sum(axis=1) > 0).all()
    else:
        assert (steps > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_draw_is_the_generators_and_the_arguments_stay(name, scan):
    strength = CORRUPTIONS[name].levels[-1]
    before = [array.copy() for array in scan]
    first, again, other = (CORRUPTIONS[name](*scan, strength, draw(seed)) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    chance = not np.array_equal(first[0], other[0])
    assert chance == (name not in {"blur", "residual_skull", "flip"})
    for array, kept in zip(scan, before, strict=True):
        np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("name", NAMES)
def test_image_and_mask_stay_sensible(name, scan):
    image, mask, _ = scan
    for strength in CORRUPTIONS[name].levels[1:]:
        altered, brain = CORRUPTIONS[name](*scan, strength, draw(1))
        assert (altered.shape, altered.dtype, brain.shape, brain.dtype) == (
            image.shape,
            np.float32,
            mask.shape,
            np.bool_,
        )
        assert np.isfinite(altered).all()
        assert ndimage.label(brain)[1] == 1
        if name in GEOMETRY:
            dice = 2 * (brain & mask).sum() / (brain.sum() + mask.sum())
            assert dice > 0.85
            assert (altered[brain] > 0).mean() > 0.97
        elif name in OUTSIDE_ONLY:
            assert (brain | ~mask).all()
            np.testing.assert_array_equal(altered[mask], image[mask])
        else:
            np.testing.assert_array_equal(brain, mask)
            np.testing.assert_array_equal(altered[~mask], image[~mask])


@pytest.mark.parametrize("name", NAMES)
def test_the_loader_takes_every_level(name, scan, small_spec):
    transform = brainfm.create_transform(small_spec)
    for strength in CORRUPTIONS[name].levels:
        for seed in range(4):
            image, mask = CORRUPTIONS[name](*scan, strength, draw(seed))
            tensor = transform((image, scan[2]), mask)
            assert tensor.shape == (1, 40, 48, 48)
            assert tensor.isfinite().all()


@pytest.mark.parametrize(("name", "strength"), [("rotation", 30.0), ("crop", 0.3), ("residual_skull", 12.0)])
def test_beyond_the_levels_the_loader_refuses(name, strength, scan, small_spec):
    image, mask = CORRUPTIONS[name](*scan, strength, draw())
    with pytest.raises(brainfm.ScanError):
        brainfm.create_transform(small_spec)((image, scan[2]), mask)


@pytest.mark.parametrize(
    ("name", "strength"), [("noise", -0.1), ("blur", np.nan), ("blur", np.inf), ("crop", 1.0), ("ghosting", 1.5)]
)
def test_strengths_that_mean_nothing_are_refused(name, strength, scan, small_spec, small_sample):
    with pytest.raises(ValueError, match="must be 0 to"):
        CORRUPTIONS[name](*scan, strength, draw())
    with pytest.raises(ValueError, match="must be 0 to"):
        corrupted([small_sample], name, strength, spec=small_spec)


# --- Each by itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_noise_has_the_std_that_was_asked_for(strength, scan):
    image, mask, _ = scan
    added = (corruptions.noise(*scan, strength, draw())[0] - image)[mask].astype(np.float64)
    wanted = strength * image[mask].astype(np.float64).std()
    assert added.std() == pytest.approx(wanted, rel=0.02)
    assert abs(added.mean()) < 4 * wanted / np.sqrt(mask.sum())
    assert abs(np.corrcoef(added, image[mask])[0, 1]) < 0.03


@pytest.mark.parametrize("strength", [0.2, 0.8])
def test_a_bias_field_has_its_range_over_the_brain_and_is_smooth(strength, scan):
    image, mask, _ = scan
    field = np.divide(corruptions.bias_field(*scan, strength, draw())[0], image, out=np.ones_like(image), where=mask)
    assert field[mask].min() == pytest.approx(1 - strength / 2, abs=1e-3)
    assert field[mask].max() == pytest.approx(1 + strength / 2, abs=1e-3)
    # A polynomial of degree 3 in the voxels' places and nothing else.
    places = (np.argwhere(mask) - 24) / 24
    terms = [np.prod(places**power, axis=1) for power in np.ndindex(4, 4, 4) if sum(power) <= 3]
    _, left, rank, _ = np.linalg.lstsq(np.stack(terms, axis=1), field[mask].astype(np.float64), rcond=None)
    assert rank == 20
    assert np.sqrt(left[0] / mask.sum()) < 1e-4


@pytest.mark.parametrize("name", ["bias_field", "ghosting", "blur", "noise", "intensity"])
def test_a_scan_shifted_by_whitestripe_is_corrupted_as_the_scan_itself(name, scan):
    """Its white matter is 0 and its background negative: a field that multiplied these left white matter as it was."""
    image, mask, affine = scan
    shift, strength = np.float32(1000), CORRUPTIONS[name].levels[3]
    stripped = np.where(mask, image, 0).astype(np.float32)
    plain, _ = CORRUPTIONS[name](stripped, mask, affine, strength, draw())
    shifted, _ = CORRUPTIONS[name](stripped - shift, mask, affine, strength, draw())
    assert np.abs(plain - stripped)[mask].mean() > 1e-3 * stripped[mask].std()
    np.testing.assert_allclose(shifted[mask] + shift, plain[mask], atol=1e-3 * shift)


def test_ghosts_are_shifted_copies_of_the_image():
    """Losing a fraction s of every n-th line takes s/n of each of n copies, N/n apart, and gives the mean line back."""
    image = draw(0).random((40, 48, 60)).astype(np.float32)
    everywhere = np.ones(image.shape, bool)
    found = set()
    for seed in range(30):
        rng = draw(seed)
        axis, every = int(rng.integers(3)), int(rng.integers(4, 11))
        size = image.shape[axis]
        if size % every:
            continue
        copies = sum(np.roll(image.astype(np.float64), k * size // every, axis) for k in range(every))
        expected = image - 0.5 / every * copies + 0.5 * image.mean(axis=axis, keepdims=True, dtype=np.float64)
        ghosted, _ = corruptions.ghosting(image, everywhere, np.eye(4), 0.5, draw(seed))
        np.testing.assert_allclose(ghosted, expected, atol=2e-6)
        found.add((axis, every))
    assert {axis for axis, _ in found} == {0, 1, 2}
    assert len(found) >= 5


def test_a_blur_is_as_wide_as_was_asked_in_mm():
    """On voxels of 1, 2 and 3 mm, a point becomes a Gaussian of the same std in mm along each axis."""
    point = np.zeros((61, 41, 31), np.float32)
    point[30, 20, 15] = 1
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    blurred, _ = corruptions.blur(point, np.ones(point.shape, bool), affine, 4.0, draw())
    assert blurred.sum() == pytest.approx(1, abs=1e-4)
    for axis, spacing in enumerate((1, 2, 3)):
        line = blurred.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.float64)
        places = spacing * (np.arange(len(line)) - len(line) // 2)
        assert np.sqrt((line * places**2).sum()) == pytest.approx(4.0, rel=0.01)  # cut at four std
    profile = blurred[:, 20, 15] / blurred[30, 20, 15]
    np.testing.assert_allclose(profile[20:41], np.exp(-(np.arange(-10, 11) ** 2) / 32), atol=1e-5)


@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_intensities_follow_a_gamma_curve_between_their_extremes(strength, scan):
    image, mask, _ = scan
    low, high = image[mask].min(), image[mask].max()
    signs = set()
    for seed in range(8):
        bent = corruptions.intensity(*scan, strength, draw(seed))[0]
        relative = (image[mask].astype(np.float64) - low) / (high - low)
        errors = {
            sign: np.abs(low + (high - low) * relative ** np.exp(sign * strength) - bent[mask]).max()
            for sign in (1, -1)
        }
        sign = min(errors, key=errors.get)
        assert errors[sign] < 1e-4 * (high - low)
        signs.add(sign)
    assert signs == {1, -1}


def test_a_shell_of_skull_is_as_thick_as_was_asked():
    """About a ball at 1 mm: its volume is that of the shell, it is bright, and the mask takes it in."""
    places = np.indices((80, 80, 80)) - 39.5
    ball = (places**2).sum(axis=0) < 30**2
    image = np.where(ball, draw().uniform(50, 100, ball.shape), 0).astype(np.float32)
    for thickness in (1.0, 2.0, 4.0):
        altered, brain = corruptions.residual_skull(image, ball, np.eye(4), thickness, draw())
        bright = np.percentile(image[ball], 99)
        added, taken_in = (altered - image).sum() / bright, brain.sum() - ball.sum()
        for volume, error in ((added, 0.33), (taken_in, 0.5)):  # voxels of 1 mm; the mask has no partial ones
            radius = np.cbrt(3 / (4 * np.pi) * (ball.sum() + volume))
            assert radius - 30 == pytest.approx(thickness, abs=error)
        assert altered.max() <= image.max()
        assert (altered[brain] >= 0.49 * bright).all()


def test_a_shell_thinner_than_half_a_voxel_stays_out_of_the_mask(scan):
    image, mask, _ = scan
    altered, brain = corruptions.residual_skull(*scan, 1.0, draw())
    np.testing.assert_array_equal(brain, mask)
    bright = np.percentile(image[mask], 99)
    assert altered[~mask].max() == pytest.approx(0.25 * bright, rel=1e-5)


def test_a_rotation_takes_points_where_scipy_takes_them():
    """In world coordinates, on voxels of different sizes and a flipped axis, about the middle of the mask."""
    from scipy.spatial.transform import Rotation

    affine = np.array([[-2.0, 0, 0, 60], [0, 0, 3, -70], [0, 2, 0, -50], [0, 0, 0, 1]])
    shape, centre = (60, 60, 40), np.array([30.0, 28.0, 18.0])
    mask = smooth_blob(shape, centre, (8, 8, 6)) > 0.5
    mark = np.array([40.0, 34.0, 22.0])
    image = smooth_blob(shape, mark, (2, 2, 2))
    turned, brain = corruptions.rotation(image, mask, affine, 25.0, draw(5))
    axis = draw(5).standard_normal(3)
    turn = Rotation.from_rotvec(np.radians(25) * axis / np.linalg.norm(axis))
    world, middle = (affine[:3, :3] @ p + affine[:3, 3] for p in (mark, np.array(ndimage.center_of_mass(mask))))
    found = affine[:3, :3] @ ndimage.center_of_mass(turned) + affine[:3, 3]
    np.testing.assert_allclose(found, middle + turn.apply(world - middle), atol=0.1)
    assert np.linalg.norm(found - world) > 5
    moved = affine[:3, :3] @ ndimage.center_of_mass(brain) + affine[:3, 3]
    np.testing.assert_allclose(moved, middle, atol=0.3)


def test_a_rotation_and_its_opposite_only_blur(scan):
    """A linear interpolation between random places smooths by a variance of 1/6 voxel: two add a sixth of ∇²."""
    image, mask, affine = scan
    smooth = ndimage.gaussian_filter(image, 1.5)
    turned, brain = corruptions.rotation(smooth, mask, affine, 10.0, draw(2))
    back, _ = corruptions.rotation(turned, mask, affine, -10.0, draw(2))  # the same axis and centre
    inner = ndimage.binary_erosion(mask, iterations=3)
    there = np.abs(turned - smooth)[inner].mean()
    assert np.abs(back - smooth - ndimage.laplace(smooth) / 6)[inner].mean() < 0.1 * there
    assert (brain != mask).any()


def test_a_crop_enlarges_what_is_left():
    """A point at place p of an axis of n voxels, after a crop to [a, a + k), lies at (p − a) n / k."""
    shape = (40, 50, 60)
    blobs = [smooth_blob(shape, centre, (1.5, 1.5, 1.5)) for centre in ((15, 20, 25), (25, 30, 36))]
    mask = smooth_blob(shape, (20, 25, 30), (6, 6, 6)) > 0.3
    places = []
    for blob in blobs:
        image, brain = corruptions.crop(blob, mask, np.eye(4), 0.2, draw(7))
        places.append(ndimage.center_of_mass(image))
    np.testing.assert_allclose(np.diff(places, axis=0)[0], np.array([10, 10, 11]) / 0.8, atol=0.05)
    first = draw(7).random(3) * 0.2 * np.array(shape)
    np.testing.assert_allclose(places[0], (np.array([15.5, 20.5, 25.5]) - first) / 0.8 - 0.5, atol=0.05)
    assert brain.sum() == pytest.approx(mask.sum() / 0.8**3, rel=0.05)


@pytest.mark.parametrize("axes", ["RAS", "LAS", "PIR", "SLA"])
def test_a_flip_exchanges_left_and_right_however_the_scan_is_stored(axes, scan):
    image, mask, affine = scan
    change = orientations.ornt_transform(nib.io_orientation(affine), orientations.axcodes2ornt(axes))

    def stored(array):
        return orientations.apply_orientation(array, change)

    turned = affine @ orientations.inv_ornt_aff(change, image.shape)
    flipped, brain = corruptions.flip(stored(image), stored(mask), turned, 1.0, draw())
    np.testing.assert_array_equal(flipped, stored(image[::-1]))
    np.testing.assert_array_equal(brain, stored(mask[::-1]))


def test_the_fraction_of_flipped_scans_is_the_strength(scan):
    counts = {
        strength: [corruptions.flip(*scan, strength, draw(seed))[0] is not scan[0] for seed in range(400)]
        for strength in (0.25, 0.5, 1.0)
    }
    for strength, flipped in counts.items():
        assert np.mean(flipped) == pytest.approx(strength, abs=0.06)
    assert all(b or not a for a, b in zip(counts[0.25], counts[0.5], strict=True))  # the same scans, and more


# --- Lists of scans -------------------------------------------------------------------------------


def test_corrupted_scans_are_embedded(small_sample, small_model, small_spec, scan):
    """As the arrays would be, with threads and without, each scan with its own chance."""
    records = [ScanRecord(*small_sample, "sub-01", f"ses-{n}", {"label": str(n)}) for n in range(3)]
    scans = corrupted(records, "rotation", 4.0, spec=small_spec, seed=5)
    tables = [brainfm.embed(scans, small_model, num_workers=workers, batch_size=2) for workers in (2, 0)]
    assert not tables[0].errors
    np.testing.assert_array_equal(tables[0].vectors, tables[1].vectors)
    for n in range(3):
        image, mask = CORRUPTIONS["rotation"](*scan, 4.0, np.random.default_rng((5, n)))
        alone = brainfm.embed([((image, scan[2]), mask)], small_model, batch_size=1)
        np.testing.assert_allclose(tables[0].vectors[n], alone.vectors[0], rtol=1e-4, atol=1e-5)
    assert len(np.unique(tables[0].vectors, axis=0)) == 3
    assert tables[0].columns() == brainfm.embed(records, small_model).columns()


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_corrupted_alike_but_for_noise_of_their_own(name, small_sample):
    """The first as it would be alone, the second by the same draw, in one reading; noise is drawn for each."""
    image, mask = small_sample
    strength = CORRUPTIONS[name].levels[-1]
    specs = [brainfm.InputSpec(channels=channels, mask="file") for channels in (("T1w",), ("T1w", "FLAIR"))]
    (alone,) = corrupted([small_sample], name, strength, spec=specs[0], seed=4)
    (both,) = corrupted([ScanRecord({"t1w": image, "flair": image}, mask)], name, strength, spec=specs[1], seed=4)
    one = brainfm.load_scan(alone.image, alone.mask, spec=specs[0])
    two = brainfm.load_scan(both.image, both.mask, spec=specs[1])
    np.testing.assert_array_equal(two.image[0], one.image[0])
    np.testing.assert_array_equal(two.mask, one.mask)
    if name == "noise":
        clean = brainfm.load_scan(image, mask, spec=specs[0])
        added = (two.image - clean.image)[:, clean.mask]
        assert abs(np.corrcoef(added)[0, 1]) < 0.03
    else:
        np.testing.assert_array_equal(two.image[1], two.image[0])
    assert both.columns()["flair_path"] == both.columns()["t1w_path"] == str(image)


def test_scan_of_several_channels_is_read_and_corrupted_once(small_sample, monkeypatch):
    image, mask = small_sample
    spec, read = brainfm.InputSpec(channels=("T1w", "FLAIR"), mask="file"), []
    load = corruptions.load_scan
    monkeypatch.setattr(corruptions, "load_scan", lambda *args, **named: read.append(1) or load(*args, **named))
    (record,) = corrupted([ScanRecord({"flair": image, "t1w": image}, mask)], "blur", 2.0, spec=spec)
    assert not read
    brainfm.load_scan(record.image, record.mask, spec=spec)
    assert len(read) == 1
    assert not record.mask.scan.kept


def test_missing_channel_stays_missing(small_sample):
    image, mask = small_sample
    lenient = brainfm.InputSpec(channels=("T1w", "FLAIR"), mask="file", missing_channel="zeros")
    (record,) = corrupted([ScanRecord({"T1w": image, "FLAIR": None}, mask)], "ghosting", 1.0, spec=lenient)
    loaded = brainfm.load_scan(record.image, record.mask, spec=lenient)
    assert loaded.image[0].any()
    assert not loaded.image[1].any()
    strict = replace(lenient, missing_channel="refuse")
    (record,) = corrupted([ScanRecord({"T1w": image}, mask)], "ghosting", 1.0, spec=strict)
    with pytest.raises(brainfm.ScanError, match="FLAIR is missing"):
        brainfm.load_scan(record.image, record.mask, spec=strict)


def test_strength_0_gives_the_records_themselves(small_sample, small_spec):
    records = [ScanRecord(*small_sample)]
    assert corrupted(records, "noise", 0.0, spec=small_spec)[0] is records[0]


def test_masks_come_from_the_image_where_there_is_no_file(small_sample, small_spec, scan):
    """And the scan may be stored in any way: scaled integers, another axis order, in memory."""
    stored = nib.Nifti1Image((scan[0] * 2).astype(np.int16)[::-1], scan[2] @ np.diag([-1.0, 1, 1, 1]))
    stored.affine[:3, 3] += scan[2][:3, 0] * (scan[0].shape[0] - 1)
    stored.header.set_slope_inter(0.5, 0)
    image = nib.Nifti1Image.from_bytes(stored.to_bytes())
    (record,) = corrupted([image], "noise", 0.25, spec=small_spec)
    loaded = brainfm.load_scan(record.image, record.mask, spec=small_spec)
    clean = brainfm.load_scan(image, spec=small_spec)
    np.testing.assert_array_equal(loaded.mask, clean.mask)
    added = (loaded.image - clean.image)[0][clean.mask]
    assert added.std() == pytest.approx(0.25 * clean.image[0][clean.mask].std(), rel=0.02)


@pytest.mark.parametrize("policy", ["file or nonzero", "file", "nonzero", "none"])
def test_every_mask_policy_is_kept(policy, small_sample, scan):
    spec = brainfm.InputSpec(mask=policy)
    (record,) = corrupted([small_sample], "crop", 0.06, spec=spec)
    loaded = brainfm.load_scan(record.image, record.mask, spec=spec)
    image, mask = CORRUPTIONS["crop"](*scan, 0.06, np.random.default_rng((0, 0)))
    np.testing.assert_allclose(loaded.image[0], image, rtol=1e-6)
    expected = {"none": None, "nonzero": image != 0}.get(policy, mask)
    np.testing.assert_array_equal(loaded.mask, expected)


def test_a_mask_can_be_read_by_itself_and_again(small_sample, small_spec):
    (record,) = corrupted([small_sample], "rotation", 6.0, spec=small_spec)
    alone = np.asarray(record.mask.dataobj)
    image = np.asarray(record.image.dataobj)
    np.testing.assert_array_equal(alone, np.asarray(record.mask.dataobj))
    np.testing.assert_array_equal(alone, np.asarray(record.mask.dataobj))
    np.testing.assert_array_equal(image, np.asarray(record.image.dataobj))
    assert alone.sum() > 0


def test_a_bad_scan_is_named_and_stops_nothing(small_sample, small_model, small_spec, tmp_path):
    empty = tmp_path / "sub-02_T1w.nii.gz"
    empty.touch()
    far = tmp_path / "sub-03_T1w.nii.gz"
    image = nib.load(small_sample[0])
    moved = image.affine.copy()
    moved[:3, 3] += 40
    nib.Nifti1Image(image.get_fdata(dtype=np.float32), moved).to_filename(far)
    records = [ScanRecord(empty), ScanRecord(*small_sample), ScanRecord(far)]
    table = brainfm.embed(corrupted(records, "blur", 2.0, spec=small_spec), small_model)
    assert len(table) == 1
    words = [message for _, message in table.errors]
    assert "sub-02_T1w.nii.gz: the file is empty" in words[0]
    assert "sub-03_T1w.nii.gz (corrupted): the brain does not lie" in words[1]
    assert [record.columns()["image_path"] for record, _ in table.errors] == [str(empty), str(far)]


def test_memory_stays_flat(small_sample, small_model, small_spec):
    """Thirty scans cost no more than one: nothing of a scan is kept, and nothing is read before its turn."""
    scans = corrupted([ScanRecord(*small_sample)] * 30, "residual_skull", 2.0, spec=small_spec)
    transform = brainfm.create_transform(small_spec)
    transform(scans[0].image, scans[0].mask)  # imports and caches
    gc.collect()
    tracemalloc.start()
    try:
        for record in scans:
            transform(record.image, record.mask)
        gc.collect()
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 48 * 48 * 40  # of thirty masks, not one


def test_an_unknown_name_is_refused_with_the_nearest(small_sample, small_spec):
    with pytest.raises(ValueError, match="did you mean 'noise'"):
        corrupted([small_sample], "nois", 1.0, spec=small_spec)
    with pytest.raises(ValueError, match="residual_skull, rotation"):
        corrupted([small_sample], "zebra", 1.0, spec=small_spec)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "brainfm.downstream.corruptions")
    with pytest.raises(brainfm.MissingExtraError, match="pip install scipy"):
        importlib.import_module("brainfm.downstream.corruptions")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_loader_takes_the_last_level_at_full_size(name, brain, spec):
    image, mask, affine = brain
    altered, brain_mask = CORRUPTIONS[name](
        image.astype(np.float32), mask > 0, affine, CORRUPTIONS[name].levels[-1], draw()
    )
    loaded = brainfm.load_scan((altered, affine), brain_mask, spec=spec)
    assert measure(loaded, loaded.mask).fault(spec.registration) == ""
