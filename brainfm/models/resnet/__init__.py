"""ResNets: the network, and its own tricks for training in little memory and for inference."""

from brainfm.models.resnet.network import ResNet

__all__ = ["ResNet"]
