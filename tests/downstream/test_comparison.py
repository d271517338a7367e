"""Two ways of preparing the same scans: how alike their embeddings are, and how far a probe's predictions move."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.linear_model import Ridge

import brainfm
from brainfm.cli import main
from brainfm.downstream import comparison
from brainfm.downstream.comparison import compare
from brainfm.errors import BrainfmError, TaskError
from brainfm.manifest import ScanRecord
from brainfm.phantom import make_cohort
from brainfm.table import Embeddings, Origin

ORIGIN = Origin(model="toy", weights="w", contract=None, readout={}, dtype="float32")


def table(vectors, patients=None, origin=ORIGIN):
    """Embeddings of one scan a patient, or of those given as "patient/scan"."""
    names = patients or [f"p{n}/1" for n in range(len(vectors))]
    records = [ScanRecord(f"{name}.nii", None, *name.split("/")) for name in names]
    return Embeddings(np.asarray(vectors, dtype=np.float32), records, origin=origin)


@pytest.fixture
def two():
    """60 scans of 40 patients in two ways, the second noisier, with a patient's age in the first number."""
    draw = np.random.default_rng(0)
    names = [f"p{n % 40}/{n // 40}" for n in range(60)]
    vectors = draw.normal(size=(60, 8))
    return table(vectors, names), table(vectors + 0.3 * draw.normal(size=(60, 8)), names)


def test_likeness_and_ranks_are_those_of_a_loop_over_scans(two, monkeypatch):
    monkeypatch.setattr(comparison, "_ROWS_AT_ONCE", 7)
    found = compare(*two)
    first, second = (each.vectors.astype(np.float64) for each in two)
    patients = [record.patient_id for record in two[0].records]

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    for n in range(60):
        own = cosine(first[n], second[n])
        others = [cosine(first[n], second[m]) for m in range(60) if patients[m] != patients[n]]
        assert found.cosines[n] == pytest.approx(own, abs=1e-12)
        assert found.others[n] == pytest.approx(np.mean(others), abs=1e-12)
        assert found.ranks[n] == 1 + sum(other > own for other in others)
    assert (found.ranks > 1).any()


def test_the_same_table_twice_has_every_scan_nearest_to_itself(two):
    found = compare(two[0], two[0])
    assert np.allclose(found.cosines, 1, atol=1e-12)
    assert (found.ranks == 1).all()


def test_scans_are_matched_by_who_and_which_and_the_rest_is_named(two):
    order = np.random.default_rng(1).permutation(60)[:50]
    names = [f"{two[1].records[n].patient_id}/{two[1].records[n].scan_id}" for n in order]
    shuffled = table(two[1].vectors[order], names)
    whole, part = compare(*two), compare(two[0], shuffled)
    kept = [n for n in range(60) if n in order]
    assert np.allclose(part.cosines, whole.cosines[kept])
    assert len(part.left_out) == 10
    assert any("10 are in one alone" in line for line in part.lines())


def test_a_probe_of_the_first_way_predicts_held_out_patients_in_both(two, tmp_path):
    """Against ridge regression by hand where there is nothing to choose: a label that is one of the numbers."""
    first, second = two
    ages = {record.patient_id: 50 + 10 * first.vectors[n, 0] for n, record in enumerate(first.records) if n < 40}
    (tmp_path / "people.tsv").write_text(
        "participant_id\tage\n" + "".join(f"{name}\t{age}\n" for name, age in ages.items())
    )
    single = [table(each.vectors[:40], [f"p{n}/0" for n in range(40)]) for each in (first, second)]
    shift = compare(*single, tmp_path / "people.tsv", label="age").shift
    wanted = np.array([ages[f"p{n}"] for n in range(40)])
    assert np.abs(shift.first - wanted).max() < 0.5
    plain = Ridge(1e-6).fit(single[0].vectors, wanted)
    moved = plain.predict(single[1].vectors) - plain.predict(single[0].vectors)
    assert np.corrcoef(shift.differences, moved)[0, 1] > 0.99
    assert shift.scores["mae"][0] < shift.scores["mae"][1]


def test_classes_that_change_are_counted(two, tmp_path):
    side = {record.patient_id: "left" if n % 2 else "right" for n, record in enumerate(two[0].records[:40])}
    (tmp_path / "people.csv").write_text("patient_id,side\n" + "".join(f"{k},{v}\n" for k, v in side.items()))
    found = compare(*two, tmp_path / "people.csv", label="side", kind="multiclass")
    assert found.shift.first.shape == (60, 2)
    assert any("change class" in line for line in found.lines())


def test_tables_of_two_models_without_common_scans_or_names_are_refused(two):
    other = Origin(model="toy", weights="other", contract=None, readout={}, dtype="float32")
    with pytest.raises(BrainfmError, match="weights"):
        compare(two[0], table(two[1].vectors, None, other))
    with pytest.raises(TaskError, match="no scan in common: the first has p0 0"):
        compare(two[0], table(np.eye(3, 8), ["q0/0", "q1/0", "q2/0"]))
    with pytest.raises(TaskError, match="without a patient_id"):
        compare(two[0], table(np.eye(3, 8), ["/0", "/1", "/2"]))
    with pytest.raises(TaskError, match="p1 1 twice"):
        compare(two[0], table(np.eye(3, 8), ["p1/1", "p1/1", "p2/0"]))
    with pytest.raises(TaskError, match="one patient"):
        compare(table(np.eye(2, 8), ["p1/0", "p1/1"]), table(np.eye(2, 8), ["p1/0", "p1/1"]))


@pytest.mark.slow
def test_command_compares_phantoms_with_and_without_a_bias_field(tmp_path):
    """From files to lines."""
    import nibabel as nib

    manifest = make_cohort(12, tmp_path / "a", spacing=4.0)
    make_cohort(12, tmp_path / "b", spacing=4.0)
    for path in (tmp_path / "b").rglob("normalized.nii.gz"):
        image = nib.load(path)
        voxels = image.get_fdata()
        low = voxels.min()
        field = np.linspace(0.85, 1.15, voxels.shape[1])[None, :, None]
        nib.Nifti1Image(((voxels - low) * field + low).astype(np.float32), image.affine).to_filename(path)
    for name in ("a", "b"):
        brainfm.embed(tmp_path / name / "manifest.csv", "test_resnet_3d", output=tmp_path / f"{name}.parquet")
    tables = [str(tmp_path / f"{name}.parquet") for name in ("a", "b")]
    labels = ["--labels", str(manifest), "--label", "age", "--kind", "regression"]
    done = CliRunner().invoke(main, ["compare", *tables, *labels, "-o", str(tmp_path / "rows.csv")])
    assert done.exit_code == 0, done.output
    assert "12 scans of 12 patients are in both tables" in done.output
    assert "age: mae" in done.output
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert all(-1 <= float(row["cosine"]) < 0.99999 for row in rows)
    assert all(float(row["prediction_first"]) != float(row["prediction_second"]) for row in rows)
    wrong = CliRunner().invoke(main, ["compare", *tables, "--label", "age"])
    assert (wrong.exit_code, "of which table" in wrong.output) == (1, True)
