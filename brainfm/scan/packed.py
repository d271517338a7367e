"""Open a file of voxels, compressed or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError

# What a file may hold beside its voxels: extensions before them, FreeSurfer's tags after them. Both are small texts.
MAX_BESIDE = 2**26
_BLOCK = 2**24  # inflated at once: what gzip makes of one block of a file can be a thousand times as much

# How compressed files begin, and the modules whose `open` reads them, the fastest first.
_MODULES = {
    b"\x1f\x8b": ("isal.igzip", "zlib_ng.gzip_ng", "gzip"),
    b"BZh": ("bz2",),
    b"\xfd7zXZ\x00": ("lzma",),
    b"\x28\xb5\x2f\xfd": ("compression.zstd", "backports.zstd", "pyzstd", "zstandard"),
}


def compression(head: bytes) -> bytes | None:
    """How a file is compressed, by its first bytes: a key for `open_packed`; None of one that is not."""
    return next((magic for magic in _MODULES if head.startswith(magic)), None)


def open_packed(path: Path, magic: bytes, file: IO[bytes] | None = None) -> Any:
    """A compressed file, opened for reading what it holds: the one at `path`, or one that is opened and called so.

    Raises:
        ScanError: Nothing that reads it is installed.
    """
    opener = fastest(magic)
    if opener is None:
        raise ScanError(
            f"{path}: compressed by Zstandard, which this Python does not read; "
            "run 'pip install backports.zstd', or unpack it first: zstd -d"
        )
    return opener(path if file is None else file)


@cache
def fastest(magic: bytes) -> Callable[[Path | IO[bytes]], Any] | None:
    """What opens a kind of compressed file: for gzip ISA-L's, zlib-ng's, or Python's; None where nothing does."""
    for module in _MODULES[magic]:
        try:
            opener: Callable[[Path | IO[bytes]], Any] = import_module(module).open
        except ImportError:
            continue
        return opener
    return None


def read_voxels(file: Any, offset: int, size: int) -> NDArray[np.uint8]:
    """The `size` bytes from `offset` on of an opened file, and nothing more of it in memory.

    The rest is read too, and dropped: that checks the stored CRC, and half a download is refused. The bytes go straight
    into an array: getting fresh memory can take a quarter of the time, and numpy asks for large pages.

    Raises:
        EOFError: It ends before.
        ValueError: There is much more after them, or before.
    """
    if offset > MAX_BESIDE:
        raise ValueError(f"the header says that the voxels begin at byte {offset}")
    file.seek(offset)
    # GzipFile.readinto would inflate into other memory and copy; the buffer behind it need not.
    reader = getattr(file, "_buffer", file)
    content, filled = np.empty(size, dtype=np.uint8), 0
    while filled < size:
        count = reader.readinto(content[filled : filled + _BLOCK])
        if not count:
            raise EOFError(f"the header says {size} bytes of voxels, and {filled} are there")
        filled += count
    scratch, dropped = bytearray(2**16), 0
    while count := reader.readinto(scratch):
        dropped += count
        if dropped > MAX_BESIDE:
            raise ValueError("the file holds far more than its header says")
    return content
