"""IXI: join IXI.xls with the prepared T1 scans, for the tasks sex and age. What to download is in ixi.md.

python examples/cohorts/ixi.py IXI.xls turboprep/ -o ixi.csv

Labels: sex, 0 male and 1 female; age in years.
"""

import re

from _common import Labels, People, ScanId, arguments, join, number, read_table, run, write_manifest

from brainfm.downstream.split import make_split

SEX = "SEX_ID (1=m, 2=f)"
PATTERN = re.compile(r"(IXI(\d+))-((?:Guys|HH|IOP)-\d+)")  # IXI002-Guys-0828-T1: patient, hospital, scan


def main() -> None:
    parser = arguments(__doc__, "IXI.xls, or the same table as .xlsx or .csv")
    parser.add_argument("--stratify", choices=("sex", "age"), default="sex", help="what the splits have alike")
    options = parser.parse_args()

    people = People()
    for row in read_table(options.phenotypes, ["IXI_ID", SEX, "AGE"]):
        if (ixi_id := number(row["IXI_ID"])) > 0:
            people.add(int(ixi_id), labels_of(row))
    cohort = join("IXI", options.scans, identify, people)
    splits = make_split(
        cohort.records,
        [labels[options.stratify] for labels in cohort.labels],
        kind="binary" if options.stratify == "sex" else "regression",
        seed=options.seed,
    )
    write_manifest(options.output, cohort, splits)


def labels_of(row: dict[str, str]) -> Labels | str:
    """The labels of a row, or why it has none: 0 stands for what is not known."""
    sex, age = number(row[SEX]), number(row["AGE"])
    if sex not in (1, 2):
        return "sex is missing or 0"
    if not 0 < age < 120:
        return "age is missing, 0 or impossible"
    return {"sex": sex - 1, "age": age}


def identify(place: str) -> ScanId | None:
    found = PATTERN.search(place)
    return ScanId(int(found[2]), found[1], found[3]) if found else None


if __name__ == "__main__":
    run(main)
