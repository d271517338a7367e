"""Folders for others' leaderboards, run as those run them: a fresh process, and a stand-in for their package."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import brainfm
from brainfm.cli import main
from brainfm.errors import BrainfmError, LicenceError, ScanError
from brainfm.extractors import MniImages, export_extractor
from brainfm.phantom import make_phantom
from brainfm.scan.spaces import FSL_MNI152


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=900)


def test_brainfmbench_takes_the_folder(tmp_path, small_sample, small_model):
    """What its scripts/validate_extract.py asks for, and the numbers of `brainfm embed`."""
    folder = tmp_path / "test_resnet_3d"
    result = CliRunner().invoke(
        main, ["export-extractor", "test_resnet_3d", "--for", "brainfmbench", "-o", str(folder)]
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {"model.yaml", "extract.py", "weights.txt", "requirements.txt"}
    said = yaml.safe_load((folder / "model.yaml").read_text())
    assert said.keys() >= {"name", "authors", "preprocessing", "embedding_dim", "datasets", "tasks"}
    assert said["weightless"]  # its weights are in the package
    assert [line for line in (folder / "weights.txt").read_text().splitlines() if line and line[0] != "#"] == []

    scans = tmp_path / "in"
    for name in ("normalized.nii.gz", "mask.nii.gz"):
        for patient in ("SUB01", "SUB02"):
            (scans / patient).mkdir(parents=True, exist_ok=True)
            nib.load(small_sample[name == "mask.nii.gz"]).to_filename(scans / patient / name)
    (scans / "SUB03").mkdir()
    noise = np.random.default_rng(0).random((16, 16, 16), dtype=np.float32) * 100  # as their validator's
    nib.Nifti1Image(noise, np.eye(4)).to_filename(scans / "SUB03" / "normalized.nii.gz")
    (tmp_path / "weights").mkdir()
    call = "import sys; sys.path.insert(0, sys.argv[1]); from extract import extract; extract(*sys.argv[2:])"
    done = run("-c", call, folder, scans, tmp_path / "out" / "features.csv", tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    rows = list(csv.reader((tmp_path / "out" / "features.csv").open()))
    assert rows[0] == ["subject_id", *(f"f{n}" for n in range(128))]
    assert [row[0] for row in rows[1:]] == ["SUB01", "SUB02", "SUB03"]
    wanted = brainfm.embed([small_sample], small_model).vectors[0]
    np.testing.assert_allclose(np.array(rows[1][1:], float), wanted, rtol=1e-5)
    assert set(rows[3][1:]) == {"nan"}
    assert "SUB03: " in done.stderr


def test_brainfmbench_says_where_weights_are_downloaded(tmp_path, small_model):
    export_extractor("simclr_resnet18_3d", "brainfmbench", tmp_path / "published")
    (url,) = (tmp_path / "published" / "weights.txt").read_text().split()
    assert url == brainfm.get_pretrained_cfg("simclr_resnet18_3d").url
    assert "checkpoint_path=files[0]" in (tmp_path / "published" / "extract.py").read_text()

    brainfm.save_for_hub(small_model, tmp_path / "own")
    name = f"local-dir:{tmp_path / 'own'}"
    with pytest.raises(BrainfmError, match="--weights-url"):
        export_extractor(name, "brainfmbench", tmp_path / "none")
    export_extractor(name, "brainfmbench", tmp_path / "hosted", weights_url="https://example.org/model.safetensors")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "download").write_bytes((tmp_path / "own" / "model.safetensors").read_bytes())
    spec = importlib.util.spec_from_file_location("hosted_extract", tmp_path / "hosted" / "extract.py")
    extract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extract)
    loaded = extract.load(tmp_path / "weights")
    assert torch.equal(next(loaded.parameters()), next(small_model.parameters()))
    (tmp_path / "weights" / "download").unlink()
    with pytest.raises(FileNotFoundError, match="names belongs there"):
        extract.load(tmp_path / "weights")


@pytest.mark.slow
def test_fomo26_s_program_writes_one_finite_vector_or_says_why_not(tmp_path, small_sample, small_model):
    folder = export_extractor("test_resnet_3d", "fomo26", tmp_path / "fomo26", requirement="brainfm @ file:///brainfm")
    assert (folder / "requirements.txt").read_text() == "brainfm @ file:///brainfm\n"
    definition = (folder / "Apptainer.def").read_text()
    assert "./model /app/model" in definition
    assert 'exec python /app/predict.py "$@"' in definition
    output = tmp_path / "out" / "embedding.npy"
    done = run(folder / "predict.py", "--input", small_sample[0], "--output", output)
    assert done.returncode == 0, done.stderr
    vector = np.load(output, allow_pickle=False)  # as container_validator/output_numpy.py: floats, 1-D, finite
    assert (vector.dtype, vector.shape) == (np.float32, (128,))
    np.testing.assert_allclose(vector, brainfm.embed([str(small_sample[0])], small_model).vectors[0], rtol=1e-5)
    nib.Nifti1Image(np.random.default_rng(0).random((16, 16, 16)), np.eye(4)).to_filename(tmp_path / "noise.nii.gz")
    done = run(folder / "predict.py", "--input", tmp_path / "noise.nii.gz", "--output", tmp_path / "none.npy")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ScanError: ")
    assert not (tmp_path / "none.npy").exists()


@pytest.fixture
def brainmarks(monkeypatch):
    """What of brainmarks_smri a model's file imports: names alone, from its models/base.py."""
    base = ModuleType("brainmarks_smri.models.base")
    base.EmbeddingOutput, base.MODELS = dict, {}
    base.register_model = lambda function: base.MODELS.setdefault(function.__name__, function)
    for name, module in (
        ("brainmarks_smri", ModuleType("brainmarks_smri")),
        ("brainmarks_smri.models", ModuleType("brainmarks_smri.models")),
        ("brainmarks_smri.models.base", base),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return base


def head(patient: int = 0) -> tuple[nib.Nifti1Image, nib.Nifti1Image, np.ndarray]:
    """A phantom as a scanner would have it: in a world of its own, axes turned; and its affine to MNI152NLin6Asym."""
    phantom = make_phantom(patient, spacing=4.0)
    angle = np.deg2rad(8)
    to_own = np.eye(4)
    to_own[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    to_own[:3, 3] = [12, -7, 20]
    affine = to_own @ phantom.affine
    image = (phantom.image - phantom.image.min()).astype(np.float32)
    turned = [nib.Nifti1Image(a, affine).as_reoriented([[1, 1], [0, -1], [2, 1]]) for a in (image, phantom.mask)]
    return turned[0], turned[1], np.linalg.inv(FSL_MNI152.to_2009c) @ np.linalg.inv(to_own)


def test_brainmarks_s_model_meets_its_contract(tmp_path, brainmarks, small_model):
    folder = export_extractor("test_resnet_3d", "brainmarks", tmp_path / "brainmarks")
    spec = importlib.util.spec_from_file_location("test_resnet_3d", folder / "test_resnet_3d.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = brainmarks.MODELS["test_resnet_3d"]()
    assert (model.name, model.embed_dim) == ("test_resnet_3d", 128)
    image, mask, affine = head()
    sample = model.transform({"image": image, "brain_mask": mask, "mni_affine": affine})
    (output,) = model.forward_embeddings([sample], return_dense=True)
    assert output["global_embedding"].shape == (128,)
    assert output["dense_embedding"].shape[3] == 128
    torch.testing.assert_close(output["dense_embedding"].mean(dim=(0, 1, 2)), output["global_embedding"])  # its pool
    assert model.forward_embeddings([sample])[0]["dense_embedding"] is None

    # the phantom as it lies in the contract's space has nearly the same embedding: one interpolation apart
    phantom = make_phantom(0, spacing=4.0)
    own = brainfm.embed([((phantom.image, phantom.affine), (phantom.mask, phantom.affine))], small_model).vectors[0]
    other = make_phantom(1, spacing=4.0)
    far = brainfm.embed([((other.image, other.affine), (other.mask, other.affine))], small_model).vectors[0]
    apart = np.linalg.norm(output["global_embedding"].numpy() - own)
    assert apart < 0.5 * np.linalg.norm(far - own)


def test_a_block_of_the_dense_grid_lies_where_its_cell_looks(small_model):
    image, mask, affine = head()
    found = MniImages(small_model)(image, mask, affine)
    info = small_model.feature_info[-1]
    cell = np.array([1, 0, 1])
    middle = cell * info["reduction"] + (np.array(info["reduction"]) - 1) / 2  # of its block, in voxels of their grid
    world = found.dense_affine[:3, :3] @ middle + found.dense_affine[:3, 3]
    in_mni = FSL_MNI152.to_2009c @ affine @ [*world, 1]
    looked_at = cell * info["reduction"] + info["offset"]  # z, y, x of the contract's tensor
    grid = small_model.pretrained_cfg.input_spec.grid
    wanted = np.array(grid.origin) + np.array(grid.spacing) * looked_at[::-1]
    np.testing.assert_allclose(in_mni[:3], wanted, atol=1.0)  # the matrix of the phantom is rigid but for 1.5 %


def test_brainmarks_refuses_what_its_images_cannot_meet(small_model):
    image, mask, _ = head()
    with pytest.raises(ScanError, match="needs a brain mask and its affine"):
        MniImages(small_model)(image, mask, None)
    with pytest.raises(ScanError, match="the mask has"):
        MniImages(small_model)(image, nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), np.eye(4))


def test_exports_refuse_what_nobody_could_run(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(BrainfmError, match="not an empty folder"):
        export_extractor("test_resnet_3d", "fomo26", tmp_path / "full")
    with pytest.raises(BrainfmError, match="has no weights"):
        export_extractor("densenet121_3d", "fomo26", tmp_path / "new")
    with pytest.raises(BrainfmError, match="no leaderboard"):
        export_extractor("test_resnet_3d", "openneuro", tmp_path / "new")
    from dataclasses import replace

    from brainfm import extractors

    found = extractors.resolve("test_resnet_3d")
    kept = replace(found, cfg=replace(found.cfg, redistribute=False, licence="of their own"))
    monkeypatch.setattr(extractors, "resolve", lambda name: kept)
    with pytest.raises(LicenceError, match="lets nobody pass its weights on"):
        export_extractor("test_resnet_3d", "fomo26", tmp_path / "new")
    assert not Path(tmp_path / "new").exists()
