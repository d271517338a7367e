"""Train here, test there: a task that is tested on another cohort, or on each of its sites in turn, as several tasks.

Each is a column of the results: the task itself, on a test part of its own, and one for what is held out. What is
learned from is the same train and val part, of the other sites or of the manifest, for each seed.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from brainfm.downstream.account import few
from brainfm.downstream.task import Task, TaskData, check_parts, labelled, read_task
from brainfm.errors import TaskError
from brainfm.manifest import read_manifest
from brainfm.tabular import is_missing

_MOST_SITES = 20


def read_tasks(
    task: Task, manifest: str | os.PathLike[str] | None = None, test_manifest: str | os.PathLike[str] | None = None
) -> list[TaskData]:
    """The scans and labels of a task, and of what it is tested on elsewhere.

    Args:
        task: The task.
        manifest: Instead of the task's own.
        test_manifest: Where that of the task is.

    Returns:
        The task on a test part of its own; then one for `test_manifest`, or for each value of `leave_out`.

    Raises:
        TaskError: As `read_task`; a patient is in both manifests or at two sites; a site is unknown, the only one, or
            without one of the classes; there are more than 20.
        ScanError: A manifest is not one.
    """
    own = read_task(replace(task, test_manifest="", leave_out=""), manifest)
    if task.test_manifest:
        return [own, _another_cohort(own, Path(test_manifest or task.test_manifest))]
    return [own, *_sites(own, task.leave_out)] if task.leave_out else [own]


def _another_cohort(own: TaskData, path: Path) -> TaskData:
    # The classes are those that are learned, in their order.
    theirs = labelled(replace(own.task, classes=own.classes), read_manifest(path), path)
    if both := sorted(set(own.patients) & set(theirs.patients)):
        raise TaskError(
            f"{path}: {len(both)} of its patients are in the manifest that is learned from: {few(both)}; take them "
            "out of one of the two, or name them apart where they are others"
        )
    joined = replace(
        own,
        records=[*own.records, *theirs.records],
        labels=np.concatenate([own.labels, theirs.labels]),
        given_split=None if own.given_split is None else [*own.given_split, *["test"] * len(theirs.records)],
        left_out=(*own.left_out, *theirs.left_out),
        elsewhere=(*[False] * len(own.records), *[True] * len(theirs.records)),
    )
    return _named(joined, path.stem, f"tested on {path.stem}", path)


def _sites(own: TaskData, column: str) -> list[TaskData]:
    name = own.task.name
    if column not in own.records[0].extra:
        raise TaskError(f"{name}: leave_out is {column!r}, and the manifest has {', '.join(own.records[0].extra)}")
    sites = [record.extra[column] for record in own.records]
    if unknown := [record.patient_id for record, site in zip(own.records, sites, strict=True) if is_missing(site)]:
        raise TaskError(f"{name}: nobody says the {column} of {few(unknown)}; say it, or leave these scans out")
    found = sorted(set(sites))
    if not 1 < len(found) <= _MOST_SITES:
        raise TaskError(
            f"{name}: {column} has {len(found)} values ({few(found)}), and 2 to {_MOST_SITES} can be left out"
        )
    places: dict[str, set[str]] = {}
    for patient, site in zip(own.patients, sites, strict=True):
        places.setdefault(patient, set()).add(site)
    if both := sorted(patient for patient, where in places.items() if len(where) > 1):
        raise TaskError(f"{name}: {len(both)} patients are at more than one {column}: {few(both)}; keep each at one")
    return [
        _named(
            replace(own, elsewhere=tuple(one == site for one in sites)),
            f"{column}-{site}",
            f"{column} {site} held out",
            name,
        )
        for site in found
    ]


def _named(data: TaskData, name: str, title: str, path: str | os.PathLike[str]) -> TaskData:
    """A task of its own, to which no published number belongs, checked."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    task = replace(data.task, name=f"{data.task.name}-{plain}", title=f"{data.task.title}, {title}", published={})
    check_parts(named := replace(data, task=task), f"{path}, {title}")
    return named
