"""Training in little memory: the parts of a ResNet with their backward passes written out.

A stem (convolution, BatchNorm, ReLU, max-pool) goes by slabs, and its full-size activation never exists. A norm with a
scale above 0, as ReLU, keeps the order of voxels, so that max-pool may come before both: the largest voxel of a window
is the same one. One pass over slabs of the volume therefore gives the pooled convolution and the moments that BatchNorm
needs, and what is left is done at an eighth of the size. The backward pass computes each slab again.

Within blocks, BatchNorm and ReLU keep their input alone, where autograd keeps their outputs too.

Outputs, gradients and running statistics are those of the modules called in turn, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv3d_input, conv3d_weight
from torch.nn.modules.batchnorm import _BatchNorm

_SLAB_BYTES = 2**26  # of the convolution's output; the backward pass has some four such tensors at a time
_CHANNELS = (0, 2, 3, 4)  # all axes but that of the channels


def pooled_stem(
    x: Tensor, conv: nn.Conv3d, norm: _BatchNorm, slab_bytes: int = _SLAB_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left to do of `max_pool3d(relu(norm(conv(x))), 3, stride=2, padding=1)`: `scale_shift_relu`.

    Where a scale of the norm is exactly 0, all voxels of a window tie: its gradient is that of the largest one, and
    not, as that of max-pool, of the first.

    Args:
        x: [B, in_chans, D, H, W].
        conv: Of stride 1 and odd kernel, padded to keep every voxel, without a bias.
        norm: BatchNorm3d or SyncBatchNorm, in training or eval mode; it counts the batch.
        slab_bytes: Of the convolution's output that is there at a time, at least.

    Returns:
        The pooled convolution [B, C, ⌈D/2⌉, ⌈H/2⌉, ⌈W/2⌉], and by channel [C] what it is to be multiplied by, and what
        is to be added.
    """
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight)
    weight = conv.weight * sign[:, None, None, None, None]  # the scale is above 0 now
    x, weight = _as_autocast(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        pooled, mean, variance = _PooledConvolution.apply(x, weight, slab_bytes)  # type: ignore[no-untyped-call]
        scale, shift = _scale_and_shift(norm, mean * sign, variance, x.numel() // x.shape[1])
        return pooled, scale * sign, shift


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the type that a convolution takes under autocast, where that is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`relu(scale · x + shift)` by channel, computed in the widest of the types, in that of x."""
    return (x * _by_channel(scale) + _by_channel(shift)).relu_().to(x.dtype)


def convolution(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """`conv(x)` of a convolution without a bias, with a backward pass by slabs."""
    x, weight = _as_autocast(x, conv.weight)
    with torch.autocast(x.device.type, enabled=False):
        return _Convolution.apply(x, weight, conv.stride, conv.padding)  # type: ignore[no-any-return, no-untyped-call]


def norm_relu_conv(x: Tensor, norm: _BatchNorm, conv: nn.Conv3d) -> Tensor:
    """`conv(relu(norm(x)))` of a convolution without a bias, of which x alone is kept for the backward pass."""
    with torch.autocast(x.device.type, enabled=False):
        weight, moments = conv.weight.to(x.dtype), _moments_of(x, norm)
        return _Convolution.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, weight, conv.stride, conv.padding, norm.weight, norm.bias, moments
        )


def norm_add_relu(x: Tensor, norm: _BatchNorm, residual: Tensor) -> Tensor:
    """`relu(norm(x) + residual)`, of which x and the residual are kept for the backward pass, once.

    The backward pass writes into x: nothing else may need it, and there can be no second backward pass, unless the
    first has computed x itself, as inside `torch.utils.checkpoint`.
    """
    with torch.autocast(x.device.type, enabled=False):
        moments = _moments_of(x, norm)
        return _NormAddReLU.apply(x, norm.weight, norm.bias, moments, residual)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True, eq=False)
class _Moments:
    """What a norm takes off its input, and divides it by.

    Attributes:
        mean: [C].
        rstd: [C] 1 / the standard deviation.
        voxels: They were taken over, on all processes; None where they are a norm's running statistics.
        group: The processes, where there are several.
    """

    mean: Tensor
    rstd: Tensor
    voxels: Tensor | None = None
    group: Any = None


@torch.no_grad()
def _moments_of(x: Tensor, norm: _BatchNorm) -> _Moments:
    """The moments of a norm's input, which counts the batch in training."""
    if not _takes_moments(norm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return _Moments(norm.running_mean, (norm.running_var + norm.eps).rsqrt())
    mean, variance, voxels = _joined(norm, *_mean_and_variance(x), x.numel() // x.shape[1])
    return _Moments(mean, (variance + norm.eps).rsqrt(), voxels, _group(norm))


def _takes_moments(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None or norm.running_var is None


def _scale_and_shift(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies each channel by, and adds to it; gradients pass to the moments of its input."""
    if _takes_moments(norm):
        mean, variance, _ = _joined(norm, mean, variance, count)
    else:
        mean, variance = norm.running_mean, norm.running_var  # type: ignore[assignment]
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale


def _joined(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of `count` voxels → those of all processes, where the norm is a SyncBatchNorm, and of how many voxels.

    The norm's running statistics count the batch.
    """
    voxels, group = mean.new_tensor(count), _group(norm)
    if group is not None:
        mean, variance, voxels = _over_processes(mean, variance, voxels, group)
    if norm.training and norm.running_mean is not None:
        count_batch(norm, mean, variance * (voxels / (voxels - 1)))
    return mean, variance, voxels


def _group(norm: _BatchNorm) -> Any:
    """The processes over which a norm takes its statistics; None where it is this one alone."""
    if not hasattr(norm, "process_group") or not dist.is_initialized():
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


@torch.no_grad()
def count_batch(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Add a batch's mean and unbiased variance [C] to the running statistics of a norm."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    factor = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean), factor)
    norm.running_var.lerp_(variance.to(norm.running_var), factor)


def _over_processes(mean: Tensor, variance: Tensor, voxels: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of all processes' voxels together, and how many those are; gradients pass between processes."""
    from torch.distributed.nn.functional import all_reduce

    total = voxels.clone()
    dist.all_reduce(total, group=group)
    share = voxels / total
    joined: Tensor = all_reduce(mean * share, group=group)  # type: ignore[no-untyped-call]
    spread: Tensor = all_reduce((variance + (mean - joined).square()) * share, group=group)  # type: ignore[no-untyped-call]
    return joined, spread, total


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """By channel, [C], in float32 or wider; the variance is the biased one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=_CHANNELS, correction=0)
    return mean, variance


class _PooledConvolution(torch.autograd.Function):
    """x, weight → max_pool3d(conv3d(x, weight), 3, stride=2, padding=1), and by channel the convolution's moments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, slab_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)  # of statistics
        mean = squares = torch.zeros(len(weight), dtype=dtype, device=x.device)
        count, parts = 0, []
        for first, last in _slabs(x, weight, slab_bytes):
            z, new, pooled = _slab(x, weight, first, last)
            parts.append(pooled)
            # Chan, Golub and LeVeque 1983: the moments of two sets of voxels together.
            more = x.numel() // x.shape[1] // x.shape[2] * (z.shape[2] - new)
            centre, spread = _mean_and_variance(z[:, :, new:])
            away, part = centre - mean, more / (count + more)
            mean = mean + away * part
            squares = squares + spread * more + away.square() * (count * part)
            count += more
        ctx.save_for_backward(x, weight, mean)
        ctx.slab_bytes, ctx.count = slab_bytes, count
        return torch.cat(parts, dim=2), mean, squares / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_pooled, of_mean, of_variance = gradients
        x, weight, mean = ctx.saved_tensors
        x, weight = (
            t.detach().requires_grad_(need) for t, need in zip((x, weight), ctx.needs_input_grad, strict=False)
        )
        inputs = [t for t in (x, weight) if t.requires_grad]
        sums = [torch.zeros_like(t, dtype=mean.dtype) for t in inputs]
        through_moments = bool(of_mean.any() or of_variance.any())  # not where the norm is in eval mode
        of_mean, of_variance, mean = map(_by_channel, (of_mean, of_variance, mean))
        for first, last in _slabs(x, weight, ctx.slab_bytes):
            with torch.enable_grad():
                z, new, pooled = _slab(x, weight, first, last)
            ways = [(pooled, of_pooled[:, :, first:last])]
            if through_moments:
                of_z = (z.detach() - mean).mul_(2 / ctx.count * of_variance).add_(of_mean / ctx.count)
                of_z[:, :, :new] = 0
                ways.append((z, of_z.to(z.dtype)))
            found = torch.autograd.grad([z for z, _ in ways], inputs, [gradient for _, gradient in ways])
            for total, part in zip(sums, found, strict=True):
                total += part
        of = {id(t): total.to(t.dtype) for total, t in zip(sums, inputs, strict=True)}
        return of.get(id(x)), of.get(id(weight)), None


def _slabs(x: Tensor, weight: Tensor, slab_bytes: int) -> Iterator[tuple[int, int]]:
    """First window and the one behind the last, along z, of the max-pool's windows of each slab."""
    batch, _, depth, height, width = x.shape
    windows = (depth + 1) // 2
    step = max(1, slab_bytes // (2 * batch * len(weight) * height * width * x.element_size()))
    return ((first, min(first + step, windows)) for first in range(0, windows, step))


def _slab(x: Tensor, weight: Tensor, first: int, last: int) -> tuple[Tensor, int, Tensor]:
    """What windows `first` … `last` − 1 of the max-pool see; window n sees planes 2n − 1 … 2n + 1 of those there are.

    Returns:
        Those planes of the convolution; how many of them the window before sees too; and the windows' largest voxels.
    """
    depth = x.shape[2]
    low, high = max(2 * first - 1, 0), min(2 * last, depth)
    reach, *padding = (size // 2 for size in weight.shape[2:])
    planes = x[:, :, max(low - reach, 0) : high + reach]
    planes = F.pad(planes, (0, 0, 0, 0, max(reach - low, 0), max(high + reach - depth, 0)))
    z = F.conv3d(planes, weight, padding=(0, *padding))
    seen = z
    if first == 0 or high < 2 * last:  # outside there is nothing: at the first plane, and behind an odd last one
        seen = F.pad(z, (0, 0, 0, 0, int(first == 0), 2 * last - high), value=float("-inf"))
    return z, 2 * first - low, F.max_pool3d(seen, 3, 2, (0, 1, 1))


class _Convolution(torch.autograd.Function):
    """x, a weight → conv3d(x, weight), or conv3d(relu(norm(x)), weight) of a norm's weight, bias and moments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: Any,
        padding: Any,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        moments: _Moments | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale, shift)
        ctx.moments, ctx.stride, ctx.padding = moments, stride, padding
        return F.conv3d(_normalised_relu(x, scale, shift, moments), weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift = ctx.saved_tensors
        (depth, kernel), (stride, *strides), (padding, *paddings) = (
            (x.shape[2], weight.shape[2]),
            ctx.stride,
            ctx.padding,
        )
        of_x = torch.zeros_like(x) if any(ctx.needs_input_grad[n] for n in (0, 4, 5)) else None
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        first = 0
        # By slabs of the output: what a convolution's backward pass needs beside its result is large.
        for (gradient,) in _parts(gradients[0]):
            low, last = first * stride - padding, first + gradient.shape[2]
            high = (last - 1) * stride - padding + kernel
            seen = slice(max(low, 0), min(high, depth))
            y = _normalised_relu(x[:, :, seen], scale, shift, ctx.moments)
            y = F.pad(y, (0, 0, 0, 0, max(-low, 0), max(high - depth, 0)))
            geometry = (stride, *strides), (0, *paddings)
            if ctx.needs_input_grad[1]:
                of_weight += conv3d_weight(y, weight.shape, gradient, *geometry)  # type: ignore[no-untyped-call]
            if of_x is not None:
                of_y = conv3d_input(y.shape, weight, gradient, *geometry)  # type: ignore[no-untyped-call]
                of_x[:, :, seen] += of_y[:, :, max(-low, 0) : y.shape[2] - max(high - depth, 0)]
            first = last
        of_weight = of_weight.to(weight.dtype)
        if ctx.moments is None or of_x is None:
            return of_x, of_weight, None, None, None, None, None
        for of_part, part in _parts(of_x, x):
            of_part *= _normalised_relu(part, scale, shift, ctx.moments) > 0
        return of_x, of_weight, None, None, *_through_norm(of_x, x, scale, ctx.moments, out=of_x), None


class _NormAddReLU(torch.autograd.Function):
    """x, a norm's weight, bias and moments, a residual → relu(norm(x) + residual)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, moments: _Moments, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, shift, residual)
        ctx.moments = moments
        return _normalised(x, scale, shift, moments).add_(residual).relu_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, residual = ctx.saved_tensors
        of_sum = torch.empty_like(x)
        for part, gradient, *inputs in _parts(of_sum, gradients[0], x, residual):
            shown = _normalised(inputs[0], scale, shift, ctx.moments).add_(inputs[1]) > 0
            torch.mul(gradient, shown, out=part)
        of_scale, of_shift = _through_norm(of_sum, x, scale, ctx.moments, out=x)
        return x, of_scale, of_shift, None, of_sum


def _normalised_relu(x: Tensor, scale: Tensor | None, shift: Tensor | None, moments: _Moments | None) -> Tensor:
    """`relu(norm(x))`; x itself where there is no norm."""
    if scale is None or shift is None or moments is None:
        return x
    return _normalised(x, scale, shift, moments).relu_()


def _normalised(x: Tensor, scale: Tensor, shift: Tensor, moments: _Moments) -> Tensor:
    """A norm's output, computed in the widest of the types, in that of x."""
    factor = scale * moments.rstd
    factor, shift = _by_channel(factor), _by_channel(shift - moments.mean * factor)
    normalised = torch.empty_like(x)
    for y, part in _parts(normalised, x):
        y.copy_(torch.addcmul(shift, part.to(factor.dtype), factor))
    return normalised


def _through_norm(gradient: Tensor, x: Tensor, scale: Tensor, moments: _Moments, out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a norm's output → that of its input, in `out`, which may be either; and those of its weights."""
    mean, rstd = _by_channel(moments.mean), _by_channel(moments.rstd)
    of_scale, of_shift = torch.zeros_like(moments.mean), torch.zeros_like(moments.mean)
    for g, part in _parts(gradient, x):
        of_shift += g.sum(dim=_CHANNELS, dtype=of_shift.dtype)
        of_scale += (g * (part - mean)).sum(dim=_CHANNELS)
    of_scale *= moments.rstd
    factor = _by_channel(scale * moments.rstd)
    if moments.voxels is None:
        for result, g in _parts(out, gradient):
            result.copy_(g * factor)
        return of_scale, of_shift
    shares = torch.stack([of_scale, of_shift])
    if moments.group is not None:
        dist.all_reduce(shares, group=moments.group)
    along, level = (_by_channel(share) for share in shares / moments.voxels)
    # factor · (g - level - along · rstd · (x - mean)), in as few passes as can be
    slope, level = factor * along * rstd, factor * (level - along * rstd * mean)
    for result, g, part in _parts(out, gradient, x):
        result.copy_((g * factor).sub_(part * slope).sub_(level))
    return of_scale, of_shift


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of some planes of each at a time, so that what is computed in between is small."""
    planes = max(1, _SLAB_BYTES // 4 * tensors[0].shape[2] // (tensors[0].numel() * tensors[0].element_size()))
    return zip(*(tensor.split(planes, dim=2) for tensor in tensors), strict=True)  # type: ignore[no-untyped-call]
