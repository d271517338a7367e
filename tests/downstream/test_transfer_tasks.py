"""Tasks of the second paper, on phantoms in place of their cohorts: curves, little training, unseen sites and sets."""

from __future__ import annotations

import csv

import pandas as pd
import pytest
from click.testing import CliRunner

from brainfm.cli.main import main
from brainfm.downstream.results import read_evaluation
from brainfm.downstream.task import load_task
from brainfm.phantom import make_cohort

pytestmark = pytest.mark.usefixtures("few_strengths")
QUICK = ["--models", "test_resnet_3d", "--seeds", "1", "--no-controls", "--set", "workers=0", "device=cpu"]


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    """Phantoms under the columns of each task, and others that stand for OASIS."""
    folder = tmp_path_factory.mktemp("cohorts")
    for name, count, seed in (("adni", 32, 5), ("oasis", 24, 6)):
        make_cohort(count, folder / name, spacing=4.0, seed=seed)
        table = pd.read_csv(folder / name / "manifest.csv").assign(ad=lambda rows: rows["disease"])
        table = table.assign(pd=table["disease"], patient_id=name + "-" + table["patient_id"])
        table.to_csv(folder / name / "labels.csv", index=False)
    return folder


def benchmark(*arguments):
    return CliRunner().invoke(main, ["benchmark", *map(str, arguments), *QUICK])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_training_size_and_how_much_is_trained_are_one_table(cohorts, tmp_path):
    table, out = cohorts / "adni" / "few.csv", tmp_path / "out"
    pd.read_csv(table.with_name("labels.csv")).head(20).to_csv(table, index=False)
    done = benchmark(
        *("alzheimer_adni", "age_adni_controls", "--manifest", table, "-o", out, "--epochs-scale", 0.01),
        *("--modes", "probe", "lora", "finetune", "--fractions", 0.5, 1.0),
    )
    assert done.exit_code == 0, done.output
    results = rows_of(out / "results.csv")
    found = {(row["task"], row["mode"], row["fraction"]) for row in results}
    assert found == {
        (task, mode, part)
        for task in ("alzheimer_adni", "age_adni_controls")
        for mode in ("probe", "lora", "finetune")
        for part in ("0.5", "1")
    }
    sizes = {row["mode"]: int(row["trained_parameters"]) for row in results if row["task"] == "alzheimer_adni"}
    assert sizes["probe"] < sizes["lora"] < sizes["finetune"]
    patients = {row["fraction"]: int(row["n_train"]) for row in results if row["task"] == "alzheimer_adni"}
    assert patients["0.5"] == pytest.approx(patients["1"] / 2, abs=1)
    assert "fine-tuned by LoRA" in (out / "table.md").read_text()


@pytest.mark.slow
def test_unseen_sites_and_an_unseen_set_are_columns_beside_the_tasks_own(cohorts, tmp_path):
    table, other, out = cohorts / "adni" / "labels.csv", cohorts / "oasis" / "labels.csv", tmp_path / "out"
    done = benchmark(
        *("ood_oasis", "parkinson", "--manifest", table, "--test-manifest", f"ood_oasis={other}"),
        *("--modes", "probe", "-o", out),
    )
    assert done.exit_code == 0, done.output
    evaluation = read_evaluation(out / "grid.json")
    sites = sorted(set(pd.read_csv(table)["site"]))
    assert [task.title for task in evaluation.tasks] == [
        "Alzheimer's (ADNI)",
        "Alzheimer's (ADNI), tested on labels",
        "Parkinson's",
        *(f"Parkinson's, site {site} held out" for site in sites),
    ]
    shares = {task.title: {share.part: share.patients for share in task.shares} for task in evaluation.tasks}
    assert shares["Alzheimer's (ADNI), tested on labels"]["test"] == (24, 24)
    assert shares["Alzheimer's (ADNI), tested on labels"]["train"] == shares["Alzheimer's (ADNI)"]["train"]
    for site in sites:
        assert shares[f"Parkinson's, site {site} held out"]["test"][0] == (pd.read_csv(table)["site"] == site).sum()


@pytest.mark.slow
def test_other_set_is_given_to_a_task_that_has_none_and_to_no_task_that_leaves_sites_out(cohorts, tmp_path):
    table, other = cohorts / "adni" / "labels.csv", cohorts / "oasis" / "labels.csv"
    fixed = ("--manifest", table, "--modes", "probe", "-o", tmp_path / "out")
    done = benchmark("alzheimer_adni", *fixed, "--test-manifest", f"alzheimer_adni={other}")
    assert done.exit_code == 0, done.output
    assert len(read_evaluation(tmp_path / "out" / "grid.json").tasks) == 2
    done = benchmark("parkinson", *fixed, "--test-manifest", f"parkinson={other}")
    assert "it is tested on what it leaves out" in done.output
    done = benchmark("alzheimer_adni", *fixed, "--test-manifest", other)
    assert "of which task? Write TASK=FILE.csv" in done.output


@pytest.mark.parametrize("name", ["alzheimer_adni", "age_adni_controls", "parkinson", "ood_oasis"])
def test_tasks_publish_no_numbers_that_nobody_has(name):
    task = load_task(name)
    assert not task.published
    assert task.kind == ("regression" if name.startswith("age") else "binary")
    assert "ADNI" in task.cohorts or name == "parkinson"
