"""Convolutions of a few planes: what a convolution in float64 gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brainfm.models.fast.winograd import Direct, Winograd, fastest, outputs


def error(way, count: int, dtype: torch.dtype) -> float:
    """Of some planes' convolution in a type, against one in float64."""
    torch.manual_seed(0)
    conv = nn.Conv3d(32, 24, 3, padding=1).to(dtype)
    planes = torch.randn(2, count + 2, 9, 12, 32).to(dtype)
    out = torch.empty(2, count, 7, 10, 24, dtype=dtype)
    with torch.inference_mode():
        way(conv)(planes.unbind(1), out)
        volume = planes.permute(0, 4, 1, 2, 3).double()
        wanted = nn.functional.conv3d(volume, conv.weight.double(), conv.bias.double()).permute(0, 2, 3, 4, 1)
    return float((out - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("way", "most"), [(Direct, 1e-6), (Winograd, 3e-6)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_planes_are_those_of_the_convolution(way, most, count):
    assert error(way, count, torch.float32) < most


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_in_bfloat16_a_transform_costs_three_bits(count):
    assert error(Winograd, count, torch.bfloat16) < 8 * error(Direct, count, torch.bfloat16)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (7, 1, 3)])
def test_number_of_outputs(size, kernel, stride, padding):
    conv = nn.Conv3d(1, 1, kernel, stride, padding, device="meta")
    assert outputs(size, conv) == conv(torch.empty(1, 1, size, size, size, device="meta")).shape[2]


@pytest.mark.parametrize(
    ("conv", "way"),
    [
        (nn.Conv3d(1, 1, 3), Winograd),
        (nn.Conv3d(1, 1, 3, dtype=torch.bfloat16), Winograd),
        (nn.Conv3d(1, 1, 3, dtype=torch.float16), Direct),
        (nn.Conv3d(1, 1, 3, device="meta"), Direct),
        (nn.Conv3d(1, 1, 3, stride=2), Direct),
        (nn.Conv3d(1, 1, 1), Direct),
    ],
)
def test_winograds_are_for_kernels_of_three_planes_on_a_processor(conv, way):
    assert type(fastest(conv)) is way
