"""What must never pass in silence: a table of corrupted inputs, and what becomes of each.

Left and right mirrored is not among them: no figure tells it, for the template and nearly every brain are symmetric.
"""

from __future__ import annotations

import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.prep.image import like, sitk, template, to_array
from brainfm.prep.quality import judge
from brainfm.prep.source import read_source

# --- Refused when they are read: what, and a word of the message -----------------------------------

SHAPE, VOXEL = (40, 48, 40), np.diag((4.0, 4.0, 4.0, 1.0))


def _ramp(shape=SHAPE):
    return np.random.default_rng(0).integers(0, 200, shape).astype(np.int16)


def _save(folder, array, affine=VOXEL):
    nib.Nifti1Image(array, affine).to_filename(folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def _empty_file(folder):
    (folder / "scan.nii.gz").touch()
    return folder / "scan.nii.gz"


def _no_orientation(folder):
    image = nib.Nifti1Image(_ramp(), VOXEL)
    image.set_sform(VOXEL, 0)
    image.set_qform(VOXEL, 0)
    image.to_filename(folder / "scan.nii")
    return folder / "scan.nii"


def _with_nan(folder):
    array = _ramp().astype(np.float32)
    array[20, 20, 20] = np.nan
    return _save(folder, array)


def _folder_of_text(folder):
    (folder / "notes.txt").write_text("nothing")
    return folder


REFUSED = {
    "an empty file": (_empty_file, "empty"),
    "no such file": (lambda folder: folder / "scan.nii.gz", "no such file"),
    "a folder without images": (_folder_of_text, "neither a DICOM series nor a BIDS"),
    "a functional series (4-D)": (lambda folder: _save(folder, _ramp((*SHAPE, 5))), "5 volumes"),
    "CT": (lambda folder: _save(folder, (_ramp() * 8 - 1000).astype(np.int16)), "Hounsfield"),
    "a slab of a few slices": (lambda folder: _save(folder, _ramp((40, 48, 12))), "12 slices"),
    "thick slices": (lambda folder: _save(folder, _ramp((40, 48, 20)), np.diag((4.0, 4, 8, 1))), "coarse"),
    "one value everywhere": (lambda folder: _save(folder, np.full(SHAPE, 7, np.int16)), "same value"),
    "NaN": (_with_nan, "NaN"),
    "a header without orientation": (_no_orientation, "qform and sform"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_input_is_refused_by_what_was_found(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(ScanError, match=words) as refusal:
        read_source(make(tmp_path))
    assert str(tmp_path) in str(refusal.value)


# --- Judged when they are prepared: what, the verdict, and a figure that says so ------------------


def _grown(mask, mm):
    grow = sitk.BinaryDilate if mm > 0 else sitk.BinaryErode
    return to_array(grow(like(mask.astype(np.uint8), template()), [abs(mm)] * 3)) > 0


def _moved(prepared, degrees=(0, 0, 0), mm=(0, 0, 0)):
    move = sitk.Euler3DTransform()
    move.SetCenter((0, 18, 8))
    move.SetRotation(*np.radians(degrees).tolist())
    move.SetTranslation([float(value) for value in mm])
    return _through(prepared, move)


def _through(prepared, move):
    """Resampled by a transform."""

    def resampled(array, how):
        return to_array(sitk.Resample(like(array, template()), template(), move, how, 0.0))

    image = resampled(prepared.image, sitk.sitkLinear)
    return replace(
        prepared, image=image, brain=resampled(prepared.brain.astype(np.uint8), sitk.sitkNearestNeighbor) > 0
    )


def _mirrored(prepared, *axes):
    """Turned over about the brain's middle, as a registration that knows no mirror images leaves it."""

    def over(array):
        shift = [0, 0, 0]
        for axis in axes:
            hits = np.flatnonzero(prepared.brain.any(axis=tuple(a for a in range(3) if a != axis)))
            shift[axis] = int(hits[0] + hits[-1] - array.shape[axis] + 1)
        return np.roll(np.flip(array, axes), shift, (0, 1, 2))

    return replace(prepared, image=over(prepared.image), brain=over(prepared.brain))


def _half(prepared):
    brain = prepared.brain.copy()
    brain[:96] = False
    return replace(prepared, image=prepared.image * brain, brain=brain)


def _cut_off(prepared):
    seen = prepared.seen.copy()
    seen[:, :, 130:] = False
    return replace(prepared, image=prepared.image * seen, brain=prepared.brain & seen, seen=seen)


def _another_contrast(prepared):
    return replace(prepared, image=np.where(prepared.image > 40, 300 - prepared.image, prepared.image))


def _noise(prepared):
    return replace(prepared, image=np.random.default_rng(0).normal(100, 30, prepared.image.shape).astype(np.float32))


def _noisy(prepared):
    noise = np.random.default_rng(0).normal(0, 60, prepared.image.shape).astype(np.float32)
    return replace(prepared, image=np.abs(prepared.image + noise))


def _lopsided(prepared):
    """A brain extraction that has lost the top of one half."""
    brain = prepared.brain.copy()
    brain[110:, :, 100:] = False
    return replace(prepared, brain=brain)


def _padded(prepared):
    """Zeros around a scan that holds the whole brain."""
    near = _grown(prepared.brain, 4)
    box = np.zeros_like(near)
    box[tuple(slice(hits.min(), hits.max() + 1) for hits in np.nonzero(near))] = True
    return replace(prepared, image=prepared.image * box, seen=box)


def _boxed(prepared):
    """A stripped brain stored in the box that just holds it: what is seen touches it on all sides."""
    box = np.zeros_like(prepared.brain)
    box[tuple(slice(hits.min(), hits.max() + 1) for hits in np.nonzero(prepared.brain))] = True
    return replace(prepared, image=prepared.image * prepared.brain, seen=box, stripped=True)


def _scaled(prepared, *sizes):
    """A brain of another size and shape, as a rigid registration leaves it."""
    move = sitk.AffineTransform(3)
    move.SetCenter((0, 18, 8))
    move.SetMatrix(np.diag(1 / np.array(sizes)).ravel().tolist())
    return _through(prepared, move)


def _swapped(*order):
    """A header that names the axes in another order."""

    def swap(prepared):
        move = sitk.AffineTransform(3)
        move.SetCenter((0, 18, 8))
        move.SetMatrix(np.eye(3)[list(order)].ravel().tolist())
        return _through(prepared, move)

    return swap


def _half_stripped(prepared):
    """The skull is off on one side only."""
    brain = _grown(prepared.brain, 13)
    brain[:96] = prepared.brain[:96]
    return replace(prepared, brain=brain)


def _bitten(prepared, mm=35):
    """The mask lacks a bite at the front."""
    grid = np.ogrid[tuple(slice(size) for size in prepared.brain.shape)]
    front = int(np.flatnonzero(prepared.brain.any(axis=(0, 2)))[-1])
    far = (grid[0] - 80) ** 2 + (grid[1] - front) ** 2 + (grid[2] - 90) ** 2 > mm**2
    return replace(prepared, brain=prepared.brain & far)


def _stripped(prepared):
    return replace(prepared, image=prepared.image * prepared.brain, stripped=True)


def _cut_by(fraction, axis):
    """A field of view that leaves out a fraction of the brain."""

    def cut(prepared):
        kept = np.cumsum(prepared.brain.sum(axis=tuple(a for a in range(3) if a != axis))) / prepared.brain.sum()
        seen = prepared.seen.copy()
        np.moveaxis(seen, axis, 0)[kept > 1 - fraction] = False
        return replace(prepared, image=prepared.image * seen, brain=prepared.brain & seen, seen=seen)

    return cut


def _mapped(*levels):
    """Another contrast: what the darkest, …, brightest of the brain become."""

    def mapped(prepared):
        low, high = np.percentile(prepared.image[prepared.brain], (2, 98))
        at = (prepared.image - low) / (high - low)
        return replace(prepared, image=np.interp(at, np.linspace(0, 1, len(levels)), levels).astype(np.float32) * high)

    return mapped


def _ghost(prepared):
    """A copy of the head lies over it, shifted along the phases."""
    return replace(prepared, image=prepared.image + np.float32(0.4) * np.roll(prepared.image, 94, axis=1))


def _wrapped(prepared):
    """The back of the head lies over the front."""
    front = (np.arange(prepared.image.shape[1]) > 110)[:, None]
    return replace(prepared, image=prepared.image + np.roll(prepared.image, 120, axis=1) * front)


def _bottle(prepared):
    grid = np.ogrid[tuple(slice(-(size // 2), size - size // 2) for size in prepared.brain.shape)]
    bottle = (grid[0] ** 2 + grid[1] ** 2 < 65**2) & (np.abs(grid[2]) < 65)
    image = bottle * 100 + np.random.default_rng(0).normal(0, 3, bottle.shape)
    return replace(prepared, image=image.astype(np.float32), brain=bottle)


# What, the worst and the best verdict that it may get, and the figures of which one says so.
BAD, DOUBTFUL, GOOD = ("fail",), ("fail", "look"), ("pass",)
JUDGED = {
    "in MNI space already": (lambda p: p, GOOD, ()),
    "without its skull already": (_stripped, GOOD, ()),
    "zeros at the edges": (_padded, GOOD, ()),
    "stripped, in a box that just holds it": (_boxed, GOOD, ()),
    "a small brain, stripped, in its box": (lambda p: _boxed(_scaled(p, 0.86, 0.86, 0.8)), GOOD, ()),
    "a smaller brain of another shape": (lambda p: _scaled(p, 0.9, 0.95, 0.85), GOOD, ()),
    "1 mm and 1° off": (lambda p: _moved(p, degrees=(1, 0, 0), mm=(0, 1, 0)), GOOD, ()),
    "left and right mirrored": (lambda p: _mirrored(p, 0), GOOD, ()),
    "no skull strip possible": (
        lambda p: replace(p, brain=_grown(p.brain, 13)),
        BAD,
        ("litres", "bright_rim", "dark_rim"),
    ),
    "scalp and marrow in the mask": (lambda p: replace(p, brain=_grown(p.brain, 9)), BAD, ("bright_rim", "dark_rim")),
    "half the skull left": (_half_stripped, BAD, ("dark_rim", "bright_rim", "litres")),
    "a mask that cuts into the brain": (lambda p: replace(p, brain=_grown(p.brain, -6)), DOUBTFUL, ("cut_rim",)),
    "a mask that ends 3 mm too far in": (lambda p: replace(p, brain=_grown(p.brain, -3)), DOUBTFUL, ("cut_rim",)),
    "a bite out of the mask": (_bitten, DOUBTFUL, ("missing",)),
    "a bite of 2.5 cm": (lambda p: _bitten(p, 25), DOUBTFUL, ("bite",)),
    "a bite of 2.5 cm out of a brain without skull": (lambda p: _stripped(_bitten(p, 25)), DOUBTFUL, ("missing",)),
    "a mask without the top of one half": (_lopsided, BAD, ("missing",)),
    "half a brain": (_half, BAD, ("missing",)),
    "the top cut off": (_cut_off, BAD, ("cut",)),
    "1.5 % of it cut off above": (_cut_by(0.015, 2), DOUBTFUL, ("cut",)),
    "1.5 % of it cut off in front": (_cut_by(0.015, 1), DOUBTFUL, ("cut",)),
    "10 % of it cut off at a side": (_cut_by(0.1, 0), BAD, ("cut",)),
    "upside-down header": (lambda p: _mirrored(p, 2), BAD, ("upright",)),
    "back-to-front header": (lambda p: _mirrored(p, 1), BAD, ("upright",)),
    "turned over about the ears": (lambda p: _mirrored(p, 1, 2), BAD, ("upright",)),
    "y and z swapped": (_swapped(0, 2, 1), BAD, ("upright",)),
    "x and y swapped": (_swapped(1, 0, 2), BAD, ("upright",)),
    "x, y, z in another order": (_swapped(1, 2, 0), BAD, ("upright",)),
    "registered 15 mm off": (lambda p: _moved(p, mm=(0, 15, 0)), BAD, ("shift",)),
    "registered 6 mm off": (lambda p: _moved(p, mm=(0, 6, 0)), DOUBTFUL, ("shift",)),
    "registered 3.5 mm off": (lambda p: _moved(p, mm=(3.5, 0, 0)), DOUBTFUL, ("shift",)),
    "registered 4° off (nodding)": (lambda p: _moved(p, degrees=(4, 0, 0)), DOUBTFUL, ("turn",)),
    "registered 4° off (ear to shoulder)": (lambda p: _moved(p, degrees=(0, 4, 0)), DOUBTFUL, ("turn",)),
    "registered 4° off (to a side)": (lambda p: _moved(p, degrees=(0, 0, 4)), DOUBTFUL, ("turn",)),
    "registered 20° off (nodding)": (lambda p: _moved(p, degrees=(20, 0, 0)), BAD, ("turn",)),
    "registered 15° off (ear to shoulder)": (lambda p: _moved(p, degrees=(0, 15, 0)), BAD, ("turn",)),
    "registered 40° off": (lambda p: _moved(p, degrees=(0, 0, 40)), BAD, ("turn", "upright")),
    "another contrast": (_another_contrast, BAD, ("contrast", "similarity")),
    "like T2w": (_mapped(1.0, 0.6, 0.55, 0.35), BAD, ("contrast", "similarity")),
    "like FLAIR": (_mapped(0.1, 0.7, 0.8, 0.6), BAD, ("contrast", "similarity")),
    "noise": (_noise, BAD, ("similarity",)),
    "a bottle": (_bottle, BAD, ("similarity", "contrast")),
    "a very noisy scan": (_noisy, DOUBTFUL, ("noise",)),
    "a ghost": (_ghost, DOUBTFUL, ("echo",)),
    "wrapped around": (_wrapped, DOUBTFUL, ("bright",)),
    "wrapped around, then stripped": (lambda p: _stripped(_wrapped(p)), DOUBTFUL, ("bright",)),
}


@pytest.mark.parametrize("name", JUDGED)
def test_prepared_scan_is_judged_as_it_should_be(name, prepared):
    corrupt, expected, telling = JUDGED[name]
    figures, verdict = judge(corrupt(prepared))
    doubts = {one.name: one.reason for one in figures if one.verdict != "pass"}
    assert verdict in expected, doubts
    assert not telling or set(telling) & doubts.keys(), doubts
    assert all(doubts.values())


def test_score_names_the_figure_that_decided_its_value_and_what_one_sees(prepared):
    figures, _ = judge(_moved(prepared, mm=(0, 15, 0)))
    score = figures[0]
    shift = next(one for one in figures if one.name == "shift")
    assert score.name == "score"
    assert score.verdict == "fail"
    assert re.search(
        r"spoiled: \S+ is above \S+; mostly by shift: misplaced against the template by, mm: 1\d", score.reason
    )
    assert shift.value == pytest.approx(15, abs=1)
    assert "the registration may have gone wrong" in score.reason


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shift_and_turn_are_measured(axis, prepared):
    figures, _ = judge(_moved(prepared, degrees=8 * np.eye(3)[axis], mm=4 * np.eye(3)[axis]))
    values = {one.name: one.value for one in figures}
    assert values["turn"] == pytest.approx(8, abs=0.5)
    assert values["shift"] == pytest.approx(4, abs=1)


def test_cut_field_of_view_is_the_reason_and_not_the_header(prepared):
    figures, _ = judge(_cut_off(prepared))
    reasons = {one.name: one.reason for one in figures if one.reason}
    assert "cut" in reasons
    assert len(reasons) > 1
    assert all("header" not in reason and "registration" not in reason for reason in reasons.values())
    assert "the field of view of the scan cuts off the brain" in reasons["cut"]


def test_whole_brain_that_lies_wrong_is_not_called_cut(prepared):
    figures, _ = judge(_mirrored(prepared, 2))
    assert not any("field of view of the scan cuts" in one.reason for one in figures)
