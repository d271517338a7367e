"""A ResNet's forward a few planes at a time: the same numbers, in less memory, and without what is known beforehand.

The widest map of a ResNet-18 is 64×150×192×192, and two thirds of a skull-stripped volume are exactly 0. So

- all but the last stage are streams of planes along z: each layer takes planes from the one before, keeps those that
  its next output needs too, and gives its own; no map of theirs but the last is ever there as a whole;
- up to the first stage, a layer computes of each slab only the box that the brain can have reached. The rest is what
  the network makes of an empty volume: it differs by the distance from the border alone, and is read off a small one;
- on a processor, convolutions along z are Winograd's, with half the multiplications.

On a GPU, where each call costs more than what it saves, only the stem goes by slabs; its map after the pool is a whole.

None of them is an approximation: the results differ by rounding alone. Slabs are small enough that the allocator keeps
their memory, and of few sizes, so that it finds it again: new pages cost more than the arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.fast.empty import Background, Live
from brainfm.models.fast.winograd import TILE, fastest, geometry, outputs
from brainfm.models.resnet.checkpointed import planes_under

_LANES = 8  # input channels of whose multiples a convolution is fastest
_SLAB_BYTES = 400_000_000  # of what the stem's convolution makes at a time on other devices


def streamed_features(model: Any, x: Tensor) -> Tensor:
    """`forward_features` of a ResNet whose BatchNorms are folded into its convolutions."""
    if x.device.type == "cpu":  # one by one: caches hold more of it, and each has a box of its own
        return torch.cat([_streamed(model, volume) for volume in x.split(1)])  # type: ignore[no-untyped-call]
    return _streamed(model, x, streams=0)


def _streamed(model: Any, x: Tensor, streams: int = 3) -> Tensor:
    """By slabs the stem and so many stages."""
    stages = [list(model.get_submodule(name).children()) for name in ("layer1", "layer2", "layer3", "layer4")]
    stream = _stem(x, model.conv1, model.maxpool, border=_reach(stages[0]))
    for number, blocks in enumerate(stages[:streams]):
        for block in blocks:
            stream = _block(block, stream)
        if number == 0:
            stream = replace(stream, live=None, empty=None)  # by now the brain has reached nearly everything
    x = torch.cat([slab[:, :, 1:-1, 1:-1] for slab in stream.slabs], dim=1).permute(0, 4, 1, 2, 3)
    for blocks in stages[streams:]:
        for block in blocks:
            x = block(x)
    return x


@dataclass(frozen=True, eq=False)
class _Stream:
    """A map, a few planes at a time.

    Attributes:
        slabs: Planes along z, in order: [B, at most `count`, 1 + rows + 1, 1 + columns + 1, C]. Around each plane is a
            border of 0, which saves the convolutions theirs. Not written to again.
        depth: Planes of the whole map.
        count: Planes that a layer makes at a time.
        live: Where the map differs from that of an empty volume; None is everywhere.
        empty: The map of a small empty volume, [1, C, d, h, w]: all its borders and corners, and a middle.
    """

    slabs: Iterator[Tensor]
    depth: int
    count: int
    live: Live | None = None
    empty: Tensor | None = None


def _stem(x: Tensor, conv: nn.Conv3d, pool: nn.MaxPool3d, border: int) -> _Stream:
    """MaxPool(ReLU(conv(x))). In its map of an empty volume, `border` voxels beside the middle are kept."""
    assert conv.bias is not None
    live = Live.of(x).after(conv).after(pool)
    constant = conv.bias.relu()  # of an empty volume
    pooled = 2 * 2 * 2  # values of the convolution for each of the map
    count = _planes_at_a_time(x, pooled * len(constant) * math.prod(live.size))
    size = [min(n, 2 * border + 1) for n in live.shape]
    empty = constant[:, None, None, None].expand(-1, *size)[None]
    return _Stream(_pooled(x, conv, live, constant, count), live.shape[0], count, live, empty)


def _pooled(x: Tensor, conv: nn.Conv3d, live: Live, constant: Tensor, count: int) -> Iterator[Tensor]:
    """The slabs of the stem's map. Plane n of it is the largest of planes 2n - 1, 2n and 2n + 1 of the convolution.

    ReLU comes last, where there is least to do: it keeps the order of voxels.
    """
    weight = _of_planes(conv)
    depth, step = x.shape[2], 2 if count == TILE else 2 * count  # the convolution's planes are the widest map
    before = x.new_zeros(len(x), 1, *live.size, len(constant))  # plane 2n - 1; before a ReLU, 0 changes no maximum
    for first in range(0, live.shape[0], count):
        last = min(first + count, live.shape[0])
        slab = _bordered(x, len(x), last - first, *live.size, len(constant))
        slab[:, :, 1:-1, 1:-1] = constant
        box = live.box(first, last)
        if not box:
            before = constant.expand_as(before)
            yield slab
            continue
        largest, held = _inside(slab, box), before[:, :, box[0], box[1]]
        for low in range(2 * first, 2 * last, step):
            planes = _pooled_in_planes(x, conv, weight, slice(low, min(low + step, 2 * last, depth)), box)
            if planes.shape[1] % 2:
                planes = F.pad(planes, (0, 0, 0, 0, 0, 0, 0, 1))
            part = largest[:, low // 2 - first :][:, : planes.shape[1] // 2]
            torch.maximum(planes[:, ::2], planes[:, 1::2], out=part)
            torch.maximum(part[:, :1], held, out=part[:, :1])
            torch.maximum(part[:, 1:], planes[:, 1:-1:2], out=part[:, 1:])
            held = planes[:, -1:]
        largest.relu_()
        before = constant.expand_as(before).clone()
        before[:, :, box[0], box[1]] = held
        yield slab


def _pooled_in_planes(x: Tensor, conv: nn.Conv3d, weight: Tensor, planes: slice, box: tuple[slice, slice]) -> Tensor:
    """[B, planes, rows, columns, C] of conv(x), max-pooled within each plane, of which the box is given.

    The weight is that of the convolution of planes: see `_of_planes`.
    """
    kernel, _, margin = geometry(conv)
    more = weight.shape[1] // conv.in_channels - kernel  # planes, which count for nothing
    seen = [slice(max(0, 2 * s.start - 1), min(2 * s.stop, n)) for s, n in zip(box, x.shape[3:], strict=True)]
    under = _patch(x, (slice(planes.start, planes.stop + more), *seen), margin)
    maps = F.conv2d(planes_under(under, kernel + more), weight, conv.bias)
    rows, columns = ((int(s.start == 0), int(2 * s.stop > n)) for s, n in zip(box, x.shape[3:], strict=True))
    if any((*rows, *columns)):
        maps = F.pad(maps, (*columns, *rows))
    maps = F.max_pool2d(maps, 3, 2).permute(0, 2, 3, 1)
    return maps.view(len(x), -1, *maps.shape[1:])


def _of_planes(conv: nn.Conv3d) -> Tensor:
    """The weight of a convolution as one of planes: see `planes_under`.

    Of a single channel it has a plane of zeros at the end: a processor computes 8 in four fifths of the time of 7.
    """
    weight = conv.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and conv.in_channels == 1:
        weight = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[2] % _LANES))
    return weight.flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _block(block: Any, stream: _Stream) -> _Stream:
    """A residual block."""
    *inner, last = (conv for name, conv in block.named_children() if name.startswith("conv"))
    slabs, beside = _forked(stream.slabs)
    stream, shortcut = replace(stream, slabs=slabs), replace(stream, slabs=beside)
    if block.downsample is not None:
        shortcut = _convolved(shortcut, block.downsample[0], relu=False)
    for conv in inner:
        stream = _convolved(stream, conv)
    return _convolved(stream, last, shortcut)


def _convolved(stream: _Stream, conv: nn.Conv3d, shortcut: _Stream | None = None, relu: bool = True) -> _Stream:
    """A convolution, a shortcut added to it, and a ReLU. Where the stream is not live everywhere, of stride 1."""
    live, empty = stream.live, stream.empty
    if live is not None and empty is not None:
        live, empty = live.after(conv), conv(empty)
        if shortcut is not None and shortcut.live is not None and shortcut.empty is not None:
            live, empty = live.joined(shortcut.live), empty + shortcut.empty
        empty = empty.relu() if relu else empty
    # A map of windows, not a generator: that would hold each slab while later layers work on it.
    slabs = map(_Layer(conv, live, empty, None if shortcut is None else shortcut.slabs, relu), _Windows(stream, conv))
    return _Stream(slabs, outputs(stream.depth, conv), stream.count, live, empty)


class _Layer:
    """What `_convolved` does to each window of planes; they are given in order."""

    def __init__(
        self, conv: nn.Conv3d, live: Live | None, empty: Tensor | None, shortcut: Iterator[Tensor] | None, relu: bool
    ) -> None:
        self._conv, self._live, self._relu = conv, live, relu
        self._background = None if live is None or empty is None else Background(empty, live.shape)
        self._shortcut = None if shortcut is None else _Planes(shortcut)
        self._compute = fastest(conv)
        self._done = 0

    def __call__(self, window: Sequence[Tensor]) -> Tensor:
        kernel, stride, margin = geometry(self._conv)
        batch, *bordered, _ = window[0].shape
        rows, columns = (outputs(n - 2, self._conv) for n in bordered)
        count = (len(window) - kernel) // stride + 1
        first, self._done = self._done, self._done + count
        added = None if self._shortcut is None else self._shortcut.take(count)

        slab = _bordered(window[0], batch, count, rows, columns, self._conv.out_channels)
        whole = slice(0, rows), slice(0, columns)
        box = whole if self._live is None else self._live.box(first, self._done)
        if self._background is not None and box != whole:
            self._background.fill(_inside(slab, whole), first)
        if box:
            values = _inside(slab, box)
            # Counted with the border, output row r sees the rows from r · stride - margin + 1 on.
            under = [slice(s.start * stride - margin + 1, (s.stop - 1) * stride - margin + 1 + kernel) for s in box]
            self._compute([plane[:, under[0], under[1]] for plane in window], values)
            for n, plane in enumerate(added or []):
                values[:, n] += _inside(plane[:, None], box)[:, 0]
            if self._relu:
                values.relu_()
        return slab


class _Windows:
    """The planes under a convolution for its next outputs, 0 beyond the ends of the map.

    Each slab that comes gives as many outputs as it can, so that two of its planes are all that is kept. Where the
    stride halves that, it waits for a whole slab of outputs.
    """

    def __init__(self, stream: _Stream, conv: nn.Conv3d) -> None:
        self._slabs, self._missing, self._count = stream.slabs, stream.depth, stream.count
        self._kernel, self._stride, self._margin = geometry(conv)
        self._held: list[Tensor] = []

    def __iter__(self) -> _Windows:
        return self

    def __next__(self) -> list[Tensor]:
        while True:
            held, stride = self._held, self._stride
            count = min(self._count, (len(held) - self._kernel) // stride + 1)
            if self._missing:
                count = min(count, len(held) // stride)  # the next window may begin after what is held
            if count > 0 and (count == self._count or stride == 1 or not self._missing):
                self._held = held[count * stride :]
                return held[: (count - 1) * stride + self._kernel]
            if not self._missing:
                raise StopIteration
            self._take(next(self._slabs))

    def _take(self, slab: Tensor) -> None:
        self._missing -= slab.shape[1]
        planes = [*self._held, *slab.unbind(1)]
        if not self._held:
            planes = [*self._beyond(slab), *planes]
        self._held = planes if self._missing else [*planes, *self._beyond(slab)]

    def _beyond(self, slab: Tensor) -> list[Tensor]:
        return [torch.zeros_like(slab[:, 0])] * self._margin


class _Planes:
    """The planes of slabs, in other numbers than they come in."""

    def __init__(self, slabs: Iterator[Tensor]) -> None:
        self._slabs = slabs
        self._waiting: list[Tensor] = []

    def take(self, count: int) -> list[Tensor]:
        """The next `count` planes."""
        while len(self._waiting) < count:
            self._waiting += next(self._slabs).unbind(1)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def _forked(slabs: Iterator[Tensor]) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """The slabs twice. The second iterator must not overtake the first; `itertools.tee` keeps dozens."""
    waiting: deque[Tensor] = deque()

    def keep(slab: Tensor) -> Tensor:
        waiting.append(slab)
        return slab

    def follow() -> Iterator[Tensor]:
        while waiting:
            yield waiting.popleft()

    return map(keep, slabs), follow()


def _patch(x: Tensor, places: Sequence[slice], margin: int) -> Tensor:
    """The places along the last axes of x and `margin` around them, 0 beyond its ends."""
    sizes = x.shape[-len(places) :]
    inside = [slice(max(0, s.start - margin), min(n, s.stop + margin)) for s, n in zip(places, sizes, strict=True)]
    ends = [(margin - s.start + i.start, margin - i.stop + s.stop) for s, i in zip(places, inside, strict=True)]
    index: tuple[Any, ...] = (..., *inside)
    return F.pad(x[index], [end for pair in reversed(ends) for end in pair])


def _reach(blocks: Sequence[nn.Module]) -> int:
    """How far into the map of blocks the border of their input reaches."""
    convolutions = [conv for block in blocks for conv in block.modules() if isinstance(conv, nn.Conv3d)]
    return sum(int(conv.padding[0]) for conv in convolutions)


def _planes_at_a_time(x: Tensor, values: int) -> int:
    """How many planes of so many values for each volume of x a layer makes at a time."""
    if x.device.type == "cpu":
        return TILE
    return TILE * max(1, _SLAB_BYTES // (TILE * len(x) * values * x.element_size()))


def _bordered(like: Tensor, batch: int, planes: int, rows: int, columns: int, channels: int) -> Tensor:
    """New memory for a slab, whose border alone is set."""
    slab = like.new_empty(batch, planes, rows + 2, columns + 2, channels)
    for edge in (slab[:, :, 0], slab[:, :, -1], slab[:, :, :, 0], slab[:, :, :, -1]):
        edge.zero_()
    return slab


def _inside(slab: Tensor, box: tuple[slice, slice]) -> Tensor:
    """A view of the box of each plane, which is counted without the border."""
    rows, columns = (slice(s.start + 1, s.stop + 1) for s in box)
    return slab[:, :, rows, columns]
