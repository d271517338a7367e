"""A chain of layers (convolutions, norms, activations, pools) computed together: the same numbers, in fewer passes.

A layer at a time, a map as wide as the volume goes through memory for each of them. Here, channels last,

- what is before a convolution, a norm and its activation, is done to each plane as the convolution reads it, and what
  is after, an activation or a pool, to a few planes as they come: the map between is never there;
- a norm over the volume has its moments from the planes as they are made;
- the convolution itself is done with fewer multiplications where that is faster, see `winograd` and `dilated`.

Wherever it is not so simple (another device or type, a gradient, a tracer), the layers are called one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.fast import dilated
from brainfm.models.fast.joined import Joined
from brainfm.models.fast.winograd import TILE, Winograd, geometry, outputs

_SLAB = 1 << 20  # values of a slab, where nothing else says how many planes it has: about what a cache holds
_WINOGRAD_FROM = 3000  # voxels of a map: in a smaller one its kernels' transforms cost more than they save

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU)
_NORMS = (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm)


class Together(nn.Module):
    """A module that knows a faster way to the same numbers, for copies for inference.

    Attributes:
        together: Whether it takes it where it can, see `is_plain`; `for_inference` says so of its copy's.
        faster: What that is, for `optimizations`.
    """

    together = False
    faster: str

    def ready(self) -> str:
        """Take the faster way from now on. Returns what is faster, in words, or "" where nothing is."""
        self.together = True
        return self.faster


class Chained(Together):
    """A module whose forward, or some of it, is a chain of layers."""

    faster = "chains of layers computed together (unless traced)"

    def through(
        self, layers: Sequence[nn.Module], x: Tensor, added: Tensor | None = None, last: nn.Module | None = None
    ) -> Tensor:
        """`last(layers(x) + added)` of a map [B, C, D, H, W]; nothing of x or `added` is written to."""
        if self.together and is_plain(x):
            return _together([*_leaves(layers)], _channels_last(x), added, last)
        for layer in layers:
            # torch's (2.13) GroupNorm of channels-last maps adds up in float32: on a head it is off by percents.
            x = layer(x.contiguous() if isinstance(layer, nn.GroupNorm) else x)
        if added is not None:
            x = x + added
        return x if last is None else cast(Tensor, last(x))


class Chain(Chained, nn.Sequential):
    """A sequence that is one chain."""

    def forward(self, x: Tensor) -> Tensor:
        return self.through([*self], x)


class JoiningChain(Chained, nn.Sequential):
    """A chain, a norm first, of a map and of one of fewer voxels, that is enlarged and joined to it in channels."""

    def forward(self, below: Tensor, beside: Tensor) -> Tensor:  # type: ignore[override]
        """The chain of `beside` [B, C, D, H, W] and the nearest voxels of `below` [B, c, d, h, w]."""
        if self.together and is_plain(beside) and is_plain(below):
            return _together([*_leaves([*self])], Joined(_channels_last(beside), _channels_last(below)))
        return self.through([*self], torch.cat((beside, F.interpolate(below, beside.shape[2:])), dim=1))


def is_traced() -> bool:
    """Whether torch writes down what is computed."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_plain(x: Tensor) -> bool:
    """Whether a map's layers can be computed together: in float32 on a processor, with nobody looking on."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cpu" and x.dtype == torch.float32 and not wanted and not is_traced()


def _leaves(layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _leaves([*layer])
        elif not isinstance(layer, (nn.Identity, nn.Dropout)):
            yield layer


# --- Norms ------------------------------------------------------------------------------------------


class Moments:
    """Mean and squared distance from it of each channel, gathered slab by slab."""

    def __init__(self, batch: int, channels: int) -> None:
        self.count = [0] * batch
        self.mean = torch.zeros(batch, channels, dtype=torch.float64)
        self.squares = torch.zeros(batch, channels, dtype=torch.float64)

    def add(self, volume: int, slab: Tensor) -> None:
        """Values [..., C] of a volume of the batch."""
        for values in slab.reshape(-1, slab.shape[-1]).split(max(1, _SLAB // 4 // slab.shape[-1])):  # type: ignore[no-untyped-call]
            have, more = self.count[volume], len(values)
            near = self.mean[volume].float() if have else values.mean(dim=0)  # of which squares lose little
            apart = values - near
            moved = apart.mean(dim=0).double()
            self.count[volume] = total = have + more
            squares = (apart.square_().sum(dim=0).double() - more * moved**2).clamp_(min=0)
            moved += near.double() - self.mean[volume]
            self.mean[volume] += moved * (more / total)
            self.squares[volume] += squares + moved**2 * (have * more / total)

    @classmethod
    def of(cls, x: Tensor | Joined) -> Moments:
        """Of maps [B, D, H, W, C]."""
        found, count = cls(len(x), x.shape[-1]), _planes(x)
        for volume in range(len(x)):
            for first in range(0, x.shape[1], count):
                found.add(volume, x[volume : volume + 1, first : first + count])
        return found


@dataclass
class _Scaling:
    """A norm as (x - mean) · scale + shift of each channel, [B, 1, 1, 1, C], and the activation after it."""

    scale: Tensor
    shift: Tensor
    mean: Tensor | None  # None where it is in the shift
    act: nn.Module | None = None

    @classmethod
    def of(cls, norm: Any, batch: int, moments: Moments | None) -> _Scaling:
        if isinstance(norm, nn.BatchNorm3d):
            statistics: Any = norm.running_mean, norm.running_var
            mean, variance = (value.double().expand(batch, -1) for value in statistics)
        else:
            assert moments is not None
            groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else moments.mean.shape[1]
            means = moments.mean.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]
            mean = means.mean(dim=2, keepdim=True)
            count = torch.tensor(moments.count, dtype=torch.float64)[:, None, None]
            variance = (moments.squares.unflatten(1, (groups, -1)) / count + (means - mean) ** 2).mean(2, keepdim=True)  # type: ignore[no-untyped-call]
            mean, variance = mean.expand_as(means).flatten(1), variance.expand_as(means).flatten(1)
        scale = (variance + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.expand_as(mean)
        if isinstance(norm, nn.BatchNorm3d):  # as torch does: there is no map whose own mean it is to take away
            return cls(_of_channels(scale), _of_channels(shift - mean * scale), None)
        return cls(_of_channels(scale), _of_channels(shift), _of_channels(mean))

    def __call__(self, values: Tensor, volumes: slice, out: Tensor) -> Tensor:
        """Write the values [b, ..., C] of some volumes, as they are after norm and activation, to `out`."""
        if self.mean is not None:  # first: of a mean far from 0 nothing is lost
            values = torch.sub(values, self.mean[volumes], out=out)
        torch.addcmul(self.shift[volumes], values, self.scale[volumes], out=out)
        return out if self.act is None else _act(self.act, out)


def _of_channels(values: Tensor) -> Tensor:
    """[B, C] → [B, 1, 1, 1, C] in float32."""
    return values.float()[:, None, None, None]


@dataclass
class _Mixing:
    """A 1×1×1 convolution, and what is before and after it: small enough to be done again as the next one reads."""

    before: _Scaling | None
    conv: nn.Conv3d
    acts: list[nn.Module]

    def __call__(self, values: Tensor, volumes: slice, out: Tensor) -> Tensor:
        """As of `_Scaling`."""
        if self.before is not None:
            values = self.before(values, volumes, torch.empty_like(values))
        values = F.linear(values, self.conv.weight.flatten(1), self.conv.bias)
        for act in self.acts:
            _act(act, values)
        return out.copy_(values)


_Before = _Scaling | _Mixing


def _act(layer: nn.Module, x: Tensor) -> Tensor:
    """In place."""
    if isinstance(layer, nn.LeakyReLU):
        return F.leaky_relu_(x, layer.negative_slope)
    return F.silu(x, inplace=True) if isinstance(layer, nn.SiLU) else x.relu_()


def _halves(layer: nn.Module) -> bool:
    """Whether it is a pool of 2×2×2 voxels, which an even number of planes needs no others for."""
    pools = isinstance(layer, (nn.MaxPool3d, nn.AvgPool3d))
    return pools and all(
        _triple(size) == wanted
        for size, wanted in ((layer.kernel_size, (2, 2, 2)), (layer.stride, (2, 2, 2)), (layer.padding, (0, 0, 0)))
    )


def _halved(pool: nn.Module, planes: Tensor) -> Tensor:
    """Planes [D, H, W, C] through a pool of 2×2×2 voxels; torch's own average takes another memory."""
    is_mean = isinstance(pool, nn.AvgPool3d)
    join = torch.add if is_mean else torch.maximum
    for axis in range(3):
        pairs = planes.narrow(axis, 0, planes.shape[axis] // 2 * 2).unflatten(axis, (-1, 2))  # type: ignore[no-untyped-call]
        planes = join(pairs.select(axis + 1, 0), pairs.select(axis + 1, 1))
    return planes.mul_(1 / 8) if is_mean else planes


def _triple(size: Any) -> tuple[int, ...]:
    return (size,) * 3 if isinstance(size, int) else tuple(size)


# --- The chain --------------------------------------------------------------------------------------


@dataclass
class _After:
    """What is done to the planes that a convolution makes: activations and pools, a sum, and taking their moments."""

    layers: list[nn.Module] = field(default_factory=list)
    added: Tensor | None = None  # [B, D, H, W, C]
    last: nn.Module | None = None
    moments: Moments | None = None

    def __call__(self, slab: Tensor, volume: int, first: int) -> Tensor:
        """Planes of a volume, [D, H, W, C], the first of which is the `first` of the convolution's."""
        for layer in self.layers:
            if isinstance(layer, _ACTIVATIONS):
                _act(layer, slab)
            else:
                slab = _halved(layer, slab)
        if self.added is not None:
            slab += self.added[volume, first : first + len(slab)]
        if self.last is not None:
            _act(self.last, slab)
        if self.moments is not None:
            self.moments.add(volume, slab)
        return slab


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1)


