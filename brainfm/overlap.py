"""Was a data set among those that a weight was pretrained on? Testing on it would be testing on training data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from brainfm.manifest import ScanRecord
from brainfm.pretrained import PretrainedCfg
from brainfm.zoo.cards import Cohort, cohort_names

if TYPE_CHECKING:
    from torch import nn

# Columns of a manifest that name the data set a scan is from, in any spelling of case and underscores.
_COLUMNS = ("dataset", "datasetid", "datasetname", "cohort", "study", "project", "source")


@dataclass(frozen=True)
class Overlap:
    """A data set that shares patients with a weight's pretraining data, or may.

    Attributes:
        dataset: The name that was asked for.
        cohort: The pretraining cohort.
        why: How the two names are related.
    """

    dataset: str
    cohort: Cohort
    why: str

    def __str__(self) -> str:
        counts = {"patients": self.cohort.patients, "scans": self.cohort.scans}
        said = ", ".join([self.cohort.name, *(f"{count:,} {what}" for what, count in counts.items() if count)])
        return f"{self.dataset}: in the pretraining data ({self.why}: {said})"


def pretraining_overlap(model: nn.Module | PretrainedCfg | str, datasets: str | Iterable[str]) -> list[Overlap]:
    """Which of these data sets were in a model's pretraining data, by the cohorts that its cfg names.

    Phases, samples, sites and full names of the cohorts are known ("NKI" is in CoRR, "ADNI3" is ADNI). A data set that
    is not in the answer has no name that is known here; where the cfg records no cohorts, nothing can be found.

    Args:
        model: An encoder of `create_model`, its cfg, or a model's name.
        datasets: Names of data sets, in any spelling of case, spaces, hyphens and underscores.

    Returns:
        An overlap for each data set and cohort that share patients, or may; empty where none is known.

    Raises:
        ModelNameError: There is no model of that name (a ValueError).

    Example:
        >>> import brainfm
        >>> [str(overlap) for overlap in brainfm.pretraining_overlap("simclr_resnet18_3d", ["IXI", "adni_3"])]
        ['adni_3: in the pretraining data (a phase of ADNI: ADNI, 3,028 patients, 21,778 scans)']
    """
    cfg, names = _cfg(model), cohort_names()
    return [
        Overlap(name, cohort, why)
        for name in ([datasets] if isinstance(datasets, str) else datasets)
        for cohort in cfg.cohorts
        if (why := _relation(name, cohort.name) or _alias(name, names.names_if_asked.get(cohort.name, {})))
    ]


def overlap_of_scans(model: nn.Module | PretrainedCfg | str, records: Iterable[ScanRecord]) -> list[Overlap]:
    """The same for a list of scans, whose data sets are named by a column such as "dataset", or by a folder."""
    columns: dict[str, None] = {}
    folders: dict[str, None] = {}
    for record in records:
        columns |= dict.fromkeys(value for column, value in record.extra.items() if _plain(column) in _COLUMNS)
        for image in record.images.values():
            if isinstance(image, str | PurePath):
                folder = os.path.dirname(image).replace(os.altsep or os.sep, os.sep)  # noqa: PTH120 - there are many
                folders |= dict.fromkeys(filter(None, folder.split(os.sep)))  # noqa: PTH206
    others = {*columns, *cohort_names().folders_of_others}
    return pretraining_overlap(model, columns) + [
        Overlap(folder, cohort, why)
        for folder in folders
        for cohort in _cfg(model).cohorts
        if folder not in others and (why := _relation(folder, cohort.name))
    ]


def _cfg(model: nn.Module | PretrainedCfg | str) -> PretrainedCfg:
    if isinstance(model, str):
        from brainfm.names import resolve

        return resolve(model).cfg
    cfg = model if isinstance(model, PretrainedCfg) else getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, PretrainedCfg) else PretrainedCfg()


def _relation(name: str, cohort: str) -> str | None:
    """What a name is to a cohort; None where nothing is known."""
    if _plain(name) and _plain(name) == _plain(cohort):
        return "the same"
    return _alias(name, cohort_names().names.get(cohort, {}))


def _alias(name: str, known: dict[str, tuple[str, ...]]) -> str | None:
    return next((why for why, names in known.items() if _plain(name) in map(_plain, names)), None)


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())
