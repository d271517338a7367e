"""Certainty in results: coverage as often as said, each interval as recorded, and scans unlike the training part."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest
from sklearn.covariance import LedoitWolf

import brainfm
from brainfm.downstream import outcome, probe, runs
from brainfm.downstream.certainty import LEVELS, held, radii
from brainfm.downstream.conformal import expected_coverage, radius
from brainfm.downstream.corruptions import corrupted
from brainfm.downstream.kept import KeptModel
from brainfm.downstream.knowledge import _Shrunk
from brainfm.downstream.precomputed import probe_embeddings
from brainfm.downstream.predicting import predictions_of
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.phantom import make_cohort
from brainfm.table import Embeddings, join
from brainfm.zoo.cards import Head


@pytest.fixture(autouse=True)
def quick(monkeypatch, no_figures):
    monkeypatch.setattr(probe, "RIDGE_ALPHA", (1.0, 100.0))
    monkeypatch.setattr(probe, "LOGISTIC_C", (0.1,))
    for module in (runs, outcome):
        monkeypatch.setattr(module, "RESAMPLES", 20)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def people(n, width=4):
    """Embeddings whose first number is an age with heavy-tailed noise, or says which of three groups."""
    draws = np.random.default_rng(0)
    age, group = draws.uniform(20, 80, n), draws.integers(0, 3, n)
    vectors = draws.standard_normal((n, width))
    vectors[:, 0] = (age - 50) / 10 + draws.standard_t(3, n)
    vectors[:, 1:3] += 1.2 * np.eye(3)[group][:, :2]
    names = [f"p{number}" for number in range(n)]
    table = Embeddings(vectors.astype(np.float32), [ScanRecord(f"{name}.nii", None, name) for name in names])
    return pd.DataFrame({"patient_id": names, "age": age, "group": np.array(["a", "b", "c"])[group]}), table


@pytest.mark.slow
@pytest.mark.parametrize("label", ["age", "group"])
def test_coverage_of_twenty_seeds_is_within_two_points_of_what_is_said(label):
    """Of 3,000 people: by the law, 2 points are then three standard deviations of the mean of twenty seeds."""
    labels, table = people(3000)
    truth = np.unique(labels[label], return_inverse=True)[1] if label == "group" else labels[label].to_numpy()
    kind = "multiclass" if label == "group" else "regression"
    found = {level: [] for level in LEVELS}
    for seed in range(20):
        train, val, test = np.split(np.random.default_rng(seed).permutation(3000), [1800, 2400])
        probed = probe.fit_probe(table.vectors[train], truth[train], kind, seed=seed)
        of_val, of_test = (probe.predict_probe(probed, table.vectors[part], kind) for part in (val, test))
        result = {
            "certainty": radii(truth[val], of_val, kind),
            "labels": truth[test],
            "predictions": of_test,
        }
        for level in LEVELS:
            found[level].append(held(result, kind, level).mean())
    for level, each in found.items():
        mean, spread = expected_coverage(600, 600, level, runs=20)
        assert 2.9 * spread < 0.02
        assert np.mean(each) == pytest.approx(mean, abs=3 * spread)
        assert np.mean(each) == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("label", ["age", "group"])
def test_certainty_of_results_is_that_of_each_interval_or_set(label, tmp_path):
    labels, table = people(600)
    page = probe_embeddings(labels, table, tmp_path, label=label, seeds=20)
    found = {float(row["nominal"]): row for row in rows_of(tmp_path / "certainty.csv") if row["mode"] == "probe"}
    assert set(found) == set(LEVELS)
    for nominal, row in found.items():
        mean, spread = expected_coverage(120, 120, nominal, runs=20)
        assert float(row["expected"]) == pytest.approx(mean, abs=6e-3)  # parts are of 120 people, or nearly so
        assert float(row["expected_sd"]) == pytest.approx(spread, rel=0.05)
        assert float(row["coverage"]) == pytest.approx(mean, abs=4 * spread)
    rows = [row for row in rows_of(tmp_path / "predictions.csv") if row["mode"] == "probe"]
    if label == "age":
        inside = [float(row["low"]) <= float(row["label"]) <= float(row["high"]) for row in rows]
        widths = {row["seed"]: float(row["high"]) - float(row["low"]) for row in rows}
        assert float(found[0.9]["size"]) == pytest.approx(np.mean(list(widths.values())))
    else:
        sets = [row["set"].split("|") for row in rows]
        inside = ["abc"[int(float(row["label"]))] in one for row, one in zip(rows, sets, strict=True)]
        assert float(found[0.9]["size"]) == pytest.approx(np.mean([len(one) for one in sets if one != [""]]), abs=0.02)
    assert np.mean(inside) == pytest.approx(float(found[0.9]["coverage"]), abs=1e-6)
    assert float(found[0.9]["out_of_distribution"]) == pytest.approx(0.05, abs=0.02)
    assert "<h2>Certainty</h2>" in page.read_text()


def test_coverage_by_group_is_in_the_fairness_report(run, tmp_path):
    """Errors of old people are thrice as large: the one interval for all holds fewer of them."""
    labels, table = people(300)
    labels["old"] = np.where(labels["age"] > 50, "yes", "no")
    wild = 3 * np.random.default_rng(1).standard_normal(300) * (labels["old"] == "yes")
    table.vectors[:, 0] = (labels["age"] - 50) / 10 + 0.3 * np.random.default_rng(2).standard_normal(300) + wild
    labels.to_csv(tmp_path / "l.csv", index=False)
    table.save(tmp_path / "v.npz")
    given = ("--embeddings", tmp_path / "v.npz", "--label", "age", "--no-controls", "--seeds", 2, "-o", tmp_path / "o")
    assert run("probe", tmp_path / "l.csv", *given, "--fairness", "old").code == 0
    found = {
        r["group"]: float(r["value"]) for r in rows_of(tmp_path / "o" / "fairness.csv") if r["metric"] == "coverage"
    }
    assert found["yes"] < found["no"]
    assert "coverage of 90 % intervals or sets by old" in (tmp_path / "o" / "index.html").read_text()


def test_too_few_validation_scans_hold_everything_and_nothing_is_unlike(tmp_path):
    labels, table = people(30)
    probe_embeddings(labels, table, tmp_path, label="age", seeds=1)
    found = {row["nominal"]: row for row in rows_of(tmp_path / "certainty.csv") if row["mode"] == "probe"}
    assert (found["0.9"]["coverage"], found["0.9"]["size"], found["0.9"]["val_scans"]) == ("1", "", "6")
    assert found["0.9"]["out_of_distribution"] == ""
    first = rows_of(tmp_path / "predictions.csv")[0]
    assert (first["low"], first["high"], first["unlike"], first["out_of_distribution"]) == ("-inf", "inf", "", "")


@pytest.mark.slow
def test_corrupted_phantoms_are_unlike_the_training_part_and_healthy_ones_are_not(run, tmp_path):
    scans = read_manifest(make_cohort(32, tmp_path / "scans", spacing=4.0, seed=5))
    model = brainfm.create_model("test_vit_3d", pretrained=True)
    spec, last = model.pretrained_cfg.input_spec, scans[-3:]
    tables = [brainfm.embed(scans, model, device="cpu")]
    labels = [{**record.extra, "patient_id": record.patient_id, "split": "train"} for record in scans]
    for n, row in enumerate(labels):
        row["split"] = "train" if n < 20 else "val" if n < 24 else "test"
    for name, strength in (("bias_field", 2.0), ("noise", 1.0)):
        copies = corrupted(last, name, strength, spec=spec)
        table = brainfm.embed(copies, model, device="cpu")
        records = [ScanRecord(None, None, f"{record.patient_id}-{name}") for record in table.records]
        tables.append(Embeddings(table.vectors, records, origin=table.origin))
        labels += [{**labels[-1], "patient_id": record.patient_id, "split": "test"} for record in records]
    join(tables).save(tmp_path / "v.npz")
    pd.DataFrame(labels).to_csv(tmp_path / "l.csv", index=False)
    given = ("--embeddings", tmp_path / "v.npz", "--label", "age", "--seeds", 1, "--no-controls", "-o", tmp_path / "o")
    result = run("probe", tmp_path / "l.csv", *given)
    assert result.code == 0, result.said
    rows = rows_of(tmp_path / "o" / "predictions.csv")
    flags = {row["patient_id"]: int(row["out_of_distribution"]) for row in rows}
    unlike = {row["patient_id"]: float(row["unlike"]) for row in rows}
    healthy = [flag for name, flag in flags.items() if name.count("-") == 1]
    assert len(healthy) == 8
    assert sum(healthy) <= 2
    shaded, noisy = ([name for name in flags if name.endswith(how)] for how in ("bias_field", "noise"))
    assert min(len(shaded), len(noisy)) >= 2  # one may be refused before it is embedded
    assert all(flags[name] for name in shaded)
    assert all(unlike[name] > unlike[name.removesuffix("-noise")] for name in noisy)  # flagged in some alone


@pytest.mark.parametrize("shape", [(30, 80), (200, 12)])
def test_distances_are_those_of_ledoit_and_wolf(shape):
    draws = np.random.default_rng(0)
    matrix = draws.standard_normal(shape) @ draws.standard_normal((shape[1], shape[1])) + 5
    new = 3 * draws.standard_normal((20, shape[1]))
    np.testing.assert_allclose(
        _Shrunk(matrix).distances(new) ** 2, LedoitWolf().fit(matrix).mahalanobis(new), rtol=1e-6
    )


def test_prediction_of_a_scan_out_of_the_distribution_is_marked():
    """By the validation part's distances: beyond the 95th of 100, but of 18 of them nothing is known so far out."""
    head = Head(label="age", kind="regression", title="age", unit="years", classes=(), run="x")
    own = np.sort(np.abs(np.random.default_rng(0).standard_normal(100)) * 3)
    arrays = {
        "train.mean": np.zeros(1, np.float32),
        "train.precision": np.eye(1, dtype=np.float32),
        "val.scores": np.arange(100.0),
        "val.distances": own,
        **{f"probe.{name}": np.ones((1, 1)) for name in ("mean", "scale", "weight", "bias")},
    }
    vectors = np.array([[radius(own, 0.95) - 1e-3], [radius(own, 0.95) + 1e-3]], np.float32)
    table = Embeddings(vectors, [ScanRecord("a.nii"), ScanRecord("b.nii")])
    found = predictions_of(KeptModel(None, None, head, arrays), table)
    assert found["out_of_distribution"].tolist() == [0, 1]
    found = predictions_of(KeptModel(None, None, head, {**arrays, "val.distances": own[:18]}), table)
    assert found["out_of_distribution"].tolist() == [0, 0]
