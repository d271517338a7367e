"""Where a map differs from that of an empty volume, and what it is where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.models.fast.winograd import geometry, outputs


@dataclass(frozen=True, eq=False)
class Live:
    """Where a map can differ from that of an empty volume: a box in each plane.

    Attributes:
        low: [planes, 2], the first row and column of the box.
        high: [planes, 2], the row and column after its last; at most `low` where the plane has none.
        size: Rows and columns of a plane.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    size: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor) -> Live:
        """Of volumes [B, C, D, H, W]: what is not 0 in any."""
        filled = (x != 0).flatten(0, 1).any(dim=0)
        low, high = np.empty((len(filled), 2), np.int64), np.empty((len(filled), 2), np.int64)
        for axis, other in ((0, 2), (1, 1)):
            found: NDArray[np.bool_] = filled.any(dim=other).cpu().numpy()
            any_there = np.any(found, axis=1)
            low[:, axis] = np.where(any_there, found.argmax(axis=1), found.shape[1])
            high[:, axis] = np.where(any_there, found.shape[1] - found[:, ::-1].argmax(axis=1), 0)
        return cls(low, high, (filled.shape[1], filled.shape[2]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Planes, rows and columns of the map."""
        return len(self.low), *self.size

    def after(self, layer: nn.Conv3d | nn.MaxPool3d) -> Live:
        """Of the layer's output: every place whose window has a live one in it."""
        kernel, stride, padding = geometry(layer)
        planes, *size = (outputs(n, layer) for n in self.shape)
        first = np.arange(planes) * stride - padding
        windows = first[:, None] + np.arange(kernel)
        inside = ((windows >= 0) & (windows < len(self.low)))[..., None]
        windows = windows.clip(0, len(self.low) - 1)
        low = np.where(inside, self.low[windows], max(self.size)).min(axis=1)
        high = np.where(inside, self.high[windows], 0).max(axis=1)
        return Live(
            np.maximum(0, -((kernel - 1 - padding - low) // stride)),
            np.minimum(size, (high - 1 + padding) // stride + 1),
            (size[0], size[1]),
        )

    def joined(self, other: Live) -> Live:
        """Of a sum of two maps."""
        return Live(np.minimum(self.low, other.low), np.maximum(self.high, other.high), self.size)

    def box(self, first: int, last: int) -> tuple[slice, slice] | None:
        """The rows and columns that hold what is live in planes `first` up to, not including, `last`."""
        (top, left), (bottom, right) = self.low[first:last].min(axis=0), self.high[first:last].max(axis=0)
        return (slice(int(top), int(bottom)), slice(int(left), int(right))) if top < bottom and left < right else None


class Background:
    """The map of an empty volume, from that of a small one: its planes differ by the distance to the border alone."""

    def __init__(self, small: Tensor, shape: Sequence[int]) -> None:
        self._small = small[0].permute(1, 2, 3, 0).contiguous()
        places = [_nearest_border(n, size) for n, size in zip(shape, small.shape[2:], strict=True)]
        self._z = places[0].tolist()
        self._rows, self._columns = (place.to(small.device) for place in places[1:])
        self._plane = self._small[0], -1

    def fill(self, out: Tensor, first: int) -> None:
        """Write the planes from `first` on to `out`, [batch, planes, rows, columns, C]."""
        for n, z in enumerate(self._z[first : first + out.shape[1]]):
            if self._plane[1] != z:  # most planes are the middle one
                self._plane = self._small[z].index_select(0, self._rows).index_select(1, self._columns), z
            out[:, n] = self._plane[0]


def _nearest_border(n: int, small: int) -> Tensor:
    """For each of n places, the one of `small` places that is as far from the same border, or the middle one."""
    place, half = torch.arange(n), small // 2
    return torch.where(place < half, place, torch.where(n - place < small - half, small - n + place, half))
