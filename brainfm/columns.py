"""What the columns of a table hold: numbers, or classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from brainfm.tabular import is_missing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind: TypeAlias = Literal["binary", "multiclass", "regression"]

MOST_CLASSES = 20  # different numbers that may still be classes
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def numbers_of(texts: Sequence[str]) -> NDArray[np.float64]:
    """[n] the numbers that texts say, nan where they say none.

    A comma is a decimal one where no text has a point, unless each has three digits after it, as thousands have.
    """
    import numpy as np

    commas = [text for text in texts if "," in text]
    if not any("." in text for text in texts) and not all(re.fullmatch(r"\D*\d+(,\d{3})+", text) for text in commas):
        texts = [text.replace(",", ".") for text in texts]
    return np.array([float(text) if _NUMBER.fullmatch(text.strip()) else np.nan for text in texts])


def plain_kind(texts: Iterable[str]) -> Kind | None:
    """What a label is, where its values leave no doubt: two are binary, words are classes, many numbers a regression.

    None where they leave doubt: some are numbers and others words, or they are few numbers.
    """
    import numpy as np

    values = {text for text in texts if not is_missing(text)}
    if len(values) <= 2:
        return "binary"
    are_numbers = np.isfinite(numbers_of(sorted(values)))
    if not are_numbers.any():
        return "multiclass"
    return "regression" if len(values) > MOST_CLASSES and are_numbers.all() else None


def in_order(texts: Iterable[str]) -> tuple[str, ...]:
    """The different texts, numbers as numbers and words after them: the order in which classes are counted from 0."""
    import numpy as np

    values = list(dict.fromkeys(texts))
    numbers = dict(zip(values, np.nan_to_num(numbers_of(values), nan=np.inf).tolist(), strict=True))
    return tuple(sorted(values, key=lambda text: (numbers[text], text)))
