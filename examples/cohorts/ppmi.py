"""PPMI: join Participant_Status with the prepared T1 scans, for Parkinson's disease against healthy controls.

python examples/cohorts/ppmi.py Participant_Status.csv prepared/ -o ppmi.csv --demographics Demographics.csv

Label: pd, 0 healthy control and 1 Parkinson's disease, by the cohort of enrolment; who is prodromal, or has scans
without evidence of a dopaminergic deficit (SWEDD), is left out. The age is that at enrolment, the first two digits of a
participant's number stand for no site, and the columns are those that the task parkinson asks for but for site.
What to download is in docs/cohorts/ppmi.md.
"""

import re
from pathlib import Path

from _common import Labels, People, ScanId, arguments, hashed_split, join, number, read_table, run, write_manifest

SUBJECT = re.compile(r"(?:^|[/_-])(?:sub-|PPMI[_-]?)?(\d{4,6})(?=[/_]|$)")
VISIT = re.compile(r"ses-([A-Za-z]*)(\d*)")
COLUMNS = ["PATNO", "COHORT_DEFINITION", "ENROLL_AGE"]
COHORTS = {"parkinson's disease": 1.0, "healthy control": 0.0}
SEXES = {0: "female", 1: "male"}  # SEX of Demographics


def main() -> None:
    parser = arguments(__doc__, "Participant_Status.csv, of any date")
    parser.add_argument("--demographics", type=Path, help="Demographics.csv, for sex (columns PATNO and SEX)")
    options = parser.parse_args()
    sexes = {}
    if options.demographics:
        sexes = {row["PATNO"].strip(): number(row["SEX"]) for row in read_table(options.demographics, ["PATNO", "SEX"])}
    people = People()
    covariates = {}
    for row in read_table(options.phenotypes, COLUMNS):
        key, age = row["PATNO"].strip(), number(row["ENROLL_AGE"])
        people.add(key, label_of(row["COHORT_DEFINITION"].strip()))
        covariates[key] = {"age": f"{age:.1f}" if age > 0 else "", "sex": SEXES.get(sexes.get(key, -1), "")}
    cohort = join("PPMI", options.scans, identify, people, covariates)
    splits = hashed_split(cohort.name, cohort.records, options.seed)
    write_manifest(options.output, cohort, splits)


def label_of(cohort: str) -> Labels | str:
    """The label of a cohort of enrolment, or why it has none."""
    found = COHORTS.get(cohort.lower().replace("\u2019", "'"))
    return {"pd": found} if found is not None else f"enrolled as {cohort or 'nothing'}"


def identify(place: str) -> ScanId | None:
    found, visit = SUBJECT.search(place), VISIT.search(place)
    number_of_visit = int(visit[2] or 0) if visit else 0
    return ScanId(found[1], found[1], visit[0] if visit else "T1w", number_of_visit) if found else None


if __name__ == "__main__":
    run(main)
