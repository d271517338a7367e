"""ABIDE I: join the composite phenotypic file with the prepared T1 scans, for autism against typical development.

python examples/cohorts/abide1.py Phenotypic_V1_0b.csv prepared/ -o abide1.csv

Label: asd, 0 typically developing and 1 autism spectrum disorder. Age, sex and site are kept for the control without an
image, and to leave sites out. What to download is in docs/cohorts/abide1.md.
"""

import re

from _common import Labels, People, ScanId, arguments, hashed_split, join, number, read_table, run, write_manifest

SUBJECT = re.compile(r"(?:^|[/_-])(?:sub-)?(00\d{5})(?=[/_]|$)")  # sub-0050002 of the BIDS folders
COLUMNS = ["SUB_ID", "DX_GROUP", "AGE_AT_SCAN", "SEX", "SITE_ID"]
GROUPS = {1: 1.0, 2: 0.0}  # DX_GROUP: 1 autism, 2 control
SEXES = {1: "male", 2: "female"}


def main() -> None:
    options = arguments(__doc__, "Phenotypic_V1_0b.csv").parse_args()
    people = People()
    covariates = {}
    for row in read_table(options.phenotypes, COLUMNS):
        subject = number(row["SUB_ID"])
        if subject != subject:
            continue
        group = GROUPS.get(number(row["DX_GROUP"]))
        label: Labels | str = "no diagnostic group" if group is None else {"asd": group}
        key = f"{int(subject):07d}"
        people.add(key, label)
        age = number(row["AGE_AT_SCAN"])
        covariates[key] = {
            "age": f"{age:.2f}" if age > 0 else "",  # -9999 is missing
            "sex": SEXES.get(number(row["SEX"]), ""),
            "site": row["SITE_ID"].strip(),
        }
    cohort = join("ABIDE I", options.scans, identify, people, covariates)
    splits = hashed_split(cohort.name, cohort.records, options.seed)
    write_manifest(options.output, cohort, splits)


def identify(place: str) -> ScanId | None:
    found = SUBJECT.search(place)
    return ScanId(found[1], f"sub-{found[1]}", "T1w") if found else None


if __name__ == "__main__":
    run(main)
