"""What embed and demo say and write."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import brainfm
from brainfm import demo, registry
from brainfm.assets import ASSETS
from brainfm.table import read

SMALL = ("--model", "test_resnet_3d")


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def notes(tmp_path):
    """A text file that poses as a scan."""
    path = tmp_path / "notes.nii"
    path.write_text("not a scan. " * 100)
    return path


# --- embed ----------------------------------------------------------------------------------------


def test_embed_of_a_manifest_with_good_and_bad_scans(run, tmp_path, small_sample, notes, small_model):
    (tmp_path / "scans.csv").write_text(
        "image_path,mask_path,label\n"
        f"{small_sample[0]},{small_sample[1]},first\n"
        "notes.nii,,second\n"
        f"{small_sample[0]},,third\n"
        "missing.nii,,fourth\n"
    )
    result = run("embed", tmp_path / "scans.csv", "-o", tmp_path / "out.csv", *SMALL)
    assert result.code == 1
    assert f"2 scans → {tmp_path / 'out.csv'} (128 numbers each)" in result.out
    errors = [line for line in result.err if line.startswith("ScanError: ")]
    assert [line.split(": ")[1] for line in errors] == [str(notes), str(tmp_path / "missing.nii")]
    assert result.err[-1] == f"2 of 4 scans failed; see {tmp_path / 'out.errors.csv'}"
    assert [row["label"] for row in rows(tmp_path / "out.csv")] == ["first", "third"]
    assert [row["label"] for row in rows(tmp_path / "out.errors.csv")] == ["second", "fourth"]
    expected = brainfm.embed([small_sample], small_model).vectors[0]
    assert [np.float32(rows(tmp_path / "out.csv")[0][f"e{n}"]) for n in range(128)] == expected.tolist()


def test_embed_of_good_scans_ends_well_and_quietly(run, tmp_path, small_sample):
    result = run("embed", small_sample[0], "-o", tmp_path / "out.csv", *SMALL)
    assert (result.code, result.err) == (0, [])
    assert result.out == f"1 scan → {tmp_path / 'out.csv'} (128 numbers each)\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json"]
    assert read(tmp_path / "out.csv").origin.model == "test_resnet_3d.phantoms"


def test_embed_takes_a_mask_for_one_scan(run, tmp_path, small_sample, small_model):
    image, mask = small_sample
    brain = nib.load(mask)
    smaller = np.asarray(brain.dataobj).copy()
    smaller[:8] = 0
    nib.Nifti1Image(smaller, brain.affine).to_filename(tmp_path / "smaller.nii.gz")
    result = run("embed", image, "--mask", tmp_path / "smaller.nii.gz", "-o", tmp_path / "out.npz", *SMALL)
    assert result.code == 0
    with np.load(tmp_path / "out.npz") as table:
        found = table["embeddings"]
    expected = brainfm.embed([(image, tmp_path / "smaller.nii.gz")], small_model).vectors
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, brainfm.embed([image], small_model).vectors)


def test_embed_takes_several_inputs_in_their_order(run, tmp_path, small_sample):
    folder = tmp_path / "prepared" / "p1"
    folder.mkdir(parents=True)
    for path in small_sample:
        (folder / path.name).write_bytes(path.read_bytes())
    result = run("embed", folder.parent, small_sample[0], "-o", tmp_path / "out.csv", *SMALL, "--batch-size", 2)
    assert result.code == 0
    assert [row["image_path"] for row in rows(tmp_path / "out.csv")] == [
        str(folder / "normalized.nii.gz"),
        str(small_sample[0]),
    ]


def test_embed_strict_stops_at_the_first_bad_scan_with_one_line(run, tmp_path, small_sample, notes):
    result = run("embed", notes, "-o", tmp_path / "out.csv", *SMALL, "--strict")
    assert result.code == 1
    assert len(result.err) == 1
    assert result.err[0].startswith(f"ScanError: {notes}: neither NIfTI nor MGZ")
    assert not (tmp_path / "out.csv").exists()


def test_embed_of_many_bad_scans_shows_the_first_ten(run, tmp_path):
    lines = "\n".join(f"scan{n}.nii" for n in range(13))
    (tmp_path / "scans.csv").write_text(f"image_path\n{lines}\n")
    (tmp_path / "scan0.nii").write_bytes(b"no image")  # where none is there, that is said once
    result = run("embed", tmp_path / "scans.csv", "-o", tmp_path / "out.csv", *SMALL)
    assert sum(line.startswith("ScanError: ") for line in result.err) == 10
    assert result.err[-1].startswith("13 of 13 scans failed")
    assert len(rows(tmp_path / "out.errors.csv")) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.nii", "-o", "out.xlsx"), "ScanError: out.xlsx: a table is written as .csv, .parquet, .npz"),
        (("a.nii", "b.nii", "--mask", "m.nii", "-o", "out.csv"), "ScanError: --mask goes with one scan"),
        (("missing.csv", "-o", "out.csv"), "ScanError: missing.csv: no such manifest"),
        (("a.nii", "-o", "out.csv", "--model", "test_resnet"), "ModelNameError: unknown model 'test_resnet'"),
        (("a.nii", "-o", "out.csv", "--model", "vit_tiny_3d"), "WeightsNotFoundError: no weights of vit_tiny_3d"),
        (("a.nii", "-o", "out.csv", *SMALL, "--checkpoint", "x.pt"), "WeightsNotFoundError: x.pt: no such weight file"),
        (("a.nii", "-o", "out.csv", *SMALL, "--device", "nonsense"), "nonsense"),
        (("a.nii", "-o", "out.csv", *SMALL, "--model", "test_vit"), "ModelNameError: unknown model 'test_vit'"),
        (
            ("a.nii", "-o", "out.csv", *SMALL, "--model", "test_vit_3d", "--checkpoint", "x.pt"),
            "BrainfmError: --checkpoint goes with one model",
        ),
        (
            ("a.nii", "-o", "out.csv", *SMALL, "--report", "out.json"),
            "BrainfmError: out.json: is written with the table",
        ),
    ],
)
def test_embed_with_a_wrong_argument_is_one_line(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.nii").touch()
    result = run("embed", *arguments)
    assert result.code == 1
    assert len(result.err) == 1
    assert message in result.err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a.nii",),
        ("a.nii", "-o", "out.csv", "--batch-size", "0"),
        ("a.nii", "-o", "out.csv", "--dense", "maps", "--dense-dtype", "float64"),
    ],
)
def test_embed_without_what_it_needs_is_a_usage_error(arguments, run):
    result = run("embed", *arguments)
    assert result.code == 2
    assert "Usage:" in result.err[0]


def test_embed_takes_a_weight_file(run, tmp_path, small_sample, small_model):
    weights = ("--checkpoint", ASSETS / "test_resnet_3d.safetensors")
    assert run("embed", small_sample[0], "-o", tmp_path / "out.npz", *SMALL, *weights).code == 0
    with np.load(tmp_path / "out.npz") as table:
        np.testing.assert_array_equal(table["embeddings"], brainfm.embed([small_sample[0]], small_model).vectors)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embed_writes_dense_features_in_the_type_asked_for(dtype, run, tmp_path, small_sample, small_model):
    asked = () if dtype == "float16" else ("--dense-dtype", dtype)  # which is what is written without being asked
    output = ("-o", tmp_path / "out.csv", "--dense", tmp_path / "maps", *asked)
    assert run("embed", small_sample[0], *output, *SMALL).code == 0
    (row,) = rows(tmp_path / "out.csv")
    written = nib.load(row["dense_path"])
    assert list((tmp_path / "maps").iterdir()) == [Path(row["dense_path"])]
    brainfm.embed([small_sample[0]], small_model, dense=tmp_path / "expected", dense_dtype=dtype)
    (expected,) = map(nib.load, (tmp_path / "expected").iterdir())
    assert written.shape == (*expected.shape[:3], 128)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(written.affine, expected.affine)
    as_float16 = np.asarray(written.dataobj).astype(np.float16).astype(np.float32)
    assert np.array_equal(as_float16, np.asarray(written.dataobj)) == (dtype == "float16")


def test_embed_reports_what_was_done(run, tmp_path, small_sample, notes):
    output = ("-o", tmp_path / "out.parquet", "--report", tmp_path / "out.json")
    assert run("embed", small_sample[0], notes, *output, *SMALL).code == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["origin"] == read(tmp_path / "out.parquet").origin.to_dict()
    assert (report["scans"], report["embedded"]) == (2, 1)
    assert [failed["scan"] for failed in report["failed"]] == [str(notes)]


def test_embed_with_several_models_writes_each_ones_own_files(run, tmp_path, small_sample, notes, small_model):
    models = ("--model", "test_resnet_3d", "--model", "test_vit_3d")
    extra = ("--dense", tmp_path / "maps", "--report", tmp_path / "run.json")
    result = run("embed", small_sample[0], notes, "-o", tmp_path / "out.csv", *models, *extra)
    assert result.code == 1
    assert result.out.splitlines() == [
        f"1 scan → {tmp_path / 'out.test_resnet_3d.csv'} (128 numbers each)",
        f"1 scan → {tmp_path / 'out.test_vit_3d.csv'} (96 numbers each)",
    ]
    report = json.loads((tmp_path / "run.json").read_text())
    for model in ("test_resnet_3d", "test_vit_3d"):
        assert f"1 of 2 scans failed; see {tmp_path / f'out.{model}.errors.csv'}" in result.err
        assert read(tmp_path / f"out.{model}.csv").origin.model == f"{model}.phantoms"
        assert report["models"][model]["origin"]["model"] == f"{model}.phantoms"
        assert len(list((tmp_path / "maps" / model).iterdir())) == 1
    assert not (tmp_path / "out.csv").exists()
    expected = brainfm.embed([small_sample[0]], small_model).vectors
    np.testing.assert_array_equal(read(tmp_path / "out.test_resnet_3d.csv").vectors, expected)


def test_embed_with_several_models_writes_their_tables_to_a_folder(run, tmp_path, small_sample):
    models = ("--model", "test_resnet_3d", "--model", "test_vit_3d")
    result = run("embed", small_sample[0], "-o", f"{tmp_path / 'made'}/", *models)
    assert (result.code, result.err) == (0, [])
    tables = [tmp_path / "made" / f"embeddings.{model}.csv" for model in ("test_resnet_3d", "test_vit_3d")]
    assert [line.split(" → ")[1] for line in result.out.splitlines()] == [
        f"{tables[0]} (128 numbers each)",
        f"{tables[1]} (96 numbers each)",
    ]
    assert [len(read(table)) for table in tables] == [1, 1]


def test_embed_with_a_model_named_twice_embeds_once(run, tmp_path, small_sample):
    result = run("embed", small_sample[0], "-o", tmp_path / "out.csv", *SMALL, *SMALL)
    assert result.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json"]


def test_interrupted_embed_says_that_it_goes_on(run, tmp_path, small_sample, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["brainfm.embed"], "embed_files", interrupt)
    result = run("embed", small_sample[0], "-o", tmp_path / "out.csv", *SMALL)
    assert result.code == 130
    assert result.err == ["interrupted; what is finished is kept, and the same command goes on from there"]


def test_weights_that_cannot_be_fetched_are_one_line_with_the_way_out(run, tmp_path, small_sample, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    published = brainfm.get_pretrained_cfg("simclr_resnet18_3d")
    closed = replace(published, url=f"http://127.0.0.1:{port}/weights.tar")

    def closed_resnet18_3d(**kwargs):
        return brainfm.models.ResNet(**kwargs)

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    brainfm.register_model(cfgs={"kaczmarek2025": closed})(closed_resnet18_3d)
    monkeypatch.setenv("BRAINFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the Hub client's retries
    result = run("embed", small_sample[0], "-o", tmp_path / "out.csv", "--model", "closed_resnet18_3d")
    assert result.code == 1
    assert result.err[-1].startswith(f"WeightsNotFoundError: cannot download {closed.url}")
    assert re.search(rf"put the file at {tmp_path}/cache/\S+/weights\.tar", result.err[-1])
    assert not any("Traceback" in line for line in result.err)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("command", ["embed", "finetune"])
def test_folder_whose_network_takes_other_channels_than_its_contract_gives_is_refused(
    command, run, tmp_path, small_sample
):
    model = brainfm.create_model("test_resnet_3d", pretrained=True, in_chans=3)
    brainfm.save_for_hub(model, tmp_path / "model")
    for n in range(20):
        shutil.copy(small_sample[0], tmp_path / f"{n}.nii.gz")
    lines = [f"{n}.nii.gz,{small_sample[1]},p{n},{n % 2}" for n in range(20)]
    (tmp_path / "scans.csv").write_text("\n".join(["image_path,mask_path,patient_id,sex", *lines]))
    evaluation = ("--label", "sex", "--seeds", "1", "--no-controls") if command == "finetune" else ()
    kind = "--models" if command == "finetune" else "--model"
    place = f"local-dir:{tmp_path / 'model'}"
    result = run(command, tmp_path / "scans.csv", kind, place, "-o", tmp_path / "out.csv", *evaluation)
    assert result.code == 1
    assert "the model takes 3 channels, and its input contract gives T1w; create_model(…, in_chans=1)" in result.err[-1]


# --- demo -----------------------------------------------------------------------------------------


def test_demo_writes_the_embedding_and_a_picture(run, tmp_path, small_model, sample):
    result = run("demo", "-o", tmp_path / "out")
    assert result.code == 0
    assert "not a brain encoder" in result.out
    assert "This was a tiny test model" in result.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["embedding.csv", "input.png"]
    (row,) = rows(tmp_path / "out" / "embedding.csv")
    vector = np.array([np.float32(row[f"e{n}"]) for n in range(128)])
    np.testing.assert_array_equal(vector, brainfm.embed([sample], small_model).vectors[0])


def test_demo_draws_three_planes_of_the_brain_with_its_outline(tmp_path, small_spec, sample):
    tensor = brainfm.create_transform(small_spec)(*sample)
    demo.draw_tensor(tensor, tmp_path / "input.png")
    with Image.open(tmp_path / "input.png") as picture:
        picture.verify()
    with Image.open(tmp_path / "input.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        pixels = np.asarray(picture).astype(int)
    height, width, _ = pixels.shape
    assert 300 <= height <= 400
    assert 900 <= width <= 1250
    yellow = (pixels[..., 0] - pixels[..., 2]) > 100
    grey = (np.ptp(pixels, axis=-1) == 0) & (pixels[..., 0] > 0)
    for panel in range(3):
        columns = slice(panel * width // 3, (panel + 1) * width // 3)
        assert 0.1 < grey[:, columns].mean() < 0.9
        assert yellow[:, columns].sum() > 100


@pytest.mark.parametrize(
    ("axis", "brighter"),
    [(2, ("right", "right", None)), (1, ("top", None, "right")), (0, (None, "top", "top"))],
    ids=["left to right", "back to front", "bottom to top"],
)
def test_picture_has_the_scans_right_on_the_right_and_its_front_and_top_up(axis, brighter, tmp_path):
    """A box that gets brighter along one axis of [z, y, x] does so in the axial, coronal and sagittal panels."""
    tensor = torch.zeros(1, 40, 48, 48)
    ramp = torch.arange(tensor.shape[1 + axis]).float() + 1
    tensor[:, 5:35, 5:43, 5:43] = ramp.reshape([-1 if a == axis else 1 for a in range(3)]).expand(40, 48, 48)[
        5:35, 5:43, 5:43
    ]
    demo.draw_tensor(tensor, tmp_path / "input.png")
    with Image.open(tmp_path / "input.png") as picture:
        grey = np.asarray(picture)[..., 2].astype(float)
    for panel, side in zip(np.array_split(grey, 3, axis=1), brighter, strict=True):
        found = panel[panel > 0]
        rows, columns = np.nonzero(panel > 0)
        right, top = (np.corrcoef(found, place)[0, 1] if np.ptp(found) > 30 else 0 for place in (columns, -rows))
        assert (right > 0.9) == (side == "right")
        assert (top > 0.9) == (side == "top")


def test_demo_with_an_unknown_model_is_one_line(run, tmp_path):
    result = run("demo", "--model", "nothing_like_it", "-o", tmp_path / "out")
    assert result.code == 1
    assert len(result.err) == 1
    assert result.err[0].startswith("ModelNameError: unknown model 'nothing_like_it'")
    assert not (tmp_path / "out").exists()
