"""The networks, a file or folder a family; a card names one by its module, such as `resnet`."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from importlib import import_module
from typing import Any

from brainfm.models.encoder import Encoder
from brainfm.models.features import FeatureMaps

__all__ = ["Encoder", "FeatureMaps", "ResNet", "VisionTransformer", "constructor"]


def constructor(network: str) -> Callable[..., Encoder]:
    """The encoder class that a family's module, or its folder, defines.

    Raises:
        TypeError: There is none, or more than one.
    """
    module = import_module(f"{__name__}.{network}")
    inside = f"{module.__name__}."
    found = [  # by the metaclass: for Python 3.10 an alias such as tuple[int, int] is a `type` too
        value
        for value in vars(module).values()
        if isinstance(value, ABCMeta) and issubclass(value, Encoder) and f"{value.__module__}.".startswith(inside)
    ]
    if len(found) != 1:
        names = ", ".join(value.__name__ for value in found) or "none"
        raise TypeError(f"{module.__name__} must show one encoder class, and shows {names}")
    return found[0]


def __getattr__(name: str) -> Any:
    families = {"ResNet": "resnet", "VisionTransformer": "vit"}
    if name in families:
        return constructor(families[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
