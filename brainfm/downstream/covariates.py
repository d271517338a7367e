"""Columns of people as numbers: measurements, or categories; what may be either is refused by its values and rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.columns import numbers_of as numbers_of
from brainfm.errors import TaskError
from brainfm.tabular import is_missing

MOST_LEVELS = 20  # of a category, and no more than half as many as there are values; ours
_DATE = re.compile(r"\d{1,4}([-/.])(\d{1,2}|[A-Za-z]{3})\1\d{1,4}\b.*")


def encoded(name: str, texts: Sequence[str], rows: Sequence[Any], *, categorical: bool) -> list[NDArray[np.float64]]:
    """A covariate as one column of numbers, or one for each category but the first; nan is what is missing.

    Args:
        name: Of the covariate, for messages.
        texts: [n] its values.
        rows: [n] where each is, for messages.
        categorical: Whether numbers are codes of categories.

    Raises:
        TaskError: It has numbers and words, or dates, or more than `MOST_LEVELS` categories.
    """
    missing = np.array([is_missing(text) for text in texts], dtype=bool)
    numbers = numbers_of(["" if absent else text for text, absent in zip(texts, missing, strict=True)])
    words = np.flatnonzero(np.isnan(numbers) & ~missing).tolist()
    if not categorical and not len(words):
        return [numbers]
    known = int((~missing).sum())
    shown = ", ".join(f"{texts[n]!r} (row {rows[n]})" for n in words[:4]) + (", …" if len(words) > 4 else "")
    if not categorical and len(words) < known:
        raise TaskError(
            f"the covariate {name} is a number in {known - len(words)} rows and none in {len(words)}: {shown}; write "
            "numbers with a point (89 for '89+'), empty what is unknown, or say that it is categorical"
        )
    if not categorical and any(_DATE.fullmatch(texts[n]) for n in words):
        raise TaskError(
            f"the covariate {name} has dates: {shown}; give a number, such as the age at that date in years"
        )
    levels = sorted({text for text, absent in zip(texts, missing, strict=True) if not absent})
    if len(levels) > min(MOST_LEVELS, max(2, known // 2)):
        raise TaskError(
            f"the covariate {name} has {len(levels)} different words in {known} rows, such as {shown}: free text, or "
            f"ids? A category has at most {MOST_LEVELS}, and two rows for each; group them, or leave it out"
        )
    return [np.where(missing, np.nan, [float(text == level) for text in texts]) for level in levels[1:]]
