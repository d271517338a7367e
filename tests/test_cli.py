"""The command line: what it prints, what it writes, and that an error is one clear line and exit code 1."""

import csv
import json
import logging
import re
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import brainfm
from brainfm import demo, registry
from brainfm.assets import ASSETS
from brainfm.cli import main
from brainfm.files import file_sha256
from brainfm.weights import save_state

SMALL = ("--model", "test_resnet_3d")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `brainfm …` in this process; gives its exit code, its output and its lines on stderr."""
    monkeypatch.setattr(logging.getLogger("brainfm"), "handlers", [])  # those of a test go with its stderr

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return SimpleNamespace(code=caught.value.code, out=written.out, err=written.err.splitlines())

    return call


def in_a_process(*arguments):
    """Runs `brainfm …` in a process of its own."""
    command = [sys.executable, "-m", "brainfm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def notes(tmp_path):
    """A text file that poses as a scan."""
    path = tmp_path / "notes.nii"
    path.write_text("not a scan. " * 100)
    return path


# --- list and info --------------------------------------------------------------------------------


def test_list_names_every_model_once(run):
    result = run("list")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()] == brainfm.list_models()


def test_list_filters_by_a_pattern(run):
    assert [line.split()[0] for line in run("list", "*vit*").out.splitlines()] == brainfm.list_models("*vit*")


def test_list_pretrained_gives_full_names_and_where_the_weights_are(run):
    lines = run("list", "--pretrained").out.splitlines()
    assert [line.split()[0] for line in lines] == brainfm.list_pretrained()
    assert all("no published weights" not in line for line in lines)
    assert any(line.startswith("test_resnet_3d.phantoms") and "in this package" in line for line in lines)


def test_list_of_nothing_is_an_error(run):
    result = run("list", "*unet*")
    assert result.code == 1
    assert result.err == ["ModelNameError: no model matches '*unet*'; 'brainfm list' names them all"]


def test_info_tells_the_contract_the_weights_and_the_cohorts(run):
    result = run("info", "simclr_resnet18_3d")
    assert result.code == 0
    for fact in (
        "512-d",
        "3D-Neuro-SimCLR/releases/download/v1.0.0",
        "f046dafe009de0cf",
        "MIT",
        "193×229×193 voxels of 1×1×1 mm",
        "crop the fixed box [10:160, 19:211, 1:193]",
        "[1, 150, 192, 192]",
        "18,759 patients, 44,958 scans",
        "ADNI",
        "0.904 ± 0.008",
        "@inproceedings",
    ):
        assert fact in result.out


def test_info_of_an_unknown_model_suggests_the_nearest(run):
    result = run("info", "simclr_resnet18")
    assert result.code == 1
    assert result.out == ""
    assert len(result.err) == 1
    assert result.err[0].startswith("ModelNameError: unknown model 'simclr_resnet18'; did you mean ")
    assert "simclr_resnet18_3d" in result.err[0]


@pytest.mark.parametrize("name", ["some/folder", "weights.safetensors", "s3:bucket"])
def test_info_of_a_place_without_a_scheme_names_the_schemes(name, run):
    result = run("info", name)
    assert result.code == 1
    assert "hf-hub:" in result.err[0]
    assert "local-dir:" in result.err[0]


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
    assert result.out == f"1 scans → {tmp_path / 'out.csv'} (128 numbers each)\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv"]


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
    ],
)
def test_embed_with_a_wrong_argument_is_one_line(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("embed", *arguments)
    assert result.code == 1
    assert len(result.err) == 1
    assert message in result.err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("a.nii",), ("a.nii", "-o", "out.csv", "--batch-size", "0")])
def test_embed_without_what_it_needs_is_a_usage_error(arguments, run):
    result = run("embed", *arguments)
    assert result.code == 2
    assert "Usage:" in result.err[0]


def test_embed_takes_a_weight_file(run, tmp_path, small_sample, small_model):
    weights = ("--checkpoint", ASSETS / "test_resnet_3d.safetensors")
    assert run("embed", small_sample[0], "-o", tmp_path / "out.npz", *SMALL, *weights).code == 0
    with np.load(tmp_path / "out.npz") as table:
        np.testing.assert_array_equal(table["embeddings"], brainfm.embed([small_sample[0]], small_model).vectors)


def test_interrupted_embed_says_that_it_goes_on(run, tmp_path, small_sample, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(brainfm, "embed", interrupt)
    result = run("embed", small_sample[0], "-o", tmp_path / "out.csv", *SMALL)
    assert result.code == 130
    assert result.err == ["interrupted; what is finished is kept, and the same command goes on from there"]


def test_weights_that_cannot_be_fetched_are_one_line_with_the_way_out(run, tmp_path, small_sample, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cfgs = registry._cfgs["simclr_resnet18_3d"]
    closed = replace(cfgs["kaczmarek2025"], url=f"http://127.0.0.1:{port}/weights.tar")
    monkeypatch.setitem(cfgs, "kaczmarek2025", closed)
    monkeypatch.setenv("BRAINFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the Hub client's retries
    result = run("embed", small_sample[0], "-o", tmp_path / "out.csv", "--model", "simclr_resnet18_3d")
    assert result.code == 1
    assert result.err[-1].startswith(f"WeightsNotFoundError: cannot download {closed.url}")
    assert re.search(rf"put the file at {tmp_path}/cache/\S+/weights\.tar", result.err[-1])
    assert not any("Traceback" in line for line in result.err)
    assert not (tmp_path / "out.csv").exists()


# --- fetch, convert, push, verify, info --overlap -------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of pretraining, as SimCLR leaves it."""
    torch.manual_seed(3)
    state = brainfm.create_model("test_resnet_3d").state_dict()
    network = {f"module.encoder.{key}": value for key, value in state.items()} | {"module.projector.0.weight": state}
    network["module.projector.0.weight"] = torch.ones(2, 2)
    torch.save({"epoch": 7, "model_state_dict": network, "optimizer_state_dict": {}}, tmp_path / "mine.tar")
    return tmp_path / "mine.tar"


