"""Sweeps by the command line: every variant a run of its own, once, whatever interrupts them; and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

import brainfm
from brainfm import RecipeError
from brainfm.cli.main import main
from brainfm.manifest import read_manifest
from brainfm.train.data import count_patients, take_patients
from brainfm.train.sweep import read_sweep

FIELDS = ["epochs=1", "batch_size=4", "workers=0", "precision=float32", "input_size=[16,16,16]"]
FIELDS += ["augmentation.crop_min=[27,32,32]"]


@pytest.fixture
def pretrain(cohort, tmp_path):
    """A function (arguments) → exit code and output of `brainfm pretrain test_resnet_3d` into tmp_path/out."""

    def run(*arguments, recipe="test_resnet_3d"):
        named = [f"manifest={cohort}", f"output={tmp_path / 'out'}"]
        done = CliRunner().invoke(main, ["pretrain", recipe, *named, *FIELDS, *arguments])
        return done.exit_code, done.output

    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_every_combination_is_a_run_of_its_own_and_is_not_run_again(pretrain, tmp_path):
    swept = ["sweep=augmentation.contrast:0,0.8", "patients=0.5,1.0"]
    code, said = pretrain(*swept)
    assert code == 0, said
    rows = rows_of(tmp_path / "out" / "sweep.csv")
    assert [(row["augmentation.contrast"], row["patients"], row["n_patients"], row["n_scans"]) for row in rows] == [
        ("0", "0.5", "6", rows[0]["n_scans"]),
        ("0", "1.0", "12", "16"),
        ("0.8", "0.5", "6", rows[0]["n_scans"]),
        ("0.8", "1.0", "12", "16"),
    ]
    assert [row["steps"] for row in rows] == ["1", "3", "1", "3"]
    assert len({row["loss"] for row in rows}) == 4
    for row in rows:
        export = tmp_path / "out" / row["variant"] / "export"
        cfg = brainfm.create_model(f"local-dir:{export}").pretrained_cfg
        recipe = json.loads(cfg.recipe)
        assert (recipe["augmentation"]["contrast"], recipe["patients"]) == (
            float(row["augmentation.contrast"]),
            float(row["patients"]),
        )
        assert (cfg.cohorts[0].patients, cfg.cohorts[0].scans) == (int(row["n_patients"]), int(row["n_scans"]))
    variants = [tmp_path / "out" / row["variant"] for row in rows]
    before = [states(folder) for folder in variants]
    assert pretrain(*swept)[0] == 0
    assert [states(folder) for folder in variants] == before
    assert rows_of(tmp_path / "out" / "sweep.csv") == rows


def test_smaller_fraction_of_the_patients_is_part_of_a_larger_whatever_their_order(cohort):
    records = read_manifest(cohort)
    parts = [take_patients(records, fraction, 0, cohort.parent) for fraction in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert [count_patients(part) for part in parts] == [1, 3, 6, 9, 12]
    names = [{record.name for record in part} for part in parts]
    assert all(small < large for small, large in itertools.pairwise(names))
    assert parts[-1] == records
    for part in parts:  # all scans of a patient, or none
        patients = {record.patient_id for record in part}
        assert [record for record in records if record.patient_id in patients] == part
    turned = take_patients(records[::-1], 0.5, 0, cohort.parent)
    assert {record.name for record in turned} == names[2]
    assert {record.name for record in take_patients(records, 0.5, 1, cohort.parent)} != names[2]


def test_sweep_that_a_signal_stopped_goes_on_where_it_was(pretrain, tmp_path, monkeypatch):
    from brainfm.train import trainer

    step = trainer.Trainer._step

    def stopped(self, batch):
        metrics = step(self, batch)
        if "seed=1" in str(self.folder) and self._step_of_run == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(trainer.Trainer, "_step", stopped)
    code, said = pretrain("sweep=seed:0,1,2")
    assert code == 75
    assert "the same command goes on" in said
    monkeypatch.undo()
    first = states(tmp_path / "out" / "seed=0")
    assert not (tmp_path / "out" / "seed=2").exists()
    assert pretrain("sweep=seed:0,1,2")[0] == 0
    assert states(tmp_path / "out" / "seed=0") == first
    lines = (tmp_path / "out" / "seed=1" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert [row["variant"] for row in rows_of(tmp_path / "out" / "sweep.csv")] == ["seed=0", "seed=1", "seed=2"]


def test_variant_that_fails_is_named_and_the_others_are_run(pretrain, tmp_path, monkeypatch):
    from brainfm.train import trainer

    step = trainer.Trainer._step

    def fails(self, batch):
        if "seed=0" in str(self.folder):
            raise brainfm.BrainfmError("the loss is nan")
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_step", fails)
    code, said = pretrain("sweep=seed:0,1")
    assert code == 1
    assert "2 variants, of which 1 failed" in said
    failed, whole = rows_of(tmp_path / "out" / "sweep.csv")
    assert (failed["error"], failed["loss"]) == ("the loss is nan", "")
    assert whole["error"] == ""
    assert float(whole["loss"]) > 0


def test_file_of_variants_sets_keys_in_groups_and_names_the_folders(tmp_path):
    path = tmp_path / "variants.yaml"
    path.write_text("as published: {}\nno shift: {augmentation: {shift: 0}, lr: 1e-4}\n")
    variants = read_sweep("simclr_resnet18_3d", ["output=runs", f"sweep={path}", "epochs=2"])
    assert [variant.name for variant in variants] == ["as-published", "no-shift"]
    published, changed = (variant.recipe for variant in variants)
    assert (changed.augmentation.shift, changed.augmentation.contrast, changed.lr) == (0, 0.8, 1e-4)
    assert (published.augmentation.shift, published.lr, published.epochs) == (0.8, 3e-4, 2)
    assert changed.output == str(Path("runs", "no-shift"))


def test_values_are_yaml_lists_and_words_among_them():
    gammas = read_sweep("simclr_resnet18_3d", ["output=runs", "sweep=augmentation.gamma:[0.5,1.5],[0.8,1.2]"])
    assert [variant.recipe.augmentation.gamma for variant in gammas] == [(0.5, 1.5), (0.8, 1.2)]
    words = read_sweep("simclr_resnet18_3d", ["output=runs", "sweep=views:joint,separate"])
    assert [(variant.name, variant.recipe.views) for variant in words] == [
        ("views=joint", "joint"),
        ("views=separate", "separate"),
    ]
    assert read_sweep("simclr_resnet18_3d", ["output=runs", "patients=0.5"]) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sweep=lr:1e-3,2e-3"], "needs output=FOLDER"),
        (["output=x", "sweep=lr"], "sweep=KEY:VALUE"),
        (["output=x", "sweep=lr:"], "no values"),
        (["output=x", "sweep=lr:[1"], "not YAML"),
        (["output=x", "sweep=lr:1e-3,-1"], r"variant lr=-1: .*lr is -1"),
        (["output=x", "sweep=learning:1"], "learning"),
        (["output=x", "sweep=output:a,b"], "output cannot be swept"),
        (["output=x", "sweep=seed:1,1"], "seed=1 twice"),
        (["output=x", "sweep=seed:1,2", "sweep=seed:3"], "set the same key"),
        (["output=x", "patients=0,0.5"], "patients is 0"),
        (["output=x", "sweep=nowhere.yaml"], r"nowhere\.yaml: cannot be read"),
    ],
)
def test_sweep_that_cannot_be_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(RecipeError, match=reason):
        read_sweep("simclr_resnet18_3d", arguments)


def test_what_fails_in_a_later_variant_is_said_before_the_first_starts(pretrain, tmp_path):
    code, said = pretrain("sweep=batch_size:4,13")
    assert code == 1
    assert "variant batch_size=13: 12 patients do not fill" in said
    assert not (tmp_path / "out").exists()
    code, said = pretrain("evaluate=phantom_age")
    assert code == 1
    assert "evaluate= goes with sweep=" in said


def test_dry_run_of_a_sweep_says_what_each_variant_would_do(pretrain, tmp_path):
    code, said = pretrain("patients=0.5,1.0", "--dry-run")
    assert code == 0
    assert said.count("tried  ") == 2
    assert " of 6 patients" in said
    assert "16 scans of 12 patients" in said
    assert not (tmp_path / "out").exists()
