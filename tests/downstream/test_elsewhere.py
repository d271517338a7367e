"""Train here, test there: who learns, who is tested, what is refused, and a table with a column for each."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.downstream.elsewhere import read_tasks
from brainfm.downstream.probe import fit_neighbours, predict_probe
from brainfm.downstream.task import Task, read_task
from brainfm.errors import TaskError


def table(patients, sites=("a", "b"), first=0):
    numbers = range(first, first + patients)
    return pd.DataFrame(
        {
            "image_path": [f"{n}.nii.gz" for n in numbers],
            "patient_id": [f"p{n}" for n in numbers],
            "dx": [("no", "yes")[n // 2 % 2] for n in numbers],
            "site": [sites[n % len(sites)] for n in numbers],
        }
    )


def written(frame, path):
    frame.to_csv(path, index=False)
    return path


def task(**fields):
    return Task(name="dx", label="dx", kind="binary", **fields)


def test_held_out_site_is_the_test_part_and_the_others_learn_as_they_do_without_it(tmp_path):
    own, *held_out = read_tasks(task(leave_out="site"), written(table(60), tmp_path / "m.csv"))
    assert [one.task.name for one in (own, *held_out)] == ["dx", "dx-site-a", "dx-site-b"]
    assert not own.elsewhere
    for one, site in zip(held_out, "ab", strict=True):
        for seed in range(3):
            parts = list(zip([record.extra["site"] for record in one.records], one.split(seed), strict=True))
            assert {part for where, part in parts if where == site} == {"test"}
            others = [part for where, part in parts if where != site]
            assert {name: others.count(name) for name in set(others)} == {"train": 18, "val": 6, "unused": 6}


def test_other_cohort_is_tested_by_what_learned_from_the_same_scans(tmp_path):
    manifest, other = written(table(40), tmp_path / "m.csv"), written(table(10, first=100), tmp_path / "other.csv")
    own, there = read_tasks(task(test_manifest=str(other)), manifest)
    assert there.task.title == "dx, tested on other"
    for seed in range(3):
        inside, outside = own.split(seed), there.split(seed)
        assert outside[40:] == ["test"] * 10
        assert outside[:40] == [{"test": "unused"}.get(part, part) for part in inside]
    assert there.labels[40:].tolist() == [int(n // 2 % 2) for n in range(100, 110)]


@pytest.mark.parametrize(
    ("fields", "change", "said"),
    [
        ({"test_manifest": "other.csv"}, {"patient_id": "p3"}, "1 of its patients are in the manifest.*: p3;"),
        ({"test_manifest": "other.csv"}, {"dx": "maybe"}, "dx has 'maybe', and the task's classes are no, yes"),
        ({"leave_out": "scanner"}, {}, "leave_out is 'scanner', and the manifest has"),
        ({"leave_out": "dx"}, {}, "dx no held out: the label is 1"),
    ],
)
def test_what_cannot_be_tested_elsewhere_is_refused_by_name(tmp_path, fields, change, said):
    other = table(8, first=100)
    for column, value in change.items():
        other.loc[0, column] = value
    fields = {name: str(tmp_path / value) if value.endswith(".csv") else value for name, value in fields.items()}
    written(other, tmp_path / "other.csv")
    with pytest.raises(TaskError, match=said):
        read_tasks(task(**fields), written(table(40), tmp_path / "m.csv"))


def test_patient_at_two_sites_or_a_site_that_nobody_says_is_refused(tmp_path):
    frame = table(40)
    frame.loc[len(frame)] = ["again.nii.gz", "p4", frame["dx"][4], "b"]
    with pytest.raises(TaskError, match="1 patients are at more than one site: p4"):
        read_tasks(task(leave_out="site"), written(frame, tmp_path / "m.csv"))
    frame = table(40)
    frame.loc[7, "site"] = "n/a"
    with pytest.raises(TaskError, match="nobody says the site of p7"):
        read_tasks(task(leave_out="site"), written(frame, tmp_path / "m.csv"))


def test_two_ways_at_once_and_a_reader_of_one_test_part_refuse(tmp_path):
    with pytest.raises(ValueError, match="test_manifest and leave_out are two ways"):
        task(leave_out="site", test_manifest="x.csv")
    with pytest.raises(TaskError, match="is tested elsewhere too"):
        read_task(task(leave_out="site"), written(table(40), tmp_path / "m.csv"))


def test_neighbours_and_class_means_are_what_they_are_by_hand():
    draws = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 12)
    features = draws.normal(size=(36, 5)) + 2 * labels[:, None]
    scaled = (features - features.mean(0)) / features.std(0)
    distances = np.linalg.norm(scaled[:, None] - scaled[None], axis=2)
    near = np.argsort(distances, axis=1)[:, :6]  # √36
    shares = predict_probe(fit_neighbours(features, labels, "multiclass"), features, "multiclass")
    assert shares == pytest.approx(np.stack([(labels[near] == k).mean(axis=1) for k in range(3)], axis=1))
    numbers = predict_probe(fit_neighbours(features, labels.astype(float), "regression"), features, "regression")
    assert numbers == pytest.approx(labels[near].mean(axis=1))
    means = np.stack([scaled[labels == k].mean(axis=0) for k in range(3)])
    nearest = np.linalg.norm(scaled[:, None] - means[None], axis=2).argmin(axis=1)
    chances = predict_probe(fit_neighbours(features, labels, "multiclass", by_class=True), features, "multiclass")
    assert (chances.argmax(axis=1) == nearest).mean() > 0.9  # theirs weighs by the variance within classes
    assert chances.sum(axis=1) == pytest.approx(1)


@pytest.mark.slow
def test_table_has_the_task_and_a_column_for_each_site_without_training(phantoms, tmp_path, few_strengths):
    (tmp_path / "age.yaml").write_text(f"label: age\nkind: regression\nleave_out: site\nmanifest: {phantoms}\n")
    given = ["--modes", "knn", "prototype", "--models", "test_vit_3d", "--seeds", "1", "--set", "device=cpu"]
    output = ["-o", tmp_path / "out"]
    done = CliRunner().invoke(main, ["benchmark", str(tmp_path / "age.yaml"), *given, *map(str, output)])
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "out" / "results.csv")
    sites = pd.read_csv(phantoms)["site"].unique()
    assert set(frame["task"]) == {"age", *(f"age-site-{site}" for site in sites)}
    assert {"knn", "prototype", "untrained", "covariates"} == set(frame["mode"])
    assert set(frame.loc[frame["mode"].isin(["knn", "prototype"]), "trained_parameters"]) == {0}
    assert all(f"site {site} held out" in (tmp_path / "out" / "table.md").read_text() for site in sites)
    for site in sites:
        [run] = (tmp_path / "out" / "runs").glob(f"age-site-{site}.*.knn.1.0.json")
        tested = json.loads(run.read_text())["rows"]
        assert tested == np.flatnonzero(pd.read_csv(phantoms)["site"] == site).tolist()


def test_model_without_a_linear_head_is_not_kept(phantoms, tmp_path):
    given = ["--modes", "knn", "--models", "test_vit_3d", "--seeds", "1", "--keep-models", "--manifest", str(phantoms)]
    done = CliRunner().invoke(main, ["benchmark", "phantom_age", *given, "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "no model can be kept" in done.output
