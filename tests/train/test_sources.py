"""Several sources of volumes in one run: scans, phantoms, synthetic volumes and clips, in stated fractions."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from clips import NTSC, make_clip, make_sound, truncate
from forked_ranks import run_ranks

import brainfm
from brainfm import RecipeError, ScanError
from brainfm.cli.main import main
from brainfm.errors import RunInterruptedError
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.phantom import make_cohort
from brainfm.sources import kind_of, kind_of_all
from brainfm.train.augment import Augmentation
from brainfm.train.cache import ScanCache, read_whole
from brainfm.train.data import PretrainingData
from brainfm.train.pretraining import pretrain, read_data
from brainfm.train.recipe import recipe_from_dict
from brainfm.train.sources import items_taken, read_sources
from brainfm.train.trainer import Trainer

MILD = Augmentation(crop_min=(27, 32, 32))
FIELDS = {
    "method": "simclr",
    "model": "test_resnet_3d",
    "epochs": 2,
    "batch_size": 4,
    "workers": 0,
    "augmentation": {"crop_min": [27, 32, 32]},
    "input_size": [16, 16, 16],
    "precision": "float32",
}


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Five clips of odd rates and sizes, in the folders of two classes."""
    folder = tmp_path_factory.mktemp("films") / "clips"
    kinds = [("a.mp4", NTSC, (64, 48)), ("b.avi", Fraction(7), (50, 70)), ("c.avi", Fraction(30), (48, 48))]
    kinds += [("d.avi", Fraction(25), (40, 30)), ("e.avi", NTSC, (64, 64))]
    for n, (name, rate, size) in enumerate(kinds):
        codec = "libx264" if name.endswith("mp4") else "mpeg4"
        make_clip(folder / ("run", "sit")[n % 2] / name, 20 + n, rate, size, codec, noise=n + 1)
    return folder


@pytest.fixture
def recipe(cohort, clips, tmp_path):
    """A function (fields) → a recipe of both, half and half unless told otherwise."""

    def make(**fields):
        mixed = {"sources": {str(cohort): 0.5, str(clips): 0.5}, "output": str(tmp_path / "run")}
        return recipe_from_dict(FIELDS | mixed | fields)

    return make


def network(folder):
    return torch.load(Path(folder) / "checkpoints" / "last.pt", weights_only=True)["model_state_dict"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# --- What an epoch takes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "fractions", "taken"),
    [
        ((12, 4), (0.5, 0.5), [4, 4]),
        ((12, 4), (0.75, 0.25), [12, 4]),
        ((100, 7), (0.9, 0.1), [63, 7]),
        ((3, 100, 50), (0.1, 0.6, 0.3), [3, 18, 9]),
        ((7,), (1.0,), [7]),
    ],
)
def test_scarcest_source_is_taken_whole_and_the_others_by_their_fractions(counts, fractions, taken):
    assert items_taken(counts, fractions) == taken


def test_an_epoch_has_the_fractions_takes_nothing_twice_and_comes_to_everything_in_turn(recipe, small_spec):
    records, _ = read_data(recipe())
    assert [len(source.records) for source in records.sources] == [16, 5]
    data = PretrainingData(records, small_spec, MILD, seed=3)
    assert len(data) == 10
    shown = Counter()
    for epoch in range(12):
        items = [data._item(epoch, place)[1] for place in range(10)]
        assert len(set(items)) == 10
        assert [item for item in items if item >= 12] == [12, 13, 14, 15, 16]
        shown.update(items)
    assert {shown[item] for item in range(12)} == {5}  # 12 epochs of 5 of 12 patients
    again = PretrainingData(records, small_spec, MILD, seed=3)
    first = data[4, 7]
    assert first.scan >= 16
    assert torch.equal(first.views, again[4, 7].views)
    made = PretrainingData(records, small_spec, MILD, seed=3, on_device=True)
    assert torch.equal(made.make_views(made[4, 7], torch.device("cpu")).views, first.views)


def test_one_patient_id_in_two_sources_is_two_patients(cohort, small_spec, tmp_path):
    shutil.copytree(cohort.parent, tmp_path / "copy")
    both = {str(cohort): 0.5, str(tmp_path / "copy" / "manifest.csv"): 0.5}
    records = read_sources(both, None, lambda listed, root: listed)
    assert [source.name for source in records.sources] == [f"{cohort.parent.name}/manifest", "copy/manifest"]
    assert len(PretrainingData(records, small_spec, MILD)) == 24


# --- Runs -----------------------------------------------------------------------------------------


