"""Fetch and read weights. Whatever the source, a weight ends as one flat state dict that loads strictly.

Names are imported when they are first asked for: finding weights needs no torch, reading them does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brainfm.weights.checkpoint import Checkpoint as Checkpoint
    from brainfm.weights.checkpoint import WeightsReport as WeightsReport
    from brainfm.weights.checkpoint import fitted as fitted
    from brainfm.weights.checkpoint import load_checkpoint as load_checkpoint
    from brainfm.weights.checkpoint import read_checkpoint as read_checkpoint
    from brainfm.weights.checkpoint import read_for as read_for
    from brainfm.weights.checkpoint import save_state as save_state
    from brainfm.weights.checkpoint import weights_digest as weights_digest
    from brainfm.weights.fetch import HUB_CONFIG as HUB_CONFIG
    from brainfm.weights.fetch import HUB_WEIGHTS as HUB_WEIGHTS
    from brainfm.weights.fetch import cached_weights as cached_weights
    from brainfm.weights.fetch import default_cache_dir as default_cache_dir
    from brainfm.weights.fetch import find_weights as find_weights
    from brainfm.weights.fetch import hub_file as hub_file
    from brainfm.weights.fetch import hub_reason as hub_reason
    from brainfm.weights.fetch import wrong_digest as wrong_digest

_MODULES = {
    "checkpoint": (
        *("Checkpoint", "WeightsReport", "fitted", "load_checkpoint", "read_checkpoint", "read_for", "save_state"),
        "weights_digest",
    ),
    "fetch": (
        *("HUB_CONFIG", "HUB_WEIGHTS", "cached_weights", "default_cache_dir", "find_weights", "hub_file", "hub_reason"),
        "wrong_digest",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
