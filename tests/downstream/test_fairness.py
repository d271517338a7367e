"""Metrics by group: a planted disparity is found, none is made up, and small groups are put together and said."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest

from brainfm.downstream import outcome, probe, runs
from brainfm.downstream.statistics import bootstrap_interval, metric_by_group, metrics
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings

PEOPLE = 400


@pytest.fixture(autouse=True)
def quick(monkeypatch, no_figures):
    monkeypatch.setattr(probe, "RIDGE_ALPHA", (1.0, 100.0))
    monkeypatch.setattr(runs, "RESAMPLES", 20)
    monkeypatch.setattr(outcome, "RESAMPLES", 200)


@pytest.fixture
def folder(tmp_path):
    """Ages that embeddings say, but for scanner C's, of which they say half; sex is of no matter; D is rare."""
    draws = np.random.default_rng(0)
    age, scanner = draws.uniform(20, 80, PEOPLE), draws.choice(list("AABBCCD"), PEOPLE)
    scanner[:] = np.where(scanner == "D", np.where(draws.random(PEOPLE) < 0.2, "D", "A"), scanner)
    vectors = draws.standard_normal((PEOPLE, 4))
    vectors[:, 0] = (age - 50) / 10 + np.where(scanner == "C", 2.0, 0.3) * draws.standard_normal(PEOPLE)
    names = [f"p{n}" for n in range(PEOPLE)]
    Embeddings(vectors.astype(np.float32), [ScanRecord(f"{n}.nii", None, n) for n in names]).save(tmp_path / "v.npz")
    people = {"patient_id": names, "age": age, "scanner": scanner, "sex": draws.choice(["F", "M"], PEOPLE)}
    pd.DataFrame(people).assign(field=draws.choice([1.5, 3], PEOPLE)).to_csv(tmp_path / "people.csv", index=False)
    return tmp_path


def probed(run, folder, *more):
    tables = ("--embeddings", folder / "v.npz", "--label", "age", "--no-controls", "-o", folder / "out")
    return run("probe", folder / "people.csv", *tables, "--seeds", 2, *more)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_planted_disparity_is_found_with_the_patients_it_rests_on_and_no_other(run, folder):
    result = probed(run, folder, "--fairness", "scanner", "sex", "age", "field", "--least-group", 10)
    assert result.code == 0, result.said
    worst = {(row["column"], row["metric"]): row for row in rows_of(folder / "out" / "disparities.csv")}
    found = worst["scanner", "mae"]
    assert found["highest"] == "C"
    assert float(found["p_value"]) < 0.01
    assert float(found["ci_low"]) > 0
    tested = {row["patient_id"] for row in rows_of(folder / "out" / "predictions.csv")}
    people = pd.read_csv(folder / "people.csv").set_index("patient_id").loc[sorted(tested)]
    assert int(found["patients_highest"]) == (people["scanner"] == "C").sum()
    assert float(worst["sex", "mae"]["p_value"]) > 0.05
    assert float(worst["field", "mae"]["p_value"]) > 0.05
    rows = rows_of(folder / "out" / "fairness.csv")
    assert {row["metric"] for row in rows} == {"mae", "rmse", "r2", "pearson", "coverage"}
    assert [row["group"] for row in rows if (row["column"], row["metric"]) == ("field", "mae")] == ["1.5", "3"]
    bands = [row["group"].split(" to ") for row in rows if (row["column"], row["metric"]) == ("age", "mae")]
    assert len(bands) == 4
    assert [float(low) for low, _ in bands] == sorted(float(low) for low, _ in bands)
    page = (folder / "out" / "index.html").read_text()
    for text in (
        "<h2>Fairness</h2>",
        "by scanner (test patients)",
        "The largest disparity",
        f"C ({found['patients_highest']})",
    ):
        assert text in page


