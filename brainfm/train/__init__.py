"""Self-supervised pretraining. For now: the SimCLR network, to use a checkpoint's projection head beside its encoder."""

from brainfm.train.simclr import SimCLR

__all__ = ["SimCLR"]
