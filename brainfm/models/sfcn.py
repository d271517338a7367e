"""The Simple Fully Convolutional Network of Peng et al. 2021 (Medical Image Analysis 68), as its authors published it.

Five blocks of convolution, BatchNorm, max-pool and ReLU, one of 1×1×1, and a classifier over bins. Written from
github ha-ha-ha-han/UKBiobank_deep_pretrain (MIT), whose state dict loads strictly. pyment's (Leonardsen et al. 2022) is
the same network, its norms with Keras' eps: it pools after the ReLU, and a maximum and a ReLU may change places.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.encoder import Encoder, stage
from brainfm.models.fast.chain import Chain


class PointwiseHead(nn.Conv3d):
    """A 1×1×1 convolution, as the authors' file has it, that takes pooled embeddings: [B, C] → [B, outputs]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, kernel_size=1)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None, None, None]).flatten(1)


class SFCN(Encoder):
    """Peng's SFCN: 160×192×160 voxels → 64 features, and log-probabilities of bins.

    Args:
        widths: Channels of the blocks; the last one has a 1×1×1 kernel and does not pool.
        bins: Outputs of the authors' classifier: with so many classes, `forward` gives log-probabilities; 0 for an
            author's classifier that gives plain outputs.
        norm_eps: Of the BatchNorms; Keras' own is 1e-3.
        num_classes: Outputs of the classifier `classifier.conv_6`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg".
        drop_rate: Dropout on the pooled embedding, in training; 0.5 in the authors' training.
    """

    classifier_name = "classifier.conv_6"
    first_conv = "feature_extractor.conv_0.0"

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256, 256, 64),
        bins: int = 40,
        norm_eps: float = 1e-5,
        *,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.bins, self.num_features = bins, widths[-1]
        *pooled, _ = widths
        blocks = [_block(before, width, 3, norm_eps, pools=True) for before, width in pairwise((in_chans, *pooled))]
        blocks.append(_block(pooled[-1], widths[-1], 1, norm_eps, pools=False))
        self.feature_extractor = nn.Sequential(OrderedDict((f"conv_{n}", block) for n, block in enumerate(blocks)))
        self.classifier = nn.Sequential()
        # A pool of 2 looks between its two voxels, so that each block's first cell lies further into the volume.
        steps = [2 ** min(n, len(pooled)) for n in range(1, len(widths) + 1)]
        self.feature_info = [
            stage(f"feature_extractor.conv_{n}", width, (step,) * 3, ((step - 1) / 2,) * 3)
            for n, (width, step) in enumerate(zip(widths, steps, strict=True))
        ]
        self.reset_classifier(num_classes)

    def _new_head(self, num_classes: int) -> nn.Module:
        return PointwiseHead(self.num_features, num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As the contract says; of the authors' classifier, log-probabilities of its bins."""
        x = super().forward_head(x, pre_logits)
        is_binned = self.bins > 0 and self.num_classes == self.bins and not pre_logits
        return F.log_softmax(x, dim=1) if is_binned else x

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the contract says; of Keras, whose norms count no batches and whose classifier is a dense layer, too."""
        state = super().filter_state_dict(state)
        head = state.get(f"{self.classifier_name}.weight")
        if head is not None and head.ndim == 2:
            state = state | {f"{self.classifier_name}.weight": head[:, :, None, None, None]}
        norms = [key.removesuffix("running_mean") for key in state if key.endswith(".running_mean")]
        return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms} | state


def _block(before: int, width: int, kernel: int, eps: float, pools: bool) -> Chain:
    layers = [nn.Conv3d(before, width, kernel, padding=kernel // 2), nn.BatchNorm3d(width, eps=eps)]
    return Chain(*layers, *([nn.MaxPool3d(2)] if pools else []), nn.ReLU(inplace=True))
