"""Fetch and read weights. Whatever the source, a weight ends as one flat state dict that loads strictly."""

from brainfm.weights.checkpoint import Checkpoint, WeightsReport, load_checkpoint, read_checkpoint
from brainfm.weights.fetch import (
    HUB_CONFIG,
    HUB_WEIGHTS,
    cached_weights,
    default_cache_dir,
    find_weights,
    hub_file,
    hub_reason,
)
from brainfm.weights.files import atomic_path, file_sha256, one_line, save_state

__all__ = [
    "HUB_CONFIG",
    "HUB_WEIGHTS",
    "Checkpoint",
    "WeightsReport",
    "atomic_path",
    "cached_weights",
    "default_cache_dir",
    "file_sha256",
    "find_weights",
    "hub_file",
    "hub_reason",
    "load_checkpoint",
    "one_line",
    "read_checkpoint",
    "save_state",
]
