"""LDM 100k: list the 100,000 synthetic T1w volumes of Pinaya et al. 2022, to pretrain on; see ldm100k.md.

python examples/cohorts/ldm100k.py LDM_100k/ -o ldm100k.csv
python examples/cohorts/ldm100k.py LDM_100k/ --prepared prepared/ -o ldm100k.csv   # after brainfm prep

Columns: age, sex, ventricles and brain_volume as participants.tsv has them, and source, which is "synthetic".
"""

import argparse
import os
import re
from pathlib import Path

from _common import number, read_table, run

from brainfm.errors import BrainfmError
from brainfm.files import write_csv
from brainfm.manifest import list_scans

CONDITIONS = {"age": r"age", "sex": r"sex|gender", "ventricles": r"vent", "brain_volume": r"brain"}  # how columns begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="LDM_100k: participants.tsv beside rawdata/sub-…/anat/sub-…_T1w.nii.gz"
    )
    parser.add_argument(
        "--prepared", type=Path, help="folder of 'brainfm prep', to list its scans and not the raw ones"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the manifest to write, a CSV")
    options = parser.parse_args()

    table = options.folder / "participants.tsv"
    rows = read_table(table, ["participant_id"])
    columns = {name: column_of(name, list(rows[0]), table) for name in CONDITIONS}
    images = (
        prepared(options.prepared) if options.prepared else raw(options.folder, [row["participant_id"] for row in rows])
    )
    made, missing, unknown = [], [], []
    for row in sorted(rows, key=lambda row: row["participant_id"]):
        name = row["participant_id"]
        told = {key: row[column] for key, column in columns.items()}
        if name not in images:
            missing.append(name)
        elif any(number(value) != number(value) for value in told.values()):
            unknown.append(name)
        else:
            path = os.path.relpath(images[name], options.output.absolute().parent)
            made.append([Path(path).as_posix(), name, *told.values(), "LDM 100k", "synthetic"])
    if not made:
        raise BrainfmError(
            f"{options.folder}: none of the {len(rows)} volumes of {table.name} is there, such as {missing[0]}"
        )
    header = ["image_path", "patient_id", *columns, "dataset", "source"]
    write_csv(options.output, [header, *made], line_end="\n")
    print(f"{options.output}: {len(made)} synthetic volumes, drawn by a model and not of people")
    for names, why in ((missing, "no volume of that name"), (unknown, "a condition that is no number")):
        if names:
            print(f"left out {len(names)}: {why}, such as {names[0]}")


def column_of(name: str, columns: list[str], table: Path) -> str:
    """The one column that begins as a condition is called."""
    found = [column for column in columns if re.match(CONDITIONS[name], column, re.IGNORECASE)]
    if len(found) != 1:
        several = f"several columns of {name}: {', '.join(found)}" if found else f"no column of {name}"
        raise BrainfmError(f"{table}: {several}; found: {', '.join(columns)}; leave one, called {name}")
    return found[0]


def raw(folder: Path, names: list[str]) -> dict[str, Path]:
    paths = {name: folder / "rawdata" / name / "anat" / f"{name}_T1w.nii.gz" for name in names}
    return {name: path for name, path in paths.items() if path.is_file()}


def prepared(folder: Path) -> dict[str, Path]:
    """Prepared scans by their patients' names, as the folders of `brainfm prep` have them."""
    return {f"sub-{record.patient_id.removeprefix('sub-')}": Path(record.image) for record in list_scans(folder)}


if __name__ == "__main__":
    run(main)
