"""Models that were kept: from files to predictions, equal to what their runs recorded, and what is refused."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import brainfm
from brainfm import BrainfmError, WeightsError, WeightsNotFoundError
from brainfm.cli import main
from brainfm.downstream import predict
from brainfm.downstream.conformal import radius
from brainfm.downstream.kept import read_kept
from brainfm.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("few_strengths")
SETTINGS = ["--seeds", "1", "--epochs-scale", "0.005", "--no-controls", "--set", "workers=0", "device=cpu", "lr=1e-3"]


def brainfm_(*arguments):
    done = CliRunner().invoke(main, list(map(str, arguments)))
    return done.exit_code, done.output


def rows_of(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def manifest(phantoms, tmp_path_factory):
    """The phantoms with one label more, of three words."""
    table = pd.read_csv(phantoms, dtype=str)
    table["image_path"] = [str(phantoms.parent / name) for name in table["image_path"]]
    table["mask_path"] = [str(phantoms.parent / name) for name in table["mask_path"]]
    table["group"] = [("young", "middle", "old")[n % 3] for n in range(len(table))]
    path = tmp_path_factory.mktemp("labels") / "scans.csv"
    table.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def results(manifest, tmp_path_factory):
    """One seed of some modes, kept: the folder of those on embeddings, and beside it that of fine-tuning."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "group.yaml").write_text(f"label: group\nkind: multiclass\nmanifest: {manifest}\ncohorts: [Anywhere]\n")
    evaluate(manifest, folder / "probed", ["probe", "probe_adam"], "phantom_age", "phantom_sex", folder / "group.yaml")
    evaluate(manifest, folder / "tuned", ["finetune"], "phantom_age", folder / "group.yaml")
    return folder / "probed"


def evaluate(manifest, output, modes, *tasks):
    given = ["--modes", *modes, "--models", "test_vit_3d", "--keep-models", "-o", output, *SETTINGS]
    code, said = brainfm_("benchmark", *tasks, "--manifest", manifest, *given)
    assert code == 0, said


def model_of(results, task, mode):
    run = run_of(results, task, mode)
    return run.parent.parent / "models" / run.stem


def run_of(results, task, mode):
    output = results.with_name("tuned") if mode == "finetune" else results
    [path] = (output / "runs").glob(f"{task}.*.{mode}.1.0.json")
    return path


def predictions_on(scans, folder, path, *options):
    code, said = brainfm_("predict", folder, scans, "-o", path, "--device", "cpu", "--workers", "0", *options)
    assert code == 0, said
    return pd.read_csv(path), said


@pytest.fixture(scope="module")
def tests_part(results, manifest, tmp_path_factory):
    """A manifest of the test part, without a label."""
    test = [row for row in rows_of(results / "splits" / "phantom_age.0.csv") if row["split"] == "test"]
    table = pd.read_csv(manifest, dtype=str).set_index("patient_id").loc[[row["patient_id"] for row in test]]
    path = tmp_path_factory.mktemp("new") / "new.csv"
    table.reset_index()[["patient_id", "scan_id", "image_path", "mask_path"]].to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        *((task, mode) for task in ("phantom_age", "phantom_sex", "group") for mode in ("probe", "probe_adam")),
        *(("phantom_age", "finetune"), ("group", "finetune")),
    ],
)
def test_kept_model_predicts_what_its_run_recorded(results, manifest, tmp_path, task, mode):
    run = json.loads(run_of(results, task, mode).read_text())
    everything = pd.read_csv(manifest, dtype=str)
    everything.loc[run["rows"], ["image_path", "mask_path", "patient_id", "scan_id"]].to_csv(
        tmp_path / "n.csv", index=False
    )
    found, _ = predictions_on(tmp_path / "n.csv", model_of(results, task, mode), tmp_path / "p.csv")
    assert found["patient_id"].tolist() == run["patients"]
    recorded = np.array(run["predictions"])
    if task == "phantom_age":
        assert found["prediction"].to_numpy() == pytest.approx(recorded, abs=1e-6)
    elif task == "phantom_sex":
        assert found["p_1"].to_numpy() == pytest.approx(recorded, abs=1e-7)
        assert found["prediction"].tolist() == [int(chance >= 0.5) for chance in recorded]
    else:
        classes = ["middle", "old", "young"]
        assert found[[f"p_{name}" for name in classes]].to_numpy() == pytest.approx(recorded, abs=1e-7)
        assert found["prediction"].tolist() == [classes[n] for n in recorded.argmax(axis=1)]


def test_fine_tuned_model_predicts_to_the_bit_what_its_run_recorded(results, manifest):
    run = json.loads(run_of(results, "phantom_age", "finetune").read_text())
    records = read_manifest(manifest)
    found = predict(model_of(results, "phantom_age", "finetune"), [records[n] for n in run["rows"]], device="cpu")
    assert found.table["prediction"].tolist() == run["predictions"]


