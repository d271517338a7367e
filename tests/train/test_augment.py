"""Views against MONAI's transforms, which the released code uses, for the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import AdjustContrast, Resize, Rotate

from brainfm.contract import Volume, ZScore
from brainfm.train.augment import (
    Augmentation,
    View,
    adjust_contrast_,
    draw_view,
    make_view,
    masked_zscore_,
    place_image,
    place_mask,
)

SHAPE = (30, 38, 44)


@pytest.fixture
def volume():
    noise = torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool3d(noise, 3, 1, 1)[0, 0] * 10 + 20


@pytest.fixture
def brain():
    z, y, x = (torch.linspace(-1, 1, size) for size in SHAPE)
    return z[:, None, None] ** 2 + y[None, :, None] ** 2 + x**2 < 0.8


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.785])
def test_rotation_is_that_of_monai_in_three_dimensions(angle, volume):
    view, speckles = View((0, 0, 0), SHAPE, angle=angle), volume > 20
    turn = {"angle": (angle, 0, 0), "keep_size": True, "padding_mode": "border"}
    image = Rotate(mode="bilinear", **turn)(volume[None])[0].as_tensor()
    mask = Rotate(mode="nearest", **turn)(speckles[None].float())[0].as_tensor()
    assert torch.allclose(place_image(volume, view, torch.empty(SHAPE)), image, atol=1e-3)
    assert torch.equal(place_mask(speckles, view, SHAPE), mask > 0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(41, 50, 60), (20, 38, 50), (1, 3, 5)])
def test_resizing_and_mirroring_are_those_of_monai(shape, flip, volume):
    view, speckles = View((0, 0, 0), SHAPE, flip), volume > 20
    image, mask = Resize(shape, mode="trilinear")(volume[None])[0], Resize(shape, mode="nearest")(speckles[None])[0]
    if flip:
        image, mask = image.flip(-1), mask.flip(-1)
    assert torch.allclose(place_image(volume, view, torch.empty(shape)), image.as_tensor(), rtol=0, atol=1e-5)
    assert torch.equal(place_mask(speckles, view, shape), mask.as_tensor() > 0)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5, 4.0])
def test_contrast_is_that_of_monai(gamma, volume):
    theirs = AdjustContrast(gamma)(volume[None])[0].as_tensor()
    assert torch.allclose(adjust_contrast_(volume.clone(), gamma), theirs, atol=1e-5)


def test_zscore_is_that_of_the_input_contract(volume, brain):
    operation = ZScore(region="mask", eps=1e-12, eps_rule="under_root", background="zero")
    wanted = operation(Volume(volume.numpy()[None], brain.numpy(), np.eye(4))).image[0]
    assert np.abs(masked_zscore_(volume.clone(), brain).numpy() - wanted).max() < 1e-5


def test_whole_view_is_that_of_the_released_pipeline(volume, brain):
    """Crop, resize, flip, rotate, shift, contrast, masked z-score, by MONAI's deterministic transforms."""
    view = View((3, 5, 2), (20, 30, 33), True, 0.4, 0.3, 0.7)
    image, mask = volume[view.box][None], brain[view.box][None].float()
    image, mask = Resize(SHAPE, mode="trilinear")(image), Resize(SHAPE, mode="nearest")(mask)
    image, mask = image.flip(-1), mask.flip(-1)
    turn = {"angle": (0.4, 0, 0), "keep_size": True, "padding_mode": "border"}
    image, mask = Rotate(mode="bilinear", **turn)(image), Rotate(mode="nearest", **turn)(mask)
    image = AdjustContrast(0.7)(image + 0.3).as_tensor().double()
    inside = image[mask > 0]
    wanted = torch.where(mask.as_tensor() > 0, (image - inside.mean()) / inside.std(correction=0), 0)
    found = make_view(volume[None][(..., *view.box)], brain[view.box], view, SHAPE)
    assert found.shape == (1, *SHAPE)
    assert (found - wanted).abs().max() < 1e-3


def test_a_view_leaves_the_volume_it_is_made_of_as_it_was(volume, brain):
    view, before = View((0, 0, 0), SHAPE, gamma=0.7, shift=0.3), volume.clone()
    make_view(volume[None], brain, view, SHAPE)
    assert torch.equal(volume, before)


def test_channels_of_a_scan_are_placed_alike_and_standardised_each_by_itself(volume, brain):
    """Each as it would be alone; so a linear map of a channel, whose gamma curve bends its own range, has its view."""
    view = View((3, 5, 2), (20, 30, 33), True, 0.4, 0.3, 0.7)
    channels = torch.stack([volume, 3 * volume + 40, volume.flip(0)])[(..., *view.box)]
    together = make_view(channels, brain[view.box], view, SHAPE)
    assert together.shape == (3, *SHAPE)
    for channel, found in zip(channels, together, strict=True):
        assert torch.equal(found, make_view(channel[None], brain[view.box], view, SHAPE)[0])
    assert (together[0] - together[1]).abs().max() < 1e-3
    assert (together[0] - together[2]).abs().max() > 1


def test_missing_channel_stays_0_in_every_view(volume, brain):
    channels = torch.stack([volume, torch.zeros_like(volume)])
    found = make_view(channels, brain, View((0, 0, 0), SHAPE, angle=0.2, shift=0.3, gamma=0.7), SHAPE)
    assert not found[1].any()
    assert float(found[0].square().sum() / found[0].count_nonzero()) == pytest.approx(1, abs=1e-3)


def test_draws_have_the_published_distributions():
    rng = np.random.default_rng(0)
    full = (150, 192, 192)
    views = [draw_view(rng, full, Augmentation()) for _ in range(4000)]
    sizes, starts = np.array([v.size for v in views]), np.array([v.start for v in views])
    assert (sizes.min(axis=0) >= (30, 40, 40)).all()
    assert (sizes.max(axis=0) == full).all()
    assert np.abs(sizes.mean(axis=0) - [90, 116, 116]).max() < 2.5
    assert ((starts + sizes) <= full).all()
    assert starts.min() == 0
    for fraction, wanted in (
        (np.mean([v.flip for v in views]), 0.5),
        (np.mean([v.angle is not None for v in views]), 0.5),
        (np.mean([v.shift is not None for v in views]), 0.8),
        (np.mean([v.gamma is not None for v in views]), 0.8),
    ):
        assert fraction == pytest.approx(wanted, abs=0.03)
    angles = np.array([v.angle for v in views if v.angle is not None])
    gammas = np.array([v.gamma for v in views if v.gamma is not None])
    assert np.abs(angles).max() <= 0.785
    assert angles.std() == pytest.approx(0.785 / 3**0.5, rel=0.05)
    assert gammas.min() >= 0.5
    assert gammas.max() <= 1.5
    assert gammas.mean() == pytest.approx(1, abs=0.02)


def test_view_without_brain_or_with_values_that_are_not_finite_is_refused(volume, brain):
    view = View((0, 0, 0), (4, 4, 4))
    with pytest.raises(ValueError, match="no voxel"):
        make_view(volume[None][(..., *view.box)], brain[view.box], view, (8, 8, 8))
    volume[15, 19, 22] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        masked_zscore_(volume, brain)


@pytest.mark.parametrize("fields", [{"flip": 1.5}, {"crop_min": (0, 4, 4)}, {"gamma": (1.5, 0.5)}, {"rotate": -0.1}])
def test_ranges_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match="augmentation"):
        Augmentation(**fields)
