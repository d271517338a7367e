"""Training in little memory gives the numbers of the modules called in turn, in training and eval mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm import create_model
from brainfm.models.slabs import convolution, norm_add_relu, norm_relu_conv, pooled_stem, scale_shift_relu


def stem(channels: int = 1, width: int = 6, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution and a norm whose scales have both signs."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(channels, width, 7, padding=3, bias=False), nn.BatchNorm3d(width)).to(dtype)
    with torch.no_grad():
        layers[1].weight.copy_(torch.randn(width))
        layers[1].bias.copy_(torch.randn(width) / 2)
        layers[1].running_mean.copy_(torch.randn(width) / 2)
    return layers


def volume(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise with a background of zeros, where voxels tie."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    x[..., : shape[-1] // 3] = 0
    return x


def in_turn(layers: nn.Sequential, x: Tensor) -> Tensor:
    return F.max_pool3d(F.relu(layers(x)), 3, 2, 1)


def by_slabs(layers: nn.Sequential, x: Tensor, slab_bytes: int = 1) -> Tensor:
    return scale_shift_relu(*pooled_stem(x, *layers, slab_bytes))


def learned(layers: nn.Sequential, x: Tensor, way) -> dict[str, Tensor]:
    """The output of a way, and after its backward pass all gradients and buffers."""
    layers, x = copy.deepcopy(layers), x.clone().requires_grad_()
    y = way(layers, x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in layers.named_parameters()}
    return {"output": y.detach(), "gradient of x": x.grad, **gradients, **dict(layers.named_buffers())}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "shape", [(1, 1, 12, 10, 12), (2, 1, 13, 9, 11), (3, 2, 7, 8, 7), (1, 1, 1, 5, 4), (1, 1, 2, 5, 4)]
)
@pytest.mark.parametrize("windows", [1, 3, 100])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_are_those_of_the_modules(shape, windows, training):
    layers, x = stem(shape[1]).train(training), volume(*shape)
    slab_bytes = windows * 2 * 6 * shape[0] * shape[3] * shape[4] * 8
    assert_same(learned(layers, x, lambda m, v: by_slabs(m, v, slab_bytes)), learned(layers, x, in_turn))


def test_statistics_without_a_momentum_are_the_mean_over_batches():
    layers, x = stem(), volume(2, 1, 8, 8, 8)
    layers[1].momentum = None
    other = copy.deepcopy(layers)
    for scale in (1, 2, 3):
        in_turn(layers, x * scale)
        by_slabs(other, x * scale)
    assert_same(dict(other.named_buffers()), dict(layers.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_norm_and_relu_within_a_block_are_those_of_the_modules(training, stride, layout, monkeypatch):
    monkeypatch.setattr("brainfm.models.slabs._SLAB_BYTES", 2**15)  # several slabs
    torch.manual_seed(0)
    first, second = (stem(6).train(training).to(memory_format=layout) for _ in range(2))
    second[0] = nn.Conv3d(6, 6, 3, stride=stride, padding=1, bias=False).double().to(memory_format=layout)
    layers = nn.Sequential(*first, *second)
    residual = torch.randn(2, 6, -(-5 // stride), -(-6 // stride), -(-7 // stride), dtype=torch.float64)

    def modules(m: nn.Sequential, v: Tensor) -> Tensor:
        return F.relu(m[3](m[2](F.relu(m[1](m[0](v))))) + residual)

    def ours(m: nn.Sequential, v: Tensor) -> Tensor:
        return norm_add_relu(norm_relu_conv(convolution(v, m[0]), m[1], m[2]), m[3], residual)

    x = volume(2, 6, 5, 6, 7).contiguous(memory_format=layout)
    assert_same(learned(layers, x, ours), learned(layers, x, modules))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("frozen", [True, False])
def test_whole_encoder_learns_the_same(channels, frozen):
    model = create_model("test_resnet_3d", in_chans=channels, num_classes=2).double()
    model = model.freeze() if frozen else model.train()
    x = volume(2, channels, 13, 14, 15)
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    found, wanted = (
        {k: v for k, v in learned(m, x, nn.Module.__call__).items() if v is not None} for m in (model, plain)
    )
    assert_same(found, wanted)
    assert len(model.forward_intermediates(x)[1]) == 5
    torch.testing.assert_close(model.forward_intermediates(x, [1])[1][0], plain.forward_intermediates(x, [1])[1][0])


def test_gradients_under_autocast_are_as_near_to_those_of_float32_as_without():
    model, x = create_model("test_resnet_3d").train(), volume(2, 1, 16, 20, 24, dtype=torch.float32)

    def gradient(bfloat16: bool, checkpointed: bool) -> Tensor:
        network = copy.deepcopy(model)
        network.set_grad_checkpointing(checkpointed)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            y = network(x)
        y.float().square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    exact = gradient(bfloat16=False, checkpointed=False)
    plain, ours = (torch.cosine_similarity(gradient(True, way), exact, dim=0) for way in (False, True))
    assert ours.dtype == torch.float32
    assert ours > plain - 0.01 > 0.9
