"""Likeness to the template: mutual information against a loop over points in float64, its slope against differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.prep import similarity
from brainfm.prep.image import sitk
from brainfm.prep.similarity import BINS, LEVELS, Similarity

LEVEL = 1


@pytest.fixture(scope="module")
def brain():
    image, mask = (sitk.ReadImage(str(path)) for path in (SAMPLE_SCAN, SAMPLE_MASK))
    return sitk.Mask(sitk.Cast(image, sitk.sitkFloat32), sitk.Cast(mask > 0, sitk.sitkUInt8))


@pytest.fixture(scope="module")
def likeness(brain):
    return Similarity(brain)


@pytest.fixture
def position(likeness):
    """Some way from where the brain fits."""
    found = np.eye(4)
    turn = 0.1
    found[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    found[:3, 3] = likeness.centre + np.array([3, -2, 4])
    return found


def naive(likeness, position, level):
    """In float64, point by point."""
    points, fixed = (part.numpy() for part in similarity._points(level))
    volume, to_grid = likeness._levels[level]
    grid = (to_grid.numpy() @ position @ points.T.astype(float))[:3].T
    size = np.array(volume.shape[:1:-1])
    index = (grid + 1) / 2 * (size - 1)
    values = map_coordinates(volume[0, 0].numpy().astype(float), index[:, ::-1].T, order=1)
    joint = np.zeros((BINS, BINS))
    for place, value, row in zip(grid, np.clip(values, 0, BINS - 1), fixed // BINS, strict=True):
        if np.abs(place).max() <= 1:
            low = min(int(value), BINS - 2)
            joint[row, low] += 1 - (value - low)
            joint[row, low + 1] += value - low
    joint /= joint.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log(joint[some] / apart[some])).sum())


def test_information_is_the_naive_loops(likeness, position):
    wanted = naive(likeness, position, LEVEL)
    assert likeness.at(position[None], LEVEL)[0] == pytest.approx(wanted, rel=1e-5)
    assert likeness._rise(torch.from_numpy(position), LEVEL)[0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("motion", ["rigid", "affine"])
def test_slope_is_that_of_the_naive_loop(likeness, position, motion):
    move, count = {"rigid": (similarity._rigid, 6), "affine": (similarity._affine, 12)}[motion]
    start = torch.from_numpy(position)

    def moved(values):
        return move(start, values)

    parameters = torch.linspace(-2, 2, count, dtype=torch.float64, requires_grad=True)  # mm
    _, rise = likeness._rise(moved(parameters).detach(), LEVEL)
    (found,) = torch.autograd.grad(moved(parameters), parameters, rise)
    wanted = []
    for axis in range(count):
        step = torch.zeros(count, dtype=torch.float64)
        step[axis] = 0.02 * LEVELS[LEVEL][0]
        ahead, behind = (naive(likeness, moved(parameters.detach() + way * step).numpy(), LEVEL) for way in (1, -1))
        wanted.append((ahead - behind) / (2 * float(step[axis])))
    error = np.linalg.norm(found.numpy() - wanted) / np.linalg.norm(wanted)
    assert error < 0.03  # a difference over so far averages the corners of linear interpolation


def test_rotation_is_the_matrix_exponential():
    start = torch.eye(4, dtype=torch.float64)
    for values in ([0.0] * 6, [1e-9, 0, 0, 1, 2, 3], [30.0, -50.0, 20.0, 0, 0, 0], [0, 188.0, 0, 0, 0, 0]):
        parameters = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        x, y, z = (parameters[:3] / 60).tolist()
        exact = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))
        position = similarity._rigid(start, parameters)
        assert torch.allclose(position[:3, :3], exact, atol=1e-12)
        assert torch.isfinite(torch.autograd.grad(position.sum(), parameters)[0]).all()


def test_scan_that_covers_too_little_says_nothing(likeness):
    far = np.eye(4)
    far[:3, 3] = 300
    assert likeness.at(far[None], LEVEL)[0] == 0
    information, rise = likeness._rise(torch.from_numpy(far), LEVEL)
    assert information == 0
    assert not rise.any()