@pytest.fixture
def converted(run, checkpoint, tmp_path):
    """A folder of the test model, as the command line makes it."""
    assert run("convert", checkpoint, tmp_path / "folder", *SMALL).code == 0
    return tmp_path / "folder"


def test_fetch_says_where_the_weights_are(run):
    result = run("fetch", "test_resnet_3d")
    assert (result.code, result.err) == (0, [])
    assert result.out == f"test_resnet_3d → {ASSETS / 'test_resnet_3d.safetensors'}\n"


def test_fetch_to_a_folder_says_how_it_is_loaded(run, tmp_path, small_model):
    result = run("fetch", "test_resnet_3d", "--to", tmp_path / "folder")
    assert (result.code, result.err) == (0, [])
    name = re.search(r"\(load it as (local-dir:.*)\)", result.out).group(1)
    state = brainfm.create_model(name).state_dict()
    assert all(torch.equal(state[key], value) for key, value in small_model.state_dict().items())


def test_fetch_from_the_hub_to_a_cache_and_again_without_a_network(run, hub, converted, tmp_path):
    hub.add("lab/tiny", {path.name: path.read_bytes() for path in converted.iterdir()})
    results = [run("fetch", "hf-hub:lab/tiny", "--cache-dir", tmp_path / "cache") for _ in range(2)]
    assert [result.code for result in results] == [0, 0]
    assert f"hf-hub:lab/tiny → {tmp_path / 'cache'}" in results[0].out
    assert hub.downloads == 1


def test_convert_says_what_it_made_and_what_is_not_said_of_it(run, checkpoint, tmp_path):
    result = run("convert", checkpoint, tmp_path / "folder", *SMALL)
    assert result.code == 0
    first, notes, unstated = result.out.splitlines()
    assert re.fullmatch(rf"{tmp_path / 'folder'}: test_resnet_3d, 128 numbers; sha256 [0-9a-f]{{64}}", first)
    assert notes.startswith("Converted from mine.tar (sha256 ")
    assert "cohorts, licence" in unstated
    assert "--cfg" in unstated


