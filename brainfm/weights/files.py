"""What is written: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def save_state(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as safetensors, atomically. The same tensors and provenance give the same file, to the bit."""
    from safetensors.torch import save_file

    with atomic_path(Path(path)) as temporary:
        tensors = {key: value.contiguous().clone() for key, value in state.items()}
        # One entry, because safetensors writes several in an order that changes.
        save_file(tensors, temporary, metadata={"provenance": json.dumps(dict(provenance or {}), sort_keys=True)})


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; moved there, synced, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    temporary.touch()
    mode = temporary.stat().st_mode  # as the user's umask has it, whatever the writer makes of it
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha256.update(block)
    return sha256.hexdigest()


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, 300 characters at the most."""
    return " ".join(str(error).split())[:300] or type(error).__name__