def test_folder_is_an_encoder_and_its_classifier_for_create_model(results, tests_part):
    folder = model_of(results, "phantom_sex", "probe")
    encoder = brainfm.create_model(f"local-dir:{folder}")
    whole = brainfm.create_model(f"local-dir:{folder}", num_classes=1)
    record = read_manifest(tests_part)[0]
    tensor = brainfm.create_transform(encoder)(record.image, record.mask)[None]
    with torch.inference_mode():
        assert encoder(tensor).shape == (1, encoder.num_features)
        chance = float(whole(tensor).sigmoid())
    found = predict(folder, [record], device="cpu").table
    assert chance == pytest.approx(found["p_1"][0], abs=1e-4)  # float32, and embeddings as they are
    group = brainfm.create_model(f"local-dir:{model_of(results, 'group', 'finetune')}")
    assert [cohort.name for cohort in group.pretrained_cfg.cohorts][-1] == "Anywhere"
    assert "Predicts group" in group.pretrained_cfg.notes


def test_intervals_are_the_validation_parts_errors(results, manifest, tests_part, tmp_path):
    folder = model_of(results, "phantom_age", "probe")
    split = {row["patient_id"]: row["split"] for row in rows_of(results / "splits" / "phantom_age.0.csv")}
    records = [record for record in read_manifest(manifest) if split[record.patient_id] == "val"]
    guesses = predict(folder, records, device="cpu").table["prediction"]
    errors = np.abs(guesses - [float(record.extra["age"]) for record in records])
    found, _ = predictions_on(tests_part, folder, tmp_path / "p.csv", "--coverage", "0.8")
    assert (found["high"] - found["prediction"]).to_numpy() == pytest.approx(radius(errors, 0.8), rel=1e-6)
    assert (found["prediction"] - found["low"]).to_numpy() == pytest.approx(radius(errors, 0.8), rel=1e-6)


def test_coverage_that_the_validation_part_is_too_small_for_is_infinite_and_said(results, tests_part, tmp_path, caplog):
    found, _ = predictions_on(
        tests_part, model_of(results, "phantom_age", "probe"), tmp_path / "p.csv", "--coverage", "0.99"
    )
    assert np.isposinf(found["high"]).all()
    assert np.isneginf(found["low"]).all()
    assert "takes 99 validation scans, and this model has 4" in caplog.text
    found, _ = predictions_on(tests_part, model_of(results, "group", "probe"), tmp_path / "q.csv", "--coverage", "0.99")
    assert set(found["set"]) == {"middle|old|young"}


def test_threshold_is_the_models_or_the_one_that_is_given(results, tests_part, tmp_path):
    folder = model_of(results, "phantom_sex", "probe")
    found, _ = predictions_on(tests_part, folder, tmp_path / "p.csv", "--threshold", "0")
    assert set(found["prediction"]) == {1}
    code, said = brainfm_("predict", folder, tests_part, "-o", tmp_path / "q.csv", "--threshold", "2")
    assert code == 1
    assert "must be a probability" in said
    code, said = brainfm_(
        "predict", model_of(results, "group", "probe"), tests_part, "-o", tmp_path / "q.csv", "--threshold", "0.3"
    )
    assert code == 1
    assert "threshold is of a binary task" in said


def test_scan_unlike_the_training_part_is_said_to_be(results, manifest):
    import nibabel as nib

    record = read_manifest(manifest)[0]
    image = nib.load(record.image)
    shade = np.exp(1.5 * np.linspace(-1, 1, image.shape[0]))  # of a coil that sees one side
    shaded = image.get_fdata() * shade[:, None, None]
    strange = nib.Nifti1Image(shaded.astype(np.float32), image.affine)
    folder = model_of(results, "phantom_age", "probe")
    own, other = predict(folder, [(record.image, record.mask), (strange, record.mask)], device="cpu").table["distance"]
    assert other > 1.5 * own
    unlike = predict(folder, [(strange, record.mask)], device="cpu").table["unlike"]
    assert unlike.tolist() == [100]


def test_one_bad_scan_is_listed_and_an_interrupted_run_goes_on(results, tests_part, tmp_path, monkeypatch):
    table = pd.read_csv(tests_part, dtype=str)
    table.loc[len(table)] = ["sub-bad", "ses-1", str(tmp_path / "bad.nii.gz"), ""]
    (tmp_path / "bad.nii.gz").write_bytes(b"not an image")
    table.to_csv(tmp_path / "new.csv", index=False)
    folder, output = model_of(results, "phantom_age", "finetune"), tmp_path / "p.csv"
    whole = ["predict", folder, tmp_path / "new.csv", "-o", output, "--device", "cpu", "--workers", "0"]
    module = importlib.import_module("brainfm.embed")  # brainfm.embed is the function
    real, done = module._outcomes, []

    def stops(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "_outcomes", stops)
    assert brainfm_(*whole)[0] == 130
    assert not output.exists()
    assert list(tmp_path.glob(".p.csv.parts/*"))
    again = []
    monkeypatch.setattr(module, "_outcomes", lambda *a: again.append(1) or real(*a))
    code, said = brainfm_(*whole)
    assert code == 1
    assert "1 of 5 scans failed" in said
    assert len(again) == 4 - 3
    assert len(rows_of(output)) == 4
    assert [row["patient_id"] for row in rows_of(tmp_path / "p.errors.csv")] == ["sub-bad"]
    assert not list(tmp_path.glob(".p.csv*"))


