"""Self-supervised pretraining: SimCLR and masked autoencoders, as Kaczmarek et al. 2025 (arXiv 2509.10620) ran them."""

from brainfm.train.losses import NTXentLoss, nt_xent_loss
from brainfm.train.mae import MaskedAutoencoder
from brainfm.train.simclr import SimCLR

__all__ = ["MaskedAutoencoder", "NTXentLoss", "SimCLR", "nt_xent_loss"]
