"""Tasks: the published ones, a user's own, and what is refused."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from brainfm import BrainfmError
from brainfm.downstream.finetuning import RECIPES
from brainfm.downstream.task import TASKS, Task, kind_of, load_task, make_task, read_task
from brainfm.errors import TaskError


@pytest.fixture
def manifest(tmp_path):
    """A function (columns) → a manifest of scans that are never read."""

    def make(**columns):
        rows = len(next(iter(columns.values())))
        path = tmp_path / "mine.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path", "patient_id", *columns])
            for n, values in enumerate(zip(*columns.values(), strict=True)):
                writer.writerow([f"{n}.nii.gz", f"p{n % rows}", *values])
        return path

    return make


@pytest.mark.parametrize("name", sorted(path.stem for path in TASKS.glob("*.yaml")))
def test_tasks_that_ship_can_be_read(name):
    task = load_task(name)
    assert task.name == name
    for row, (mean, sd) in task.published.items():
        assert row.partition("/")[2] in ("probe_paper", "finetune", "scratch")  # a row's own method, not another
        assert 0 < sd < mean


NOT_OF_THE_PAPER = ("optimiser", "lr", "batch_size", "schedule", "weight_decay", "target", "head_std", "selection")
NOT_A_SETTING = ("title", "label", "unit", "cohorts", "published_source", "published")


@pytest.mark.parametrize("path", [*sorted(TASKS.glob("*.yaml")), *sorted(RECIPES.glob("*.yaml"))], ids=lambda p: p.stem)
def test_every_setting_has_a_source_and_the_papers_say_where(path):
    """The paper names data, splits, epochs and augmentation; rate, batch, optimiser and selection are the code's."""
    lines = [line for line in path.read_text().splitlines() if re.match(r"[a-z_]+:", line)]
    settings = [line for line in lines if line.partition(":")[0] not in NOT_A_SETTING]
    assert len(settings) >= 3
    for line in settings:
        source = re.search(r"# (paper \([^)]+\)|code|mae|peft|adapters|ours)(:|;|$)", line)
        assert source, line
        if line.partition(":")[0] in NOT_OF_THE_PAPER:
            assert "paper" not in line, line


def test_papers_regressions_learn_raw_labels_and_ones_own_standardised():
    shipped = {name: load_task(name) for name in ("age_ixi", "stroke_soop", "phantom_age")}
    assert [task.target for task in shipped.values()] == ["raw", "raw", "standardised"]
    assert [task.selection for task in shipped.values()] == ["loss"] * 3
    assert make_task("age", "regression").target == "standardised"


def test_published_numbers_are_those_of_the_papers_table():
    row = "simclr_resnet18_3d/finetune"
    found = {name: load_task(name).published[row] for name in ("stroke_soop", "alzheimer_aibl", "sex_ixi", "age_ixi")}
    assert list(found.values()) == [(5.37, 0.24), (0.929, 0.028), (0.991, 0.004), (4.35, 0.22)]


def test_words_are_classes_in_their_order_and_rows_without_a_label_are_left_out(manifest):
    words = ["HC", "AD"] * 10 + ["", "n/a"]
    data = read_task(make_task("dx", "binary"), manifest(dx=words))
    assert (data.classes, len(data.left_out), len(data.records)) == (("AD", "HC"), 2, 20)
    assert data.labels.tolist() == [1, 0] * 10
    data = read_task(Task(name="dx", label="dx", kind="binary", classes=("HC", "AD")), manifest(dx=words))
    assert data.labels.tolist() == [0, 1] * 10


def test_task_may_name_the_positive_class(manifest):
    words = manifest(dx=["AD", "HC"] * 10)
    data = read_task(make_task("dx", "binary", positive="AD"), words)
    assert (data.classes, data.labels.tolist()) == (("HC", "AD"), [1, 0] * 10)
    with pytest.raises(TaskError, match="positive is 'MCI', and dx has 'AD', 'HC'"):
        read_task(make_task("dx", "binary", positive="MCI"), words)
    with pytest.raises(TaskError, match="positive is of a binary task"):
        make_task("dx", "multiclass", positive="AD")


