"""Parameter-efficient fine-tuning: low-rank changes, norms and biases, bottleneck adapters, of a CNN or a ViT alike.

Not by `peft`, whose 0.21.2 imports transformers and accelerate (some 8 s, 170 MB), and of Conv3d cannot merge kernels
of 1×1×1 nor groups, nor run dilated ones.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from brainfm.errors import BrainfmError
from brainfm.models.encoder import Encoder

M = TypeVar("M", bound=nn.Module)


class _LowRank(nn.Module):
    """A layer whose weight has a learned change of low rank, 0 at the start: LoRA, Hu et al. 2021 (arXiv 2106.09685).

    The change is `scale · up @ down`, with the weight as a matrix [outputs, all else]. As in the authors' own layers of
    convolutions it is added to the weight, so that stride, dilation and groups are the layer's, and to merge is exact.
    """

    lora_down: nn.Parameter
    lora_up: nn.Parameter
    lora_scale: float

    @property
    def weight(self) -> Tensor:
        """The weight, and the change."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight + self.lora_scale * (self.lora_up @ self.lora_down).view(weight.shape)


class LoRALinear(_LowRank, nn.Linear):  # type: ignore[override]
    """A linear layer that was given a change of low rank."""


class LoRAConv3d(_LowRank, nn.Conv3d):  # type: ignore[override]
    """A convolution that was given a change of low rank."""


_CHANGED: dict[type[nn.Module], type[_LowRank]] = {nn.Linear: LoRALinear, nn.Conv3d: LoRAConv3d}
_PLAIN = {changed: plain for plain, changed in _CHANGED.items()}


class Adapter(nn.Module):
    """x → x + up(ReLU(down(x))) of each cell or token, with `up` 0 at the start: Houlsby et al. 2019 (1902.00751).

    Args:
        channels: Of x: a map [B, C, D, H, W], or tokens [B, N, C].
        width: Of the bottleneck.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """In the shape of x."""
        cells = x.movedim(1, -1) if x.ndim == 5 else x
        change: Tensor = self.up(F.relu(self.down(cells)))
        return x + (change.movedim(-1, 1) if x.ndim == 5 else change)


def add_lora(encoder: Encoder, rank: int = 8, alpha: float | None = None) -> list[nn.Parameter]:
    """Add a change of low rank to every linear layer and convolution of an encoder's trunk, in place.

    Args:
        encoder: It computes what it did before, until what is returned is trained.
        rank: Of the changes; at most half of what a layer's weight could have, so that none is more than the weight.
        alpha: Scale times rank; None is the rank, so a scale of 1.

    Returns:
        The new parameters. Of the others none is frozen.
    """
    if rank < 1:
        raise BrainfmError(f"the rank of a change of low rank is {rank}, and must be 1 or more")
    if any(isinstance(layer, _LowRank) for layer in encoder.modules()):
        raise BrainfmError("this encoder has changes of low rank already; merge them first, by merge_lora(encoder)")
    found: list[nn.Parameter] = []
    for name, layer in encoder.named_modules():
        if type(layer) in _CHANGED and not _is_new(encoder, name):
            weight = layer.get_parameter("weight").detach()
            outputs, inputs = weight.flatten(1).shape
            own = min(rank, max(1, min(outputs, inputs) // 2))
            down, up = nn.Parameter(weight.new_empty(own, inputs)), nn.Parameter(weight.new_zeros(outputs, own))
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            layer.lora_down, layer.lora_up, layer.lora_scale = down, up, 1.0 if alpha is None else alpha / rank
            layer.__class__ = _CHANGED[type(layer)]  # the same names of the same tensors, and two more
            found += down, up
    return _some(found, encoder, "linear layer or convolution")


def merge_lora(module: nn.Module) -> None:
    """Add the changes of low rank to the weights, in place: the same outputs, of layers like any other again."""
    for layer in module.modules():
        if isinstance(layer, _LowRank):
            layer._parameters["weight"].data = layer.weight.detach()  # type: ignore[union-attr]
            del layer.lora_down, layer.lora_up, layer.lora_scale
            layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]


def merged(module: M) -> M:
    """The module itself, or where it has changes of low rank a copy in which they are merged."""
    if not any(isinstance(layer, _LowRank) for layer in module.modules()):
        return module
    module = copy.deepcopy(module)
    merge_lora(module)
    return module


def add_adapters(encoder: Encoder, reduction: int = 16) -> list[nn.Parameter]:
    """Add a bottleneck adapter after each stage of an encoder that has weights (of a ViT: each block), in place.

    `save_for_hub` keeps them, and `create_model` builds them again.

    Args:
        encoder: It computes what it did before, until what is returned is trained.
        reduction: Channels of a stage by those of its adapter's bottleneck, which has 1 at least.

    Returns:
        The new parameters. Of the others none is frozen.
    """
    if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1:
        raise BrainfmError(f"an adapter's reduction is {reduction!r}, and must be a whole number, 1 or more")
    if encoder.adapters:
        raise BrainfmError("this encoder has adapters already")
    like = next(encoder.parameters())
    for number, stage in enumerate(encoder.feature_info):
        channels = stage["num_chs"]
        if next(encoder.get_submodule(stage["module"]).parameters(), None) is not None:  # not an activation
            adapter = Adapter(channels, max(1, channels // reduction)).to(like.device, like.dtype)
            encoder.adapters[str(number)] = adapter.train(encoder.training)
    encoder.model_args = {**encoder.model_args, "adapter_reduction": reduction}
    return _some(list(encoder.adapters.parameters()), encoder, "stage with weights")


def norms_and_biases(encoder: Encoder) -> list[nn.Parameter]:
    """The scales and shifts of an encoder's norms, and all biases of its trunk, as far as they are learned.

    Biases alone are BitFit (Ben Zaken et al. 2021, arXiv 2106.10199); norms alone, of a CNN, are in Frankle et al. 2020
    (arXiv 2003.00152). A ResNet's convolutions have few biases, so that its norms are what there is.
    """
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    found = [
        parameter
        for place, module in encoder.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (name == "bias" or isinstance(module, norms)) and parameter.requires_grad and not _is_new(encoder, place)
    ]
    return _some(found, encoder, "norm or bias")


def _is_new(encoder: Encoder, name: str) -> bool:
    """Whether a module is of the head, or of an adapter."""
    return name == encoder.classifier_name or name.startswith((f"{encoder.classifier_name}.", "adapters."))


def _some(found: list[nn.Parameter], encoder: Encoder, what: str) -> list[nn.Parameter]:
    if not found:
        raise BrainfmError(f"{type(encoder).__name__} has no {what} that could be trained; fine-tune it all")
    return found
