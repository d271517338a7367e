"""Convolutions of a few planes: what a convolution in float64 gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brainfm.inference.convolution import Direct, Winograd, outputs


@pytest.mark.parametrize("way", [Direct, Winograd])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_planes_are_those_of_the_convolution(way, count):
    torch.manual_seed(0)
    conv = nn.Conv3d(32, 24, 3, padding=1)
    planes = torch.randn(2, count + 2, 9, 12, 32)
    out = torch.empty(2, count, 7, 10, 24)
    with torch.inference_mode():
        way(conv)(planes.unbind(1), out)
        volume = planes.permute(0, 4, 1, 2, 3).double()
        wanted = nn.functional.conv3d(volume, conv.weight.double(), conv.bias.double()).permute(0, 2, 3, 4, 1)
    error = float((out - wanted).norm() / wanted.norm())
    assert error < (3e-6 if way is Winograd else 1e-6)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (7, 1, 3)])
def test_number_of_outputs(size, kernel, stride, padding):
    conv = nn.Conv3d(1, 1, kernel, stride, padding, device="meta")
    assert outputs(size, conv) == conv(torch.empty(1, 1, size, size, size, device="meta")).shape[2]


def test_winograds_is_for_kernels_of_three_planes_in_float32_on_a_processor():
    assert Winograd.applies(nn.Conv3d(1, 1, 3))
    assert not Winograd.applies(nn.Conv3d(1, 1, 3, dtype=torch.bfloat16))
    assert not Winograd.applies(nn.Conv3d(1, 1, 3, device="meta"))
    assert not Winograd.applies(nn.Conv3d(1, 1, 3, stride=2))
    assert not Winograd.applies(nn.Conv3d(1, 1, 1))
