"""Pretraining by several methods, see `method.METHODS`; SimCLR and MAE as Kaczmarek et al. 2025 (2509.10620) ran them.

Names and modules are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brainfm.lazy import found_in

if TYPE_CHECKING:
    from brainfm.train.losses import NTXentLoss as NTXentLoss
    from brainfm.train.losses import nt_xent_loss as nt_xent_loss
    from brainfm.train.losses import yaware_loss as yaware_loss
    from brainfm.train.mae import MaskedAutoencoder as MaskedAutoencoder
    from brainfm.train.simclr import SimCLR as SimCLR
    from brainfm.train.simmim import SimMIM as SimMIM

_WHERE = {"NTXentLoss": "losses", "nt_xent_loss": "losses", "yaware_loss": "losses"}
_WHERE |= {"MaskedAutoencoder": "mae", "SimCLR": "simclr", "SimMIM": "simmim"}

__all__ = [*sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    return found_in(__name__, name, _WHERE)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
