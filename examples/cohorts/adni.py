"""ADNI: join ADNIMERGE.csv with the prepared T1 scans, for Alzheimer's disease against controls, or the controls' age.

python examples/cohorts/adni.py ADNIMERGE.csv prepared/ -o adni.csv
python examples/cohorts/adni.py ADNIMERGE.csv prepared/ -o adni_age.csv --label age
python examples/cohorts/adni.py ADNIMERGE.csv prepared/ -o adni.csv --dxsum DXSUM.csv --mrilist MRILIST.csv

Label: ad, 0 cognitively normal and 1 dementia, at the visit of the scan; or age at that visit, of the normal alone.
Age, sex and site are kept for the control without an image, and to leave sites out. What to download is in adni.md.
"""

import datetime
import math
import re
from pathlib import Path

from _common import Labels, People, ScanId, arguments, join, number, read_table, run, write_manifest

from brainfm.downstream.split import make_split

PATIENT = re.compile(r"(\d{3})_?S_?(\d{4})")  # 011_S_0002 of LONI, sub-ADNI011S0002 of Clinica
VISIT = re.compile(r"[/_](?:ses-)?(bl|[mM]\d+)(?=[/_]|$)")  # bl and m06 of the tables, ses-M006 of Clinica
IMAGE = re.compile(r"(?:^|[/_])I(\d+)(?=[/_]|$)")  # LONI's number of an image
DIAGNOSES = {1: "CN", 2: "MCI", 3: "Dementia"}  # DIAGNOSIS of DXSUM
MOST_DAYS = 180  # between a scan and the visit that it belongs to
COLUMNS = ["PTID", "VISCODE", "EXAMDATE", "DX", "AGE", "PTGENDER", "SITE", "Years_bl"]


def main() -> None:
    parser = arguments(__doc__, "ADNIMERGE.csv")
    parser.add_argument("--label", choices=("ad", "age"), default="ad", help="what is predicted (default: ad)")
    parser.add_argument("--dxsum", type=Path, help="DXSUM_PDXCONV_ADNIALL.csv: its diagnoses in place of ADNIMERGE's")
    parser.add_argument("--mrilist", type=Path, help="MRILIST.csv: which visit an image (I12345) is of, by its date")
    options = parser.parse_args()

    stated = diagnoses(options.dxsum) if options.dxsum else {}
    people = People()
    covariates, dates = {}, {}
    for row in read_table(options.phenotypes, COLUMNS):
        key = (row["PTID"].strip(), viscode(row["VISCODE"]))
        age = number(row["AGE"]) + number(row["Years_bl"])  # AGE is that at baseline
        diagnosis = stated.get(key, "") if options.dxsum else row["DX"].strip()
        people.add(key, labels_of(diagnosis, age, options.label))
        known = {"sex": row["PTGENDER"].strip().lower(), "site": row["SITE"].strip()}
        covariates[key] = known if options.label == "age" else {"age": f"{age:.2f}" if age == age else "", **known}
        dates[key] = day(row["EXAMDATE"])
    images = scan_dates(options.mrilist) if options.mrilist else {}
    cohort = join("ADNI", options.scans, lambda place: identify(place, images, dates), people, covariates)
    kind = "regression" if options.label == "age" else "binary"
    labels = [one[options.label] for one in cohort.labels]
    splits = make_split(cohort.records, labels, kind=kind, seed=options.seed)
    write_manifest(options.output, cohort, splits)


def labels_of(diagnosis: str, age: float, label: str) -> Labels | str:
    """The label of a visit, or why it has none."""
    if diagnosis not in DIAGNOSES.values():
        return "no diagnosis at the scan's visit"
    if diagnosis == "MCI":
        return "mild cognitive impairment at the scan's visit"
    if label == "ad":
        return {"ad": float(diagnosis == "Dementia")}
    if diagnosis != "CN":
        return "dementia at the scan's visit"
    return {"age": round(age, 2)} if age == age else "no age"


def diagnoses(path: Path) -> dict[tuple[str, str], str]:
    """DXSUM's diagnosis of each visit."""
    found = {}
    for row in read_table(path, ["PTID", "VISCODE2", "DIAGNOSIS"]):
        code = number(row["DIAGNOSIS"])
        found[row["PTID"].strip(), viscode(row["VISCODE2"])] = DIAGNOSES.get(code, "")
    return found


def scan_dates(path: Path) -> dict[int, tuple[str, datetime.date | None]]:
    """By the number of each image of MRILIST whose it is, and of which day."""
    rows = read_table(path, ["SUBJECT", "SCANDATE", "IMAGEUID"])
    return {int(number(row["IMAGEUID"])): (row["SUBJECT"].strip(), day(row["SCANDATE"])) for row in rows}


def day(text: str) -> datetime.date | None:
    """2005-09-08, or 9/8/2005."""
    for layout in ("%Y-%m-%d", "%m/%d/%Y"):
        try:
            return datetime.datetime.strptime(text.strip(), layout).date()
        except ValueError:
            continue
    return None


def viscode(visit: str) -> str:
    """The tables' name of a visit, bl or m06, for sc, M000 or M006 too."""
    months = re.fullmatch(r"[mM](\d+)", visit.strip())
    if months is None:
        return "bl" if visit.strip() in ("sc", "scmri") else visit.strip()
    return f"m{int(months[1]):02d}" if int(months[1]) else "bl"


def identify(place: str, images, dates) -> ScanId | None:
    """Whose scan a folder holds, and of which visit: as its name says, or by the day of its image in MRILIST."""
    patient, visit, image = PATIENT.search(place), VISIT.search(place), IMAGE.search(place)
    if patient is not None and visit is not None:
        ptid, code = f"{patient[1]}_S_{patient[2]}", viscode(visit[1])
        return ScanId((ptid, code), ptid, code, visit=months_of(code))
    if image is None or int(image[1]) not in images:
        return None
    ptid, scanned = images[int(image[1])]
    if patient is not None and ptid != f"{patient[1]}_S_{patient[2]}":
        return None
    apart = {key: abs((scanned - when).days) for key, when in dates.items() if key[0] == ptid and when and scanned}
    near = min(apart, key=lambda key: apart[key], default=None)
    if near is None or apart[near] > MOST_DAYS:
        return ScanId((ptid, f"no visit within {MOST_DAYS} days"), ptid, f"I{image[1]}", visit=math.inf)
    return ScanId(near, ptid, f"{near[1]}-I{image[1]}", visit=months_of(near[1]))


def months_of(code: str) -> float:
    return int(code[1:]) if re.fullmatch(r"m\d+", code) else 0.0


if __name__ == "__main__":
    run(main)
