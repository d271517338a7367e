"""AIBL: join aibl_pdxconv_*.csv with the prepared T1 scans, for Alzheimer's disease against healthy controls.

python examples/cohorts/aibl.py aibl_pdxconv_01-Jun-2018.csv turboprep/ -o aibl.csv

Label: ad, 0 healthy and 1 Alzheimer's disease, at the visit of the scan. What to download is in aibl.md. Where
aibl_ptdemog_*.csv lies beside the table of diagnoses, sex and year of birth are kept for the control without an image.
"""

import re

import numpy as np
from _common import Cohort, Labels, People, ScanId, arguments, join, number, read_table, run, write_manifest

from brainfm.errors import BrainfmError

HEALTHY, MCI, ALZHEIMER = 1, 2, 3  # DXCURREN
PATIENT = re.compile(r"AIBL_?(\d+)")
VISIT = re.compile(r"[/_](?:ses-)?(bl|[mM]\d+)(?=[/_]|$)")  # bl and m18 of the tables, ses-M018 of Clinica
TRAIN_PER_CLASS = 53  # paper: 53 + 53 in train; 215 healthy and 15 ill in val, 216 and 15 in test


def main() -> None:
    parser = arguments(__doc__, "aibl_pdxconv_*.csv, or the folder it is in")
    parser.add_argument(
        "--train-per-class", type=int, default=TRAIN_PER_CLASS, help="patients of each class in train (paper: 53)"
    )
    options = parser.parse_args()

    people = People()
    table = diagnoses(options.phenotypes)
    for row in read_table(table, ["RID", "VISCODE", "DXCURREN"]):
        if (rid := number(row["RID"])) > 0:
            people.add((int(rid), viscode(row["VISCODE"])), labels_of(row))
    known = demographics(table.parent)
    covariates = {key: known.get(key[0], {"birth_year": "", "sex": ""}) for key in people}
    cohort = join("AIBL", options.scans, identify, people, covariates)
    splits = paper_split(cohort, options.train_per_class, options.seed)
    write_manifest(options.output, cohort, splits)


def diagnoses(path):
    """The table of diagnoses: the path itself, or the one such file in a folder."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("aibl_pdxconv_*.csv"))
    if len(found) != 1:
        raise BrainfmError(f"{path}: {len(found)} files aibl_pdxconv_*.csv; name the one to use")
    return found[0]


def demographics(folder):
    """Sex and year of birth by RID, from aibl_ptdemog_*.csv in a folder; nothing where there is none."""
    known = {}
    for path in sorted(folder.glob("aibl_ptdemog_*.csv")):
        for row in read_table(path, ["RID", "PTGENDER", "PTDOB"]):
            year = re.search(r"(19|20)\d\d$", row["PTDOB"])  # "/1932"
            sex = {1: "male", 2: "female"}.get(number(row["PTGENDER"]), "")
            if number(row["RID"]) > 0:
                known[int(number(row["RID"]))] = {"birth_year": year[0] if year else "", "sex": sex}
    return known


def labels_of(row: dict[str, str]) -> Labels | str:
    """The label of a row, or why it has none: -4 stands for what is not known."""
    diagnosis = number(row["DXCURREN"])
    if diagnosis == MCI:
        return "mild cognitive impairment at the scan's visit"
    if diagnosis not in (HEALTHY, ALZHEIMER):
        return "no diagnosis at the scan's visit"
    return {"ad": float(diagnosis == ALZHEIMER)}


def viscode(visit: str) -> str:
    """The tables' name of a visit, bl or m18, for M000 or M018 too."""
    months = re.fullmatch(r"[mM](\d+)", visit)
    if months is None:
        return visit
    return f"m{int(months[1])}" if int(months[1]) else "bl"


def identify(place: str) -> ScanId | None:
    patient, visit = PATIENT.search(place), VISIT.search(place)
    if patient is None or visit is None:
        return None
    rid, scan = int(patient[1]), viscode(visit[1])
    return ScanId((rid, scan), f"AIBL{rid}", scan, visit=0 if scan == "bl" else int(scan[1:]))


def paper_split(cohort: Cohort, train_per_class: int, seed: int) -> list[str]:
    """The same number of each class in train; half of the others in val, half in test (an odd one goes to test)."""
    rng = np.random.default_rng(seed)
    order = sorted(range(len(cohort.records)), key=lambda n: cohort.records[n].patient_id)
    splits = [""] * len(order)
    for label, name in ((0, "healthy controls"), (1, "Alzheimer's patients")):
        drawn = rng.permutation([n for n in order if cohort.labels[n]["ad"] == label])
        if len(drawn) < train_per_class + 2:
            raise BrainfmError(
                f"{len(drawn)} {name} are too few for {train_per_class} in train and one in val and test each; "
                "give a smaller --train-per-class, and say so beside the score"
            )
        half = (len(drawn) - train_per_class) // 2
        for place, n in enumerate(drawn):
            held_out = "val" if place < train_per_class + half else "test"
            splits[n] = "train" if place < train_per_class else held_out
    return splits


if __name__ == "__main__":
    run(main)
