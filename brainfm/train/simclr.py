"""SimCLR: an encoder and the projection head it is pretrained with (Kaczmarek et al. 2025, arXiv 2509.10620)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainfm.models.encoder import Encoder


class SimCLR(nn.Module):
    """An encoder with a projection head: Linear → ReLU → Linear, without biases and norms, as the released code has it.

    Its state dict has the released checkpoint's names, `encoder.…` and `projector.…`, and loads it strictly.

    Args:
        encoder: An encoder without a classifier.
        projection_dim: Width of the projection; 64 in the released code.

    Example:
        >>> network = SimCLR(brainfm.create_model("simclr_resnet18_3d"))
        >>> network.load_state_dict(read_checkpoint("simclr_3d_brain_foundation.tar").state)
    """

    def __init__(self, encoder: Encoder, projection_dim: int = 64) -> None:
        super().__init__()
        if encoder.num_classes:
            raise ValueError("SimCLR takes an encoder without a classifier: reset_classifier(0)")
        width = encoder.num_features
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, projection_dim, bias=False),
        )

    def forward(self, *views: Tensor) -> Tensor:
        """Views [B, in_chans, D, H, W] each → projections [views · B, projection_dim], not normalised, view after view.

        Each view passes through the network by itself, as in the released code: BatchNorm takes its statistics of one
        view, and moves its running ones with each. All in one call, for DistributedDataParallel prepares a backward
        pass, and sends its buffers, in each.
        """
        return torch.cat([self.projector(self.encoder(view)) for view in views])
