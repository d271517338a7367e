"""`benchmarks/end_to_end.py`, tiny: from no file at all to the printed coverage of predictions for a new cohort."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "end_to_end.py"
SIZES = {"starts": "anew", "patients": 20, "epochs": 1, "labelled": 48, "finetune-epochs": 1, "new": 8, "seeds": 1}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(folder: Path, *parts: str) -> str:
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    words = [sys.executable, SCRIPT, folder, *sizes, "--only", *parts]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_unattended_from_phantoms_to_the_coverage_of_a_new_cohort(tmp_path):
    page = run(tmp_path, "phantoms", "pretrain", "finetune", "predict")
    ages = {row["patient_id"]: float(row["age"]) for row in rows_of(tmp_path / "new" / "manifest.csv")}
    assert len(ages) == 8
    (kept,) = (tmp_path / "finetuned" / "models").iterdir()
    for cohort in ("new", "noisy"):
        found = rows_of(tmp_path / "predictions" / f"{kept.name}-{cohort}.csv")
        assert [row["patient_id"] for row in found] == list(ages)
        low, high = ([float(row[name]) for row in found] for name in ("low", "high"))
        assert all(0 < b - a < 300 for a, b in zip(low, high, strict=True))
        inside = sum(a <= age <= b for a, age, b in zip(low, ages.values(), high, strict=True))
        unlike = sum(float(row["unlike"]) == 100 for row in found)
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{kept.name}` | {cohort} |"))
        assert f"({inside} of 8)" in line
        assert line.endswith(f"| {unlike} of 8 |")
