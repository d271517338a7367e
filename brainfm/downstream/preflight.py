"""What can fail is tried first: before hours of work, and before anything is written."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from brainfm.downstream.finetuning import Finetuning, put_head
from brainfm.downstream.split import subsample
from brainfm.downstream.task import TaskData
from brainfm.downstream.untrained import create_untrained
from brainfm.errors import MissingExtraError, ScanError
from brainfm.factory import create_model
from brainfm.manifest import ScanRecord
from brainfm.transforms import InputTransform, check_channels, create_transform


def missing_files(data: TaskData) -> dict[int, str]:
    """By its number each scan of which a file is not there, and which file."""
    found = {}
    for n, record in enumerate(data.records):
        files = [item for item in (*record.images.values(), record.mask) if isinstance(item, str | Path)]
        if lacking := [str(item) for item in files if not Path(item).is_file() and not Path(item).is_dir()]:
            found[n] = f"no such file: {lacking[0]}" if lacking[0] != record.name else "no such file"
    return found


def check_packages() -> None:
    """Raise MissingExtraError where a probe's packages are not installed."""
    for package in ("sklearn", "threadpoolctl"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise MissingExtraError("scikit-learn", "eval") from error


def check_splits(data: TaskData, seeds: int, fractions: Iterable[float]) -> None:
    """Raise BrainfmError where a seed's split, or a fraction of its training part, cannot be drawn."""
    for seed in range(seeds):
        splits = data.split(seed)
        for fraction in fractions:
            subsample(data.records, data.labels, splits, fraction, kind=data.task.kind, seed=seed)


def check_model(name: str, data: Sequence[TaskData], settings: Sequence[Finetuning], *, pretrained: bool) -> None:
    """Raise BrainfmError where weights cannot be had, or do not fit their contract, a task's scans or a setting."""
    encoder = create_model(name, pretrained=True) if pretrained else create_untrained(name)
    transform = create_transform(encoder)
    check_channels(encoder, transform.spec)
    for one in data:
        check_scans(one.records, transform, f"{one.task.name} and {name}")
    for values in settings:
        put_head(encoder, 1, values)


def check_scans(records: Sequence[ScanRecord], transform: InputTransform, of: str) -> None:
    """Raise ScanError where there is no scan that the transform takes; as a rule one is looked at."""
    if reason := refusal(records, transform):
        raise ScanError(f"{of}: none of {len(records)} scans can be read; the first: {reason}")


def refusal(records: Sequence[ScanRecord], transform: InputTransform) -> str:
    """Why the first scan is not taken, where none is; else an empty string."""
    reason = ""
    for record in records:
        try:
            transform(record.image, record.mask)
        except ScanError as error:
            reason = reason or str(error)
        else:
            return ""
    return reason
