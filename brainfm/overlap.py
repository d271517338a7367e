"""Was a data set among those that a weight was pretrained on? Testing on it would be testing on training data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from brainfm.manifest import ScanRecord
from brainfm.pretrained import PretrainedCfg
from brainfm.zoo.cards import Cohort

if TYPE_CHECKING:
    from torch import nn

# Other names of the cohorts: phases, samples, spelled-out names, OpenNeuro accessions, and collections that hold them.
# Each with what it is. A name that is not here proves nothing.
_ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "ADNI": {
        "a phase of ADNI": ("ADNI1", "ADNI2", "ADNI3", "ADNI4", "ADNIGO"),
        "the name in full": ("Alzheimer's Disease Neuroimaging Initiative",),
        "a selection of ADNI's patients": ("TADPOLE",),
    },
    "AOMIC": {
        "a sample of AOMIC": ("ID1000", "PIOP1", "PIOP2", "AOMIC-ID1000", "AOMIC-PIOP1", "AOMIC-PIOP2"),
        "a sample of AOMIC on OpenNeuro": ("ds003097", "ds002785", "ds002790"),
        "the name in full": ("Amsterdam Open MRI Collection",),
    },
    "CoRR": {
        "CoRR holds NKI-TRT, test-retest scans of the Nathan Kline Institute's Rockland sample": (
            *("NKI", "NKI1", "NKI-RS", "NKI-TRT", "NKI-Rockland", "NKI-Rockland Sample", "NKI-Enhanced", "eNKI"),
            *("Enhanced NKI-Rockland", "Nathan Kline Institute Rockland Sample"),
        ),
        "CoRR's site SWU 4": ("Southwest University Longitudinal Imaging Multimodal",),
        "a collection that holds CoRR": ("OpenBHB", "BHB", "BHB-10K"),
        "the name in full": ("Consortium for Reliability and Reproducibility",),
    },
    "DLBS": {
        "DLBS on OpenNeuro": ("ds004856",),
        "the name in full": ("Dallas Lifespan Brain Study",),
    },
    "GSP": {
        "a release of GSP": ("GSP1000", "GSP1570", "Brain GSP"),
        "a collection that holds GSP": ("OpenBHB", "BHB", "BHB-10K"),
        "the name in full": ("Brain Genomics Superstruct Project", "Genomics Superstruct Project"),
    },
    "HABS-HD": {
        "the earlier name of HABS-HD": (
            *("HABLE", "Health and Aging Brain among Latino Elders"),
            "Health & Aging Brain among Latino Elders",
        ),
        "if HABS-HD is meant; the Harvard Aging Brain Study is another": ("HABS",),
        "the name in full": (
            "Health and Aging Brain Study Health Disparities",
            "Health & Aging Brain Study - Health Disparities",
        ),
    },
    "MCSA": {"the name in full": ("Mayo Clinic Study of Aging", "Mayo Clinic Study on Aging")},
    "NIFD": {
        "another name of NIFD": ("FTLDNI", "NIFD/FTLDNI"),
        "the name in full": (
            "Neuroimaging in Frontotemporal Dementia",
            "Frontotemporal Lobar Degeneration Neuroimaging Initiative",
        ),
    },
    "PPMI": {"the name in full": ("Parkinson's Progression Markers Initiative",)},
    "SALD": {"the name in full": ("Southwest University Adult Lifespan Dataset",)},
    "SOOP": {
        "SOOP on OpenNeuro": ("ds004889",),
        "the name in full": ("Stroke Outcome Optimization Project",),
    },
}

# Names that are too short or too common to be taken from a folder: only who asks for them by name is told.
_ALIASES_BY_NAME: dict[str, dict[str, tuple[str, ...]]] = {
    "CoRR": {
        "a site of CoRR": (
            *("BMB1", "BNU1", "BNU2", "BNU3", "DC1", "HNU1", "IACAS", "IACAS1", "IBATRT", "JHNU", "JHNU1", "LMU1"),
            *("LMU2", "LMU3", "IPCAS1", "IPCAS2", "IPCAS3", "IPCAS4", "IPCAS5", "IPCAS6", "IPCAS7", "IPCAS8", "MPG1"),
            *("MRN", "MRN1", "SWU1", "SWU2", "SWU3", "SWU4", "UPSM1", "Utah1", "Utah2", "UWM", "XHCUMS"),
        ),
        "if the site of CoRR is meant; ABIDE has sites of this name too": ("NYU1", "NYU2"),
        "CoRR's site SWU 4": ("SLIM",),
    },
}

_FOLDERS_OF_OTHERS = ("corr",)  # where bias-corrected scans are kept

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
        numbers = f"{self.cohort.patients:,} patients, {self.cohort.scans:,} scans"
        return f"{self.dataset}: in the pretraining data ({self.why}: {self.cohort.name}, {numbers})"


def pretraining_overlap(model: nn.Module | PretrainedCfg | str, datasets: str | Iterable[str]) -> list[Overlap]:
    """Which of these data sets were in a model's pretraining data, by the cohorts that its cfg names.

    Phases, samples, sites and full names of the cohorts are known ("NKI" is in CoRR, "ADNI3" is ADNI). A data set that
    is not in the answer has no name that is known here; where the cfg records no cohorts, nothing can be found.

    Args:
        model: An encoder of `create_model`, its cfg, or a model's name.
        datasets: Names of data sets, in any spelling of case, spaces, hyphens and underscores.

    Example:
        >>> [str(overlap) for overlap in brainfm.pretraining_overlap("simclr_resnet18_3d", ["IXI", "adni_3"])]
        ['adni_3: in the pretraining data (a phase of ADNI: ADNI, 3,028 patients, 21,778 scans)']
    """
    cfg = _cfg(model)
    return [
        Overlap(name, cohort, why)
        for name in ([datasets] if isinstance(datasets, str) else datasets)
        for cohort in cfg.cohorts
        if (why := _relation(name, cohort.name) or _alias(name, _ALIASES_BY_NAME.get(cohort.name, {})))
    ]


def overlap_of_scans(model: nn.Module | PretrainedCfg | str, records: Iterable[ScanRecord]) -> list[Overlap]:
    """The same for a list of scans, whose data sets are named by a column such as "dataset", or by a folder."""
    columns: dict[str, None] = {}
    folders: dict[str, None] = {}
    for record in records:
        columns |= dict.fromkeys(value for column, value in record.extra.items() if _plain(column) in _COLUMNS)
        if isinstance(record.image, str | PurePath):
            folders |= dict.fromkeys(Path(record.image).parent.parts)
    return pretraining_overlap(model, columns) + [
        Overlap(folder, cohort, why)
        for folder in folders
        for cohort in _cfg(model).cohorts
        if folder not in columns and folder not in _FOLDERS_OF_OTHERS and (why := _relation(folder, cohort.name))
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
    return _alias(name, _ALIASES.get(cohort, {}))


def _alias(name: str, known: dict[str, tuple[str, ...]]) -> str | None:
    return next((why for why, names in known.items() if _plain(name) in map(_plain, names)), None)


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())
