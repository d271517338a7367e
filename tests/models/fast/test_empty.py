"""Where a map differs from an empty volume's, and what that is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brainfm.models.fast.empty import Background, Live


def test_live_box_holds_every_voxel_that_a_change_reaches():
    x = torch.zeros(1, 1, 21, 30, 27)
    x[0, 0, 9:12, 8:20, 3:9] = 1
    conv, pool = nn.Conv3d(1, 2, 7, padding=3), nn.MaxPool3d(3, 2, 1)
    with torch.no_grad():
        changed = pool(conv(x)) != pool(conv(torch.zeros_like(x)))
    live = Live.of(x).after(conv).after(pool)
    assert live.shape == tuple(changed.shape[2:])
    outside = changed.any(dim=(0, 1))
    for plane in range(live.shape[0]):
        if box := live.box(plane, plane + 1):
            assert outside[plane][box].any()
            outside[plane][box] = False
    assert not outside.any()


@pytest.mark.parametrize("size", [5, 6, 9, 20])
def test_map_of_an_empty_volume_is_read_off_a_small_one(size):
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv3d(3, 3, 3, padding=1) for _ in range(2)))
    small, whole = (network(torch.ones(1, 3, n, n + 1, n + 2)).detach() for n in (5, size))
    found = torch.empty(1, size, size + 1, size + 2, 3)
    background = Background(small, whole.shape[2:])
    for first in range(0, size, 4):
        background.fill(found[:, first : first + 4], first)
    torch.testing.assert_close(found, whole.permute(0, 2, 3, 4, 1))
