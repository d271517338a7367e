"""Labels and embeddings that were made before: joined, and what has no partner named."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm.downstream.precomputed import probe_embeddings, read_embedded
from brainfm.errors import TaskError
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings

PEOPLE = 24


@pytest.fixture
def embedded():
    """Embeddings of two scans of each of 24 patients; the first number is the patient's label."""
    vectors = np.random.default_rng(0).standard_normal((2 * PEOPLE, 6)).astype(np.float32)
    records = [ScanRecord(f"/data/{n}.nii.gz", None, f"sub-{n // 2:02}", f"ses-{n % 2}") for n in range(2 * PEOPLE)]
    vectors[:, 0] = [3 * (n // 2 % 2) for n in range(2 * PEOPLE)]
    return Embeddings(vectors, records)


def people(**columns):
    return pd.DataFrame({"participant_id": [f"sub-{n:02}" for n in range(PEOPLE)]} | columns)


SEX = ["F", "M"] * (PEOPLE // 2)


def test_row_of_a_patient_is_of_all_scans_of_the_patient(embedded):
    data = read_embedded(people(sex=SEX), {"t": embedded}, label="sex")
    assert (len(data.records), data.classes, data.task.kind) == (2 * PEOPLE, ("F", "M"), "binary")
    assert data.labels.tolist() == [n // 2 % 2 for n in range(2 * PEOPLE)]
    np.testing.assert_array_equal(data.embeddings["t"], embedded.vectors)
    assert data.left_out == ()


def test_row_of_a_scan_is_of_that_scan_and_the_order_of_rows_is_nothing(embedded):
    rows = pd.DataFrame([{"patient_id": r.patient_id, "scan_id": r.scan_id} for r in embedded.records])
    rows["age"] = np.arange(2 * PEOPLE) + 0.5
    data = read_embedded(rows.sample(frac=1, random_state=0), {"t": embedded}, label="age")
    assert data.task.kind == "regression"
    assert data.labels.tolist() == rows["age"].tolist()


def test_what_has_no_partner_is_named_on_both_sides(embedded):
    labels = people(sex=SEX).replace({"participant_id": {"sub-00": "sub-99"}})
    data = read_embedded(labels, {"t": embedded}, label="sex")
    assert {(one.scan, one.why) for one in data.left_out} == {
        ("sub-99", "no embedding in t"),
        ("sub-00 ses-0", "no row in labels"),
        ("sub-00 ses-1", "no row in labels"),
    }
    assert not any(one.failed for one in data.left_out)
    assert "joined by patient and scan: 23 of 24 rows of labels and 46 of 48 embeddings of t" in data.notes[0]
    assert "no embedding of 1 rows: sub-99; no row for 2 embeddings: sub-00 ses-0, sub-00 ses-1" in data.notes[0]


def test_rows_are_joined_by_path_where_they_name_no_patient(embedded):
    rows = pd.DataFrame({"image_path": [r.name for r in embedded.records], "sex": [s for s in SEX for _ in "12"]})
    data = read_embedded(rows[2:], {"t": embedded}, label="sex")
    assert len(data.records) == 2 * PEOPLE - 2
    assert data.patients[0] == "sub-01"
    assert "joined by path" in data.notes[0]


def test_prefix_of_bids_is_seen_through_and_said(embedded):
    labels = people(sex=SEX)
    labels["participant_id"] = labels["participant_id"].str.removeprefix("sub-")
    data = read_embedded(labels, {"t": embedded}, label="sex")
    assert len(data.records) == 2 * PEOPLE
    assert "matched without the prefix 'sub-'" in data.notes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename(columns={"sex": "gender"}), "there is no column 'sex'; it has participant_id, gender"),
        (
            lambda t: t.assign(participant_id=[f"x{n}" for n in range(PEOPLE)]),
            "nothing matches by patient and scan; the",
        ),
        (lambda t: t.assign(participant_id="sub-01"), "24 rows are of sub-01; say by a column scan_id or image_path"),
        (lambda t: t.drop(columns="participant_id"), "nothing to be joined by: each needs patient_id, or each"),
        (lambda t: t[:0], "has no rows"),
    ],
)
def test_labels_that_cannot_be_joined_are_refused(change, message, embedded):
    with pytest.raises(TaskError, match=message):
        read_embedded(change(people(sex=SEX)), {"t": embedded}, label="sex")


def test_scan_that_is_there_twice_is_refused(embedded):
    twice = replace(embedded, records=[embedded.records[0], *embedded.records[:-1]])
    with pytest.raises(TaskError, match="the table of embeddings has sub-00 ses-0 twice"):
        read_embedded(people(sex=SEX), {"t": twice}, label="sex")


def test_tables_of_several_models_are_rows_of_one_page(embedded, tmp_path):
    """The second has no label in it, and lies in another order."""
    noise = np.random.default_rng(1).standard_normal(embedded.vectors.shape).astype(np.float32)
    other = Embeddings(noise[::-1], embedded.records[::-1])
    labels = people(sex=SEX, age=[str(n) for n in range(PEOPLE)])
    tables = {"good": embedded, "bad": other}
    data = read_embedded(labels, tables, label="sex")
    np.testing.assert_array_equal(data.embeddings["bad"], noise)
    page = probe_embeddings(labels, tables, tmp_path, label="sex", covariates=["age"], positive="F", seeds=2)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "auc"]
    assert {row["model"] for row in rows} == {"good", "bad", "covariates"}
    assert all(float(row["value"]) == 1 for row in rows if row["model"] == "good")
    assert {row["positive"] for row in rows} == {"F"}
    text = Path(page).read_text()
    assert "the positive class, 1, is &#39;F&#39; (24 scans)" in text
    assert "good, linear probe" in text