def _together(layers: list[nn.Module], maps: Any, added: Tensor | None = None, last: nn.Module | None = None) -> Tensor:
    """The chain of maps [B, D, H, W, C], a tensor or `Joined`; one of them is as its norm will scale it.

    Returns [B, C, D, H, W].
    """
    ours, moments = False, None  # whether the map may be written to
    scaling: Any = None  # what is still to be done to it
    if added is not None:
        added = _channels_last(added)
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, _NORMS):
            maps, ours = _finished(maps, scaling, ours)
            if moments is None and not isinstance(layer, nn.BatchNorm3d):
                moments = Moments.of(maps)
            scaling = _Scaling.of(layer, len(maps), moments)
            if layers and isinstance(layers[0], _ACTIVATIONS):
                scaling.act = layers.pop(0)
        elif isinstance(layer, nn.Conv3d):
            after = _After()
            while layers and (isinstance(layers[0], _ACTIVATIONS) or _halves(layers[0])):
                after.layers.append(layers.pop(0))
            if _joins(layer, after.layers, layers, maps):
                scaling = _Mixing(scaling, layer, after.layers)
                continue
            if not layers:
                after.added, after.last, added, last = added, last, None, None
            elif isinstance(layers[0], (nn.InstanceNorm3d, nn.GroupNorm)):
                after.moments = Moments(len(maps), layer.out_channels)
            maps = _convolved(maps, layer, scaling, after)
            ours, scaling, moments = True, None, after.moments
        elif _halves(layer):
            maps = _ended(maps, scaling, ours, pool=layer)
            ours, scaling, moments = True, None, None
        else:
            maps, ours = _finished(maps, scaling, ours)
            if isinstance(layer, _ACTIVATIONS):
                maps = _act(layer, maps if ours else maps.clone())
            else:
                maps = layer(maps.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
            ours, scaling, moments = True, None, None
    if scaling is not None or added is not None or last is not None:
        maps = _ended(maps, scaling, ours, added, last)
    return cast(Tensor, maps.permute(0, 4, 1, 2, 3))


def _finished(maps: Tensor, scaling: _Scaling | None, ours: bool) -> tuple[Tensor, bool]:
    """The map after its norm, and whether it may be written to."""
    return (maps, ours) if scaling is None else (_ended(maps, scaling, ours), True)


def _ended(
    maps: Tensor,
    scaling: _Scaling | None,
    ours: bool,
    added: Tensor | None = None,
    last: nn.Module | None = None,
    pool: nn.Module | None = None,
) -> Tensor:
    """The map after its norm, and a sum and a last activation, in place where it may be, or a pool of 2×2×2."""
    batch, depth, *plane, channels = maps.shape
    if pool is not None:
        out = maps.new_empty(batch, depth // 2, *(n // 2 for n in plane), channels)
    else:
        out = maps if ours else maps.new_empty(*maps.shape)
    count = _planes(maps)
    for volume in range(batch):
        for first in range(0, depth, count):
            place = slice(volume, volume + 1), slice(first, first + count)
            values = maps[place]
            if scaling is not None:
                values = scaling(values, place[0], torch.empty_like(values) if pool is not None else out[place])
            elif pool is None:
                values = values if ours else out[place].copy_(values)
            if added is not None:
                values += added[place]
            if last is not None:
                _act(last, values)
            if pool is not None:
                halved = _halved(pool, values[0])
                out[volume, first // 2 : first // 2 + len(halved)] = halved
    return out


def _planes(maps: Tensor | Joined) -> int:
    """How many planes make a slab, an even number."""
    return max(2, _SLAB // 2 // max(1, math.prod(maps.shape[2:])) // 2 * 2)


# --- Convolutions -----------------------------------------------------------------------------------


def _convolved(maps: Tensor, conv: nn.Conv3d, before: Any, after: _After) -> Tensor:
    """A convolution [B, D, H, W, C] → the same of its outputs, with what is before and after it."""
    slabs = _slabs(conv, maps)
    if slabs is None:
        return _whole(maps if before is None else _ended(maps, before, ours=False), conv, after)
    size = tuple(outputs(n, conv) for n in maps.shape[1:4])  # kernels of slabs are cubes
    pools = sum(map(_halves, after.layers))
    out = maps.new_empty(len(maps), *(n >> pools for n in size), conv.out_channels)
    for volume, made in enumerate(out):
        # Where no pool follows, slabs are made in place.
        place = maps.new_empty(0) if pools else made
        done = first = 0
        for slab in slabs(maps, volume, conv, before, place):
            found = after(slab, volume, first)
            if pools:
                made[done : done + len(found)] = found
            first, done = first + len(slab), done + len(found)
    return out


def _joins(conv: nn.Conv3d, after: list[nn.Module], following: list[nn.Module], maps: Tensor) -> bool:
    """Whether a 1×1×1 convolution's map need not be there, as the next convolution reads each plane once."""
    return (
        _slabs(conv, maps) is _pointwise
        and not any(map(_halves, after))
        and bool(following)
        and isinstance(following[0], nn.Conv3d)
        and _slabs(following[0], maps) is _winograd
    )


def _slabs(conv: nn.Conv3d, maps: Tensor) -> Any:
    """The way to compute a convolution slab by slab; None where it is better done as a whole."""
    if conv.groups > 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if set(conv.kernel_size) == set(conv.stride) == {1}:
        return _pointwise
    if len({*conv.kernel_size}) == len({*conv.stride}) == len({*conv.padding}) == 1 and conv.in_channels <= 3:
        return _of_few_channels
    is_plain = set(conv.kernel_size) == {3} and set(conv.stride) == set(conv.padding) == {1}
    return _winograd if is_plain and math.prod(maps.shape[1:4]) >= _WINOGRAD_FROM else None


def _whole(maps: Tensor, conv: nn.Conv3d, after: _After) -> Tensor:
    along = dilated.lines(maps.shape[1:4], conv)
    made = _direct(maps, conv) if along is None else dilated.convolved(maps, conv, along)
    slabs = [after(planes, volume, 0) for volume, planes in enumerate(made)]
    return torch.stack(slabs) if len(slabs) > 1 else slabs[0][None]


def _direct(maps: Tensor, conv: nn.Conv3d) -> Tensor:
    x = maps.permute(0, 4, 1, 2, 3)
    # torch does not take oneDNN's by itself where it has one thread.
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        arguments: Any = conv.padding, conv.stride, conv.dilation, conv.groups
        made = torch.mkldnn_convolution(x, conv.weight, conv.bias, *arguments)
    else:
        made = F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return made.permute(0, 2, 3, 4, 1)


# Slabs of one volume's outputs [planes, H, W, C], an even number but for the last; parts of `out` unless that is empty.


def _part(out: Tensor, first: int, size: Sequence[int]) -> Tensor:
    """Where a slab of a size goes."""
    return out[first : first + size[0]] if out.numel() else out.new_empty(size)


def _pointwise(maps: Tensor, volume: int, conv: nn.Conv3d, before: _Before | None, out: Tensor) -> Iterator[Tensor]:
    weight = conv.weight.flatten(1).t()
    first = 0
    for planes in maps[volume].split(_planes(maps)):  # type: ignore[no-untyped-call]
        if before is not None:
            planes = before(planes[None], slice(volume, volume + 1), torch.empty_like(planes[None]))[0]
        slab = _part(out, first, (*planes.shape[:3], conv.out_channels))
        values = planes.reshape(-1, conv.in_channels)
        if conv.bias is None:
            torch.mm(values, weight, out=slab.view(-1, conv.out_channels))
        else:
            torch.addmm(conv.bias, values, weight, out=slab.view(-1, conv.out_channels))
        yield slab
        first += len(planes)


def _of_few_channels(
    maps: Tensor, volume: int, conv: nn.Conv3d, before: _Before | None, out: Tensor
) -> Iterator[Tensor]:
    """As a convolution of planes, whose channels are the planes under the kernel.

    Where all under it is 0, as beside a brain, a convolution is its bias, and not computed.
    """
    x = maps[volume : volume + 1]
    if before is not None:
        x = before(x, slice(volume, volume + 1), torch.empty_like(x))
    kernel, stride, margin = geometry(conv)
    x = F.pad(x[0].permute(0, 3, 1, 2), (margin,) * 2 + (margin,) * 2 + (0, 0) + (margin,) * 2)  # [D, C, H, W]
    weight = conv.weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    windows = x.unfold(0, kernel, stride).permute(0, 4, 1, 2, 3)  # [outputs, kernel, C, H, W]
    rows, columns = ((n - kernel) // stride + 1 for n in x.shape[2:])
    filled = (x != 0).any(dim=1)  # [D, H, W]
    first = 0
    for some in windows.split(TILE):  # type: ignore[no-untyped-call]
        slab = _part(out, first, (len(some), rows, columns, conv.out_channels))
        under = filled[first * stride : (first + len(some) - 1) * stride + kernel].any(dim=0)
        box = [_reached(under.any(dim=axis), kernel, stride, n) for axis, n in ((1, rows), (0, columns))]
        if any(part != slice(0, n) for part, n in zip(box, (rows, columns), strict=True)):
            slab[:] = 0 if conv.bias is None else conv.bias
        if all(part.stop > part.start for part in box):
            seen = [slice(part.start * stride, (part.stop - 1) * stride + kernel) for part in box]
            made = F.conv2d(some[..., seen[0], seen[1]].flatten(1, 2), weight, conv.bias, stride)
            slab[:, box[0], box[1]] = made.permute(0, 2, 3, 1)
        yield slab
        first += len(some)


def _reached(filled: Tensor, kernel: int, stride: int, count: int) -> slice:
    """Of so many outputs along an axis those that see anything filled, and what is between them."""
    places = filled.nonzero()
    if not len(places):
        return slice(0, 0)
    low, high = int(places[0]), int(places[-1])
    return slice(max(0, -((kernel - 1 - low) // stride)), min(count, high // stride + 1))


def _winograd(maps: Tensor, volume: int, conv: nn.Conv3d, before: _Before | None, out: Tensor) -> Iterator[Tensor]:
    _, depth, rows, columns, _ = maps.shape
    channels = conv.in_channels
    way, volumes = Winograd(conv), slice(volume, volume + 1)
    most = max(1, 2 * _SLAB // (TILE * rows * columns * channels))
    needed = -(-depth // TILE)
    tiles = -(-needed // -(-needed // most))  # of so many slabs, each has about as many
    # Planes with a border of 0, which saves the convolution its own; the last two are the next slab's first.
    planes = maps.new_zeros(TILE * tiles + 2, rows + 2, columns + 2, channels)
    inside = planes[:, 1:-1, 1:-1]

    def read(at: int, z: int, count: int) -> None:
        here = max(0, min(count, depth - z))
        if before is None:
            inside[at : at + here] = maps[volume, z : z + here]
        elif here:
            before(maps[volumes, z : z + here], volumes, inside[None, at : at + here])
        inside[at + here : at + count] = 0

    read(1, 0, 1)
    for first in range(0, depth, TILE * tiles):
        count = min(TILE * tiles, depth - first)
        if first:
            planes[:2] = planes[-2:]
        read(2, first + 1, TILE * tiles)
        slab = _part(out, first, (count, rows, columns, conv.out_channels))
        here = -(-count // TILE)
        whole = slab if count == TILE * here else slab.new_empty(TILE * here, *slab.shape[1:])
        # Tiles are as volumes of a batch.
        under = planes.unfold(0, TILE + 2, TILE).movedim(-1, 0)
        way(under[:, :here], whole.unflatten(0, (here, TILE)))  # type: ignore[no-untyped-call]
        if whole is not slab:
            slab.copy_(whole[:count])
        yield slab
