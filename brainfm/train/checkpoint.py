"""A run's checkpoints: whole or not at all, and everything that the rest of the run depends on.

What is random is a function of (seed, epoch, step), so there is no generator's state to keep.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brainfm.errors import BrainfmError, RecipeError, WeightsError
from brainfm.files import atomic_path
from brainfm.train.recipe import Training

logger = logging.getLogger("brainfm")

# What may change when a run goes on: it changes rounding at the most, not what is drawn or learned from.
_FREE = {"output", "device", "workers", "cache", "max_bad_fraction", "save_every", "resume", "tf32", "channels_last"}
_FREE |= {"grad_checkpointing", "manifest", "augment_on", "picture_every", "stage", "stage_size"}
_FREE |= {"sources"}  # where they are; the digest of the data says which they are, and their fractions
_FREE |= {"init", "teacher"}  # where the weights are; init_sha256 and teacher_sha256 say which
# 1 masked views before the augmentation, in pretraining passed both at once, and in fine-tuning learned standardised
# labels by a head of small weights, with batch_size scans on each process.
_FORMAT = 2


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
    """Write a checkpoint, atomically. `read_checkpoint` and `brainfm convert` read the network out of it.

    Raises:
        BrainfmError: It cannot be written, such as on a full disk; the one that was there is as it was.
    """
    content = {
        "format": _FORMAT,
        "model_state_dict": network,
        "optimiser": optimiser,
        "progress": {"epoch": progress.epoch, "step": progress.step, "best": progress.best},
        "losses": list(progress.losses),
        "recipe": settings.to_dict(),
        "data": data,
        "joined_batch": joined_batch,
    }
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch hides the OSError of a full disk behind its own
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise BrainfmError(
            f"{path}: cannot be written ({reason.strerror or reason}); make room there, and the same command goes on "
            "from the last checkpoint that could"
        ) from error


def read_newest(folder: Path, settings: Training, data: str, joined_batch: int) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of this very run that is whole, and its content; None where there is none at all.

    That is the last one, or where it is damaged or gone, the further one of the best and the newest of an epoch.

    Raises:
        RecipeError: As `read_run`.
        WeightsError: There are checkpoints, and none is whole; the message names them.
    """
    damaged: list[str] = []

    def first_whole(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in paths:
            try:
                yield path, read_run(path, settings, data, joined_batch)
                return
            except WeightsError as error:
                damaged.append(f"{path.name}, {error}")

    last, best = ([folder / f"{name}.pt"] if (folder / f"{name}.pt").is_file() else [] for name in ("last", "best"))
    epochs = sorted(folder.glob("epoch*.pt"), reverse=True)
    for found in first_whole(last):
        return found
    whole = [*first_whole(epochs), *first_whole(best)]
    if whole:
        newest, content = max(whole, key=lambda found: found[1]["progress"].epoch)
        lost = "; ".join(damaged if last else ["last.pt is gone", *damaged])
        logger.warning("%s: going on from %s instead (%s)", folder, newest.name, lost)
        return newest, content
    if damaged:
        raise WeightsError(
            f"{folder}: no checkpoint of the run can be read ({'; '.join(damaged)}); put a copy of one in place, or "
            f"remove {folder.parent} to start again"
        )
    return None


def read_run(path: Path, settings: Training, data: str, joined_batch: int) -> dict[str, Any]:
    """A checkpoint of this very run, whatever the number of processes was that the joined batch was shared by.

    Raises:
        RecipeError: It is of another recipe, other scans, or another joined batch; the message says what differs.
        WeightsError: The file is damaged.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours, _ = content["recipe"], settings.to_dict(), content["format"]
        content["progress"] = Progress(**content["progress"], losses=tuple(content["losses"]))
    except Exception as error:  # torch has a dozen ways to say that a file is damaged
        raise WeightsError(f"not a checkpoint of a run, or a damaged one: {type(error).__name__}") from error
    if content["format"] != _FORMAT:
        raise RecipeError(
            f"{path}: this run was begun by an earlier brainfm, which trained otherwise: its views were masked before "
            "the augmentation, and in pretraining both passed through the network at once, where the released code "
            "does neither; in fine-tuning each process had a batch of batch_size scans. Going on would be half of "
            "each: finish it with the version it was begun with, or give another output="
        )
    free = _FREE if ours.get("gradient") == "upstream" else _FREE | {"batch_size"}  # which depends on the processes
    not_default = settings.to_dict(sparse=True)  # a key that came later means, by its default, what was done before
    theirs = {key: None if key in not_default else value for key, value in ours.items()} | theirs
    changed = [f"{key} was {theirs[key]}" for key in ours if key not in free and theirs[key] != ours[key]]
    if content["joined_batch"] != joined_batch:
        changed.append(f"the joined batch was {content['joined_batch']} and is {joined_batch}")
    if content["data"] != data:
        changed.append("the manifest lists other scans or patients, or other labels of them")
    if changed:
        raise RecipeError(f"{path}: this run was started differently ({'; '.join(changed)}); give another output=")
    return content
