"""Scans as their contract's tensors, small ones kept in memory: epochs and runs look at the same scans again and again.

What takes the time of a small volume is to read it and to hold it against its contract, which gives the same each time.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor

from brainfm.files import file_state
from brainfm.manifest import ScanRecord
from brainfm.transforms import InputTransform

MOST_BYTES = 2**29  # that a process keeps of all
SMALL_BYTES = 2**22  # and of one volume; one of 1 mm is five times as large

_kept: OrderedDict[Any, Tensor] = OrderedDict()


def read_volume(transform: InputTransform, record: ScanRecord) -> Tensor:
    """A scan's tensor, not to be changed in place: by the transform, or of before where its files are as they were.

    Raises:
        ScanError: As the transform; that is not kept.
    """
    key = _key(transform, record)
    if key is not None and key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    tensor = transform(record.image, record.mask)
    if key is not None and tensor.nbytes <= SMALL_BYTES:
        _kept[key] = tensor
        while sum(one.nbytes for one in _kept.values()) > MOST_BYTES:
            _kept.popitem(last=False)
    return tensor


def _key(transform: InputTransform, record: ScanRecord) -> Any:
    """What a volume is made of; None where that cannot be said: of images in memory, and of views drawn by chance."""
    files: list[Any] = [*record.images.values(), *([] if record.mask is None else [record.mask])]
    if type(transform) is not InputTransform or transform.augment is not None:
        return None
    if not all(isinstance(file, str | Path) for file in files):
        return None
    try:
        states = tuple(tuple(file_state(file)) for file in files)
    except OSError:  # the transform says what is wrong
        return None
    return repr(transform.spec), transform.on_mismatch, tuple(record.images), record.mask is None, states
