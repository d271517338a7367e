"""SOOP: join participants.tsv with the prepared T1 scans, for the stroke scale (NIHSS). What to download is in soop.md.

python examples/cohorts/soop.py ds004889/participants.tsv turboprep/ -o soop.csv

Label: nihss, the NIH Stroke Scale, a whole number from 0 to 42. Age and sex are kept for the control without an image.
"""

import re

from _common import People, ScanId, arguments, join, number, read_table, run, write_manifest

from brainfm.downstream.split import make_split

PATTERN = re.compile(r"sub-(\d+)")
WORST = 42  # of the NIH Stroke Scale


def main() -> None:
    options = arguments(__doc__, "participants.tsv of OpenNeuro ds004889").parse_args()

    people = People()
    covariates = {}
    for row in read_table(options.phenotypes, ["participant_id", "nihss", "age", "sex"]):
        # The oldest are "89+".
        covariates[row["participant_id"]] = {"age": row["age"].removesuffix("+"), "sex": row["sex"]}
        nihss = number(row["nihss"])
        if nihss != nihss:
            people.add(row["participant_id"], "no NIHSS")
        elif not (0 <= nihss <= WORST and nihss == int(nihss)):
            people.add(row["participant_id"], f"an NIHSS that is no whole number from 0 to {WORST}")
        else:
            people.add(row["participant_id"], {"nihss": nihss})
    cohort = join("SOOP", options.scans, identify, people, covariates)
    splits = make_split(
        cohort.records, [labels["nihss"] for labels in cohort.labels], kind="regression", seed=options.seed
    )
    write_manifest(options.output, cohort, splits)
    print(
        "warning: in the paper the training part of SOOP was pretraining data too. Its list of patients is not public, "
        "so the val and test patients of this split may have been in pretraining: a score of the published encoder on "
        "them is in-distribution at best"
    )


def identify(place: str) -> ScanId | None:
    found = PATTERN.search(place)
    return ScanId(found[0], found[0], "T1w") if found else None


if __name__ == "__main__":
    run(main)
