"""A run's data sheet: the same results to the byte by one command, or what is not the same."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings

pytestmark = pytest.mark.usefixtures("few_strengths")
PEOPLE = 120


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Results of a command with relative paths, in nested cross-validation."""
    folder = tmp_path_factory.mktemp("made")
    draws = np.random.default_rng(0)
    label = draws.integers(0, 2, PEOPLE)
    vectors = draws.standard_normal((PEOPLE, 4)) + label[:, None]
    names = [f"p{n:03}" for n in range(PEOPLE)]
    Embeddings(vectors.astype(np.float32), [ScanRecord(f"{n}.nii", None, n) for n in names]).save(folder / "v.npz")
    people = {"patient_id": names, "sex": np.array(["F", "M"])[label], "age": draws.uniform(20, 80, PEOPLE)}
    pd.DataFrame(people).to_csv(folder / "people.csv", index=False)
    given = ["--label", "sex", "--covariates", "age", "--folds", "4", "--seeds", "2", "-o", "results"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["brainfm", "probe"])  # the page says how to do it again
        done = CliRunner().invoke(main, ["probe", "people.csv", "--embeddings", "v.npz", *given])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def probed(made, tmp_path, monkeypatch):
    """A copy of it, as if it had been made there."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results" / "run.json"
    sheet = json.loads(path.read_text())
    assert sheet["command"]["folder"] == str(made)
    path.write_text(json.dumps(sheet | {"command": sheet["command"] | {"folder": str(tmp_path)}}))
    return tmp_path


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_command_makes_the_same_results_to_the_byte(run, probed, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = probed / "again"
    result = run("benchmark", "--from", probed / "results" / "run.json", "-o", again)
    assert result.code == 0, result.said
    assert "the same to the byte" in result.said
    for name in ("results.csv", "predictions.csv", "certainty.csv"):
        assert (again / name).read_bytes() == (probed / "results" / name).read_bytes()
    first, second = (json.loads((where / "run.json").read_text()) for where in (probed / "results", again))
    assert first == second
    assert len(first["splits"]["sex"]) == len(set(first["splits"]["sex"])) == 8
    assert (first["seeds"], first["folds"], list(first["embeddings"])) == (8, 4, ["v.npz"])
    assert first["versions"]["scikit-learn"]


def test_nested_cross_validation_tests_each_patient_once_a_time(probed):
    rows = [row for row in rows_of(probed / "results" / "predictions.csv") if row["mode"] == "probe"]
    for seeds in (range(4), range(4, 8)):
        tested = [row["patient_id"] for row in rows if int(row["seed"]) in seeds]
        assert sorted(tested) == [f"p{n:03}" for n in range(PEOPLE)]
    assert "nested cross-validation of 4 folds, 2 times" in (probed / "results" / "index.html").read_text()


def test_tests_of_the_table_are_adjusted_and_say_how_many_patients_are_needed(probed):
    tests = json.loads((probed / "results" / "grid.json").read_text())["tests"]
    assert [test["test"] for test in tests] == ["paired bootstrap", "corrected resampled t-test"]
    for test in tests:
        assert test["p_holm"] == test["p_value"]  # one of its kind
    assert (tests[0]["patients"], tests[0]["patients_needed"] < PEOPLE) == (PEOPLE, True)
    assert tests[1]["difference"] == pytest.approx(tests[0]["difference"], abs=0.02)
    page = (probed / "results" / "index.html").read_text()
    for text in ("p (Holm, over the table)", "Patients for 80 % power", f"(here {PEOPLE})", "--from run.json"):
        assert text in page


def test_what_is_not_the_same_is_said(run, probed):
    people = pd.read_csv(probed / "people.csv")
    people.loc[:5, "sex"] = people.loc[:5, "sex"].map({"F": "M", "M": "F"})
    people.to_csv(probed / "people.csv", index=False)
    result = run("benchmark", "--from", "results/run.json", "-o", "again")
    assert result.code == 1
    assert (
        "differs from results/results.csv. Not the same: the scans or labels of sex; the splits of sex" in result.said
    )


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (("-o", "again", "--seeds", 3), {}, "has all options itself; leave seeds out"),
        (("-o", "results"), {}, "holds the results that are to be made again; name another folder"),
        (("-o", "again"), {"command": None}, "was not made by one brainfm command"),
        (("-o", "again"), {"command": {"name": "embed", "folder": ".", "options": {}}}, "made by 'embed'"),
        (("-o", "again"), {"results": None}, "not the run.json of an evaluation"),
    ],
)
def test_sheets_that_cannot_be_done_again_are_refused(arguments, change, message, run, probed):
    path = probed / "results" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = run("benchmark", "--from", path, *arguments)
    assert result.code == 1
    assert message in result.said
    assert not (probed / "again").exists()


def test_tasks_are_needed_without_a_sheet(run, tmp_path):
    assert "Missing argument 'TASKS...'" in run("benchmark", "-o", tmp_path / "o").said


def test_encoder_embeds_the_scans_again_to_the_same_bytes(run, phantoms, tmp_path):
    given = ("--manifest", phantoms, "--models", "test_vit_3d", "--modes", "probe", "knn", "--seeds", 1)
    result = run("benchmark", "phantom_sex", *given, "--no-controls", "--set", "device=cpu", "-o", tmp_path / "first")
    assert result.code == 0, result.said
    result = run("benchmark", "--from", tmp_path / "first" / "run.json", "-o", tmp_path / "second")
    assert result.code == 0, result.said
    assert (tmp_path / "first" / "results.csv").read_bytes() == (tmp_path / "second" / "results.csv").read_bytes()


def test_folds_of_a_split_that_is_given_are_refused(run, probed):
    people = pd.read_csv(probed / "people.csv")
    people.assign(split=["train", "val", "test"] * 40).to_csv(probed / "people.csv", index=False)
    result = run("probe", "people.csv", "--embeddings", "v.npz", "--label", "sex", "--folds", 4, "-o", "other")
    assert result.code == 1
    assert "its table says the split, so there are no --folds to draw" in result.said
