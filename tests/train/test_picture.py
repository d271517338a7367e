"""Pictures of what an MAE fills in: what they show, and that a run does not notice them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from brainfm import RecipeError
from brainfm.cli.main import main
from brainfm.train import picture
from brainfm.train.mae import patchify, unpatchify
from brainfm.train.picture import reconstruction, write_picture
from brainfm.train.recipe import load_recipe

FIELDS = ["epochs=3", "batch_size=6", "workers=0", "precision=float32", "warmup_epochs=1", "decoder_depth=1"]
FIELDS += ["input_size=[16,24,24]"]


@pytest.fixture
def pretrain(cohort, tmp_path):
    """A function (folder, arguments) that runs `brainfm pretrain test_vit_3d`."""

    def run(folder, *arguments):
        named = [f"manifest={cohort}", f"output={tmp_path / folder}"]
        done = CliRunner().invoke(main, ["pretrain", "test_vit_3d", *named, *FIELDS, *arguments])
        assert done.exit_code == 0, done.output
        return tmp_path / folder

    return run


@pytest.mark.parametrize("place", ["loader", "device"])
def test_run_with_pictures_ends_bit_identical_to_one_without(place, pretrain):
    with_them = pretrain("with", "picture_every=2", f"augment_on={place}")
    without = pretrain("without", "picture_every=0")
    states = [torch.load(run / "checkpoints" / "last.pt", weights_only=True) for run in (with_them, without)]
    for key, value in states[0]["model_state_dict"].items():
        assert torch.equal(value, states[1]["model_state_dict"][key]), key
    losses = [[json.loads(line)["loss"] for line in (run / "log.jsonl").open()] for run in (with_them, without)]
    assert losses[0] == losses[1]
    assert [path.name for path in (with_them / "reconstructions").iterdir()] == ["epoch0002.png"]
    assert not (without / "reconstructions").exists()


def test_pictures_of_every_epoch_show_the_same_scans_and_what_is_learned(pretrain):
    run = pretrain("run", "picture_every=1", "epochs=2")
    first, second = (np.asarray(Image.open(run / "reconstructions" / f"epoch000{n}.png")) for n in (1, 2))
    column = first.shape[1] // 3
    assert first[:, :column].std() > 20
    assert np.array_equal(first[:, : 2 * column], second[:, : 2 * column])
    assert not np.array_equal(first, second)


def test_hidden_patches_are_dark_then_filled_in_and_visible_ones_stay():
    volumes = torch.randn(2, 2, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    patches = patchify(volumes, (8, 8, 8))
    mask = torch.zeros(2, 18)
    mask[:, ::2] = 1
    guess = torch.full_like(patches, 0.5)
    original, masked, filled = reconstruction(volumes, guess, mask, (8, 8, 8), norm_pix_loss=False).unbind(1)
    hidden = unpatchify(mask[:, :, None].expand_as(patches), (8, 8, 8), (2, 3, 3))[:, 0].bool()
    assert torch.equal(original, volumes[:, 0])
    assert torch.equal(masked[~hidden], volumes[:, 0][~hidden])
    assert torch.equal(filled[~hidden], volumes[:, 0][~hidden])
    assert (masked[hidden] == volumes.min()).all()
    assert (filled[hidden] == 0.5).all()
    normalised = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    whole = reconstruction(volumes, normalised, mask, (8, 8, 8), norm_pix_loss=True)[:, 2]
    assert torch.allclose(whole, volumes[:, 0], atol=1e-5)


def test_picture_has_middle_slices_in_rows_of_planes_front_and_top_up(tmp_path):
    panels = np.zeros((1, 3, 200, 210, 220), np.float32)
    panels[0, 0, 100, 209, 5] = panels[0, 0, 199, 105, 7] = panels[0, 0, 199, 9, 110] = 1
    panels[0, 0, :, :, 219] = 1e-3  # so that the 99.5th percentile is above 0
    write_picture(panels, tmp_path / "picture.png")
    shown = np.asarray(Image.open(tmp_path / "picture.png"))
    assert shown.shape == ((210 + 8) + 2 * (200 + 8), 3 * (220 + 8))
    assert shown[4 + 0, 4 + 5] == 255  # axial: the front row
    assert shown[218 + 4 + 0, 4 + 7] == 255  # coronal: the top row
    assert shown[218 + 208 + 4 + 0, 4 + 9] == 255  # sagittal: top, y from the left


def test_picture_that_cannot_be_written_costs_a_warning(pretrain, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(picture, "write_picture", full)
    run = pretrain("run", "picture_every=3")
    assert "going on without a picture of reconstructions: No space left on device" in caplog.text
    assert (run / "export" / "config.json").is_file()


def test_pictures_are_of_an_mae():
    with pytest.raises(RecipeError, match="picture_every is of mae, not of simclr"):
        load_recipe("simclr_resnet18_3d", ["picture_every=1"])
    assert load_recipe("mae_vit_tiny_3d").picture_every == 10
