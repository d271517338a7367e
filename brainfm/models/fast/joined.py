"""Two maps side by side in channels, the second of them of fewer voxels, that are put together as they are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Joined:
    """What `cat((beside, interpolate(below, mode="nearest")))` is, channels last, a few planes at a time.

    Of a head the enlarged map and the joined one are the largest of a U-Net by far.

    Args:
        beside: [B, D, H, W, C].
        below: [B, d, h, w, c].
    """

    def __init__(self, beside: Tensor, below: Tensor) -> None:
        self.beside, self.below = beside, below
        self.shape = torch.Size((*beside.shape[:-1], beside.shape[-1] + below.shape[-1]))
        sizes = zip(below.shape[1:4], beside.shape[1:4], strict=True)
        self._nearest = [_nearest(before, after) for before, after in sizes]

    def __len__(self) -> int:
        return len(self.beside)

    def __getitem__(self, place: slice | tuple[slice, slice]) -> Tensor:
        """[b, planes, H, W, C + c] of some volumes, and some of their planes."""
        volumes, planes = place if isinstance(place, tuple) else (place, slice(None))
        depth, rows, columns = self._nearest
        below = self.below[volumes].index_select(1, depth[planes])
        below = below.index_select(2, rows).index_select(3, columns)
        return torch.cat((self.beside[volumes, planes], below), dim=-1)

    def new_empty(self, *size: int) -> Tensor:
        """As a tensor's."""
        return self.beside.new_empty(size)

    def new_zeros(self, *size: int) -> Tensor:
        """As a tensor's."""
        return self.beside.new_zeros(size)


def _nearest(before: int, after: int) -> Tensor:
    """[after]: which of so many voxels along an axis torch takes for each of the enlarged ones."""
    return F.interpolate(torch.arange(before, dtype=torch.float64)[None, None], size=after, mode="nearest")[0, 0].long()
