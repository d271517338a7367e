"""Memory that is used again and again: new pages cost more than the arithmetic on them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Held(threading.local):
    """A thread's, which is as large as was ever asked for."""

    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}


_HELD = _Held()


def scratch(number: int, like: Tensor, *size: int) -> Tensor:
    """Memory [*size] of a tensor's type and device, holding whatever was there.

    Who asks for the same number next is given the same memory, so that it is not to outlive a call.
    """
    values, held = math.prod(size), _HELD.memory.get(number)
    if held is None or held.numel() < values or (held.dtype, held.device) != (like.dtype, like.device):
        _HELD.memory.pop(number, None)  # before there is another
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            _HELD.memory[number] = held = like.new_empty(values)
    return held[:values].view(size)
