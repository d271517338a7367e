"""3D ResNets as MONAI has them, as Kaczmarek et al. 2025 (arXiv 2509.10620) pretrained them with SimCLR.

The modules are those of MONAI's `ResNet` (`blocks`), so that a state dict of one loads strictly in the other. Around
them are the encoder contract, and what other publications changed in the network: AnatCL's stem has a stride, and
MedicalNet's last stages (Chen et al. 2019, arXiv 1904.00625) keep the size of the map and dilate their kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brainfm.models.adaptation import merged
from brainfm.models.encoder import Encoder, computing_in, stage
from brainfm.models.fast.chain import Chained, is_traced
from brainfm.models.fast.folding import fold_batch_norms, weights_made_anew
from brainfm.models.resnet.blocks import Basic, Bottleneck, Shortcut, draw, residual_stage
from brainfm.models.resnet.checkpointed import pooled_stem, residual_block
from brainfm.models.resnet.streamed import streamed_features

_BLOCKS: dict[str, type[Basic | Bottleneck]] = {"basic": Basic, "bottleneck": Bottleneck}
_STAGES = ("layer1", "layer2", "layer3", "layer4")


class ResNet(Chained, Encoder):
    """A 3D ResNet (7×7×7 stem, residual blocks in four stages) as an encoder.

    Args:
        block: "basic" (ResNet-18) or "bottleneck" (ResNet-50).
        layers: Blocks in each of the four stages.
        widths: Channels of each stage, before a bottleneck's expansion by 4.
        stem_stride: Of the first convolution.
        shortcut: Where a stage changes the map's size or width: "B", a 1×1×1 convolution and a norm, or "A", see
            `brainfm.models.resnet.blocks.PaddedShortcut`.
        shortcut_bias: Whether the convolutions of shortcut B have a bias.
        dilations: Of each stage's 3×3×3 kernels. A stage whose dilation is above 1 keeps the size of its map.
        num_classes: Outputs of the classifier `fc`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg".
        drop_rate: The probability of dropout on the pooled embedding, in training.
    """

    classifier_name = "fc"
    first_conv = "conv1"

    conv1: nn.Conv3d
    bn1: nn.BatchNorm3d
    act: nn.Module
    maxpool: nn.MaxPool3d

    def __init__(
        self,
        block: Literal["basic", "bottleneck"] = "basic",
        layers: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_stride: int = 1,
        shortcut: Shortcut = "B",
        shortcut_bias: bool = True,
        dilations: Sequence[int] = (1, 1, 1, 1),
        *,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        if block not in _BLOCKS or shortcut not in ("A", "B"):
            raise ValueError(
                f"a ResNet's block is basic or bottleneck, its shortcut A or B, not {block!r}, {shortcut!r}"
            )
        kind = _BLOCKS[block]
        expansion, inputs = kind.expansion, widths[0]
        self.conv1 = nn.Conv3d(in_chans, inputs, 7, stem_stride, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(inputs)
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        for n, (name, width, many, dilation) in enumerate(zip(_STAGES, widths, layers, dilations, strict=True)):
            stride = 1 if n == 0 else 2
            self.add_module(name, residual_stage(kind, inputs, width, many, stride, dilation, shortcut, shortcut_bias))
            inputs = width * expansion
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        draw(self)
        self.num_features = widths[-1] * expansion
        # Kernels are odd and padded to keep every voxel, so that cell 0 of every stage is centred on voxel 0.
        step = stem_stride
        stages = [stage("act", widths[0], (step, step, step))]
        for n, (name, width, dilation) in enumerate(zip(_STAGES, widths, dilations, strict=True)):
            step *= 2 if n == 0 or dilation == 1 else 1  # the first by the max-pool before it
            stages.append(stage(name, width * expansion, (step, step, step)))
        self.feature_info = stages
        # The package's own tricks, by slabs, know the plain network alone.
        self._plain = stem_stride == 1 and shortcut == "B" and set(dilations) == {1}
        self._streams = False  # whether the forward is that of `streamed`: its norms are folded
        self.reset_classifier(num_classes)

    def _stem(self, x: Tensor) -> Tensor:
        return self.through([self.conv1, self.bn1, self.act], x)

    def _stage(self, number: int, x: Any, needed: bool) -> Any:
        if number == 0:
            if needed:
                return self._run(self._stem, x)
            # What the first block takes, or where the stem's map is not to be kept, what that is made of.
            if self.grad_checkpointing and self._plain:
                return pooled_stem(x, self.conv1, self.bn1)
            return (self._run(lambda x: self.maxpool(self._stem(x)), x),)
        inputs = x if isinstance(x, tuple) else (self.maxpool(x) if number == 1 else x,)
        for block in self._part(_STAGES[number - 1]).children():
            by_hand = self.grad_checkpointing and self._plain
            run = partial(self._residual, block) if self.together else block
            inputs = (residual_block(block, *inputs) if by_hand else self._run(run, *inputs),)
        return inputs[0]

    def _residual(self, block: Any, x: Tensor) -> Tensor:
        """A residual block, as a chain."""
        *layers, _ = (
            part
            for n in (1, 2, 3)
            if hasattr(block, f"conv{n}")
            for part in (getattr(block, f"conv{n}"), getattr(block, f"bn{n}"), block.act)
        )
        shortcut = x if block.downsample is None else block.downsample(x)
        return self.through(layers, x, added=shortcut, last=block.act)

    def forward_features(self, x: Tensor) -> Tensor:
        if self._streams and not is_traced() and not (torch.is_grad_enabled() and x.requires_grad):
            self._check_input(x)
            return streamed_features(self, x)
        return super().forward_features(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the contract says, and the stem of a plain network goes by slabs: its full-size activation never exists.

        Hooks on the stem's modules, on blocks and on what is in them are not called then.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def for_inference(self, dtype: torch.dtype) -> Encoder:
        """As the contract says: norms folded, all but the last stage a few planes at a time, see `streamed`.

        Where a gradient is asked for, or the network is traced, its forward is the plain one. Otherwise hooks on
        modules in the stem and the first three stages are not called. A subclass, whose forward may be another, is
        not streamed, nor is what has adapters, a stem of stride 2, shortcut A or dilated kernels: these are chains.
        """
        model = merged(self)
        if type(self) is not ResNet or not self._plain or self.adapters:
            return super(ResNet, model).for_inference(dtype)
        fast = model._copy_for_inference(weights_made_anew(model))
        assert isinstance(fast, ResNet)
        fold_batch_norms(fast, dtype)
        fast._streams = True
        slabs = "stem and first three stages by slabs, without what is empty (unless traced)"
        return computing_in(fast, dtype, ("BatchNorm folded", slabs))
