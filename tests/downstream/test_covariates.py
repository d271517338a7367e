"""Covariates from a manifest: numbers, or categories; what may be either is refused by its values and rows."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.downstream.features import table_of
from brainfm.downstream.knowledge import leakage_probe, plot_map
from brainfm.downstream.task import Task, make_task, read_task
from brainfm.errors import TaskError

AGES = [str(50 + n) for n in range(40)]


@pytest.fixture
def read(tmp_path):
    """A function (values of a covariate, task's fields) → its columns of numbers, by a manifest on the disk."""

    def call(values, **fields):
        lines = ["image_path,patient_id,y,x", *(f'{n}.nii,p{n},{n % 2},"{x}"' for n, x in enumerate(values))]
        (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
        task = Task(name="y", label="y", kind="binary", covariates=("x",), **fields)
        data = read_task(task, tmp_path / "mine.csv")
        return table_of(data, [None] * len(values), train=range(len(values)))

    return call


def test_numbers_stay_one_column_however_they_are_written(read):
    ages = np.arange(50.0, 90.0)[:, None]
    np.testing.assert_array_equal(read(AGES), ages)
    np.testing.assert_array_equal(read([f"{age},5" for age in AGES]), ages + 0.5)
    np.testing.assert_array_equal(read([f" {age}.50" for age in AGES]), ages + 0.5)


def test_missing_numbers_are_the_mean_of_train(read):
    np.testing.assert_array_equal(read([*AGES[:39], "n/a"])[-1], [np.arange(50, 89).mean()])


def test_words_are_categories(read):
    found = read(["Siemens", "GE", "Philips", ""] * 10)
    assert found.shape == (40, 2)
    np.testing.assert_array_equal(found[:3], [[0, 1], [0, 0], [1, 0]])


def test_codes_are_categories_where_the_task_says_so(read):
    assert read(["1", "2", "3", "9"] * 10).shape == (40, 1)
    assert read(["1", "2", "3", "unknown"] * 10, categorical=("x",)).shape == (40, 3)
    with pytest.raises(ValueError, match="categorical names 'z', which is none of the covariates"):
        Task(name="y", label="y", kind="binary", covariates=("x",), categorical=("z",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [*AGES[:38], "89+", ">90"],
            r"x is a number in 38 rows and none in 2: '89\+' \(row 40\), '>90' \(row 41\); write",
        ),
        (["68.2", *AGES[:38], "71,5"], r"a number in 39 rows and none in 1: '71,5' \(row 41\)"),
        ([*AGES[:38], "1,234", "2,345"], r"none in 2: '1,234' \(row 40\)"),
        ([*AGES[:39], "inf"], r"none in 1: 'inf' \(row 41\)"),
        ([f"{n % 28 + 1:02}.03.1950" for n in range(40)], r"x has dates: '01\.03\.1950' \(row 2\).*age at that date"),
        ([f"1950-03-{n % 2 + 1:02}" for n in range(40)], "x has dates: '1950-03-01'"),
        ([f"seen on {n}" for n in range(40)], r"x has 40 different words in 40 rows.*at most 20"),
        ([f"{age} y" for age in AGES], "x has 40 different words"),
    ],
)
def test_covariate_that_may_be_either_is_refused_by_its_values_and_rows(values, message, read):
    with pytest.raises(TaskError, match=message) as caught:
        read(values)
    assert "mine.csv: the covariate x" in str(caught.value)


def test_probe_says_it_before_it_starts(tmp_path):
    ages = [*AGES[:39], "89+"]
    lines = ["image_path,patient_id,sex,age", *(f"{n}.nii,p{n},{'MF'[n % 2]},{age}" for n, age in enumerate(ages))]
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
    arguments = ["probe", tmp_path / "mine.csv", "--label", "sex", "--kind", "binary", "--covariates", "age"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--models", "test_resnet_3d", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "age is a number in 39 rows and none in 1: '89+' (row 41)" in f"{result.output}{result.exception}"
    assert not (tmp_path / "out").exists()


def test_labels_with_decimal_commas_are_numbers(tmp_path):
    lines = ["image_path;patient_id;age", *(f"{n}.nii;p{n};{age},5" for n, age in enumerate(AGES))]
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
    np.testing.assert_array_equal(
        read_task(make_task("age", "regression"), tmp_path / "mine.csv").labels, np.arange(50.5, 90)
    )


def test_task_whose_patients_nobody_says_is_refused(tmp_path):
    (tmp_path / "mine.csv").write_text("\n".join(["image_path,sex", *(f"{n}.nii,{n % 2}" for n in range(30))]))
    with pytest.raises(TaskError, match=r"mine\.csv: nobody says whose 30 of 30 scans are.*give a column patient_id"):
        read_task(make_task("sex", "binary"), tmp_path / "mine.csv")
    (tmp_path / "mine.csv").write_text("\n".join(["image_path,sex", *(f"sub-{n}_T1w.nii,{n % 2}" for n in range(30))]))
    assert len(set(read_task(make_task("sex", "binary"), tmp_path / "mine.csv").patients)) == 30


def test_what_a_map_is_coloured_by_and_what_leaks_take_no_mixture_for_categories(tmp_path):
    points = np.random.default_rng(0).normal(size=(40, 2))
    plot_map(points, [*AGES[:39], "n/a"], tmp_path / "age.svg", title="age")
    assert "n/a" not in (tmp_path / "age.svg").read_text()  # grey, and no category of a legend
    with pytest.raises(ValueError, match=r"the column has numbers, and '89\+'"):
        plot_map(points, [*AGES[:39], "89+"], tmp_path / "age.svg")
    with pytest.raises(ValueError, match=r"column is unknown .* for 20 of 40"):
        leakage_probe(points, ["a", "n/a"] * 20, AGES)
