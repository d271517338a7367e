"""ADHD-200: join the sites' participants.tsv with the prepared T1 scans, for ADHD against typical development.

python examples/cohorts/adhd200.py RawDataBIDS/ prepared/ -o adhd200.csv --test-set allSubs_testSet_phenotypic_dx.csv

Label: adhd, 0 typically developing and 1 ADHD of any kind. With --test-set the competition's holdout is the test part,
and the others are train and val; without it everyone is split by a hash. What to download: docs/cohorts/adhd200.md.
"""

import re
from pathlib import Path

from _common import Labels, People, ScanId, arguments, hashed_split, join, number, read_table, run, write_manifest

from brainfm.errors import BrainfmError

SUBJECT = re.compile(r"(?:^|[/_-])(?:sub-)?(\d{7})(?=[/_]|$)")
SESSION = re.compile(r"ses-(\d+)")
COLUMNS = ["participant_id", "dx"]
CONTROL = "typically developing children"


def main() -> None:
    parser = arguments(__doc__, "RawDataBIDS, with a participants.tsv a site, or one such file")
    parser.add_argument("--test-set", type=Path, help="allSubs_testSet_phenotypic_dx.csv: the competition's holdout")
    options = parser.parse_args()
    people = People()
    covariates = {}
    for path in tables(options.phenotypes):
        for raw in read_table(path, []):
            row = {name.strip(): value.strip() for name, value in raw.items()}
            if missing := [name for name in COLUMNS if name not in row]:
                if missing == ["dx"]:  # Brown's labels were never released
                    break
                raise BrainfmError(f"{path}: no column {', '.join(missing)}; found: {', '.join(row)}")
            key = f"{int(row['participant_id'].removeprefix('sub-')):07d}"
            people.add(key, label_of(row["dx"]))
            covariates[key] = {
                "age": row.get("age", "") if number(row.get("age", "")) > 0 else "",
                "sex": row.get("gender", "").lower(),
                "site": path.parent.name,
            }
    cohort = join("ADHD-200", options.scans, identify, people, covariates)
    splits = hashed_split(cohort.name, cohort.records, options.seed)
    if options.test_set:
        holdout = {f"sub-{int(number(row['ID'])):07d}" for row in read_table(options.test_set, ["ID"])}
        splits = [
            "test" if record.patient_id in holdout else "train" if split == "test" else split
            for record, split in zip(cohort.records, splits, strict=True)
        ]
    write_manifest(options.output, cohort, splits)


def tables(place: Path) -> list[Path]:
    """The sites' tables in a folder, or the one that is given."""
    if not place.is_dir():
        return [place]
    found = sorted(place.glob("*/participants.tsv"))
    if not found:
        raise BrainfmError(f"{place}: no site in it has a participants.tsv; give RawDataBIDS, as it was downloaded")
    return found


def label_of(diagnosis: str) -> Labels | str:
    """The label of a diagnosis, or why it has none."""
    if diagnosis.lower() == CONTROL:
        return {"adhd": 0.0}
    if diagnosis.upper().startswith("ADHD"):
        return {"adhd": 1.0}
    return "no diagnosis"


def identify(place: str) -> ScanId | None:
    found, session = SUBJECT.search(place), SESSION.search(place)
    visit = int(session[1]) if session else 1
    return ScanId(found[1], f"sub-{found[1]}", f"ses-{visit}", visit) if found else None


if __name__ == "__main__":
    run(main)
