import csv
from collections import Counter, defaultdict

import numpy as np
import pytest

from brainfm.downstream.split import SPLITS, check_split, load_split, make_fold, make_split, save_split, subsample
from brainfm.errors import BrainfmError
from brainfm.manifest import ScanRecord, read_manifest


def cohort(patients, scans=1, folder="scans"):
    """Records of patients p0, p1, …, with some scans each."""
    return [
        ScanRecord(f"{folder}/p{patient}_{scan}.nii.gz", None, f"p{patient}", str(scan))
        for patient in range(patients)
        for scan in range(scans)
    ]


def by_patient(records, splits):
    """The one split of each patient."""
    found = defaultdict(set)
    for record, split in zip(records, splits, strict=True):
        found[record.patient_id or str(record.image)].add(split)
    assert all(len(several) == 1 for several in found.values())
    return {patient: one.pop() for patient, one in found.items()}


def counts(splits):
    found = Counter(splits)
    return tuple(found[name] for name in SPLITS)


# --- make_split -----------------------------------------------------------------------------------


def test_the_proportions_are_exact_for_the_whole_and_for_each_class():
    labels = [0] * 70 + [1] * 30
    splits = make_split(cohort(100), labels, kind="binary")
    assert counts(splits) == (60, 20, 20)
    assert counts(splits[:70]) == (42, 14, 14)
    assert counts(splits[70:]) == (18, 6, 6)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_any_cohort_is_divided_to_within_one_patient(kind):
    draw = np.random.default_rng(0)
    for seed in range(60):
        patients = int(draw.integers(40, 200))
        if kind == "regression":
            labels = draw.poisson(6, patients).astype(float)  # many ties
        else:
            labels = draw.integers(0, 2 if kind == "binary" else 5, patients)
        fractions = draw.dirichlet((8, 5, 5))
        if fractions.min() < 0.1:
            continue
        splits = make_split(cohort(patients), labels, kind=kind, fractions=fractions, seed=seed)
        assert np.abs(counts(splits) - patients * fractions).max() < 1.01, (patients, fractions)
        if kind != "regression":
            for label in np.unique(labels):
                of_class = [split for split, value in zip(splits, labels, strict=True) if value == label]
                if len(of_class) >= 10:  # one patient or more of it: none is put in for being the only one
                    assert np.abs(counts(of_class) - len(of_class) * fractions).max() < 1


def test_a_rare_class_is_in_every_split():
    labels = ["common"] * 97 + ["rare"] * 3
    for seed in range(5):
        splits = make_split(cohort(100), labels, kind="binary", seed=seed)
        assert sorted(splits[97:]) == ["test", "train", "val"]
        assert counts(splits) == (60, 20, 20)


def test_a_regression_is_stratified_along_its_label():
    labels = np.random.default_rng(1).permutation(np.arange(100.0))
    splits = np.array(make_split(cohort(100), labels, kind="regression"))
    for tenth in range(10):
        assert counts(splits[(labels >= 10 * tenth) & (labels < 10 * tenth + 10)]) == (6, 2, 2)


def test_few_patients_have_fewer_bins():
    assert counts(make_split(cohort(5), [1.0, 2.0, 3.0, 4.0, 5.0], kind="regression")) == (3, 1, 1)
    assert counts(make_split(cohort(12), np.arange(12.0), kind="regression")) in [(7, 3, 2), (7, 2, 3), (8, 2, 2)]


def test_all_scans_of_a_patient_are_in_one_split():
    records = cohort(30, scans=4)
    labels = [int(record.patient_id[1:]) % 2 for record in records]
    split_of = by_patient(records, make_split(records, labels, kind="binary"))
    assert counts(split_of.values()) == (18, 6, 6)


def test_a_patient_counts_by_the_most_frequent_class_of_the_scans():
    records = cohort(10, scans=3)
    labels = [0 if int(r.patient_id[1:]) < 5 else 1 for r in records]
    changed = [1 - y if r.scan_id == "2" else y for r, y in zip(records, labels, strict=True)]
    assert make_split(records, labels, kind="binary") == make_split(records, changed, kind="binary")


def test_scans_whose_patient_nobody_says_are_not_split():
    records = [*cohort(20, scans=1), ScanRecord("a.nii.gz"), ScanRecord("b.nii.gz", None, "n/a")]
    labels, parts = [0, 1] * 11, ["train"] * 14 + ["val"] * 4 + ["test"] * 4
    for refused in (
        lambda: make_split(records, labels, kind="binary"),
        lambda: check_split(records, parts),
        lambda: subsample(records, labels, parts, 0.5, kind="binary"),
    ):
        with pytest.raises(BrainfmError, match=r"whose 2 of 22 scans are: a\.nii\.gz, b\.nii\.gz; .*patient_id"):
            refused()


