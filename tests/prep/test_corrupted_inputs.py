"""What must never pass in silence: a table of corrupted inputs, and what becomes of each.

Left and right mirrored is not among them: no figure tells it, for the template and nearly every brain are symmetric.
"""

from __future__ import annotations

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


JUDGED = {
    "in MNI space already": (lambda p: p, "pass", ""),
    "without its skull already": (lambda p: replace(p, image=p.image * p.brain, stripped=True), "pass", ""),
    "zeros at the edges": (_padded, "pass", ""),
    "no skull strip possible": (lambda p: replace(p, brain=_grown(p.brain, 13)), "fail", "litres"),
    "scalp and marrow in the mask": (lambda p: replace(p, brain=_grown(p.brain, 9)), "fail", "bright_rim"),
    "a mask that cuts into the brain": (lambda p: replace(p, brain=_grown(p.brain, -6)), "fail", "cut_rim"),
    "a mask without the top of one half": (_lopsided, "fail", "balance"),
    "half a brain": (_half, "fail", "balance"),
    "the top cut off": (_cut_off, "fail", "unseen"),
    "upside-down header": (lambda p: _mirrored(p, 2), "fail", "upright"),
    "back-to-front header": (lambda p: _mirrored(p, 1), "fail", "upright"),
    "turned over about the ears": (lambda p: _mirrored(p, 1, 2), "fail", "upright"),
    "registered 15 mm off": (lambda p: _moved(p, mm=(0, 15, 0)), "fail", "offset"),
    "registered 6 mm off": (lambda p: _moved(p, mm=(0, 6, 0)), "look", "offset"),
    "registered 20° off (nodding)": (lambda p: _moved(p, degrees=(20, 0, 0)), "fail", "tilt"),
    "registered 15° off (ear to shoulder)": (lambda p: _moved(p, degrees=(0, 15, 0)), "fail", "symmetry"),
    "another contrast": (_another_contrast, "fail", "similarity"),
    "noise": (_noise, "fail", "similarity"),
    "a very noisy scan": (_noisy, "fail", "noise"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_prepared_scan_is_judged_as_it_should_be(name, prepared):
    corrupt, expected, figure = JUDGED[name]
    figures, verdict = judge(corrupt(prepared))
    doubts = {one.name: one.verdict for one in figures if one.verdict != "pass"}
    assert verdict == expected, [one.reason for one in figures if one.reason]
    assert figure in doubts or not figure
    assert all(one.reason for one in figures if one.verdict != "pass")


def test_cut_field_of_view_is_the_reason_and_not_the_header(prepared):
    figures, _ = judge(_cut_off(prepared))
    reasons = {one.name: one.reason for one in figures if one.reason}
    assert "unseen" in reasons
    assert len(reasons) > 1
    assert all("header" not in reason and "registration" not in reason for reason in reasons.values())
    assert "the field of view of the scan cuts off the brain" in reasons["unseen"]


def test_whole_brain_that_lies_wrong_is_not_called_cut(prepared):
    figures, _ = judge(_mirrored(prepared, 2))
    assert not any("field of view of the scan cuts" in one.reason for one in figures)
