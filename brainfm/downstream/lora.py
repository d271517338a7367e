"""Low-rank adaptation of linear layers: Hu et al. 2021 (arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from brainfm.errors import BrainfmError
from brainfm.models.encoder import Encoder

_TARGETS = ("attn.qkv", "attn.proj")


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained change of low rank, 0 at the start.

    Args:
        layer: The layer; its weights are taken over.
        rank: Of the change.
        alpha: The change is scaled by alpha / rank.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.requires_grad_(False)
        self.lora_down = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_up = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the change's."""
        return super().forward(x) + self.scale * (x @ self.lora_down.T @ self.lora_up.T)


def add_lora(encoder: Encoder, rank: int = 8, alpha: float | None = None) -> None:
    """Freeze an encoder, in place, but for its head and low-rank changes of its attention layers.

    Args:
        encoder: A ViT.
        rank: Of the changes.
        alpha: Scale times rank; None is the rank, so a scale of 1.

    Raises:
        BrainfmError: The encoder has no attention layers.
    """
    encoder.requires_grad_(False)
    found = [name for name, layer in encoder.named_modules() if name.endswith(_TARGETS) and type(layer) is nn.Linear]
    if not found:
        raise BrainfmError(f"LoRA changes attention layers, and {type(encoder).__name__} has none; fine-tune it all")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        layer = encoder.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(encoder.get_submodule(parent), leaf, LoRALinear(layer, rank, rank if alpha is None else alpha))
    encoder.get_classifier().requires_grad_(True)
