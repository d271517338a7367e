"""An encoder as a backbone of feature maps: `create_model(…, features_only=True)`, as in timm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from brainfm.models.encoder import Encoder, FeatureInfo, chosen_stages
from brainfm.pretrained import PretrainedCfg


class FeatureMaps(nn.Module):
    """Volumes [B, in_chans, D, H, W] → a list of feature maps [B, C, d, h, w], the shallowest first.

    Args:
        encoder: Whose; it is the submodule `encoder`.
        out_indices: Which stages, as of `Encoder.forward_intermediates`; `feature_info` describes those.

    Raises:
        ValueError: The encoder has no such stage.
    """

    def __init__(self, encoder: Encoder, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.out_indices = chosen_stages(out_indices, len(encoder.feature_info))
        self.feature_info = FeatureInfo(encoder.feature_info[n] for n in self.out_indices)

    @property
    def pretrained_cfg(self) -> PretrainedCfg:
        """What the weights are and expect."""
        return self.encoder.pretrained_cfg

    default_cfg = pretrained_cfg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Encoder.set_grad_checkpointing`."""
        self.encoder.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, D, H, W] → the chosen maps [B, C, d, h, w]; nothing is computed after the last of them."""
        maps = self.encoder.forward_intermediates(x, self.out_indices, intermediates_only=True)
        assert isinstance(maps, list)
        return maps