def test_value_of_a_group_is_the_metric_of_its_rows(run, folder):
    assert probed(run, folder, "--fairness", "sex").code == 0
    people = pd.read_csv(folder / "people.csv").set_index("patient_id")
    guesses = pd.read_csv(folder / "out" / "predictions.csv")
    women = guesses[people.loc[guesses["patient_id"], "sex"].to_numpy() == "F"]
    by_seed = [metrics(own["label"], own["prediction"], "regression")["mae"] for _, own in women.groupby("seed")]
    [row] = [r for r in rows_of(folder / "out" / "fairness.csv") if (r["group"], r["metric"]) == ("F", "mae")]
    assert float(row["value"]) == pytest.approx(np.mean(by_seed), rel=1e-6)
    assert (int(row["patients"]), int(row["scans"])) == (women["patient_id"].nunique(), women["patient_id"].nunique())


def test_small_groups_are_put_together_or_left_out_and_that_is_said(run, folder):
    people = pd.read_csv(folder / "people.csv", dtype=str)
    people["site"] = [("one", "two", "one", "two", "three", "four")[n % 6] for n in range(PEOPLE)]
    people["rare"] = ["tiny" if n < 10 else ("one", "two")[n % 2] for n in range(PEOPLE)]
    people.loc[20:21, "site"] = ["", "n/a"]
    people.to_csv(folder / "people.csv", index=False)
    result = probed(run, folder, "--fairness", "site", "rare", "--least-group", 19)
    assert result.code == 0, result.said
    rows = [row for row in rows_of(folder / "out" / "fairness.csv") if row["metric"] == "mae"]
    sites = {row["group"]: row for row in rows if row["column"] == "site"}
    assert list(sites) == ["one", "two", "others", "four", "three", "(no value)"]
    assert "patients, fewer than 19: in others" in sites["three"]["note"]
    assert (sites["three"]["value"], sites["(no value)"]["note"]) == ("", "2 scans, left out")
    assert int(sites["others"]["patients"]) >= 19
    [tiny] = [row for row in rows if row["group"] == "tiny"]
    assert "fewer than 19: left out, as all small groups together have" in tiny["note"]
    assert "tiny: " in (folder / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--fairness", "hair"), "--fairness hair: there is no such column; it has"),
        (("--fairness", "sex", "--least-group", 300), "has 0 groups of 300 test patients or more"),
        (("--fairness", "patient"), "different words, such as"),
    ],
)
def test_columns_that_make_no_groups_are_refused_before_any_run(more, message, run, folder):
    people = pd.read_csv(folder / "people.csv")
    people.assign(patient=people["patient_id"]).to_csv(folder / "people.csv", index=False)
    result = probed(run, folder, *more)
    assert result.code == 1
    assert message in result.said
    assert not list(folder.glob("out/runs/*"))


def test_interval_of_a_group_is_that_of_its_patients_alone():
    """Where strata do not matter: the bootstrap of the group's own rows, to within its resamples' chance."""
    draws = np.random.default_rng(1)
    labels, group = draws.normal(50, 10, 300), draws.integers(0, 2, 300)
    guesses, patients = labels + draws.normal(0, 3 + 3 * group), np.arange(300)
    values, gap = metric_by_group([(labels, guesses, group, patients)], "regression", "mae", n=2000)
    for number, found in enumerate(values):
        own = group == number
        expected = bootstrap_interval(labels[own], guesses[own], "regression", "mae")
        assert (found.ci_low, found.ci_high) == pytest.approx(expected, rel=0.05)
    assert (gap.lowest, gap.highest) == (0, 1)


def test_disparity_of_groups_that_mean_nothing_is_significant_as_often_as_said():
    """A permutation test of the extremes of four groups: 5 % of 60 draws of nothing are 3; ten would be 1 in 1,500."""
    draws = np.random.default_rng(2)
    p_values = []
    for _ in range(60):
        labels = draws.integers(0, 2, 80)
        chances = np.clip(draws.normal(0.35 + 0.3 * labels, 0.2), 0, 1)
        run = (labels, chances, draws.integers(0, 4, 80), np.arange(80))
        p_values.append(metric_by_group([run], "binary", "auc", n=99)[1].p_value)
    assert np.mean(np.array(p_values) <= 0.05) < 10 / 60
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.13)
