"""What is beside tables and training, on a GPU: saliency, dense features, planted changes, synthetic volumes."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_bundle import write_bundle

import brainfm
from brainfm.cli.main import main
from brainfm.downstream.saliency import grad_cam, occlusion
from brainfm.phantom import make_cohort
from brainfm.synthesis import synthesize

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return make_cohort(6, tmp_path_factory.mktemp("phantoms"), spacing=4)


def run(*arguments) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def assert_like(found: list[dict[str, str]], wanted: list[dict[str, str]], within: float) -> None:
    """Rows of the same words, and of numbers that differ by no more."""
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            try:
                number = float(value)
            except ValueError:
                assert one[key] == value, key
            else:
                assert float(one[key]) == pytest.approx(number, abs=within, nan_ok=True), key


@pytest.mark.parametrize("way", [grad_cam, occlusion])
def test_saliency_is_that_of_the_processor(way, small_sample, gpu):
    arguments = {"window": 16} if way is occlusion else {}
    maps = []
    for device in (gpu, "cpu"):
        model = brainfm.create_model("test_resnet_3d", pretrained=True).to(device)
        direction = np.ones(model.num_features)
        maps.append(way(model, *small_sample, direction=direction, **arguments).map)
    assert np.abs(maps[0] - maps[1]).max() < 1e-3 * np.abs(maps[1]).max()


@pytest.mark.parametrize("command", ["segment", "recovery"])
def test_analysis_is_that_of_the_processor(command, gpu, tmp_path):
    for device in (gpu, "cpu"):
        run(command, "--model", "test_resnet_3d", "--phantoms", 4, "--device", device, "-o", tmp_path / device)
    table = "dice.csv" if command == "segment" else "recovery.csv"
    assert_like(rows(tmp_path / gpu / table), rows(tmp_path / "cpu" / table), within=5e-3)


def test_synthetic_volume_is_that_of_the_processor(gpu, tmp_path):
    """But for the decoder's half precision, in which the bundle's own script decodes on a GPU."""
    bundle = write_bundle(tmp_path / "bundle")
    drawn = []
    for device in (gpu, "cpu"):
        manifest = synthesize(1, tmp_path / device, bundle=bundle, device=device)
        (row,) = rows(Path(manifest))
        drawn.append(nib.load(tmp_path / device / row["image_path"]).get_fdata())
    assert np.abs(drawn[0] - drawn[1]).max() < 2e-2
    assert drawn[1].std() > 0.01


def test_memory_is_given_back(phantoms, gpu):
    """A table more leaves no more on the card than a table did."""
    if gpu == "cpu":
        pytest.skip("torch counts a GPU's memory")
    model = brainfm.create_model("test_resnet_3d", pretrained=True)
    left = []
    for _ in range(3):
        brainfm.embed(phantoms, model, device=gpu)
        left.append(torch.cuda.memory_allocated())
    assert left[2] <= left[1]
