"""Convolutions of far-apart voxels: what one in float64 gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import brainfm
from brainfm.models.fast import chain, dilated

MEDICALNET = (8, 10, 8)  # of a crop of 64×80×64 voxels


def conv(dilation=4, channels=128, **changes) -> nn.Conv3d:
    torch.manual_seed(0)
    arguments = {"padding": dilation, "dilation": dilation, **changes}
    return nn.Conv3d(channels, 144, 3, **arguments).to(memory_format=torch.channels_last_3d).requires_grad_(False)


def off(layer: nn.Conv3d, x: torch.Tensor) -> float:
    """Of the convolution, by the way that its lines are to take."""
    along = dilated.lines(x.shape[2:], layer)
    assert along is not None
    found = dilated.convolved(x.permute(0, 2, 3, 4, 1), layer, along).permute(0, 4, 1, 2, 3)
    wanted = layer.double()(x.double())
    layer.float()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("dilation", "size"),
    [(4, MEDICALNET), (2, (4, 5, 4)), (4, (4, 8, 12)), (4, (3, 2, 1)), (4, (8, 11, 5)), (3, (6, 4, 9)), (2, (1, 4, 4))],
)
def test_map_is_that_of_the_convolution(dilation, size):
    assert off(conv(dilation), torch.randn(2, 128, *size)) < 3e-6


@pytest.mark.parametrize("outputs_at_a_time", [1, 100, 144])
def test_outputs_are_made_in_parts(monkeypatch, outputs_at_a_time):
    monkeypatch.setattr(dilated, "_OUTPUTS_AT_ONCE", outputs_at_a_time)
    assert off(conv(), torch.randn(1, 128, *MEDICALNET)) < 3e-6


def test_without_a_bias():
    assert off(conv(bias=False), torch.randn(1, 128, *MEDICALNET)) < 3e-6


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (conv(2), MEDICALNET),  # lines of 4 and 5 voxels
        (conv(4), (12, 12, 12)),  # all of 3: a kernel has more transforms than are saved
        (conv(1), (2, 2, 2)),
        (conv(channels=32), MEDICALNET),
        (conv(stride=2), MEDICALNET),
        (conv(padding=0), (12, 12, 12)),
        (conv(padding="same"), MEDICALNET),
        (conv(padding_mode="circular"), MEDICALNET),
        (conv(groups=2), MEDICALNET),
    ],
)
def test_what_is_left_to_torch(layer, size):
    assert dilated.lines(size, layer) is None


def test_medicalnets_last_stage_takes_it(monkeypatch):
    seen = []
    monkeypatch.setattr(chain.dilated, "convolved", lambda *args, way=dilated.convolved: seen.append(1) or way(*args))
    torch.manual_seed(0)
    model, x = brainfm.create_model("medicalnet_resnet10"), torch.randn(2, 1, 64, 80, 64)
    with torch.inference_mode():
        wanted, found = model(x), brainfm.optimize(model)(x)
    assert len(seen) == 2
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
