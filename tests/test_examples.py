"""The examples run as they stand, on the packaged scan and the test model."""

import csv
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import brainfm

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def expected(small_sample, small_model):
    transform = brainfm.create_transform(small_model)
    with torch.inference_mode():
        return small_model(transform(*small_sample)[None])


@pytest.fixture
def two_groups(tmp_path, small_sample):
    """A manifest of 18 made-up patients: in half of them a part of the brain is dimmed."""
    image = nib.load(small_sample[0])
    voxels = image.get_fdata(dtype=np.float32)
    draw = np.random.default_rng(0)
    rows = []
    for number in range(18):
        changed = voxels * (1 + 0.02 * draw.standard_normal(voxels.shape))
        if number % 2:
            changed[10:20, 15:30, 10:25] *= 0.5
        name = f"patient{number}.nii.gz"
        nib.Nifti1Image(changed.astype(np.float32), image.affine).to_filename(tmp_path / name)
        rows.append([name, str(small_sample[1]), f"p{number}", number % 2])
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image_path", "mask_path", "patient_id", "label"], *rows])
    return tmp_path / "manifest.csv"


def test_embed_and_classify_tells_two_groups_apart(two_groups, tmp_path):
    output = tmp_path / "embeddings.csv"
    score = load_example("embed_and_classify").main(
        [str(two_groups), "--model", "test_resnet_3d", "--output", str(output)]
    )
    assert output.exists()
    assert score > 0.9


def test_monai_pipeline_gives_the_embedding_of_the_three_lines(small_sample, expected):
    vector = load_example("monai_pipeline").main([*map(str, small_sample), "--model", "test_resnet_3d"])
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)


def test_torch_hub_gives_the_embedding_of_the_three_lines(small_sample, expected):
    vector = load_example("torch_hub").main([*map(str, small_sample), "--model", "test_resnet_3d"])
    torch.testing.assert_close(vector, expected, rtol=0, atol=0)


def test_own_model_is_registered_saved_and_loaded_again(sample, tmp_path, monkeypatch):
    from brainfm import registry

    monkeypatch.setattr(registry, "_entrypoints", dict(registry._entrypoints))
    monkeypatch.setattr(registry, "_cfgs", dict(registry._cfgs))
    example = load_example("register_own_model")
    arguments = [*map(str, sample), str(tmp_path / "weights.safetensors")]
    first, second = example.main(arguments), example.main(arguments)
    assert first.shape == (1, 64)
    assert torch.equal(first, second)
