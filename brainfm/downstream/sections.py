"""What a page shows of sites, groups and certainty: a section each, where a results folder has its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from brainfm.downstream.results import Run
from brainfm.downstream.tables import Cell, Table
from brainfm.downstream.wording import NONE, mean_std, span_text
from brainfm.errors import BrainfmError

_WORDS = ("task", "model", "mode", "column", "group", "metric", "lowest", "highest")


class Section(NamedTuple):
    """A title, a sentence or two, and tables."""

    title: str
    text: str
    tables: list[Table]


def sections(folder: Path, run: Run) -> Iterator[Section]:
    """The sections that there are numbers for."""
    for make in (_sites,):
        if section := make(folder, run):
            yield section


def _sites(folder: Path, run: Run) -> Section | None:
    found = _read(folder / "harmonisation.csv", run)
    if found is None:
        return None
    lines = []
    for (task, row), own in found.groupby(["task", "row"], sort=False):
        left = span_text((int(own["left_as_they_are_test"].min()), int(own["left_as_they_are_test"].max())))
        scores = [_mean_std(own[f"site_{when}"]) for when in ("before", "after")]
        sizes = span_text((int(own["sites"].min()), int(own["sites"].max())))
        lines.append([task, row, sizes, _mean_std(own["chance"]), *scores, left])
    text = (
        "How well another linear probe, fitted on the training part, tells the sites of the test part's scans: "
        "balanced accuracy, mean ± standard deviation over the seeds. After harmonisation it should be near chance. "
        "What that costs is said by the paired tests of each harmonised row with the plain one."
    )
    head = ("Column", "Row", "Sites", "Chance", "As they are", "Harmonised", "Test scans left as they are")
    return Section("Sites", text, [_table("Sites read from the embeddings", head, lines)])


def _table(title: str, head: tuple[str, ...], lines: list[list[str]]) -> Table:
    return Table(title, [(name, "") for name in head], [("", [[Cell(text) for text in line] for line in lines])])


def _mean_std(values: pd.Series, decimals: int = 3) -> str:
    known = values.dropna()
    if known.empty:
        return NONE
    return mean_std(float(known.mean()), float(known.std()) if len(known) > 1 else math.nan, decimals)


def _read(path: Path, run: Run) -> pd.DataFrame | None:
    """A table of runs on all training labels, with tasks and rows by their titles; None where there is none."""
    if not path.exists():
        return None
    titles = {row.key: row.title for row in run.evaluation.everything}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        numbers = [name for name in table if name not in _WORDS]
        table[numbers] = table[numbers].apply(pd.to_numeric)  # nothing is nan
        table = table[table["fraction"] == 1]
        table["row"] = (table["model"] + "/" + table["mode"]).map(titles)
        table["task"] = table["task"].map({task.name: task.title for task in run.evaluation.tasks})
    except (OSError, ValueError, KeyError) as error:
        raise BrainfmError(f"{path}: not a table of a benchmark ({error}); let the benchmark write it anew") from error
    table = table.dropna(subset=["task", "row"])
    return None if table.empty else table
