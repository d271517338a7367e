"""Where a brain lies: found from any header within 45°, steadily, to the bit; and what the record says of it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.assets import SAMPLE_SCAN
from brainfm.errors import ScanError
from brainfm.prep import bias, registration, steps
from brainfm.prep.image import like, sitk, template, to_array, to_itk
from brainfm.prep.registration import register

POINTS = np.array([(x, y, z, 1) for x in (-50, 50) for y in (-80, 50) for z in (-40, 60)], dtype=float)  # LPS mm


@pytest.fixture(scope="session")
def brain():
    """The packaged brain, at 2 mm, turned a little and noisy: what registration gets. Read-only."""
    scan = nib.load(SAMPLE_SCAN)
    voxels = np.asanyarray(scan.dataobj).astype(np.float32)
    voxels += (voxels > 0) * np.random.default_rng(0).normal(0, 8, voxels.shape).astype(np.float32)
    small = sitk.BinShrink(to_itk(np.maximum(voxels, 0), scan.affine), [2, 2, 2])
    return lying(small, (4, -3, 5), (3, -2, 6))


@pytest.fixture(scope="session")
def found(brain):
    return register(brain)


def motion(degrees, millimetres):
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*np.radians(degrees).tolist())
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(turn.GetMatrix(), (3, 3))
    matrix[:3, 3] = millimetres
    return matrix


def lying(image, degrees, millimetres, mirrored=(1, 1, 1)):
    """The same voxels, whose header says that they are turned and shifted, LPS mm."""
    matrix = motion(degrees, millimetres)
    moved = sitk.Image(image)
    direction = matrix[:3, :3] @ np.diag(mirrored) @ np.reshape(image.GetDirection(), (3, 3))
    moved.SetDirection(direction.ravel().tolist())
    moved.SetOrigin((matrix[:3, :3] @ (np.array(image.GetOrigin()) * mirrored) + matrix[:3, 3]).tolist())
    return moved


def matrix(transform):
    made = np.eye(4)
    made[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    made[:3, 3] = transform.GetTranslation()
    return made


def millimetres(one, other):
    return np.linalg.norm(POINTS @ (one - other)[:3].T, axis=1).max()


def test_average_brain_lies_where_it_was_put(found):
    assert millimetres(matrix(found.rigid), motion((4, -3, 5), (3, -2, 6))) < 1
    assert found.starts["steady"]
    assert not found.starts["second_round"]
    assert found.starts["looked_at"] > 200
    assert 1 <= found.starts["agree"] <= found.starts["followed"] == 5
    assert found.similarity["affine"] > found.similarity["rigid"] > 0.5


@pytest.mark.parametrize("degrees", [(40, 0, 0), (0, -45, 0), (0, 0, 45), (-40, 25, -35)])
def test_header_that_is_turned_and_far_away_ends_where_the_right_one_does(degrees, brain, found):
    lie = motion(degrees, (150, -300, 120))
    again = register(lying(brain, degrees, (150, -300, 120)))
    assert millimetres(np.linalg.inv(lie) @ matrix(again.rigid), matrix(found.rigid)) < 0.5
    assert millimetres(np.linalg.inv(lie) @ matrix(again.affine), matrix(found.affine)) < 0.5


def test_same_brain_gives_the_same_transforms_to_the_bit_on_any_number_of_threads(brain, found):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(2, threads))
        again = register(sitk.Image(brain))
        assert torch.get_num_threads() == 3 - min(2, threads)  # as it was set
    finally:
        torch.set_num_threads(threads)
    for kind in ("rigid", "affine"):
        one, other = (getattr(each, kind) for each in (found, again))
        assert one.GetMatrix() == other.GetMatrix()
        assert one.GetTranslation() == other.GetTranslation()
    assert found.to_dict() == again.to_dict()


def test_affine_finds_another_size_and_rigid_keeps_it():
    stretch = sitk.AffineTransform(3)
    stretch.Scale((1.08, 1.0, 0.94))
    smaller = sitk.Resample(template(), template(), stretch, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    found = register(sitk.Shrink(smaller, [2, 2, 2]))
    assert np.allclose(np.diag(matrix(found.affine))[:3], (1 / 1.08, 1, 1 / 0.94), atol=0.01)
    turn = matrix(found.rigid)[:3, :3]
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-6)


def test_second_look_comes_back_though_rigid_fits_of_another_size_are_as_good_in_several_places():
    """Looked at as a rigid one, this came back 1.0° away and began a second round."""
    smaller = sitk.AffineTransform(3)
    smaller.Scale((1.1, 1.2, 1.3))
    brain = sitk.BinShrink(
        sitk.Resample(template(), template(), smaller, sitk.sitkLinear, 0.0, sitk.sitkFloat32), [2] * 3
    )
    voxels = sitk.GetArrayFromImage(brain)
    voxels += (voxels > 0) * np.random.default_rng(0).normal(0, 8, voxels.shape).astype(np.float32)
    found = register(lying(like(np.maximum(voxels, 0).T, brain), (-15, 20, 5), (10, 20, -30)))
    assert found.starts["moved_deg"] < 0.1
    assert found.starts["steady"]
    assert not found.starts["second_round"]
    lie = np.linalg.inv(motion((-15, 20, 5), (10, 20, -30)))
    assert np.allclose((lie @ matrix(found.affine))[:3, :3], np.diag((1 / 1.1, 1 / 1.2, 1 / 1.3)), atol=0.01)


def test_affine_that_went_astray_leaves_the_rigid_one_and_a_reason(brain, found, monkeypatch):
    monkeypatch.setattr(registration, "MOST_STRETCH", 1.001)
    without = register(brain)
    assert without.affine is None
    assert "went astray" in without.to_dict()["no_affine"]
    assert millimetres(matrix(without.wanted("rigid")), matrix(found.rigid)) < 0.5
    with pytest.raises(ScanError, match=r"would stretch the brain by .*; use the rigid one"):
        without.wanted("affine")


def test_result_that_does_not_come_back_begins_a_second_round_and_says_so(brain, found, monkeypatch):
    monkeypatch.setattr(registration, "STEADY_DEG", -1.0)
    monkeypatch.setattr(registration, "ROUNDS", ((20.0, 20.0, 2), (20.0, 40.0, 3)))
    again = register(brain)
    assert again.starts | {"agree": 0, "rank": 0, "moved_deg": 0} == {
        "looked_at": 27 + 8,
        "followed": 5,
        "agree": 0,
        "rank": 0,
        "moved_deg": 0,
        "second_round": True,
        "steady": False,
    }
    assert millimetres(matrix(again.rigid), matrix(found.rigid)) < 0.5


@pytest.mark.slow
def test_header_that_mirrors_the_brain_is_not_put_right_by_half_a_turn(brain, found):
    """As a brain turned by 180° it would fit nearly as well, with left and right exchanged."""
    flipped = register(lying(brain, (0, 0, 0), (0, 0, 0), (1, 1, -1)))
    assert np.trace(matrix(flipped.rigid)[:3, :3]) > 1  # turned by less than 90°
    assert flipped.similarity["rigid"] < 0.5 * found.similarity["rigid"]


def test_brain_that_fits_only_beyond_the_most_turn_is_refused(brain, monkeypatch):
    monkeypatch.setattr(registration, "ROUNDS", ((1.0, 2.0, 1),))
    monkeypatch.setattr(registration, "MOST_TURN_DEG", 3.0)
    with pytest.raises(ScanError, match=r"more than 3° against its header, which may have axes swapped or reversed"):
        register(brain)


def test_empty_image_is_refused(brain):
    with pytest.raises(ScanError, match="no brain to register"):
        register(brain * 0)


# --- Bias field -----------------------------------------------------------------------------------


def test_field_on_coarse_voxels_gives_the_corrected_head_again(brain):
    ramp = np.exp(np.linspace(-0.4, 0.4, brain.GetSize()[0], dtype=np.float32))[:, None, None]
    dimmed = like(to_array(brain) * ramp, brain) - 7  # as scanners that store signed values have it
    corrected, field = bias.n4(dimmed)
    assert max(field.GetSpacing()) >= 4
    assert max(field.GetSize()) < 60
    wide = sitk.Resample(field, dimmed, sitk.Transform(), sitk.sitkLinear, 0.0, useNearestNeighborExtrapolator=True)
    expected = (to_array(dimmed) - to_array(dimmed).min()) * np.exp(-to_array(wide))
    assert np.allclose(to_array(corrected), expected, rtol=1e-5)
    assert bias.none(dimmed) == (dimmed, None)


# --- The record -----------------------------------------------------------------------------------


def test_record_and_every_tools_settings_are_json(found):
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    for table in (steps.BIAS, steps.EXTRACTION, steps.REGISTRATION):
        for backend in table.values():
            assert isinstance(json.loads(json.dumps(backend.settings())), dict)
    assert steps.BIAS["n4"].settings()["iterations"] == list(bias.ITERATIONS)
    assert {"levels_mm", "points", "starts", "seed"} <= steps.REGISTRATION["torch"].settings().keys()
    assert steps.EXTRACTION["deepbet"].settings()["voxels"] == [128, 256]
