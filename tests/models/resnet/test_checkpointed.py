"""Training in little memory gives the numbers of the modules called in turn, in training and eval mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm import create_model
from brainfm.models.resnet import ResNet, checkpointed
from brainfm.models.resnet.checkpointed import pooled_stem, residual_block


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
    return scaled(*pooled_stem(x, *layers, slab_bytes))


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.relu(x * scale[:, None, None, None] + shift[:, None, None, None])


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


class AsModule(nn.Module):
    """A residual block after a stem, or alone."""

    def __init__(self, block: nn.Module, after_stem: bool) -> None:
        super().__init__()
        self.block = block
        self.scale = nn.Parameter(torch.randn(6, dtype=torch.float64)) if after_stem else None
        self.shift = nn.Parameter(torch.randn(6, dtype=torch.float64)) if after_stem else None

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x if self.scale is None else scaled(x, self.scale, self.shift))

    def in_little_memory(self, x: Tensor) -> Tensor:
        return residual_block(self.block, x, *(() if self.scale is None else (self.scale, self.shift)))


@pytest.fixture(params=[1, 2], ids=["slabs of one plane", "of two"])
def small_slabs(request, monkeypatch):
    monkeypatch.setattr("brainfm.models.resnet.checkpointed._SLAB_BYTES", 1)
    monkeypatch.setattr("brainfm.models.resnet.checkpointed._SLAB_PLANES", request.param)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("place", ["after the stem", "first of a stage", "another"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_residual_block_is_that_of_the_modules(kind, place, training, layout, small_slabs):
    torch.manual_seed(0)
    network = ResNet(kind, (2, 2, 1, 1), (6, 8, 8, 8)).double()
    stage, number = {"after the stem": (network.layer1, 0), "first of a stage": (network.layer2, 0)}.get(
        place, (network.layer2, 1)
    )
    layers = AsModule(stage[number], place == "after the stem").train(training)
    with torch.no_grad():
        for values in (*layers.parameters(), *layers.buffers()):
            if values.ndim == 1:
                values.copy_(torch.rand_like(values) + 0.5)
    x = volume(2, layers.block.conv1.in_channels, 7, 6, 9).contiguous(memory_format=layout)
    layers = layers.to(memory_format=layout)
    assert_same(learned(layers, x, AsModule.in_little_memory), learned(layers, x, AsModule.__call__))


@pytest.mark.parametrize("frozen", ["conv1", "conv2", "downsample.0"])
def test_frozen_convolution_is_spared_its_gradient(frozen, monkeypatch):

    block, computed = create_model("test_resnet_3d").double().train().layer2[0], []
    gradient = checkpointed._weight_gradient
    monkeypatch.setattr(checkpointed, "_weight_gradient", lambda *given: computed.append(given[1]) or gradient(*given))
    block.get_submodule(frozen).requires_grad_(False)
    x = volume(1, 16, 5, 6, 7).requires_grad_()
    others = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
    found, wanted = (torch.autograd.grad(y.square().sum(), others) for y in (residual_block(block, x), block(x)))
    assert_same(dict(enumerate(found)), dict(enumerate(wanted)))
    assert len(computed) == 2  # of the other two, of one slab each


def test_residual_block_may_be_passed_back_twice():
    block, x = create_model("test_resnet_3d").double().train().layer1[0], volume(1, 16, 5, 6, 7)
    y = residual_block(block, x.requires_grad_()).square().sum()
    first, second = (torch.autograd.grad(y, [x, *block.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


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
    # No stage's map has two planes: of those, oneDNN 3.12 gives weight gradients with unset memory in bfloat16.
    torch.manual_seed(0)
    model, x = create_model("test_resnet_3d").train(), volume(2, 1, 36, 20, 24, dtype=torch.float32)

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


def test_second_derivatives_are_refused():
    block, x = create_model("test_resnet_3d").double().train().layer1[0], volume(1, 16, 5, 6, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(residual_block(block, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
