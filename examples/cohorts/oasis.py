"""OASIS: join the table of OASIS-1 or OASIS-3 with the prepared T1 scans, for Alzheimer's disease against controls.

python examples/cohorts/oasis.py oasis_cross-sectional.csv prepared/ -o oasis.csv        # OASIS-1
python examples/cohorts/oasis.py OASIS3_UDSb4_cdr.csv prepared/ -o oasis.csv             # OASIS-3

Label: ad, 0 healthy and 1 ill. In OASIS-1 by the Clinical Dementia Rating (0, or above 0); in OASIS-3 by that and the
diagnosis of the visit nearest to the scan. What to download is in oasis.md.
"""

import math
import re

from _common import Labels, People, ScanId, arguments, join, number, read_table, run, write_manifest

from brainfm.downstream.split import make_split
from brainfm.errors import BrainfmError

SCAN_1 = re.compile(r"OAS1_(\d{4})_MR(\d)")
SCAN_3 = re.compile(r"(OAS3\d{4}).*?[_-](?:MR_?)?d(\d{4})")  # OAS30001_MR_d0129, sub-OAS30001/ses-d0129
DAY = re.compile(r"d(\d{4,5})$")
MOST_DAYS = 365  # between a scan and the visit that it belongs to
# Of a column, its names: in the releases of 2022 and later, and before.
ID, SESSION, CDR = ("OASISID", "Subject"), ("OASIS_session_label", "ADRC_ADRCCLINICALDATA ID"), ("CDRTOT", "cdr")
AGE = ("age at visit", "ageAtEntry")


def main() -> None:
    options = arguments(__doc__, "oasis_cross-sectional.csv, or OASIS3_UDSb4_cdr.csv").parse_args()
    rows = read_table(options.phenotypes, [])
    columns = set(rows[0]) if rows else set()
    if {"ID", "CDR", "Age", "M/F"} <= columns:
        name, (people, covariates, identify) = "OASIS-1", first(rows)
    elif all(columns & set(names) for names in (ID, SESSION, CDR)) and "dx1" in columns:
        name, (people, covariates, identify) = "OASIS-3", third(rows)
    else:
        raise BrainfmError(
            f"{options.phenotypes}: neither OASIS-1's table (ID, M/F, Age, CDR) nor OASIS-3's (OASISID, "
            f"OASIS_session_label, CDRTOT, dx1); found: {', '.join(sorted(columns))}"
        )
    cohort = join(name, options.scans, identify, people, covariates)
    splits = make_split(cohort.records, [one["ad"] for one in cohort.labels], kind="binary", seed=options.seed)
    write_manifest(options.output, cohort, splits)


def first(rows):
    """OASIS-1: the labels and covariates of each session, and whose scan a folder holds."""
    people = People()
    covariates = {}
    for row in rows:
        rating = number(row["CDR"])
        label: Labels | str = "no Clinical Dementia Rating" if rating != rating else {"ad": float(rating > 0)}
        people.add(row["ID"], label)
        covariates[row["ID"]] = {"age": row["Age"], "sex": {"M": "male", "F": "female"}.get(row["M/F"], "")}

    def identify(place: str) -> ScanId | None:
        found = SCAN_1.search(place)
        return ScanId(found[0], f"OAS1_{found[1]}", f"MR{found[2]}", visit=int(found[2])) if found else None

    return people, covariates, identify


def third(rows):
    """OASIS-3: the labels and covariates of each visit, and whose scan a folder holds and to which visit it belongs."""
    people = People()
    covariates: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        named = DAY.search(one_of(row, SESSION).strip())
        if named is None:
            continue
        key = one_of(row, ID).strip(), int(named[1])
        people.add(key, label_of(number(one_of(row, CDR)), row["dx1"].strip()))
        covariates[key] = {"age": age_of(row, key[1])}

    def identify(place: str) -> ScanId | None:
        found = SCAN_3.search(place)
        if found is None:
            return None
        patient, scanned = found[1], int(found[2])
        apart = {key: abs(key[1] - scanned) for key in people if key[0] == patient}
        near = min(apart, key=lambda key: apart[key], default=None)
        if near is None or apart[near] > MOST_DAYS:
            near = patient, -1  # no visit of the table
        return ScanId(near, patient, f"d{found[2]}", visit=scanned)

    return people, covariates, identify


def one_of(row, names):
    """A column by whichever of its names the table has."""
    return next(row[name] for name in names if name in row)


def age_of(row, days: int) -> str:
    """Years at the visit; the earlier tables have those at the first."""
    age = number(one_of(row, AGE)) if set(AGE) & set(row) else math.nan
    if "age at visit" not in row:
        age += days / 365.25
    return f"{age:.2f}" if age == age else ""


def label_of(rating: float, diagnosis: str) -> Labels | str:
    """The label of a visit, or why it has none."""
    if rating != rating:
        return "no Clinical Dementia Rating"
    if rating == 0 and diagnosis.lower() == "cognitively normal":
        return {"ad": 0.0}
    if rating > 0 and diagnosis.lower().startswith("ad dem"):
        return {"ad": 1.0}
    return "neither normal nor Alzheimer's dementia at the nearest visit"


if __name__ == "__main__":
    run(main)
