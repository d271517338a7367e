"""Self-supervised pretraining. For now, the SimCLR network: an encoder and its projection head."""

from brainfm.train.simclr import SimCLR

__all__ = ["SimCLR"]
