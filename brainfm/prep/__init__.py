"""From the scanner to the contract: raw T1w → registered, skull-stripped T1w, its mask, and its quality ([prep])."""

from __future__ import annotations

from typing import Any

from brainfm.lazy import found_in


def __getattr__(name: str) -> Any:
    return found_in(__name__, name)
