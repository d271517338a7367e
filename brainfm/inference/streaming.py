"""A ResNet's forward a few planes at a time: the same numbers, in less memory, and without what is known beforehand.

The widest map of a ResNet-18 is 64×150×192×192, and two thirds of a skull-stripped volume are exactly 0. So

- the stem and the first two stages are streams of planes along z: each layer takes planes from the one before, keeps
  those that its next output needs too, and gives its own; no map of theirs but the last is ever there as a whole;
- up to the first stage, a layer computes of each slab only the box that the brain can have reached. The rest is what
  the network makes of an empty volume: it differs by the distance from the border alone, and is read off a small one.

Neither is an approximation. Slabs are small enough that the allocator keeps their memory: at this size, new pages cost
more than the arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.models.resnet import ResNet

# Bytes of what a layer makes at a time. On a CPU below the 32 MB from which glibc asks the system for every piece anew.
_SLAB = {"cpu": 15_000_000}
_SLAB_ELSEWHERE = 400_000_000


class StreamedResNet(ResNet):
    """A ResNet whose BatchNorms are folded into its convolutions, with a forward for inference. Made by `optimize`.

    Hooks on modules inside the stem and the first two stages are not called. Where a gradient is asked for, or the
    network is traced, the forward is the plain one.
    """

    def forward_features(self, x: Tensor) -> Tensor:
        """As `Encoder.forward_features`."""
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if traced or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward_features(x)
        self._check_input(x)
        layer1, layer2 = self.get_submodule("layer1"), self.get_submodule("layer2")
        stream = _stem(x, self.conv1, self.maxpool, border=_reach(layer1))
        for block in layer1.children():
            stream = _block(block, stream)
        stream = _Stream(stream.planes)  # by now the brain has reached nearly everything
        for block in layer2.children():
            stream = _block(block, stream)
        x = _channels_second(torch.cat(list(stream.planes), dim=1))
        for name in ("layer3", "layer4"):
            x = self._stage(name, x)
        return x


@dataclass(frozen=True, eq=False)
class Live:
    """Where a map can differ from that of an empty volume: a box in each plane.

    Attributes:
        low: [planes, 2], the first row and column of the box.
        high: [planes, 2], the row and column behind its last; at most `low` where the plane has none.
        size: Rows and columns of a plane.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    size: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor) -> Live:
        """Of volumes [B, C, D, H, W]: what is not 0 in any."""
        filled: NDArray[np.bool_] = (x != 0).flatten(0, 1).any(dim=0).cpu().numpy()
        low, high = np.empty((len(filled), 2), np.int64), np.empty((len(filled), 2), np.int64)
        for axis, other in ((0, 2), (1, 1)):
            found: NDArray[np.bool_] = np.any(filled, axis=other)
            any_there = np.any(found, axis=1)
            low[:, axis] = np.where(any_there, found.argmax(axis=1), found.shape[1])
            high[:, axis] = np.where(any_there, found.shape[1] - found[:, ::-1].argmax(axis=1), 0)
        return cls(low, high, filled.shape[1:])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Planes, rows and columns of the map."""
        return len(self.low), *self.size

    def behind(self, layer: Any) -> Live:
        """Of the layer's output: every place whose window has a live one in it."""
        kernel, stride, padding = (_one(getattr(layer, name)) for name in ("kernel_size", "stride", "padding"))
        planes, *size = ((n + 2 * padding - kernel) // stride + 1 for n in self.shape)
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


@dataclass(frozen=True, eq=False)
class _Stream:
    """A map, plane by plane.

    Attributes:
        planes: Slabs of it along z: [B, planes, rows, columns, C], not written to again.
        live: Where it differs from that of an empty volume; None is everywhere.
        empty: The map of a small empty volume, [1, C, d, h, w]: all its borders and corners, and a middle.
    """

    planes: Iterator[Tensor]
    live: Live | None = None
    empty: Tensor | None = None


def _stem(x: Tensor, conv: nn.Conv3d, pool: nn.MaxPool3d, border: int) -> _Stream:
    """MaxPool(ReLU(conv(x))). In its map of an empty volume, `border` voxels beside the middle are kept."""
    assert conv.bias is not None
    live = Live.of(x).behind(conv).behind(pool)
    constant = conv.bias.relu()  # of an empty volume
    planes = _regrouped(_pooled(x, conv, live, constant), _slab_planes(x, len(constant) * math.prod(live.size)))
    size = [min(n, 2 * border + 1) for n in live.shape]
    return _Stream(planes, live, constant[:, None, None, None].expand(-1, *size)[None])


def _pooled(x: Tensor, conv: nn.Conv3d, live: Live, constant: Tensor) -> Iterator[Tensor]:
    """The planes of the stem's map; two planes of the convolution make one.

    The convolution is one of planes, whose channels are the planes under its kernel: with few input channels that is
    the faster way to compute the same.
    """
    kernel, margin = conv.kernel_size[0], int(conv.padding[0])
    weight = conv.weight.flatten(1, 2).contiguous(memory_format=torch.channels_last)
    batch, _, depth, height, width = x.shape
    padded = F.pad(x, (margin,) * 6)
    step = 2 * max(1, _slab_planes(x, len(constant) * height * width) // 2)
    held = x.new_zeros(batch, 1, *live.size, len(constant))  # behind a ReLU, 0 changes no maximum
    for first in range(0, depth, step):
        last = min(first + step, depth)
        planes = constant.expand(batch, last - first, *live.size, -1).clone()
        if box := live.box(first // 2, (last + 1) // 2):
            sizes = (height, width)
            rows, columns = (
                slice(max(0, 2 * s.start - 1), min(2 * s.stop, n)) for s, n in zip(box, sizes, strict=True)
            )
            under = [slice(s.start, s.stop + kernel - 1) for s in (slice(first, last), rows, columns)]
            windows = padded[:, :, under[0], under[1], under[2]].unfold(2, kernel, 1).permute(0, 2, 3, 4, 1, 5)
            windows = windows.flatten(4).flatten(0, 1).permute(0, 3, 1, 2)  # [B · planes, channels, rows, columns]
            maps = F.conv2d(windows, weight, conv.bias).relu_()
            ends = [(int(s.start == 0), int(2 * s.stop > n)) for s, n in zip(box, sizes, strict=True)]
            maps = F.max_pool2d(F.pad(maps, (*ends[1], *ends[0])), 3, 2)
            planes[:, :, box[0], box[1]] = maps.permute(0, 2, 3, 1).view(batch, last - first, *maps.shape[2:], -1)
        if (last - first) % 2:
            planes = F.pad(planes, (0, 0, 0, 0, 0, 0, 0, 1))
        threes = torch.cat([held, planes], dim=1)
        held = planes[:, -1:]
        yield torch.maximum(torch.maximum(threes[:, :-1:2], threes[:, 1::2]), threes[:, 2::2])


def _block(block: Any, stream: _Stream) -> _Stream:
    """A residual block."""
    *inner, last = (conv for name, conv in block.named_children() if name.startswith("conv"))
    planes, beside = _forked(stream.planes)
    stream, shortcut = replace(stream, planes=planes), replace(stream, planes=beside)
    if block.downsample is not None:
        shortcut = _convolved(shortcut, block.downsample[0], relu=False)
    for conv in inner:
        stream = _convolved(stream, conv)
    return _convolved(stream, last, shortcut)


def _convolved(stream: _Stream, conv: nn.Conv3d, shortcut: _Stream | None = None, relu: bool = True) -> _Stream:
    """A convolution, a shortcut added to it, and a ReLU. Where the stream is not live everywhere, of stride 1."""
    live, empty = stream.live, stream.empty
    if live is not None and empty is not None:
        live, empty = live.behind(conv), conv(empty)
        if shortcut is not None and shortcut.live is not None and shortcut.empty is not None:
            live, empty = live.joined(shortcut.live), empty + shortcut.empty
        empty = empty.relu() if relu else empty
    windows = _Windows(stream.planes, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))
    # A map of them, not a generator: that would hold each slab while later layers work on it.
    return _Stream(map(_Convolution(conv, live, empty, shortcut, relu), windows), live, empty)


class _Convolution:
    """What `_convolved` does to a slab of the planes under its kernel; slabs are given in order."""

    def __init__(
        self, conv: nn.Conv3d, live: Live | None, empty: Tensor | None, shortcut: _Stream | None, relu: bool
    ) -> None:
        self.conv, self.live, self.relu = conv, live, relu
        self._background = None if live is None or empty is None else _Background(empty, live.shape)
        self._shortcut = None if shortcut is None else _Queue(shortcut.planes)
        self._done = 0

    def __call__(self, slab: Tensor) -> Tensor:
        kernel, margin = self.conv.kernel_size[0], int(self.conv.padding[0])
        first = self._done
        self._done += (slab.shape[1] - kernel) // self.conv.stride[0] + 1
        added = None if self._shortcut is None else self._shortcut.take(self._done - first)
        box = None if self.live is None else self.live.box(first, self._done)
        if self._background is None or box == tuple(slice(0, n) for n in slab.shape[2:4]):
            return self._values(slab, added, margin)
        out = self._background.planes(len(slab), first, self._done)
        if box:
            rows, columns = box
            added = None if added is None else added[:, :, rows, columns]
            out[:, :, rows, columns] = self._values(_patch(slab, box, margin), added, 0)
        return out

    def _values(self, slab: Tensor, added: Tensor | None, margin: int) -> Tensor:
        """[B, planes, rows, columns, C], with `margin` rows and columns of zeros around the slab."""
        weight, bias, padding = self.conv.weight, self.conv.bias, (0, margin, margin)
        values = F.conv3d(_channels_second(slab), weight, bias, self.conv.stride, padding).permute(0, 2, 3, 4, 1)
        if added is not None:
            values += added
        return values.relu_() if self.relu else values


class _Windows:
    """Slabs with all the planes that a convolution along z takes for its next outputs; 0 beyond the ends of the map."""

    def __init__(self, planes: Iterator[Tensor], kernel: int, stride: int, margin: int) -> None:
        self._planes, self._kernel, self._stride, self._margin = planes, kernel, stride, margin
        self._held: Tensor | None = None

    def __iter__(self) -> _Windows:
        return self

    def __next__(self) -> Tensor:
        while True:
            slab = next(self._planes, None)
            held = self._joined(slab)
            outputs = (held.shape[1] - self._kernel) // self._stride + 1
            if slab is not None:
                outputs = min(outputs, held.shape[1] // self._stride)  # the next window may begin behind what is held
            elif outputs < 1:
                raise StopIteration
            self._held = held[:, outputs * self._stride :].clone()  # a view would keep all of it
            if outputs > 0:
                return held[:, : (outputs - 1) * self._stride + self._kernel]

    def _joined(self, slab: Tensor | None) -> Tensor:
        margin = self._margin
        if slab is None:
            assert self._held is not None
            self._margin = 0  # the end comes once
            return F.pad(self._held, (0, 0, 0, 0, 0, 0, 0, margin))
        return F.pad(slab, (0, 0, 0, 0, 0, 0, margin, 0)) if self._held is None else torch.cat([self._held, slab], 1)


def _patch(x: Tensor, box: tuple[slice, slice], margin: int) -> Tensor:
    """The box of planes [B, planes, rows, columns, C] and `margin` around it, 0 beyond the ends of the map."""
    inside = [slice(max(0, s.start - margin), min(n, s.stop + margin)) for s, n in zip(box, x.shape[2:4], strict=True)]
    rows, columns = ((margin - s.start + i.start, margin - i.stop + s.stop) for s, i in zip(box, inside, strict=True))
    return F.pad(x[:, :, inside[0], inside[1]], (0, 0, *columns, *rows))


def _regrouped(planes: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """The same planes in slabs of at least `count`, but for the last."""
    waiting: list[Tensor] = []
    for slab in planes:
        waiting.append(slab)
        if sum(each.shape[1] for each in waiting) >= count:
            yield torch.cat(waiting, dim=1)
            waiting = []
    if waiting:
        yield torch.cat(waiting, dim=1)


def _forked(planes: Iterator[Tensor]) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """The slabs twice. The second iterator has to stay behind the first; `itertools.tee` keeps dozens."""
    waiting: deque[Tensor] = deque()

    def keep(slab: Tensor) -> Tensor:
        waiting.append(slab)
        return slab

    def follow() -> Iterator[Tensor]:
        while waiting:
            yield waiting.popleft()

    return map(keep, planes), follow()


class _Queue:
    """Planes of a stream, in slabs of another size than they come in."""

    def __init__(self, planes: Iterator[Tensor]) -> None:
        self._planes = planes
        self._waiting: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """The next `count` planes."""
        while self._waiting is None or self._waiting.shape[1] < count:
            more = next(self._planes)
            self._waiting = more if self._waiting is None else torch.cat([self._waiting, more], dim=1)
        taken, self._waiting = self._waiting[:, :count], self._waiting[:, count:].clone()
        return taken


class _Background:
    """The planes of an empty volume's map, from a small one's: they differ by the distance to the border alone."""

    def __init__(self, small: Tensor, shape: Sequence[int]) -> None:
        self._small = small[0].permute(1, 2, 3, 0).contiguous()
        places = [_nearest_border(n, size) for n, size in zip(shape, small.shape[2:], strict=True)]
        self._z = places[0].tolist()
        self._rows, self._columns = (place.to(small.device) for place in places[1:])
        self._plane = self._small[0], -1

    def planes(self, batch: int, first: int, last: int) -> Tensor:
        """Planes `first` up to, not including, `last`, [batch, planes, rows, columns, C] in new memory."""
        out = self._small.new_empty(batch, last - first, len(self._rows), len(self._columns), self._small.shape[-1])
        for n, z in enumerate(self._z[first:last]):
            if self._plane[1] != z:  # most planes are the middle one
                self._plane = self._small[z].index_select(0, self._rows).index_select(1, self._columns), z
            out[:, n] = self._plane[0]
        return out


def _nearest_border(n: int, small: int) -> Tensor:
    """For each of n places, the one of `small` places that is as far from the same border, or the middle one."""
    place, half = torch.arange(n), small // 2
    return torch.where(place < half, place, torch.where(n - place < small - half, small - n + place, half))


def _reach(stage: nn.Module) -> int:
    """How far into a stage's map the border of its input reaches."""
    convolutions = [conv for conv in stage.modules() if isinstance(conv, nn.Conv3d)]
    return sum(int(conv.padding[0]) for conv in convolutions)


def _slab_planes(x: Tensor, values: int) -> int:
    """How many planes of so many values, for each volume of a batch, are made at a time."""
    return max(1, _SLAB.get(x.device.type, _SLAB_ELSEWHERE) // (len(x) * values * x.element_size()))


def _channels_second(x: Tensor) -> Tensor:
    """[B, D, H, W, C] → [B, C, D, H, W], the same memory: torch's channels-last."""
    return x.permute(0, 4, 1, 2, 3)


def _one(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]
