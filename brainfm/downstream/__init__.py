"""Evaluation of encoders: probes, fine-tuning, and the paper's tables and figures (Kaczmarek et al. 2025)."""

from __future__ import annotations

from typing import Any

from brainfm.lazy import found_in


def __getattr__(name: str) -> Any:
    return found_in(__name__, name, {"predict": "predicting", "compare_encoders": "encoders"})
