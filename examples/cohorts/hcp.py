"""HCP Young Adult: join the unrestricted table with the prepared T1 scans, for sex; with the restricted one, for age.

python examples/cohorts/hcp.py unrestricted.csv prepared/ -o hcp.csv --restricted RESTRICTED.csv
python examples/cohorts/hcp.py unrestricted.csv prepared/ -o hcp_age.csv --restricted RESTRICTED.csv --label age

Label: sex, 0 male and 1 female; or age in years, which is restricted data, as the families are. The participants are
brothers, sisters and twins: with --restricted a family is in one part alone; without it that cannot be, and is said.
What to download is in docs/cohorts/hcp.md.
"""

import re
from pathlib import Path

from _common import Labels, People, ScanId, arguments, hashed_split, join, number, read_table, run, write_manifest

from brainfm.errors import BrainfmError

SUBJECT = re.compile(r"(?:^|[/_-])(?:sub-)?(\d{6})(?=[/_]|$)")
SEXES = {"M": 0.0, "F": 1.0}


def main() -> None:
    parser = arguments(__doc__, "unrestricted_….csv of ConnectomeDB")
    parser.add_argument("--restricted", type=Path, help="RESTRICTED_….csv: age and family")
    parser.add_argument("--label", choices=("sex", "age"), default="sex", help="what is predicted (default: sex)")
    options = parser.parse_args()
    families: dict[str, str] = {}
    ages: dict[str, float] = {}
    if options.restricted:
        for row in read_table(options.restricted, ["Subject", "Age_in_Yrs", "Family_ID"]):
            families[row["Subject"].strip()] = row["Family_ID"].strip()
            ages[row["Subject"].strip()] = number(row["Age_in_Yrs"])
    elif options.label == "age":
        raise BrainfmError("age in years is restricted data of HCP: give --restricted RESTRICTED_….csv")
    people = People()
    covariates = {}
    for row in read_table(options.phenotypes, ["Subject", "Gender", "Age"]):
        key = row["Subject"].strip()
        sex, age = SEXES.get(row["Gender"].strip()), ages.get(key, float("nan"))
        people.add(key, label_of(sex, age, options.label))
        known = {"age_band": row["Age"].strip()}
        covariates[key] = known | ({"sex": row["Gender"].strip()} if options.label == "age" else {})
    cohort = join("HCP-YA", options.scans, identify, people, covariates)
    splits = hashed_split(cohort.name, cohort.records, options.seed, families)
    write_manifest(options.output, cohort, splits)
    if not options.restricted:
        print(
            "warning: brothers and sisters may be in different parts of the split; give --restricted to keep families"
        )


def label_of(sex: float | None, age: float, label: str) -> Labels | str:
    """The label of a participant, or why there is none."""
    if label == "age":
        return {"age": age} if age == age else "no age"
    return {"sex": sex} if sex is not None else "no sex"


def identify(place: str) -> ScanId | None:
    found = SUBJECT.search(place)
    return ScanId(found[1], found[1], "T1w") if found else None


if __name__ == "__main__":
    run(main)
