"""UCLA CNP (LA5c, OpenNeuro ds000030): join participants.tsv with the prepared T1 scans, for four diagnoses.

python examples/cohorts/cnp.py participants.tsv prepared/ -o cnp.csv
python examples/cohorts/cnp.py participants.tsv prepared/ -o schz.csv --label schz

Label: diagnosis, 0 control, 1 ADHD, 2 bipolar disorder, 3 schizophrenia; or one of these against the controls alone, 0
and 1. Age, sex and the scanner are kept. What to download is in docs/cohorts/cnp.md.
"""

import re

from _common import Labels, People, ScanId, arguments, hashed_split, join, read_table, run, write_manifest

SUBJECT = re.compile(r"sub-(\d{5})(?=[/_]|$)")
COLUMNS = ["participant_id", "diagnosis", "age", "gender", "ScannerSerialNumber"]
DIAGNOSES = ("CONTROL", "ADHD", "BIPOLAR", "SCHZ")
SEXES = {"M": "male", "F": "female"}


def main() -> None:
    parser = arguments(__doc__, "participants.tsv")
    choices = ("diagnosis", *(name.lower() for name in DIAGNOSES[1:]))
    parser.add_argument("--label", choices=choices, default="diagnosis", help="what is predicted (default: diagnosis)")
    options = parser.parse_args()
    people = People()
    covariates = {}
    for row in read_table(options.phenotypes, COLUMNS):
        key = row["participant_id"].strip()
        people.add(key, label_of(row["diagnosis"].strip(), options.label))
        covariates[key] = {
            "age": row["age"].strip(),
            "sex": SEXES.get(row["gender"].strip(), ""),
            "site": row["ScannerSerialNumber"].strip().removesuffix(".0"),
        }
    cohort = join("UCLA CNP", options.scans, identify, people, covariates)
    splits = hashed_split(cohort.name, cohort.records, options.seed)
    write_manifest(options.output, cohort, splits)


def label_of(diagnosis: str, label: str) -> Labels | str:
    """The label of a diagnosis, or why it has none."""
    if diagnosis not in DIAGNOSES:
        return "no diagnosis"
    if label == "diagnosis":
        return {label: float(DIAGNOSES.index(diagnosis))}
    if diagnosis not in ("CONTROL", label.upper()):
        return f"neither {label} nor a control"
    return {label: float(diagnosis != "CONTROL")}


def identify(place: str) -> ScanId | None:
    found = SUBJECT.search(place)
    return ScanId(f"sub-{found[1]}", f"sub-{found[1]}", "T1w") if found else None


if __name__ == "__main__":
    run(main)
