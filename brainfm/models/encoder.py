"""The contract that every encoder keeps: timm's words, 3D shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from brainfm.pretrained import PretrainedCfg


class Encoder(nn.Module, ABC):
    """A 3D encoder: volumes [B, in_chans, D, H, W] in, embeddings [B, num_features] or logits out.

    A subclass builds its layers, then calls `reset_classifier`, and writes `forward_features`, `pool`,
    `forward_intermediates`, `set_grad_checkpointing` and `group_matcher`.

    Attributes:
        num_features: Width of the embedding.
        num_classes: Outputs of the classifier; 0 without one.
        in_chans: Input channels.
        global_pool: How a feature map or tokens become one vector; one of `pools`.
        feature_info: A dict a stage: "num_chs", "reduction" (voxels a step, by axis) and "module".
        pretrained_cfg: What the weights are and expect; set by `create_model`.
    """

    pools: ClassVar[tuple[str, ...]]  # the first is the default
    classifier: ClassVar[str]  # name of the head's module, as in the family's checkpoints
    first_conv: ClassVar[str]  # name of the layer that sees the input channels

    num_features: int
    num_classes: int
    in_chans: int
    global_pool: str
    feature_info: list[dict[str, Any]]
    pretrained_cfg: PretrainedCfg
    model_args: dict[str, Any]  # what `create_model` gave the constructor, beside channels, classes and dropout
    saved_args: dict[str, Any]  # the same of the model whose weights these are, where their config says
    weights_report: object | None  # what `create_model` loaded, a `brainfm.weights.WeightsReport`

    def __init__(self, num_classes: int, in_chans: int, global_pool: str | None, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = self._checked_pool(global_pool or self.pools[0])
        self.head_drop = nn.Dropout(drop_rate)
        self.pretrained_cfg = PretrainedCfg()
        self.model_args, self.saved_args = {}, {}
        self.weights_report = None
        self.grad_checkpointing = False
        self._frozen = False

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, D, H, W] → the last feature map [B, num_features, d, h, w], or tokens [B, N, num_features]."""

    @abstractmethod
    def pool(self, features: Tensor) -> Tensor:
        """What `forward_features` gives → [B, num_features]."""

    @abstractmethod
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps [B, C, d, h, w] of chosen stages, beside the final features unless `intermediates_only`.

        Args:
            x: [B, in_chans, D, H, W].
            indices: Which stages of `feature_info`: a list (negative counts from the end), the last n, or None for all.
            intermediates_only: Return the list alone, and compute nothing behind the last chosen stage.
        """

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the inputs of each block and compute the rest again in the backward pass."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters into "stem" and "blocks", for layer-wise learning rates."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, beside biases and norms."""
        return set()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives → [B, num_features], and through the classifier unless `pre_logits`."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, D, H, W] → [B, num_features], or [B, num_classes] where a head was asked for."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer: a Linear, or an Identity where there are no classes."""
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of `num_classes` outputs (0: none), and the pooling where one is given."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, not {num_classes}")
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            # Beside the trunk's parameters, in place, type and mode.
            like = next(self.parameters(), torch.empty(0))
            head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        setattr(self, self.classifier, head.train(self.training))

    def freeze(self) -> Encoder:
        """Hold the trunk still: no gradients, and eval mode (BatchNorm and dropout included) even under `.train()`.

        The classifier stays trainable. Returns the encoder itself.
        """
        self._frozen = True
        self.requires_grad_(False)
        self.get_classifier().requires_grad_(True)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Training or eval mode; a frozen trunk stays in eval mode."""
        super().train(mode)
        if self._frozen:
            for name, child in self.named_children():
                if name not in (self.classifier, "head_drop"):
                    child.eval()
        return self

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The one place where a family says how checkpoints of others fit: renamed, dropped and reshaped tensors.

        Here: the input layer is adapted to `in_chans`. What is left is loaded strictly.
        """
        weight = state.get(f"{self.first_conv}.weight")
        if weight is not None and weight.ndim == 5 and weight.shape[1] != self.in_chans:
            state = state | {f"{self.first_conv}.weight": adapt_input_weight(weight, self.in_chans)}
        return state

    def _checked_pool(self, name: str) -> str:
        if name not in self.pools:
            raise ValueError(f"{type(self).__name__} pools by {' or '.join(map(repr, self.pools))}, not {name!r}")
        return name

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"expected volumes of shape [B, {self.in_chans}, D, H, W], got {list(x.shape)}"
                + ("; add the batch axis: model(tensor[None])" if x.ndim == 4 else "")
            )

    def _run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`block(x)`, recomputed in the backward pass where gradient checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                return nullcontext(), self._still_statistics()

            recomputed: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            return recomputed
        return block(x)

    @contextmanager
    def _still_statistics(self) -> Iterator[None]:
        """Keep BatchNorm's running statistics as they are: recomputing a block must not count its batch twice."""
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm) and module.training]
        saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
        try:
            yield
        finally:
            for buffer, value in saved:
                buffer.copy_(value)


def adapt_input_weight(weight: Tensor, in_chans: int) -> Tensor:
    """A convolution's weight [out, I, …] for `in_chans` input channels, by timm's rule.

    One channel gets the sum over I; more get the I repeated in turn and scaled by I / in_chans, so that copies of one
    image in every channel give what it gave alone.
    """
    have = weight.shape[1]
    weight = weight.float()
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    repeats = -(-in_chans // have)
    return weight.repeat(1, repeats, *[1] * (weight.ndim - 2))[:, :in_chans] * (have / in_chans)


def chosen_stages(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """The stages that `forward_intermediates` was asked for, as indices from 0, in the network's order."""
    if indices is None:
        return list(range(count))
    wanted = (
        list(range(count - indices, count))
        if isinstance(indices, int)
        else [i + count if i < 0 else i for i in indices]
    )
    if not wanted or not all(0 <= i < count for i in wanted):
        raise ValueError(f"indices {indices!r} name no stage: there are {count}")
    return sorted(set(wanted))
