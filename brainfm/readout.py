"""A scan's tensor → one vector, or a dense feature map, as the weight's readout says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.contract import Readout, Window
from brainfm.errors import ScanError
from brainfm.models.encoder import Encoder
from brainfm.system import tf32

_Box = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder makes of a scan.

    Attributes:
        vectors: [B, num_features] float32.
        maps: [B, C, d, h, w], where dense features were asked for.
    """

    vectors: Tensor
    maps: Tensor | None = None


class Reader:
    """Volumes of one shape → vectors, as a readout says; and their dense features, where they are asked for.

    Args:
        model: An encoder, or the copy that `brainfm.optimize` made of one. Another module gives its vectors itself.
        readout: How features become the vector; None is what the model's cfg says, but for the pooling that the model
            was set to.
        dense: Whether maps are wanted too.

    Raises:
        ValueError: The readout or the maps need what the module or its contract does not have.
    """

    def __init__(self, model: nn.Module, readout: Readout | None = None, *, dense: bool = False) -> None:
        cfg = getattr(model, "pretrained_cfg", None)
        own: Readout = getattr(cfg, "readout", None) or Readout()
        self.model: Any = model
        self.readout = readout or own
        self.dense = dense
        if (dense or self.readout.pool == "brain") and not isinstance(model, Encoder):
            raise ValueError(f"a {type(model).__name__} has no dense features: it is no brainfm.models.Encoder")
        pool = getattr(model, "global_pool", None)
        if readout is not None and readout.pool not in (None, "brain", pool):
            raise ValueError(
                f"the readout pools by {readout.pool!r}, and the model is set to {pool!r}; set it by "
                f"model.reset_classifier(0, global_pool={readout.pool!r})"
            )
        spec = getattr(cfg, "input_spec", None)
        if self.by_brain and spec is not None and spec.mask == "none":
            raise ValueError("the readout averages over the brain, and the model's input contract takes no brain mask")

    @property
    def by_brain(self) -> bool:
        """Whether the brain mask is needed, [D, H, W] booleans on the tensor's voxels."""
        window = self.readout.window
        return self.readout.pool == "brain" or (window is not None and window.average == "brain")

    def __call__(self, volumes: Tensor, masks: Sequence[NDArray[np.bool_] | None] | None = None) -> Features:
        """Read volumes [B, C, D, H, W], with the brain mask of each where the readout goes by the brain.

        Raises:
            ScanError: A mask is needed and is not there, or no cell or window of it holds brain.
        """
        if self.by_brain and (masks is None or any(mask is None for mask in masks)):
            raise ScanError("this model averages over the brain, and there is no brain mask: pass mask=")
        brains = [mask for mask in masks or () if mask is not None] if self.by_brain else []
        with torch.inference_mode(), tf32(getattr(self.model, "tf32", False)):
            if self.readout.window is None:
                return self._whole(volumes, brains)
            found = [
                self._by_windows(volume[None], brains[n] if brains else None, self.readout.window)
                for n, volume in enumerate(volumes)
            ]
        maps = torch.cat([one.maps for one in found if one.maps is not None]) if self.dense else None
        return Features(torch.cat([one.vectors for one in found]), maps)

    def _whole(self, x: Tensor, brains: Sequence[NDArray[np.bool_]]) -> Features:
        if not self.dense and self.readout.pool != "brain":
            vectors: Tensor = self.model(x)
            return Features(vectors.float())
        model = self.model
        like = next(
            model.parameters(), x
        )  # an optimised copy's hooks cast what its `forward` is given, and nothing else
        features, maps = model.features_and_map(x.to(like.dtype))
        maps = maps.float()
        if self.readout.pool == "brain":
            return Features(torch.stack([_brain_mean(m, b, model) for m, b in zip(maps, brains, strict=True)]), maps)
        return Features(model.forward_head(features, pre_logits=True).float(), maps)

    def _by_windows(self, x: Tensor, brain: NDArray[np.bool_] | None, window: Window) -> Features:
        """One volume [1, C, D, H, W], in windows."""
        padded = _padded(x, window.shape, window.pad)
        mask = brain
        if brain is not None:
            mask = np.pad(brain, [(0, n - m) for n, m in zip(padded.shape[2:], brain.shape, strict=True)])
        alone = Reader(self.model, Readout(self.readout.pool if self.readout.pool == "brain" else None))
        vectors, weights = [], []
        for box in windows(padded.shape[2:], window):
            inside = None if mask is None else mask[box]
            if inside is not None and not inside.any():
                continue
            try:
                seen = alone(padded[(..., *box)], [inside])
            except ScanError:  # brain there is, but no cell is centred in it
                continue
            vectors.append(seen.vectors[0])
            count = 1.0 if inside is None or window.average == "mean" else float(np.count_nonzero(inside))
            weights.append(count)
        if not vectors:
            raise ScanError("no window of the readout holds a voxel of the brain mask")
        fractions = torch.tensor(weights, device=x.device) / sum(weights)
        vector = (fractions @ torch.stack(vectors))[None]
        return Features(vector, self._stitched(x, window) if self.dense else None)

    def _stitched(self, x: Tensor, window: Window) -> Tensor:
        """The map [1, C, d, h, w] of one volume: the mean of those of windows that begin on a cell of the whole map."""
        steps = self.model.feature_info[-1]["reduction"]
        size = [
            width + -(-max(0, n - width) // step) * step
            for n, width, step in zip(x.shape[2:], window.shape, steps, strict=True)
        ]
        padded = _padded(x, size, window.pad)
        boxes = list(windows(size, window, steps))
        seen = [self.model.dense(padded[(..., *box)])[0].float() for box in boxes]
        starts = [[part.start // step for part, step in zip(box, steps, strict=True)] for box in boxes]
        channels, *own = seen[0].shape
        whole = [last + n for last, n in zip(starts[-1], own, strict=True)]
        cells, count = x.new_zeros(channels, *whole, dtype=torch.float32), x.new_zeros(whole, dtype=torch.float32)
        for first, part in zip(starts, seen, strict=True):
            place = tuple(slice(start, start + n) for start, n in zip(first, own, strict=True))
            cells[(slice(None), *place)] += part
            count[place] += 1
        # Those that look at what was padded are left out.
        places = cell_places(self.model, whole)
        kept = tuple(
            slice(0, max(1, np.count_nonzero(at < n - 0.5))) for at, n in zip(places, x.shape[2:], strict=True)
        )
        return (cells / count)[(slice(None), *kept)][None]


def _padded(x: Tensor, shape: Sequence[int], value: float) -> Tensor:
    """A tensor whose last three axes are at least as long as `shape`, padded at their far ends."""
    extra = [max(0, want - have) for want, have in zip(shape, x.shape[-3:], strict=True)]
    return F.pad(x, [end for n in reversed(extra) for end in (0, n)], value=value) if any(extra) else x


def cell_places(model: Any, shape: Sequence[int]) -> list[NDArray[np.float64]]:
    """Along each axis of a dense map of so many cells, the voxels of the input at which cells look."""
    info = model.feature_info[-1]
    return [
        offset + step * np.arange(n) for n, step, offset in zip(shape, info["reduction"], info["offset"], strict=True)
    ]


def cells_in_brain(model: Any, shape: Sequence[int], brain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[d, h, w]: whether the voxel at a cell's centre is brain."""
    picked = [
        np.clip(np.rint(places), 0, size - 1).astype(int)
        for places, size in zip(cell_places(model, shape), brain.shape, strict=True)
    ]
    inside: NDArray[np.bool_] = brain[np.ix_(*picked)]
    return inside


def _brain_mean(cells: Tensor, brain: NDArray[np.bool_], model: Any) -> Tensor:
    """The mean [C] of the cells [C, d, h, w] that look at the brain."""
    inside = cells_in_brain(model, cells.shape[1:], brain)
    if not inside.any():
        raise ScanError("no cell of the model's feature map is centred in the brain mask: is it the scan's own?")
    return cells[:, torch.from_numpy(inside).to(cells.device)].mean(dim=1)


def windows(shape: Sequence[int], window: Window, multiple_of: Sequence[int] = (1, 1, 1)) -> Iterator[_Box]:
    """The windows over a volume that is at least as large as one; the last along an axis is moved inwards to fit.

    They begin at multiples of `multiple_of`, but for the last.
    """
    starts = []
    for size, width, multiple in zip(shape, window.shape, multiple_of, strict=True):
        step = max(1, int(width * (1 - window.overlap) + 1e-6) // multiple) * multiple  # 100 · (1 - 0.9) is 10
        last = size - width
        starts.append([*range(0, last, step), last])
    for z, y, x in product(*starts):
        d, h, w = window.shape
        yield slice(z, z + d), slice(y, y + h), slice(x, x + w)
