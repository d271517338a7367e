"""Curves of what is left of a score when scans are corrupted."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest

import brainfm
from brainfm.downstream import robustness as job
from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.corruptions import CORRUPTIONS, corrupted
from brainfm.downstream.plan import Plan
from brainfm.downstream.probe import fit_probe, predict_probe
from brainfm.downstream.report import write_report
from brainfm.downstream.robustness import robustness
from brainfm.downstream.statistics import metrics
from brainfm.downstream.task import load_task, read_task


@pytest.fixture(scope="module")
def data(phantoms):
    return read_task(load_task("phantom_age"), phantoms)


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    benchmark([data], Plan(models=("test_resnet_3d",), modes=("probe",), seeds=1, controls=False), folder)
    robustness([data], ["test_resnet_3d"], folder, names=["noise"])
    return folder


def test_curve_is_that_of_the_clean_probe_on_corrupted_test_scans(data, results):
    rows = list(csv.DictReader((results / "robustness.csv").open()))
    assert [float(row["strength"]) for row in rows] == list(CORRUPTIONS["noise"].levels)
    model = brainfm.create_model("test_resnet_3d", pretrained=True)
    splits = np.array(data.split(0))
    train, test = (np.flatnonzero(splits == part) for part in ("train", "test"))
    clean = brainfm.embed(data.records, model).vectors
    patients = [data.patients[n] for n in train]
    probe = fit_probe(clean[train], data.labels[train], "regression", patients=patients)
    for row in (rows[0], rows[-1]):
        scans = corrupted(
            [data.records[n] for n in test], "noise", float(row["strength"]), spec=model.pretrained_cfg.input_spec
        )
        vectors = brainfm.embed(scans, model).vectors
        wanted = metrics(data.labels[test], predict_probe(probe, vectors, "regression"), "regression")["mae"]
        assert float(row["value"]) == pytest.approx(wanted, rel=1e-3)
        assert int(row["n_test"]) == len(test)


def test_report_shows_the_curves(results, figures):
    write_report(results)
    assert (results / "figures" / "phantom_age_robustness.svg").is_file()
    assert "more and more" in (results / "index.html").read_text()


def test_curve_that_is_there_is_not_computed_again(data, results, monkeypatch):
    monkeypatch.setattr(job, "_curve", lambda *_: pytest.fail("computed again"))
    before = (results / "robustness.csv").read_text()
    robustness([data], ["test_resnet_3d"], results, names=["noise"])
    assert (results / "robustness.csv").read_text() == before


def test_curve_of_other_labels_is_computed_again_and_takes_the_place_of_the_first(data, results, tmp_path, monkeypatch):
    results = shutil.copytree(results, tmp_path / "copy")
    before = list(csv.DictReader((results / "robustness.csv").open()))
    empty = [{name: row[name] for name in job.COLUMNS[:-1]} | {"value": 7.0} for row in before]
    monkeypatch.setattr(job, "_curve", lambda *_: empty)
    robustness([replace(data, labels=data.labels + 1)], ["test_resnet_3d"], results, names=["noise"])
    after = list(csv.DictReader((results / "robustness.csv").open()))
    assert [row["value"] for row in after] == ["7.0"] * len(before)