def test_run_from_the_command_line_is_cached_by_source_and_its_card_says_what_it_saw(
    cohort, clips, small_spec, tmp_path
):
    def run(*arguments):
        done = CliRunner().invoke(main, [*map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.output

    caches = {str(cohort): str(tmp_path / "scans"), str(clips): str(tmp_path / "films")}
    for source, cache in caches.items():
        run("cache", "build", source, cache, "--model", "test_resnet_3d", "--workers", 1)
    assert "0 scans written, 5 were there" in run(
        "cache", "build", clips, caches[str(clips)], "--model", "test_resnet_3d", "--workers", 1
    )
    whole = (slice(0, 40), slice(0, 48), slice(0, 48))
    mixture = read_sources({str(clips): 1.0}, None, lambda listed, root: listed)
    image, mask = ScanCache(caches[str(clips)], small_spec).read(mixture.key_of(2), whole)
    wanted = read_whole(mixture[2], small_spec)
    assert (image.numpy() == wanted[0]).all()
    assert mask.all()

    fields = [f"{key}={json.dumps(value)}" for key, value in FIELDS.items() if key != "augmentation"]
    fields += ["augmentation.crop_min=[27,32,32]", "epochs=1", f"sources.{cohort}=0.6", f"sources.{clips}=0.4"]
    plan = run("pretrain", "test_resnet_3d", *fields, f"output={tmp_path / 'run'}", "--dry-run")
    assert (
        "60% of an epoch: 16 scans of 12 patients (manifest); 40% of an epoch: 5 video clips, no scans (clips)" in plan
    )
    assert "steps        3 an epoch of 4" in plan  # 7 patients and 5 clips
    run("pretrain", "test_resnet_3d", *fields, f"output={tmp_path / 'run'}")
    run("pretrain", "test_resnet_3d", *fields, f"cache={json.dumps(caches)}", f"output={tmp_path / 'cached'}")
    cfg = brainfm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}").pretrained_cfg
    assert [(one.name, one.patients, one.scans) for one in cfg.cohorts] == [
        ("manifest", 12, 16),
        ("clips (5 video clips, no scans)", 0, 0),
    ]
    assert "40% of an epoch: 5 video clips, no scans (clips)" in cfg.notes
    assert json.loads(cfg.recipe)["sources"] == {"manifest": 0.6, "clips": 0.4}
    page = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "clips (5 video clips, no scans)" in page
    assert str(tmp_path) not in page + (tmp_path / "run" / "export" / "config.json").read_text()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()] for name in ("run", "cached")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # scans in steps of a 16-bit cache