def test_one_patient_written_in_two_ways_is_not_split():
    records = [ScanRecord(f"{n}.nii", None, name, "") for n, name in enumerate(["007", "8", "9", "7", "10", "11"])]
    with pytest.raises(BrainfmError, match="the patients '007', '7' may be one"):
        make_split(records, [0, 1] * 3, kind="binary")


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_the_order_of_rows_changes_nothing(kind):
    records = cohort(40, scans=3)
    draw = np.random.default_rng(3)
    ages = {patient: draw.normal(50, 10) for patient in range(40)}
    labels = [ages[int(r.patient_id[1:])] + draw.normal() for r in records]
    if kind == "binary":
        labels = [int(label > 50) for label in labels]
    splits = make_split(records, labels, kind=kind, seed=7)
    for _ in range(5):
        order = draw.permutation(len(records))
        again = make_split([records[n] for n in order], [labels[n] for n in order], kind=kind, seed=7)
        assert again == [splits[n] for n in order]


def test_the_order_of_rows_changes_nothing_where_means_are_equal_but_for_rounding():
    records, labels = cohort(40, scans=3), [0.1, 0.2, 0.3] * 20 + [1.1, 1.2, 1.3] * 20
    splits = make_split(records, labels, kind="regression")
    draw = np.random.default_rng(0)
    for _ in range(5):
        order = draw.permutation(len(records))
        again = make_split([records[n] for n in order], [labels[n] for n in order], kind="regression")
        assert again == [splits[n] for n in order]


def test_the_seed_decides_and_the_folder_does_not():
    labels = [0, 1] * 20
    first = make_split(cohort(40), labels, kind="binary", seed=1)
    assert make_split(cohort(40, folder="/elsewhere"), labels, kind="binary", seed=1) == first
    assert make_split(cohort(40), labels, kind="binary", seed=2) != first


@pytest.mark.parametrize(
    ("labels", "kind", "says"),
    [
        ([0, 1, 1], "binary", "class 0 has 1 patient.*needs 3"),
        ([0, 1, 1], "regression", "3 patients are too few.*at least 5"),
        ([1] * 9, "binary", "the label is 1 for each of 9 patients; two different"),
        ([4.0] * 9, "regression", "the label is 4.0 for each of 9 patients"),
        ([0, 0, 0, 0, 1, 1], "multiclass", "class 1 has 2 patient.*needs 3.*leave the class out"),
        ([0, 1, 2] * 3, "binary", "two values, and this has 3: 0, 1, 2"),
        ([0, 1, None, "", float("nan"), 1], "binary", "3 scans have no label: p2, p3, p4"),
        (["a", "b"] * 4, "regression", "must be a number"),
        ([float("inf"), 1, 2, 3, 4], "regression", "finite"),
        ([], "binary", "there are no scans"),
    ],
)
def test_what_cannot_be_divided_is_refused(labels, kind, says):
    with pytest.raises(BrainfmError, match=says):
        make_split(cohort(len(labels)), labels, kind=kind)


@pytest.mark.parametrize("fractions", [(0.6, 0.4), (0.6, 0.3, 0.2), (0.8, 0.2, 0.0)])
def test_fractions_must_be_three_numbers(fractions):
    with pytest.raises(ValueError, match="three numbers above 0 that sum to 1"):
        make_split(cohort(20), [0, 1] * 10, kind="binary", fractions=fractions)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kind must be"):
        make_split(cohort(20), [0, 1] * 10, kind="classes")
    with pytest.raises(ValueError, match="2 labels for 20 scans"):
        make_split(cohort(20), [0, 1], kind="binary")


# --- check_split ----------------------------------------------------------------------------------


def test_a_patient_in_two_splits_is_named():
    records = cohort(4, scans=2)
    splits = ["train", "test", "train", "val", "val", "val", "test", "test"]
    with pytest.raises(BrainfmError, match="2 patients are in more than one split: p0, p1; give all scans"):
        check_split(records, splits)


def test_an_empty_split_or_another_word_is_refused():
    check_split(cohort(3), ["train", "val", "test"])
    with pytest.raises(BrainfmError, match="no scan is in val and test"):
        check_split(cohort(3), ["train"] * 3)
    with pytest.raises(BrainfmError, match="one of train, val, test, not '', 'valid'"):
        check_split(cohort(4), ["train", "valid", "test", ""])
    with pytest.raises(ValueError, match="1 splits for 3 scans"):
        check_split(cohort(3), ["train"])


