"""A run's checkpoints: whole or not at all, and everything that the rest of the run depends on.

What is random is a function of (seed, epoch, step), so there is no generator's state to keep.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brainfm.errors import RecipeError, WeightsError
from brainfm.files import atomic_path
from brainfm.train.recipe import Training

# What may change when a run goes on: it changes rounding at the most, not what is drawn or learned from.
_FREE = {"output", "device", "workers", "cache", "max_bad_fraction", "save_every", "resume", "tf32", "channels_last"}
_FREE |= {"grad_checkpointing", "manifest", "augment_on"}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: The one that runs, or comes next.
        step: Steps done in it.
        best: Smallest mean loss of an epoch so far.
        losses: Losses of this epoch's steps.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("inf")
    losses: tuple[float, ...] = ()


def save_checkpoint(
    path: Path,
    network: dict[str, Tensor],
    optimiser: dict[str, Any],
    progress: Progress,
    settings: Training,
    data: str,
    joined_batch: int,
) -> None:
    """Write a checkpoint, atomically. `read_checkpoint` and `brainfm convert` read the network out of it."""
    content = {
        "format": 1,
        "model_state_dict": network,
        "optimiser": optimiser,
        "progress": {"epoch": progress.epoch, "step": progress.step, "best": progress.best},
        "losses": list(progress.losses),
        "recipe": settings.to_dict(),
        "data": data,
        "joined_batch": joined_batch,
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def read_run(path: str | os.PathLike[str], settings: Training, data: str, joined_batch: int) -> dict[str, Any]:
    """A checkpoint of this very run.

    Raises:
        RecipeError: It is of another recipe, other scans, or another joined batch; the message says what differs.
        WeightsError: The file is damaged.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours = content["recipe"], settings.to_dict()
        content["progress"] = Progress(**content["progress"], losses=tuple(content["losses"]))
    except Exception as error:  # torch has a dozen ways to say that a file is damaged
        raise WeightsError(
            f"{path}: not a checkpoint of a run, or a damaged one ({type(error).__name__}); remove it to start again"
        ) from error
    changed = [f"{key} was {theirs.get(key)}" for key in ours if key not in _FREE and theirs.get(key) != ours[key]]
    if content["joined_batch"] != joined_batch:
        changed.append(f"the joined batch was {content['joined_batch']} and is {joined_batch}")
    if content["data"] != data:
        changed.append("the manifest lists other scans or patients")
    if changed:
        raise RecipeError(f"{path}: this run was started differently ({'; '.join(changed)}); give another output=")
    return content