@pytest.mark.parametrize(
    ("values", "kind"),
    [(["M", "F", "n/a"], "binary"), (["a", "b", "c"], "multiclass"), ([str(n / 3) for n in range(30)], "regression")],
)
def test_kind_of_a_label_is_known_where_there_is_no_doubt(values, kind):
    assert kind_of(values, "y") == kind
    with pytest.raises(TaskError, match=r"y has 5 different values .* Say --kind"):
        kind_of(["0", "1", "2", "3", "4"], "y")


def test_numbers_sort_as_numbers(manifest):
    data = read_task(make_task("stage", "multiclass"), manifest(stage=["2", "10", "1"] * 6))
    assert data.classes == ("1", "2", "10")


def test_given_split_is_taken_and_else_each_seed_draws_its_own(manifest):
    labels = [str(n % 2) for n in range(30)]
    drawn = read_task(make_task("y", "binary"), manifest(y=labels))
    assert drawn.split(0) == drawn.split(0) != drawn.split(1)
    given = ["train"] * 20 + ["val"] * 5 + ["test"] * 5
    fixed = read_task(make_task("y", "binary"), manifest(y=labels, split=given))
    assert fixed.split(0) == fixed.split(1) == given


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("binary", {"note": ["a"] * 9}, r"no column 'y'; it has note"),
        ("binary", {"y": [""] * 9}, "no row has a y"),
        ("binary", {"y": ["1"] * 9}, "every y is '1'; there is nothing to tell apart"),
        ("binary", {"y": ["0", "1", "2"] * 3}, r"3 different values \('0', '1', '2'\), and a binary task has two"),
        ("multiclass", {"y": [f"seen on {n}" for n in range(30)]}, "30 different values .*free text"),
        ("regression", {"y": ["old", "41", "42"] * 3}, "must be numbers for a regression, and 3 rows are not.*'old'"),
        ("regression", {"y": ["1", "2", "3"]}, "3 patients"),
        ("binary", {"y": ["0", "1", "1"]}, "class"),
        (
            "binary",
            {"y": ["0", "1"] * 9, "split": ["train", "dev"] * 9},
            "split has 'dev', and must say train, val, test",
        ),
        ("binary", {"y": ["0", "1"] * 9, "split": ["train"] * 18}, "val"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused_with_what_is_needed(kind, columns, message, manifest):
    with pytest.raises(TaskError, match=message):
        read_task(make_task("y", kind), manifest(**columns))


def test_patient_in_two_splits_is_refused(tmp_path):
    lines = ["image_path,patient_id,y,split", *(f"{n}.nii,p{n % 20},{n % 2},{p}" for n, p in enumerate(_parts()))]
    path = tmp_path / "leak.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(BrainfmError, match="2 patients are in more than one split: p0, p1"):
        read_task(make_task("y", "binary"), path)


def _parts():
    return ["train"] * 12 + ["val"] * 4 + ["test"] * 4 + ["test"] * 2  # the last two are patients of the first two rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("label: age\nkind: number", "kind is 'number'"),
        ("label: age\nkind: binary\nmetric: mae", "metric is 'mae', and must be one of auc"),
        ("lable: age\nkind: binary", r"Task has no field lable; did you mean label\?"),
        ("label: age\nkind: regression\ncovariates: [age]", "the label 'age' itself"),
        ("label: age\nkind: binary\nage_bias: cole", "age_bias is of a regression"),
        ("kind: binary", "label"),
        ("label: age\nkind: regression\nname: my task", "name is 'my task', and must be letters"),
        ("label: age\nkind: binary\nfractions: [0.5, 0.2, 0.2]", "fractions are .*1 together"),
        ("- a", "a list of 'key: value' lines"),
    ],
)
def test_task_files_that_cannot_be_are_refused(fields, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(fields)
    with pytest.raises(TaskError, match=message):
        load_task(path)


def test_unknown_task_names_the_nearest():
    with pytest.raises(TaskError, match="did you mean 'age_ixi'"):
        load_task("age_ix")


def test_labels_are_numbers_of_the_manifest(phantoms):
    data = read_task(load_task("phantom_age"), phantoms)
    assert len(data.records) == 20
    assert np.array_equal(data.labels, [float(record.extra["age"]) for record in data.records])
    assert data.has_covariates