# --- save_split, load_split -----------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "study" / "manifest.csv"
    path.parent.mkdir()
    rows = [[f"scans/p{n}.nii.gz", f"p{n}"] for n in range(10)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image_path", "patient_id"], *rows])
    return path


def test_a_split_is_read_back_for_the_same_scans_in_any_order_and_place(manifest, tmp_path, monkeypatch):
    records = read_manifest(manifest)
    splits = make_split(records, [0, 1] * 5, kind="binary")
    save_split(manifest.parent / "split.csv", records, splits)
    with (manifest.parent / "split.csv").open(newline="") as file:
        assert next(csv.DictReader(file)) == {
            "image_path": "scans/p0.nii.gz",
            "patient_id": "p0",
            "split": splits[0],
        }
    assert load_split(manifest.parent / "split.csv", records[::-1]) == splits[::-1]

    moved = manifest.parent.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert load_split("split.csv", read_manifest(moved.relative_to(moved) / "manifest.csv")) == splits
    assert sorted(path.name for path in moved.iterdir()) == ["manifest.csv", "split.csv"]


def test_a_split_may_lie_in_another_folder(manifest, tmp_path):
    records = read_manifest(manifest)
    splits = make_split(records, [0, 1] * 5, kind="binary")
    save_split(tmp_path / "results" / "split.csv", records, splits)
    assert "../study/scans/p0.nii.gz" in (tmp_path / "results" / "split.csv").read_text()
    assert load_split(tmp_path / "results" / "split.csv", records) == splits


def test_split_of_scans_of_several_channels_is_kept_by_a_column_a_channel(tmp_path):
    paths = [{"FLAIR": f"p{n}_flair.nii.gz", "T1w": f"p{n}_t1w.nii.gz"} for n in range(10)]
    del paths[3]["FLAIR"]
    records = [
        ScanRecord({channel: tmp_path / path for channel, path in one.items()}, None, f"p{n}", str(n))
        for n, one in enumerate(paths)
    ]
    splits = make_split(records, [0, 1] * 5, kind="binary")
    save_split(tmp_path / "split.csv", records, splits)
    with (tmp_path / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "flair_path": "p0_flair.nii.gz",
        "t1w_path": "p0_t1w.nii.gz",
        "patient_id": "p0",
        "split": splits[0],
    }
    assert (rows[3]["flair_path"], rows[3]["t1w_path"]) == ("", "p3_t1w.nii.gz")
    assert load_split(tmp_path / "split.csv", records[::-1]) == splits[::-1]


def test_the_split_of_another_manifest_is_refused(manifest):
    records = read_manifest(manifest)
    path = manifest.parent / "split.csv"
    save_split(path, records, make_split(records, [0, 1] * 5, kind="binary"))
    with pytest.raises(BrainfmError, match=r"5 of its scans are not in the manifest \(.*p0.*p1.*p2.* and 2 more\)"):
        load_split(path, records[5:])
    others = [*records, ScanRecord(manifest.parent / "new.nii.gz", None, "new")]
    with pytest.raises(BrainfmError, match=r"1 scans of the manifest are not in it \(.*new.nii.gz\); .*new split"):
        load_split(path, others)


def test_a_split_that_a_later_manifest_finds_leaking_is_refused(manifest):
    records = read_manifest(manifest)
    splits = make_split(records, [0, 1] * 5, kind="binary")
    save_split(manifest.parent / "split.csv", records, splits)
    one, other = splits.index("train"), splits.index("test")
    records[other] = ScanRecord(records[other].image, None, records[one].patient_id)
    with pytest.raises(BrainfmError, match=f"more than one split: {records[one].patient_id}"):
        load_split(manifest.parent / "split.csv", records)


def test_what_is_no_split_file_is_refused(manifest, tmp_path):
    with pytest.raises(BrainfmError, match="no such split file"):
        load_split(tmp_path / "none.csv", read_manifest(manifest))
    with pytest.raises(BrainfmError, match="needs the columns image_path and split"):
        load_split(manifest, read_manifest(manifest))
    images = [ScanRecord((np.zeros((2, 2, 2)), np.eye(4)), None, name) for name in "abc"]
    with pytest.raises(BrainfmError, match="image in memory"):
        save_split(tmp_path / "split.csv", images, SPLITS)
    assert not (tmp_path / "split.csv").exists()


# --- subsample ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_smaller_fractions_are_nested_stratified_and_of_the_right_size(kind):
    records = cohort(200, scans=2)
    labels = [float(int(r.patient_id[1:]) % 5 == 0) if kind == "binary" else int(r.patient_id[1:]) for r in records]
    splits = make_split(records, labels, kind=kind)
    before: set[int] = set()
    for percent in (20, 40, 60, 80, 100):
        rows = subsample(records, labels, splits, percent / 100, kind=kind, seed=4)
        assert rows == sorted(set(rows))
        assert {splits[row] for row in rows} == {"train"}
        classes = (96, 24) if kind == "binary" else (120,)
        patients = sum(n * percent // 100 for n in classes)
        assert len(rows) == 2 * patients  # both scans of each of the patients
        assert len({records[row].patient_id for row in rows}) == patients
        assert before <= set(rows)
        before = set(rows)
        values = np.array([labels[row] for row in rows])
        if kind == "binary":
            assert (values == 1).sum() == 2 * (24 * percent // 100)
        else:
            tenths = np.histogram(values, bins=10, range=(0, 200))[0]
            assert tenths.max() - tenths.min() <= 2  # scans of one patient
    assert before == {row for row, split in enumerate(splits) if split == "train"}


def test_a_fifth_of_aibl_is_ten_patients_a_class_as_in_the_paper():
    labels = [0] * 53 + [1] * 53 + [0, 1]
    splits = ["train"] * 106 + ["val", "test"]
    for seed in range(3):
        rows = subsample(cohort(108), labels, splits, 0.2, kind="binary", seed=seed)
        assert [sum(labels[row] == label for row in rows) for label in (0, 1)] == [10, 10]
    assert len(subsample(cohort(108), labels, splits, 1, kind="binary")) == 106


def test_what_does_not_go_into_the_bins_evenly_is_drawn_from_all_of_them():
    labels = np.arange(200.0)
    splits = make_split(cohort(200), labels, kind="regression")
    fractions = [subsample(cohort(200), labels, splits, 0.2, kind="regression", seed=seed) for seed in range(40)]
    assert np.mean([labels[rows].mean() for rows in fractions]) == pytest.approx(99.5, abs=2)


def test_every_class_keeps_a_patient_in_the_smallest_fraction():
    labels = ["common"] * 95 + ["rare"] * 5
    splits = make_split(cohort(100), labels, kind="binary")
    for seed in range(5):
        for fraction, kept in ((0.05, 3), (0.01, 2)):
            rows = subsample(cohort(100), labels, splits, fraction, kind="binary", seed=seed)
            assert len(rows) == kept
            assert {labels[row] for row in rows} == {"common", "rare"}


def test_the_fraction_is_seeded_and_the_same_for_any_order_of_rows():
    records, labels = cohort(60, scans=2), [int(n % 4 < 2) for n in range(120)]
    splits = make_split(records, labels, kind="binary")
    rows = subsample(records, labels, splits, 0.4, kind="binary", seed=1)
    order = np.random.default_rng(0).permutation(120)
    shuffled = [[items[n] for n in order] for items in (records, labels, splits)]
    again = subsample(*shuffled, 0.4, kind="binary", seed=1)
    assert {order[row] for row in again} == set(rows)
    assert subsample(records, labels, splits, 0.4, kind="binary", seed=2) != rows


def test_labels_outside_the_training_data_are_not_looked_at():
    labels = [0, 1] * 20
    splits = make_split(cohort(40), labels, kind="binary")
    hidden = [label if split == "train" else None for label, split in zip(labels, splits, strict=True)]
    rows = subsample(cohort(40), labels, splits, 0.5, kind="binary")
    assert subsample(cohort(40), hidden, splits, 0.5, kind="binary") == rows


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_a_fraction_outside_the_range_is_refused(fraction):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        subsample(cohort(3), [0, 1, 0], ["train", "val", "test"], fraction, kind="binary")


def test_a_fraction_of_one_class_is_refused():
    with pytest.raises(BrainfmError, match="the label is 0 for each of 2 patients"):
        subsample(cohort(4), [0, 0, 1, 1], ["train", "train", "val", "test"], 0.5, kind="binary")


# --- Folds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_each_patient_is_tested_once_and_validated_once_over_the_folds(kind):
    records = [ScanRecord(f"{n}.nii", None, f"p{n // 2:03}") for n in range(94)]
    draws = np.random.default_rng(0)
    labels = np.repeat(draws.integers(0, 2, 47) if kind == "binary" else draws.normal(size=47), 2)
    splits = np.array([make_fold(records, labels, kind=kind, folds=5, fold=n) for n in range(5)])
    for part in ("test", "val"):
        assert ((splits == part).sum(axis=0) == 1).all()
        assert np.ptp((splits == part).sum(axis=1)) <= 2  # scans: to within one patient
    for one in splits:
        check_split(records, one.tolist())
        if kind == "binary":
            assert abs(labels[one == "test"].mean() - labels.mean()) < 0.1
    assert splits[0].tolist() == make_fold(records, labels, kind=kind, folds=5, fold=0)
    assert splits[0].tolist() != make_fold(records, labels, kind=kind, folds=5, fold=0, seed=1)


def test_folds_that_cannot_be_are_refused():
    records = [ScanRecord(f"{n}.nii", None, f"p{n}") for n in range(12)]
    with pytest.raises(BrainfmError, match="class 1 has 4 patient"):
        make_fold(records, [0] * 8 + [1] * 4, kind="binary", folds=5, fold=0)
    with pytest.raises(ValueError, match="3 or more"):
        make_fold(records, [0, 1] * 6, kind="binary", folds=2, fold=0)