def test_convert_takes_what_is_known_from_a_json_file(run, checkpoint, tmp_path):
    cfg = {"licence": "CC-BY-4.0", "notes": "Unsere ä.", "cohorts": [{"name": "Lab", "patients": 2, "scans": 3}]}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg, ensure_ascii=False), encoding="utf-8")
    result = run("convert", checkpoint, tmp_path / "folder", *SMALL, "--cfg", tmp_path / "cfg.json")
    assert result.code == 0
    assert "Unsere ä." in result.out
    assert "Not stated" not in result.out
    said = run("info", f"local-dir:{tmp_path / 'folder'}").out
    assert "CC-BY-4.0" in said
    assert "Pretrained on 2 patients, 3 scans" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"license": "MIT"}', "has no field 'license'; did you mean 'licence'?"),
        ('{"licence": "MIT"', "cfg.json: "),
        ("[1]", "cfg.json: "),
        ("3", "cfg.json: "),
        ('{"licence": 3}', "licence is 3, and must be"),
        ('{"cohorts": 3}', "cfg.json: "),
    ],
)
def test_convert_with_a_cfg_that_means_nothing_is_one_line(text, message, run, checkpoint, tmp_path):
    (tmp_path / "cfg.json").write_text(text)
    result = run("convert", checkpoint, tmp_path / "folder", *SMALL, "--cfg", tmp_path / "cfg.json")
    assert result.code == 1
    (line,) = [line for line in result.err if "left out" not in line]
    assert message in line
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "none.pt", "folder", *SMALL), "WeightsNotFoundError: none.pt: no such weight file"),
        (("convert", "mine.tar", "folder", "--model", "resnet"), "ModelNameError: unknown model 'resnet'"),
        (("convert", "mine.tar", "folder", "--model", "test_resnet_3d.phantoms"), "WeightsError: mine.tar: sha256 is"),
        (("convert", "mine.tar", "folder", "--model", "test_vit_3d"), "do not fit this VisionTransformer"),
        (("convert", "mine.tar", "mine.tar", *SMALL), "BrainfmError: mine.tar: a file; name a folder"),
        (("convert", "mine.tar", ".", *SMALL), "BrainfmError: .: not empty, and no model's folder"),
        (("fetch", "vit_tiny_3d"), "WeightsNotFoundError: no weights of vit_tiny_3d"),
        (("fetch", "test_resnet"), "ModelNameError: unknown model 'test_resnet'"),
        (("fetch", "hf-hub:lab/none"), "no such repository, or a private one"),
        (("fetch", "local-dir:none", "--to", "folder"), "WeightsNotFoundError: local-dir:none"),
        (("fetch", "test_resnet_3d", "--to", "mine.tar"), "BrainfmError: mine.tar: a file; name a folder"),
        (("push", "none", "lab/tiny"), "WeightsNotFoundError: local-dir:none"),
        (("push", ".", "lab/tiny"), "config.json is not there"),
        (("push", ".", "tiny"), "BrainfmError: 'tiny' is not the name of a repository"),
        (("verify", "vit_tiny_3d"), "WeightsNotFoundError: no weights of vit_tiny_3d"),
        (("verify", "local-dir:none"), "WeightsNotFoundError: local-dir:none"),
        (("verify", "test_resnet_3d", "--device", "nonsense"), "BrainfmError: device 'nonsense' cannot be used here"),
        (("verify", "test_resnet_3d", "--device", "cuda:99"), "BrainfmError: device 'cuda:99' cannot be used here"),
        (("info", "test_resnet", "--overlap", "ADNI"), "ModelNameError: unknown model 'test_resnet'"),
    ],
)
def test_command_with_a_wrong_argument_is_one_line_and_writes_nothing(
    arguments, message, run, hub, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 1
    (line,) = [line for line in result.err if "left out" not in line]
    assert message in line
    assert result.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tar"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("fetch",),
        ("convert", "a.tar", "folder"),
        ("convert", "a.tar", *SMALL),
        ("convert", "a.tar", "folder", *SMALL, "--cfg", "missing.json"),
        ("push", "folder"),
        ("verify",),
        ("verify", "test_resnet_3d", "--dtype", "float64"),
        ("info", "test_resnet_3d", "--overlap"),
        ("info", "test_resnet_3d", "ADNI"),
    ],
)
def test_command_without_what_it_needs_is_a_usage_error(arguments, run):
    result = run(*arguments)
    assert result.code == 2
    assert "Usage:" in result.err[0]


def test_push_says_the_commit_and_the_hash_to_pin(run, hub, converted, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "write-token")
    result = run("push", converted, "lab/tiny", "--private")
    assert result.code == 0
    repository = hub.repositories["lab/tiny"]
    assert repository.private
    name, pinned = result.out.splitlines()
    assert name == f"hf-hub:lab/tiny@{repository.branches['main']}"
    assert pinned.split()[1].rstrip(":") == brainfm.create_model(f"local-dir:{converted}").pretrained_cfg.sha256


