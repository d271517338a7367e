"""What a control without an image is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import brainfm
from brainfm import table
from brainfm.downstream.features import name_of, read_features, table_of
from brainfm.downstream.task import Task, TaskData
from brainfm.embed import origin_of
from brainfm.errors import BrainfmError, TaskError
from brainfm.manifest import ScanRecord


def of(**columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    task = Task(name="y", label="y", kind="binary", covariates=tuple(columns))
    records = [ScanRecord(Path(f"{n}.nii.gz"), None, f"p{n}", "", row) for n, row in enumerate(rows)]
    return TaskData(task, records, np.arange(len(rows)) % 2, ("a", "b"), None)


def test_a_scan_is_another_when_any_of_its_files_has_changed(tmp_path):
    paths = [tmp_path / name for name in ("t1.nii", "flair.nii", "mask.nii")]
    for path in paths:
        path.write_bytes(b"1")
    record = ScanRecord({"t1w": paths[0], "flair": paths[1]}, paths[2])
    names = [name_of(record), name_of(ScanRecord({"flair": paths[0], "t1w": paths[1]}, paths[2]))]
    for path in paths:
        path.write_bytes(path.read_bytes() + b"2")
        names.append(name_of(record))
    paths[1].unlink()
    names.append(name_of(record))
    assert len(set(names)) == len(names)


def test_missing_age_leaves_age_a_number():
    """It was taken for a word once, and each age for a class of its own: a control that is too easy to beat."""
    found = table_of(of(age=["20", "n/a", "40", "70"]), [None] * 4, train=[0, 1, 2])
    np.testing.assert_array_equal(found, [[20], [30], [40], [70]])


def test_what_is_missing_is_filled_by_the_training_scans_alone():
    found = table_of(of(sex=["M", "F", "", "M"]), [1000.0, 1200.0, None, 5000.0], train=[0, 1])
    np.testing.assert_array_equal(found, [[1, 1000], [0, 1200], [0.5, 1100], [1, 5000]])


def test_covariates_without_a_value_are_an_error():
    with pytest.raises(TaskError, match="its covariates age are empty"):
        table_of(of(age=["", "NA", "50"]), [None] * 3, train=[0, 1])


def test_features_are_kept_as_a_table_that_says_what_made_it_and_only_new_scans_are_embedded(
    small_sample, small_model, tmp_path
):
    first, second = ScanRecord(*small_sample), ScanRecord(*small_sample, extra={"dx": "AD"})
    found, failed = read_features([first], small_model, tmp_path, "small")
    assert failed == {}
    (path,) = tmp_path.glob("*.npz")
    kept = table.read(path)
    assert kept.origin.digest == origin_of(small_model).digest
    np.testing.assert_array_equal(kept.vectors, found)
    np.testing.assert_array_equal(
        read_features([first, second], small_model, tmp_path, "small").vectors, [*found, *found]
    )
    assert len(table.read(path)) == 1


def test_features_that_another_model_made_are_not_probed(small_sample, small_model, tmp_path):
    records = [ScanRecord(*small_sample)]
    read_features(records, small_model, tmp_path, "small")
    (path,) = tmp_path.glob("*.npz")
    other = brainfm.create_model("test_vit_3d", pretrained=True)
    read_features(records, other, tmp_path / "other", "small")
    next((tmp_path / "other").glob("*.npz")).replace(path)
    with pytest.raises(
        BrainfmError, match=r"test_vit_3d\.phantoms and test_resnet_3d\.phantoms, and differ in weights"
    ):
        read_features(records, small_model, tmp_path, "small")
