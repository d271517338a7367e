"""The grid: what it runs, that it goes on, and that the test part is looked at last."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from forked_ranks import run_ranks
from sklearn.metrics import mean_absolute_error, roc_auc_score

import brainfm
from brainfm import BrainfmError, RecipeError, WeightsNotFoundError
from brainfm.cli import main
from brainfm.downstream import grid, outcome, runs, statements
from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.figures import drawings
from brainfm.downstream.plan import MODES, Plan, read_settings
from brainfm.downstream.results import Row
from brainfm.downstream.task import load_task, make_task, read_task
from brainfm.errors import RunInterruptedError
from brainfm.files import held
from brainfm.names import resolve

SETTINGS = {"workers": 0, "lr": 1e-3, "device": "cpu"}
PLAN = Plan(models=("test_vit_3d",), seeds=2, epochs_scale=0.005, settings=SETTINGS)


pytestmark = pytest.mark.usefixtures("few_strengths")


@pytest.fixture(scope="module")
def data(phantoms):
    return [read_task(load_task(name), phantoms) for name in ("phantom_sex", "phantom_age")]


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    """A whole grid, with its figures."""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfm.downstream.report.drawings", drawings)
        benchmark(data, PLAN, folder)
    return folder


def rows_of(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_data_sheet_has_the_digest_of_weights_that_come_with_the_package(results):
    weights = json.loads((results / "run.json").read_text())["weights"]["test_vit_3d"]
    file = Path(brainfm.__file__).parent / "assets" / "test_vit_3d.safetensors"
    assert weights == {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "source": "in this package"}


def test_grid_has_every_run_and_its_numbers_are_those_of_its_predictions(results):
    scores, guesses = rows_of(results / "results.csv"), rows_of(results / "predictions.csv")
    names = "task model mode fraction seed metric value ci_low ci_high n_train n_test trained_parameters parameters"
    assert list(scores[0]) == [*names.split(), "positive"]
    runs = {(r["task"], r["mode"], r["seed"]) for r in scores}
    modes = ("probe", "finetune", "scratch", "untrained", "covariates")
    assert runs == {(t, m, s) for t in ("phantom_sex", "phantom_age") for m in modes for s in "01"}
    for row in scores:
        if row["metric"] not in ("auc", "mae"):
            continue
        key = {name: row[name] for name in ("task", "model", "mode", "seed")}
        mine = [g for g in guesses if all(g[name] == value for name, value in key.items())]
        labels, predictions = ([float(g[name]) for g in mine] for name in ("label", "prediction"))
        wanted = (roc_auc_score if row["metric"] == "auc" else mean_absolute_error)(labels, predictions)
        assert float(row["value"]) == pytest.approx(wanted, rel=1e-6)
        assert (len(mine), int(row["n_train"])) == (int(row["n_test"]), 12)
        assert float(row["ci_low"]) <= float(row["value"]) <= float(row["ci_high"])


def test_report_and_splits_are_written(results):
    for name in ("table.md", "table.tex", "index.html", "grid.json"):
        assert (results / name).stat().st_size > 500
    assert len(list((results / "figures").glob("*.svg"))) >= 4
    splits = [rows_of(results / "splits" / f"phantom_sex.{seed}.csv") for seed in (0, 1)]
    assert splits[0] != splits[1]
    text = (results / "table.md").read_text()
    assert "phantoms, not people" in text
    assert "Epochs are scaled by 0.005: 1 instead of 100 (fine-tuned), 2 instead of 300 (from scratch)" in text
    tests = json.loads((results / "grid.json").read_text())["tests"]
    pairs = {(test["first"], test["second"]) for test in tests if test["task"] == "phantom_age"}
    assert ("test_vit_3d/probe", "test_vit_3d/scratch") in pairs
    assert ("test_vit_3d/scratch", "covariates/covariates") in pairs  # each row is held against every control


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("synthetic", "synthetic volumes, drawn by a model and not of people; the numbers say nothing of patients"),
        ("", ""),
    ],
)
def test_page_says_what_is_no_scan_of_a_person(phantoms, tmp_path, source, said):
    """By the manifest's column, where neither a path nor a README says it."""
    shutil.copytree(phantoms.parent, tmp_path / "scans", ignore=shutil.ignore_patterns("README*", "*.csv"))
    rows = [row | {"source": source} for row in rows_of(phantoms)]
    with (tmp_path / "scans" / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    plan = Plan(models=("test_vit_3d",), modes=("prototype",), seeds=1, settings=SETTINGS, controls=False)
    benchmark([read_task(load_task("phantom_sex"), tmp_path / "scans" / "manifest.csv")], plan, tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "not people" not in text
    assert said in text
    assert ("nothing of patients" in text) == bool(said)


def test_paired_difference_is_that_of_the_table(results):
    """The test of seed 0 alone could contradict the table, which is of all seeds."""
    scores = [
        row for row in rows_of(results / "results.csv") if row["task"] == "phantom_sex" and row["metric"] == "auc"
    ]
    means = {}
    for row in scores:
        means.setdefault(f"{row['model']}/{row['mode']}", []).append(float(row["value"]))
    for test in json.loads((results / "grid.json").read_text())["tests"]:
        if test["task"] == "phantom_sex":
            assert test["difference"] == pytest.approx(np.mean(means[test["first"]]) - np.mean(means[test["second"]]))


def test_every_output_says_which_class_is_1_and_how_many_are_in_each_part(results):
    for name in ("results.csv", "predictions.csv"):
        assert {(row["task"], row["positive"]) for row in rows_of(results / name)} == {
            ("phantom_sex", "1"),
            ("phantom_age", ""),
        }
    column = json.loads((results / "grid.json").read_text())["tasks"][0]
    assert column["classes"] == ["0", "1"]
    assert [share["part"] for share in column["shares"]] == ["train", "val", "test"]
    assert [sum(low for low, _ in share["classes"]) for share in column["shares"]] == [12, 4, 4]
    for name in ("table.md", "index.html"):
        text = (results / name).read_text()
        assert "the positive class, 1, is" in text
        assert "no brain encoder" in text
        assert "2 test patients of class 0, fewer than 10" in text
    assert "**" not in (results / "table.md").read_text().split("|", 1)[1].split("## Data")[0]  # nothing is bold


def test_another_evaluation_in_the_output_is_not_lost_but_where_that_is_asked_for(
    data, results, figures, tmp_path, caplog
):
    folder = shutil.copytree(results, tmp_path / "copy")
    before = (folder / "results.csv").read_bytes()
    plan = replace(PLAN, modes=("probe",), seeds=1, controls=False)
    with pytest.raises(BrainfmError, match=r"holds another evaluation, of which .* would be lost; name another output"):
        benchmark(data[:1], plan, folder)
    assert (folder / "results.csv").read_bytes() == before
    benchmark(data[:1], plan, folder, replace_all=True)
    assert "the evaluation in it is replaced, all of it" in caplog.text
    assert {path.name.split("_")[1] for path in (folder / "figures").iterdir()} == {"sex"}
    assert len(list((folder / "runs").iterdir())) == 1
    caplog.clear()
    with caplog.at_level("INFO", logger="brainfm"):
        benchmark(data[:1], replace(plan, seeds=2), folder)
    assert "1 of 2 runs are there from before and are kept" in caplog.text


def test_scans_that_are_not_there_or_cannot_be_read_are_counted_and_named(data, tmp_path):
    gone, broken = tmp_path / "gone.nii.gz", tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no scan")
    one = data[0]
    first, second = (replace(one.records[n], image=path) for n, path in enumerate((gone, broken)))
    one = replace(one, records=[first, second, *one.records[2:]])
    benchmark([one], replace(PLAN, modes=("probe", "finetune"), seeds=1, controls=False), tmp_path / "out")
    left_out = {(row["scan"], row["row"]): row for row in rows_of(tmp_path / "out" / "left_out.csv")}
    assert set(left_out) == {(str(gone), ""), (str(broken), "")}
    assert left_out[str(gone), ""]["why"] == "no such file"
    assert "broken.nii.gz" in left_out[str(broken), ""]["why"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "2 of 20 scans were left out" in text
    assert "19 scans of 19 patients" in text


def test_what_can_fail_is_tried_before_anything_is_run(data, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(runs, "_probed", lambda *_: ran.append(1) or _stop())
    monkeypatch.setattr(runs, "_trained", lambda *_: ran.append(1) or _stop())
    model = brainfm.create_model("test_resnet_3d", pretrained=True)
    brainfm.save_for_hub(model, tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").unlink()
    plan = replace(PLAN, models=("test_resnet_3d", f"local-dir:{tmp_path / 'weights'}"), modes=("probe",))
    with pytest.raises(BrainfmError, match="weights"):
        benchmark(data[:1], plan, tmp_path / "a")
    dropping = replace(PLAN, models=("test_resnet_3d",), settings=SETTINGS | {"drop_path": 0.1})
    with pytest.raises(BrainfmError, match="drop_path and trained_positions are of a ViT"):
        benchmark(data[:1], dropping, tmp_path / "b")
    cards = [replace(record, mask=None, image=Path(__file__)) for record in data[0].records]
    with pytest.raises(BrainfmError, match="none of 20 scans can be read; the first"):
        benchmark([replace(data[0], records=cards)], PLAN, tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        benchmark(data[:1], PLAN, tmp_path / "file" / "out")
    assert ran == []


def test_two_folders_of_one_name_are_two_names():
    names = grid.short_names(["local-dir:runs/a/export", "local-dir:runs/b/export", "test_resnet_3d"])
    assert list(names.values()) == ["a", "b", "test_resnet_3d"]
    names = grid.short_names(["local-dir:x/mae/export", "local-dir:y/mae/export"])
    assert list(names.values()) == ["x/mae", "y/mae"]


def test_model_that_is_not_run_in_a_mode_is_named():
    plan = Plan(models=("simclr_resnet18_3d", "resnet18_3d"))
    said = list(grid.not_run({model: resolve(model).cfg for model in plan.models}, plan))
    assert said == [
        "simclr_resnet18_3d is not trained from scratch: resnet18_3d stands for that.",
        "resnet18_3d has no weights, and is not run as: linear probe, fine-tuned.",
    ]


def test_second_command_on_the_output_is_refused_while_the_first_lasts(data, results):
    before = (results / "index.html").read_bytes()
    with held(results), pytest.raises(BrainfmError, match=f"process {os.getpid()} on .* is writing it"):
        benchmark(data, PLAN, results)
    assert (results / "index.html").read_bytes() == before
    assert not list(results.glob(".*"))


def test_nothing_is_done_twice_and_what_is_lost_is_done_again_alike(data, results, tmp_path, monkeypatch):
    results = shutil.copytree(results, tmp_path / "copy")
    before = (results / "results.csv").read_bytes()
    lost = next((results / "runs").glob("phantom_age.*.finetune.1.1.json"))
    lost.unlink()
    trained = []
    monkeypatch.setattr(runs, "finetune", lambda *a, **k: trained.append(1) or real(*a, **k))
    real = brainfm.downstream.finetuning.finetune
    benchmark(data, PLAN, results)
    assert trained == [1]
    assert (results / "results.csv").read_bytes() == before
    assert not lost.with_suffix("").exists()  # checkpoints are not kept


def test_other_settings_do_the_runs_that_they_change_again(data, results, tmp_path, monkeypatch):
    folder = shutil.copytree(results, tmp_path / "copy")
    modes = []
    monkeypatch.setattr(runs, "_trained", lambda cell, *_: modes.append(cell.row.mode) or _stop())
    monkeypatch.setattr(runs, "_probed", lambda cell, *_: modes.append(cell.row.mode) or _stop())
    with pytest.raises(InterruptedError):
        benchmark(data, Plan(models=PLAN.models, seeds=2, epochs_scale=0.02, settings=SETTINGS), folder)
    assert modes == ["finetune"]


@pytest.mark.parametrize("what", ["scan", "patient", "covariate"])
def test_other_scans_patients_or_covariates_do_a_run_again(what, data, tmp_path, monkeypatch):
    scan = shutil.copytree(Path(str(data[0].records[0].image)).parent, tmp_path / "scan")
    first = replace(data[0].records[0], image=scan / "normalized.nii.gz", mask=scan / "mask.nii.gz")
    one = replace(data[0], records=[first, *data[0].records[1:]])
    plan = replace(PLAN, modes=("probe",), seeds=1, controls=False)
    benchmark([one], plan, tmp_path / "out")
    if what == "scan":
        shutil.copyfile(Path(str(data[0].records[1].image)), first.image)
    else:
        other = {"patient_id": "another"} if what == "patient" else {"extra": first.extra | {"age": "99"}}
        one = replace(one, records=[replace(first, **other), *one.records[1:]])
    monkeypatch.setattr(runs, "_probed", lambda *_: _stop())
    with pytest.raises(InterruptedError):
        benchmark([one], plan, tmp_path / "out")


def test_other_settings_after_a_kill_do_not_meet_what_the_killed_run_left(data, tmp_path, monkeypatch):
    plan = replace(PLAN, models=("test_resnet_3d",), modes=("scratch",), seeds=1, controls=False)
    met = []
    monkeypatch.setattr(
        runs, "finetune", lambda *a: met.append(Path(a[-1].output)) or met[-1].mkdir(parents=True) or _stop()
    )
    for settings in (SETTINGS, SETTINGS | {"lr": 1e-4}):
        with pytest.raises(InterruptedError):
            benchmark(data[:1], replace(plan, settings=settings), tmp_path)
    assert met[0] != met[1]


def test_paired_tests_are_of_all_seeds_and_of_the_scans_that_both_could_read():
    draw, task, row = np.random.default_rng(0), make_task("sex", "binary"), Row("a", "probe", "A")
    labels, patients = np.array([0, 1] * 20), [f"p{n}" for n in range(40)]

    def result(scores, rows):
        names = {"labels": labels, "predictions": scores, "patients": np.array(patients)}
        return {"rows": rows} | {name: values[rows].tolist() for name, values in names.items()}

    everything, some = list(range(40)), list(range(1, 40))  # the first scan could not be read by one
    scores = draw.random((2, 2, 40))
    ours = {seed: result(scores[0, seed], everything) for seed in range(2)}
    theirs = {seed: result(scores[1, seed], some) for seed in range(2)}
    found = outcome._paired(task, row, row, ours, theirs)
    assert found == outcome._paired(task, row, row, {n: result(scores[0, n], some) for n in range(2)}, theirs)
    areas = [[roc_auc_score(labels[some], scores[who, seed][some]) for seed in range(2)] for who in range(2)]
    assert found.difference == pytest.approx(np.mean(areas[0]) - np.mean(areas[1]))


def _stop():
    raise InterruptedError


def test_published_numbers_stand_beside_their_own_method_alone():
    """The paper's probe is not ours; other settings or fewer epochs are other methods too."""
    task, models = load_task("age_ixi"), ("simclr_resnet18_3d", "resnet18_3d", "vit_tiny_3d")
    cfgs = {model: resolve(model).cfg for model in models}

    def published(**fields):
        plan = Plan(models=models, modes=tuple(MODES), **fields)
        return [one.row for one in statements.published_beside(task, grid.model_rows(cfgs, plan), cfgs, plan)]

    everything = [f"simclr_resnet18_3d/{mode}" for mode in ("probe_paper", "finetune")]
    everything += ["resnet18_3d/scratch", "vit_tiny_3d/scratch"]
    assert published() == published(settings={"workers": 4, "device": "cpu"}) == everything
    assert published(settings={"augment": True}) == everything[:1]  # which means nothing to the probe
    assert published(settings={"lr": 1e-3}) == published(settings={"target": "standardised"}) == []
    assert published(epochs_scale=0.5) == []


def test_what_the_paper_does_not_say_of_a_row_is_marked(data):
    vit = resolve("mae_vit_tiny_3d").cfg
    one = replace(data[1], task=load_task("age_ixi"))
    rows = [Row("local-dir:mae", mode, "") for mode in ("probe", "probe_paper", "finetune")]
    plan = Plan(models=("local-dir:mae",), modes=("probe", "probe_paper", "finetune"))
    notes = list(statements.unstated([one], rows, {"local-dir:mae": vit}, plan))
    assert [note.mode for note in notes] == ["probe_paper", "finetune"]
    assert all("is not stated" in note.text for note in notes)


def test_rows_have_the_settings_of_their_recipes(data):
    """A ViT of an MAE is fine-tuned as by its authors, all else as in the released code; the task says the target."""
    age = replace(data[1], task=replace(data[1].task, target="raw"))

    def settings(model, mode, **fields):
        cfg, plan = resolve(model).cfg, Plan(models=(model,), **fields)
        return runs.settings_of(grid.Job(age, Row(model, mode, ""), 1, 0), plan, cfg, 24, "out")

    probe = settings("test_resnet_3d", "probe_paper")
    assert (probe.trained, probe.drifting, probe.target, probe.head_std) == ("head", True, "raw", None)
    assert (probe.epochs, probe.lr, probe.batch_size, probe.val_loss) == (100, 1e-4, 6, "batches")
    tuned, scratch = (settings("test_resnet_3d", mode) for mode in ("finetune", "scratch"))
    assert (tuned.optimiser, tuned.target, tuned.augment, tuned.epochs) == ("adam", "raw", False, 100)
    assert (scratch.target, scratch.augment, scratch.epochs) == ("raw", True, 300)
    vit = settings("test_vit_3d", "finetune")
    assert (vit.optimiser, vit.layer_decay, vit.drop_path, vit.global_pool) == ("adamw", 0.75, 0.1, "fc_norm")
    assert (vit.schedule, vit.warmup_epochs, vit.trained_positions, vit.augment) == ("cosine", 5, True, True)
    assert (vit.target, vit.head_std) == ("standardised", 2e-5)
    short = settings("test_vit_3d", "finetune", epochs_scale=0.02)
    assert (short.epochs, short.warmup_epochs) == (2, pytest.approx(0.1))
    other = settings("test_resnet_3d", "probe_paper", settings={"trained": "lora", "lr": 1})
    assert (other.trained, other.lr) == ("head", 1)


@pytest.mark.parametrize("mode", ["probe", "probe_paper", "probe_adam", "finetune"])
def test_test_part_changes_nothing_that_is_chosen(mode, data, tmp_path, monkeypatch):
    """The labels of the test part are swapped: the same predictions come out, or else they were used."""
    plan = Plan(models=PLAN.models, modes=(mode,), seeds=1, epochs_scale=0.02, settings=SETTINGS, controls=False)
    found = []
    for swapped in (False, True):
        one = data[0]
        labels, splits = one.labels.copy(), np.array(one.split(0))
        monkeypatch.setattr(type(one), "split", lambda self, seed, splits=splits: list(splits))
        if swapped:
            labels[splits == "test"] = 1 - labels[splits == "test"]
        changed = type(one)(one.task, one.records, labels, one.classes, None)
        benchmark([changed], plan, tmp_path / str(swapped))
        found.append([row["prediction"] for row in rows_of(tmp_path / str(swapped) / "predictions.csv")])
    assert found[0] == found[1]


def test_patient_in_two_parts_of_a_split_stops_the_grid(data, tmp_path, monkeypatch):
    one = data[0]
    twin = brainfm.manifest.ScanRecord(one.records[1].image, one.records[1].mask, one.records[0].patient_id)
    leaky = type(one)(one.task, [one.records[0], twin, *one.records[2:]], one.labels, one.classes, None)
    splits = one.split(0)
    splits[0], splits[1] = "train", "test"
    monkeypatch.setattr(type(one), "split", lambda self, seed: splits)
    with pytest.raises(BrainfmError, match="more than one split: sub-0001"):
        benchmark([leaky], PLAN, tmp_path)


def test_age_bias_is_corrected_by_what_val_says(data, tmp_path):
    plan = Plan(models=("test_resnet_3d",), modes=("probe",), seeds=1, controls=False)
    found = []
    for rule in ("keep", "cole"):
        one = replace(data[1], task=replace(data[1].task, age_bias=rule))
        benchmark([one], plan, tmp_path / rule)
        found.append(np.array([float(row["prediction"]) for row in rows_of(tmp_path / rule / "predictions.csv")]))
    slope, intercept = np.polyfit(*found, 1)
    assert slope > 1  # a probe draws ages to their mean, and the correction draws them apart again
    np.testing.assert_allclose(found[1], slope * found[0] + intercept, rtol=1e-6)


def test_fractions_of_the_training_patients_are_nested_curves(data, figures, tmp_path):
    plan = Plan(models=PLAN.models, modes=("probe",), seeds=1, fractions=(0.5, 1.0), controls=False)
    benchmark(data[:1], plan, tmp_path)
    sizes = {row["fraction"]: int(row["n_train"]) for row in rows_of(tmp_path / "results.csv")}
    assert sizes == {"0.5": 6, "1": 12}
    assert any("label" in path.name or "efficiency" in path.name for path in (tmp_path / "figures").iterdir())


def test_what_is_trained_from_scratch_is_trained_whole(data):
    """A baseline with a frozen random trunk would make any pretrained encoder look good."""
    plan = replace(PLAN, settings=SETTINGS | {"trained": "head", "drifting": True})
    cfg = resolve("test_resnet_3d").cfg
    rows = (Row("test_resnet_3d", mode, "") for mode in ("finetune", "scratch"))
    whole = [runs.settings_of(grid.Job(data[0], row, 1, 0), plan, cfg, 24, "out") for row in rows]
    assert [(one.trained, one.drifting, one.lr) for one in whole] == [("head", True, 1e-3), ("all", False, 1e-3)]
    said = list(statements.statements(data, plan))
    assert "What is trained from scratch is trained whole, without trained, drifting." in said
    assert "In place of the recipes' settings: workers=0, lr=0.001" in " ".join(said)


def test_age_bias_is_said_in_words_and_a_predictor_that_learned_nothing_stops_no_grid(data, caplog):
    one = replace(data[1], task=replace(data[1].task, age_bias="cole"))
    said = " ".join(statements.statements([one], PLAN))
    assert "corrected for age bias by the line fitted on val" in said
    constant = runs._correction(one, (list(range(8)), np.full(8, 50.0)))
    assert constant is None
    assert "age bias is not corrected in this run: predictions do not rise with age" in caplog.text


def test_signal_in_a_training_ends_the_command_as_one_that_can_go_on(phantoms, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise RunInterruptedError("stopped by signal 15; the same command goes on from there")

    monkeypatch.setattr(runs, "finetune", stopped)
    fixed = [
        "--label",
        "sex",
        "--kind",
        "binary",
        "--models",
        "test_vit_3d",
        "--no-controls",
        "-o",
        tmp_path / "out",
    ]
    result = CliRunner().invoke(main, list(map(str, ["finetune", phantoms, *fixed])))
    assert result.exit_code == 75
    assert "goes on from there" in result.output


def test_models_are_run_in_the_modes_they_can_be(tmp_path):
    def rows(models, modes=("probe", "finetune", "scratch")):
        plan = Plan(models=models, modes=modes)
        return [row.key for row in grid.model_rows({model: resolve(model).cfg for model in models}, plan)]

    assert rows(("test_resnet_3d",), ("probe", "probe")) == ["test_resnet_3d/probe"]
    assert rows(("simclr_resnet18_3d", "resnet18_3d")) == [
        "simclr_resnet18_3d/probe",
        "simclr_resnet18_3d/finetune",
        "resnet18_3d/scratch",
    ]
    assert len(rows(("test_resnet_3d", "test_vit_3d"))) == 6
    with pytest.raises(WeightsNotFoundError, match="no weights of mae_vit_tiny_3d were published; pretrain it"):
        rows(("mae_vit_tiny_3d", "vit_tiny_3d"))
    with pytest.raises(BrainfmError, match="nothing to run"):
        rows(("vit_tiny_3d",), ("probe",))


def test_model_that_was_pretrained_on_a_tasks_cohort_is_marked_or_refused(phantoms, tmp_path):
    task = make_task("sex", "binary")
    soop = read_task(type(task)(name="sex", label="sex", kind="binary", cohorts=("SOOP",)), phantoms)
    notes = statements.find_overlaps([soop], ("simclr_resnet18_3d", "resnet18_3d"), "mark")
    assert [(note.model, note.text) for note in notes] == [
        ("simclr_resnet18_3d", "pretrained on this task's data (SOOP)")
    ]
    with pytest.raises(BrainfmError, match="SOOP: in the pretraining data"):
        benchmark([soop], Plan(models=("simclr_resnet18_3d",)), tmp_path, on_overlap="refuse")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=1", "Finetuning has no field rate"),
        ("lr=fast", "lr is 'fast'"),
        ("epochs=3", "--epochs-scale"),
        ("lr", "key=value"),
    ],
)
def test_settings_that_cannot_be_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        read_settings([text])


def test_probe_does_not_depend_on_order_or_resuming(phantoms, tmp_path, monkeypatch):
    """The embeddings of half the scans are there from before; the rest comes later, in another order."""
    plan = Plan(models=PLAN.models, modes=("probe",), seeds=1, controls=False)
    whole = read_task(load_task("phantom_age"), phantoms)
    benchmark([whole], plan, tmp_path / "one")
    from brainfm.downstream.features import read_features

    model = brainfm.create_model("test_vit_3d", pretrained=True)
    read_features(whole.records[::-2], model, tmp_path / "two" / "embeddings", "test_vit_3d", batch_size=3)
    benchmark([whole], plan, tmp_path / "two")
    first, second = (
        [float(r["prediction"]) for r in rows_of(tmp_path / n / "predictions.csv")] for n in ("one", "two")
    )
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_command_line_runs_a_users_own_table(phantoms, tmp_path):
    arguments = ["probe", phantoms, "--label", "age", "--kind", "regression", "--covariates", "sex", "site"]
    arguments += ["--models", "test_resnet_3d", "test_vit_3d", "--seeds", "1", "-o", tmp_path / "out"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "\ntest_vit_3d, linear probe  " in result.output
    assert {row["mode"] for row in rows_of(tmp_path / "out" / "results.csv")} == {"probe", "untrained", "covariates"}
    result = CliRunner().invoke(main, [str(a) if a != "age" else "weight" for a in arguments])
    assert result.exit_code == 1
    assert "TaskError" in result.output
    assert "there is no column 'weight'; it has site, age" in result.output


TWICE = """
import sys
from brainfm.cli import main

main([*sys.argv[1:], "--no-controls"], standalone_mode=False)
sys.stderr.write("the first has ended\\n")
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_several_processes_train_together_and_refuse_to_probe(phantoms, tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    fields = ["--label", "sex", "--kind", "binary", "--models", "test_vit_3d", "--seeds", "1"]
    fields += ["--epochs-scale", "0.01", "--set", "workers=0", "device=cpu", "batch_size=4"]
    done = run_ranks(2, tmp_path / "twice.py", "finetune", phantoms, *fields, "-o", tmp_path / "out")
    assert done.stderr.count("the first has ended") == 2, done.stderr
    (record,) = (tmp_path / "out" / "runs").glob("*.json")
    assert json.loads(record.read_text())["processes"] == 2
    assert done.stdout.count("The one planned run is in.") == 1
    assert 0 <= float(rows_of(tmp_path / "out" / "results.csv")[0]["value"]) <= 1
    assert done.returncode != 0
    assert "only training uses several processes" in done.stderr


def test_command_line_takes_tasks_with_one_manifest_or_each_its_own(phantoms, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(main, ["benchmark", *map(str, arguments), "-o", str(tmp_path / "out")])

    fixed = (
        "phantom_sex",
        "phantom_age",
        "--models",
        "test_vit_3d",
        "--modes",
        "probe",
        "--seeds",
        1,
        "--no-controls",
    )
    assert run(*fixed, "--manifest", phantoms).exit_code == 0
    assert run(*fixed, "--manifest", f"phantom_sex={phantoms}").output.startswith(
        "TaskError: phantom_age: this task needs"
    )
    assert "no such task" in run(*fixed, "--manifest", f"other={phantoms}").output
    (tmp_path / "mine.yaml").write_text(f"label: sex\nkind: binary\nmanifest: {phantoms}\n")
    result = run(tmp_path / "mine.yaml", "--models", "test_vit_3d", "--modes", "probe", "scratches", "--seeds", 1)
    assert "unknown mode 'scratches'" in result.output
    result = run("phantom_sex", "--manifest", phantoms, "--models", "test_vit_3d", "--modes", "scratch", "--robustness")
    assert "--robustness is of the linear probe; add probe to --modes" in result.output