def test_same_command_keeps_what_is_there_and_makes_a_model_that_is_lost(results, manifest):
    folder, run = model_of(results, "phantom_age", "probe"), run_of(results, "phantom_age", "probe")
    others = {path: path.stat().st_mtime_ns for path in (results / "runs").glob("*.json") if path != run}
    before = (folder / "model.safetensors").read_bytes(), json.loads(run.read_text())
    shutil.rmtree(folder)
    tasks = ("phantom_age", "phantom_sex", results.parent / "group.yaml")
    evaluate(manifest, results, ["probe", "probe_adam"], *tasks)
    assert ((folder / "model.safetensors").read_bytes(), json.loads(run.read_text())) == before
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_folder_that_predicts_nothing_or_was_changed_is_refused(results, tests_part, tmp_path):
    model = brainfm.create_model("test_vit_3d", pretrained=True)
    brainfm.save_for_hub(model, tmp_path / "encoder")
    with pytest.raises(WeightsNotFoundError, match="gives embeddings and predicts nothing"):
        predict(tmp_path / "encoder", tests_part)
    with pytest.raises(WeightsNotFoundError, match="is not there"):
        predict(tmp_path / "nowhere", tests_part)
    mixed = tmp_path / "mixed"
    shutil.copytree(model_of(results, "phantom_age", "probe"), mixed)
    shutil.copyfile(model_of(results, "phantom_sex", "probe") / "head.safetensors", mixed / "head.safetensors")
    with pytest.raises(WeightsError, match="is not the file that"):
        read_kept(mixed)
    config = json.loads((mixed / "config.json").read_text())
    for change, said in (({"kind": "ordinal"}, "its head is not one"), ({"slope": 0}, "its head is not one")):
        (mixed / "config.json").write_text(json.dumps(config | {"head": config["head"] | change}))
        with pytest.raises(WeightsError, match=said):
            read_kept(mixed)


def test_fetched_copy_of_a_kept_model_predicts_too(results, tests_part, tmp_path):
    folder = model_of(results, "phantom_age", "probe")
    brainfm.hub.fetch(f"local-dir:{folder}", tmp_path / "copy")
    first, second = (predict(place, tests_part, device="cpu").table for place in (folder, tmp_path / "copy"))
    assert first.equals(second)


def test_what_cannot_predict_new_scans_is_not_kept_and_refused_before_any_run(manifest, tmp_path):
    task = tmp_path / "age.yaml"
    task.write_text(f"label: age\nkind: regression\nage_bias: beheshti\nmanifest: {manifest}\n")
    code, said = brainfm_(
        "finetune", task, "--models", "test_vit_3d", "--keep-models", "-o", tmp_path / "out", *SETTINGS
    )
    assert code == 1
    assert "age_bias: beheshti" in said
    assert not (tmp_path / "out" / "runs").exists()


def test_age_bias_is_corrected_in_new_scans_too(manifest, tmp_path):
    task = tmp_path / "age.yaml"
    task.write_text(f"label: age\nkind: regression\nage_bias: cole\nmanifest: {manifest}\n")
    given = ["--models", "test_vit_3d", "--modes", "probe", "--keep-models", "-o", tmp_path / "out", *SETTINGS]
    code, said = brainfm_("benchmark", task, *given)
    assert code == 0, said
    run = json.loads(run_of(tmp_path / "out", "age", "probe").read_text())
    records = read_manifest(manifest)
    found = predict(model_of(tmp_path / "out", "age", "probe"), [records[n] for n in run["rows"]], device="cpu").table
    assert found["prediction"].to_numpy() == pytest.approx(np.array(run["predictions"]), rel=1e-9)


def test_prediction_of_nothing_but_bad_scans_is_a_list_of_errors(results, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"not an image")
    code, said = brainfm_(
        "predict",
        model_of(results, "group", "probe"),
        tmp_path / "bad.nii.gz",
        "-o",
        tmp_path / "p.csv",
        "--device",
        "cpu",
    )
    assert code == 1
    assert "ScanError" in said
    with pytest.raises(BrainfmError, match=r"written as \.csv"):
        predict(model_of(results, "group", "probe"), tmp_path / "bad.nii.gz", output=tmp_path / "p.parquet")
