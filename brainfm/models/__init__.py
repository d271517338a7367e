"""The registered encoders, one file a family. Importing this package registers them."""

from brainfm.models.encoder import Encoder
from brainfm.models.resnet import ResNet
from brainfm.models.vit import VisionTransformer

__all__ = ["Encoder", "ResNet", "VisionTransformer"]
