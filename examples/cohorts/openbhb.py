"""OpenBHB: join participants.tsv with the prepared T1 scans of healthy people, for their age or sex.

python examples/cohorts/openbhb.py participants.tsv prepared/ -o openbhb.csv

Labels: age in years, and sex, 0 male and 1 female. The challenge's internal and external test sets are the test part,
told apart by the column official; its training set is split into train and val by a hash. Site and study are kept.
What to download is in docs/cohorts/openbhb.md.
"""

import re

from _common import People, ScanId, arguments, hashed_split, join, number, read_table, run, write_manifest

SUBJECT = re.compile(r"(?:^|[/_-])(?:sub-)?(\d{12})(?=[/_]|$)")  # twelve digits, of no source cohort
COLUMNS = ["participant_id", "sex", "age", "site", "study", "split"]
SEXES = {"male": 0.0, "female": 1.0}


def main() -> None:
    options = arguments(__doc__, "participants.tsv").parse_args()
    people = People()
    covariates = {}
    for row in read_table(options.phenotypes, COLUMNS):
        key, age, sex = row["participant_id"].strip(), number(row["age"]), SEXES.get(row["sex"].strip().lower())
        people.add(key, "age or sex is missing" if not age > 0 or sex is None else {"age": age, "sex": sex})
        covariates[key] = {name: row[name].strip() for name in ("site", "study")} | {"official": row["split"].strip()}
    cohort = join("OpenBHB", options.scans, identify, people, covariates)
    hashed = hashed_split(cohort.name, cohort.records, options.seed)
    splits = [
        "test" if record.extra["official"].endswith("test") else "train" if split == "test" else split
        for record, split in zip(cohort.records, hashed, strict=True)
    ]
    write_manifest(options.output, cohort, splits)


def identify(place: str) -> ScanId | None:
    found = SUBJECT.search(place)
    return ScanId(found[1], f"sub-{found[1]}", "ses-1") if found else None


if __name__ == "__main__":
    run(main)
