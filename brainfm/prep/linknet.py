"""deepbet's network, a LinkNet (Chaurasia and Culurciello 2017) of 3-D residual blocks, run from its weights alone.

Its TorchScript makes two channels of 256³ voxels, their softmax and a copy. The sigmoid of their difference is the
same, and takes a third of the memory and less time: in float64 to 1e-10, in float32 to what either is off by (1e-4).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
_EPSILON = 1e-5  # of torch's instance norm


def brain_probability(weights: Weights, image: Tensor) -> Tensor:
    """The probability of brain [1, 1, x, y, z] of an image of that shape, whose sides are multiples of 32."""
    x = _norm(F.conv3d(image, weights["init.0.weight"], stride=2, padding=3))
    x = _pooled(x)
    stages = [x]
    for stage in range(4):
        x = _block(weights, f"down{stage}.block1", x, stride=1 if stage == 0 else 2)
        x = _block(weights, f"down{stage}.block2", x, stride=1)
        stages.append(x)
    for stage in range(4):
        x = _up(weights, f"up{stage}", x, stride=1 if stage == 3 else 2).add_(stages[3 - stage])
    del stages
    x = F.conv_transpose3d(x, weights["tp_conv1.0.weight"], weights["tp_conv1.0.bias"], 2, 1, 1)
    x = _norm(x)
    x = _norm(F.conv3d(x, weights["conv.0.weight"], weights["conv.0.bias"], padding=1))
    weight, bias = weights["tp_conv2.weight"], weights["tp_conv2.bias"]
    cubes = torch.einsum("cxyz,cijk->xiyjzk", x[0], weight[:, 1] - weight[:, 0])  # each voxel becomes 2×2×2
    shape = [2 * size for size in x.shape[2:]]
    return cubes.reshape(1, 1, *shape).add_(bias[1] - bias[0]).sigmoid_()


def _block(weights: Weights, name: str, x: Tensor, stride: int) -> Tensor:
    inner = _norm(F.conv3d(x, weights[f"{name}.double_conv.0.weight"], stride=stride, padding=1))
    inner = F.instance_norm(F.conv3d(inner, weights[f"{name}.double_conv.3.weight"], padding=1))
    down = weights.get(f"{name}.downsample.0.weight")
    beside = x if down is None else F.instance_norm(F.conv3d(x, down, stride=stride))
    return F.relu_(inner.add_(beside))


def _up(weights: Weights, name: str, x: Tensor, stride: int) -> Tensor:
    x = _norm(F.conv3d(x, weights[f"{name}.conv1.0.weight"]))
    x = _norm(F.conv_transpose3d(x, weights[f"{name}.tp_conv.0.weight"], None, stride, 1, stride - 1))
    return _norm(F.conv3d(x, weights[f"{name}.conv2.0.weight"]))


def _norm(x: Tensor) -> Tensor:
    """ReLU of the instance norm, in place; torch's own norm takes three times as long.

    Sums are of rows and then of these, as float32 asks for, and squares are of what is left after the mean.
    """
    rows = x.reshape(*x.shape[:2], -1, x.shape[-1])
    rows = rows.sub_(rows.mean(3).mean(2)[:, :, None, None])
    variance = torch.linalg.vector_norm(rows, dim=3).square_().sum(2)[:, :, None, None] / rows[0, 0].numel()
    return rows.mul_((variance + _EPSILON).rsqrt_()).relu_().view_as(x)


def _pooled(x: Tensor) -> Tensor:
    """The largest of 3×3×3 voxels about every second, along one axis after another; sides are even."""
    for axis in (2, 3, 4):
        even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)  # type: ignore[no-untyped-call]
        x = torch.maximum(even, odd)
        later, before = x.narrow(axis, 1, x.shape[axis] - 1), odd.narrow(axis, 0, x.shape[axis] - 1)
        torch.maximum(later, before, out=later)
    return x