def test_push_without_a_token_is_one_line(run, hub, converted):
    result = run("push", converted, "lab/tiny")
    assert result.code == 1
    assert len(result.err) == 1
    assert result.err[0].startswith("BrainfmError: hf-hub:lab/tiny: not uploaded: the token was refused (401)")


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_verify_of_a_packaged_model_is_ok_in_every_dtype(name, run):
    dtypes = ("--dtype", "float32", "--dtype", "bfloat16", "--dtype", "float16")
    result = run("verify", name, *dtypes)
    assert (result.code, result.err) == (0, [])
    lines = result.out.splitlines()
    assert [re.split(r"\s{2,}", line)[0].split(" relative")[0].strip() for line in lines] == [
        "float32",
        "float32, optimized",
        "bfloat16, optimized",
        "float16, optimized",
    ]
    assert all(re.search(r"relative error \d\.\de[-+]\d\d   ok \(at most [\d.e-]+\)$", line) for line in lines)


def test_verify_of_a_converted_folder_is_ok_and_of_other_weights_is_off(run, converted):
    result = run("verify", f"local-dir:{converted}")
    assert result.code == 0
    assert result.out.count(" ok ") == 3
    model = brainfm.create_model(f"local-dir:{converted}")
    for value in model.state_dict().values():
        value.mul_(1.05) if value.is_floating_point() else None
    save_state(model.state_dict(), converted / "model.safetensors")
    config = json.loads((converted / "config.json").read_text())
    config["pretrained_cfg"]["sha256"] = file_sha256(converted / "model.safetensors")
    (converted / "config.json").write_text(json.dumps(config))
    result = run("verify", f"local-dir:{converted}")
    assert result.code == 1
    assert result.out.count(" OFF ") == 3
    assert result.err == [
        f"these are not the features of local-dir:{converted}; the input, the weights or the arithmetic differ"
    ]


def test_verify_without_a_fingerprint_is_one_line(run, converted):
    config = json.loads((converted / "config.json").read_text())
    del config["fingerprint"]
    (converted / "config.json").write_text(json.dumps(config))
    result = run("verify", f"local-dir:{converted}")
    assert (result.code, result.out) == (1, "")
    assert len(result.err) == 1
    assert "no fingerprint is known for these weights" in result.err[0]


def test_overlap_is_said_of_every_data_set_in_its_order(run):
    result = run("info", "simclr_resnet18_3d", "--overlap", "IXI", "ADNI", "my_study", "OpenBHB")
    assert (result.code, result.err) == (0, [])
    unknown = "not among the pretraining cohorts by any name known here"
    assert result.out.splitlines() == [
        f"IXI: {unknown}",
        "ADNI: in the pretraining data (the same: ADNI, 3,028 patients, 21,778 scans)",
        f"my_study: {unknown}",
        "OpenBHB: in the pretraining data (a collection that holds CoRR: CoRR, 1,416 patients, 1,416 scans)",
        "OpenBHB: in the pretraining data (a collection that holds GSP: GSP, 1,569 patients, 1,569 scans)",
    ]


def test_overlap_may_be_asked_for_in_front_and_of_a_name_with_spaces(run):
    result = run("info", "--overlap", "simclr_resnet18_3d", "Dallas Lifespan Brain Study")
    assert result.code == 0
    assert result.out.startswith("Dallas Lifespan Brain Study: in the pretraining data (the name in full: DLBS")


def test_overlap_of_a_model_without_recorded_cohorts_says_that_instead(run):
    result = run("info", "vit_tiny_3d", "--overlap", "ADNI")
    assert result.code == 0
    assert result.out == "ADNI: vit_tiny_3d records no pretraining cohorts\n"


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
    red = (pixels[..., 0] - pixels[..., 1]) > 100
    grey = (np.ptp(pixels, axis=-1) == 0) & (pixels[..., 0] > 0)
    for panel in range(3):
        columns = slice(panel * width // 3, (panel + 1) * width // 3)
        assert 0.1 < grey[:, columns].mean() < 0.9
        assert red[:, columns].sum() > 100


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


# --- All commands ---------------------------------------------------------------------------------


def test_debug_shows_the_traceback_and_nothing_else_does():
    plain, debug = (in_a_process(*flags, "info", "nothing_like_it") for flags in ((), ("--debug",)))
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert "ModelNameError: unknown model 'nothing_like_it'" in debug.stderr


def test_version_is_the_packages(run):
    result = run("--version")
    assert result.code == 0
    assert brainfm.__version__ in result.out


@pytest.mark.parametrize(
    "command", [(), ("list",), ("info",), ("demo",), ("embed",), ("fetch",), ("convert",), ("push",), ("verify",)]
)
def test_help_is_there_for_every_command(command, run):
    result = run(*command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out
