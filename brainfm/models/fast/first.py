"""Encoders of tokens of which the embedding needs one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from brainfm.models.encoder import Encoder
from brainfm.models.fast.chain import Together, is_plain


class FirstTokenReader(Together, Encoder):
    """An encoder of tokens, whose copy for inference makes no others in its last block than the embedding is read from.

    Where `_reads_first` is true, `pool` takes the first token of each sequence, and the last stage can make that alone
    (`of_first`: tokens [B, N, C] → [B, 1, C]).
    """

    faster = "last block for the token that is read (unless traced)"

    @property
    def _reads_first(self) -> bool:
        return True

    def ready(self) -> str:
        return super().ready() if self._reads_first else ""

    def forward(self, x: Tensor) -> Tensor:
        last: Any = self._part(self.feature_info[-1]["module"])
        if not self.together or not self._reads_first or not hasattr(last, "of_first") or not is_plain(x):
            return super().forward(x)
        self._check_input(x)
        x = self._begin(x)
        *before, end = range(len(self.feature_info))
        for number in before:
            x = self._adapted(number, self._stage(number, x, needed=False))
        return self.forward_head(self._finish(self._adapted(end, last.of_first(x))))