def test_run_that_is_stopped_goes_on_to_the_bit(recipe, tmp_path, monkeypatch):
    pretrain(recipe(output=str(tmp_path / "whole")))
    step = Trainer._step

    def stopping(self, batch):
        if self._step_of_run in (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", stopping)
    for _ in range(2):
        with pytest.raises(RunInterruptedError):
            pretrain(recipe())
    monkeypatch.undo()
    pretrain(recipe())
    assert same(network(tmp_path / "whole"), network(tmp_path / "run"))


def test_run_does_not_go_on_with_other_fractions_and_does_from_another_place(recipe, cohort, clips, tmp_path):
    pretrain(recipe(epochs=1))
    with pytest.raises(RecipeError, match="this run was started differently"):
        pretrain(recipe(epochs=1, sources={str(cohort): 0.6, str(clips): 0.4}))
    shutil.copytree(clips, tmp_path / "clips")
    assert pretrain(recipe(epochs=1, sources={str(cohort): 0.5, str(tmp_path / "clips"): 0.5})).is_dir()


RANKS = """
import json, sys
from brainfm.train.pretraining import pretrain
from brainfm.train.recipe import recipe_from_dict
pretrain(recipe_from_dict(json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(recipe, tmp_path):
    fields = {"epochs": 1, "precision": "float64"}
    pretrain(recipe(output=str(tmp_path / "one"), **fields))
    (tmp_path / "run.py").write_text(RANKS)
    two = recipe(output=str(tmp_path / "two"), batch_size=2, **fields)
    done = run_ranks(2, tmp_path / "run.py", json.dumps(two.to_dict()))
    assert done.returncode == 0, done.stderr
    one, two = network(tmp_path / "one"), network(tmp_path / "two")
    for key, value in one.items():
        assert (two[key] - value).abs().max() <= 1e-9 * max(1, value.abs().max()), key


def test_bad_clips_are_listed_and_counted_as_bad_scans_are(recipe, clips, tmp_path):
    films = tmp_path / "films"
    shutil.copytree(clips, films)
    truncate(films / "half.mp4", films / "run" / "a.mp4")
    make_sound(films / "sound.mp4")
    alone = {"sources": {}, "manifest": str(films)}
    with pytest.raises(brainfm.BrainfmError, match=r"of 7 scans cannot be read, more than max_bad_fraction=0\.01"):
        pretrain(recipe(**alone, epochs=4))
    export = pretrain(recipe(**alone, epochs=4, max_bad_fraction=0.4, output=str(tmp_path / "kept")))
    with (tmp_path / "kept" / "bad_scans.csv").open() as file:
        bad = {Path(row["image_path"]).name: row["error"] for row in csv.DictReader(file)}
    assert bad.keys() == {"half.mp4", "sound.mp4"}
    assert "truncated" in bad["half.mp4"]
    assert "no video in this file" in bad["sound.mp4"]
    assert "SimCLR on 5 video clips, no scans (films), 4 epochs" in (export / "README.md").read_text()


def test_recipes_that_cannot_be_mixed_are_refused(recipe, cohort, clips, tmp_path):
    with pytest.raises(RecipeError, match="manifest and sources both say what to train on"):
        recipe(manifest=str(cohort))
    for fractions in ({str(cohort): 0.5, str(clips): 0.6}, {str(cohort): 0.0, str(clips): 1.0}):
        with pytest.raises(RecipeError, match="above 0 and add up to 1, and are"):
            recipe(sources=fractions)
    with pytest.raises(RecipeError, match="of several sources each has a cache of its own"):
        read_data(recipe(cache="cache"))
    with pytest.raises(RecipeError, match="cache: other is no source; they are"):
        read_data(recipe(cache={"other": "cache"}))
    rows = read_manifest(cohort)
    listed = tmp_path / "again.csv"
    listed.write_text(f"image_path,mask_path\n{rows[3].image},{rows[3].mask}\n")
    with pytest.raises(RecipeError, match=r"t1.nii.gz: is in two sources, manifest and again; list it in one"):
        pretrain(recipe(sources={str(cohort): 0.5, str(listed): 0.5}))
    with pytest.raises(ScanError, match="no such manifest"):
        read_data(recipe(sources={str(tmp_path / "none.csv"): 1.0}))


# --- What a source is of --------------------------------------------------------------------------


def test_kinds_are_told_by_column_file_and_readme(cohort, tmp_path):
    assert kind_of(ScanRecord("a.MP4")) == "video"
    assert kind_of(ScanRecord("a.nii.gz", extra={"source": "Synthetic"})) == "synthetic"
    assert kind_of(ScanRecord("a.nii.gz", extra={"source": "ADNI"})) == "scans"
    assert (
        kind_of(ScanRecord("prepared/synth0-000012")) == kind_of(ScanRecord("synth7-000012_T1w.nii.gz")) == "synthetic"
    )
    assert kind_of(ScanRecord("prepared/synthesis-01")) == "scans"
    assert kind_of_all(read_manifest(cohort)) == "scans"
    made = read_manifest(make_cohort(2, tmp_path / "made", spacing=8))
    assert kind_of_all(made) == "phantom"
    assert made[0].extra["source"] == "phantom"
    before = [ScanRecord(record.image) for record in made]  # of manifests without the column
    assert kind_of_all(before) == "phantom"


def test_card_of_a_run_on_phantoms_and_synthetic_volumes_says_so(cohort, tmp_path):
    from brainfm.downstream.account import is_test_model

    phantoms = make_cohort(8, tmp_path / "made", spacing=4)
    rows = list(csv.reader(cohort.open()))
    drawn = tmp_path / "drawn.csv"
    paths = [[*(str(cohort.parent / name) for name in row[:2]), *row[2:], "synthetic"] for row in rows[1:]]
    with drawn.open("w", newline="") as file:
        csv.writer(file).writerows([[*rows[0], "source"], *paths])
    fields = {"sources": {str(phantoms): 0.5, str(drawn): 0.5}, "epochs": 1, "output": str(tmp_path / "run")}
    cfg = brainfm.create_model(f"local-dir:{pretrain(recipe_from_dict(FIELDS | fields))}").pretrained_cfg
    assert [one.name for one in cfg.cohorts] == [
        "manifest (phantom scans, not of people)",
        "drawn (16 synthetic volumes, drawn by a model and not of people)",
    ]
    assert "synthetic volumes, drawn by a model and not of people (drawn)" in cfg.notes
    assert is_test_model(cfg)
