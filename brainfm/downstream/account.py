"""What a results page says of its data: what was used, what was left out, and what must be read before any number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from brainfm.downstream.results import Share, Unused
from brainfm.downstream.split import SPLITS
from brainfm.downstream.task import TaskData
from brainfm.pretrained import PretrainedCfg


def shares(data: TaskData, seeds: int) -> tuple[Share, ...]:
    """What is in each part, of all seeds' splits the fewest and the most."""
    found = []
    for part in SPLITS:
        counts = []
        for seed in range(1 if data.given_split is not None else seeds):
            rows = [n for n, name in enumerate(data.split(seed)) if name == part]
            counts.append([len(rows), len({data.patients[n] for n in rows}), *class_patients(data, rows)])
        scans, patients, *classes = [(min(column), max(column)) for column in zip(*counts, strict=True)]
        found.append(Share(part, scans, patients, tuple(classes)))
    return tuple(found)


def class_patients(data: TaskData, rows: Sequence[int]) -> list[int]:
    """Patients of each class among some scans; of a regression, nothing."""
    labels = data.labels.tolist()
    return [len({data.patients[n] for n in rows if labels[n] == number}) for number in range(len(data.classes))]


def unused(data: TaskData, failed: Mapping[str, Mapping[int, str]]) -> Iterator[Unused]:
    """What a task leaves out.

    Args:
        data: The task.
        failed: For each row "model/mode" that looks at scans, by number those that it could not use, and why.
    """
    name = data.task.name
    for one in data.left_out:
        yield Unused(name, one.scan, one.why, failed=one.failed)
    by_all = set.intersection(*(set(reasons) for reasons in failed.values())) if failed else set()
    for n in sorted(by_all):
        yield Unused(name, scan_name(data, n), next(iter(failed.values()))[n], failed=True)
    for row, reasons in failed.items():
        for n in sorted(set(reasons) - by_all):
            yield Unused(name, scan_name(data, n), reasons[n], row, failed=True)


def scan_name(data: TaskData, number: int) -> str:
    """A scan's path, or whose it is."""
    record = data.records[number]
    return record.name or " ".join(filter(None, (record.patient_id, record.scan_id))) or f"scan {number}"


def label_words(data: TaskData) -> str:
    """Which number each class is, with its scans; of a binary task, which of them is the positive one."""
    counts = [int((data.labels == number).sum()) for number in range(len(data.classes))]
    said = [
        f"{n} is {word!r} ({count:,} scans)" for n, (word, count) in enumerate(zip(data.classes, counts, strict=True))
    ]
    if data.task.kind == "binary":
        return f"the positive class, 1, is {data.classes[1]!r} ({counts[1]:,} scans), and {said[0]}"
    return ", ".join(said)


def is_test_model(cfg: PretrainedCfg | None) -> bool:
    """Whether a model is one for tests, or was pretrained on phantoms."""
    if cfg is None:
        return False
    return cfg.architecture.startswith("test_") or any("phantom" in cohort.name.lower() for cohort in cfg.cohorts)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
