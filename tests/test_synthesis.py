"""Synthetic volumes, from a bundle's folder to files: the tiny untrained bundle has every part of the real one."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from monai.networks.nets import AutoencoderKL
from monai.networks.schedulers import DDIMScheduler
from tiny_bundle import CONFIG, write_bundle

from brainfm import BrainfmError, WeightsError
from brainfm.cli.main import main
from brainfm.diffusion import DiffusionUNet
from brainfm.manifest import ScanRecord, list_scans
from brainfm.sources import kind_of_all
from brainfm.synthesis import PUBLISHED, LatentDiffusion, find_bundle, read_config, synthesize
from brainfm.train.sources import read_source


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def run(*arguments):
    done = CliRunner().invoke(main, ["synthesize", *map(str, arguments)])
    return done.exit_code, done.output


def rows(folder):
    with (folder / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


# --- From file to file ----------------------------------------------------------------------------


def test_volumes_come_with_their_place_their_seeds_and_a_manifest_that_calls_them_synthetic(bundle, tmp_path):
    out = tmp_path / "drawn"
    code, said = run("--n", 3, "--out", out, "--bundle", bundle, "--age", "0.2:0.4", "--sex", 1, "--ventricles", 0.7)
    assert code == 0, said
    assert said.endswith(f"{out / 'manifest.csv'}: 3 synthetic volumes, drawn by a model and not of people\n")
    made = rows(out)
    assert [*made[0]] == ["image_path", "patient_id", "age", "sex", "ventricles", "brain_volume", "source", "seed"]
    assert {(row["sex"], row["ventricles"], row["source"]) for row in made} == {("1", "0.7", "synthetic")}
    assert all(0.2 <= float(row["age"]) <= 0.4 for row in made)
    assert len({row["seed"] for row in made}) == len({row["age"] for row in made}) == 3
    image = nib.load(out / made[0]["image_path"])
    assert image.shape == (24, 32, 24)
    assert image.header.get_zooms() == pytest.approx((160 / 24, 7, 160 / 24))
    corners = nib.affines.apply_affine(image.affine, [[-0.5] * 3, [23.5, 31.5, 23.5]])
    assert np.allclose(corners, [[-80.5, -130.5, -72.5], [79.5, 93.5, 87.5]])  # the card's box of 160×224×160 mm
    voxels = image.get_fdata()
    assert voxels.min() >= 0
    assert voxels.max() <= 1
    assert voxels.std() > 0.01
    records, _ = read_source(out / "manifest.csv")
    assert kind_of_all(records) == "synthetic"
    assert kind_of_all([ScanRecord(records[0].image)]) == "synthetic"  # without the manifest's column
    assert records[0].patient_id == "synth0-000001"
    assert "not people" in (out / "README.txt").read_text()


def test_volume_is_that_of_its_seed_and_its_conditions(bundle, tmp_path):
    run("--n", 2, "--out", tmp_path / "a", "--bundle", bundle)
    config, weights = find_bundle(bundle)
    model = LatentDiffusion(config, *weights, torch.device("cpu"))
    row = rows(tmp_path / "a")[1]
    told = [float(row[name]) for name in ("sex", "age", "ventricles", "brain_volume")]
    drawn = model.draw(told, int(row["seed"]))
    found = nib.load(tmp_path / "a" / row["image_path"]).get_fdata()
    assert np.abs(found - drawn).max() < 0.51 / 4096
    for place in range(4):
        other = [1 - value if n == place else value for n, value in enumerate(told)]
        assert np.abs(model.draw(other, int(row["seed"])) - drawn).max() > 1e-4
    assert np.abs(model.draw(told, 1) - drawn).max() > 0.01


def test_steps_are_those_of_monai_and_the_bundles_script(bundle):
    config, weights = find_bundle(bundle)
    model = LatentDiffusion(config, *weights, torch.device("cpu"))
    assert list(config.moments) == [800, 600, 400, 200, 0]
    assert [*PUBLISHED.moments] == [*range(980, -1, -20)]
    theirs = DDIMScheduler(1000, "scaled_linear_beta", clip_sample=False, beta_start=0.0015, beta_end=0.0205)
    theirs.set_timesteps(5)
    told = torch.tensor([[1.0, 0.3, 0.2, 0.6]])
    latent = torch.randn(1, 3, 6, 8, 6, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for step in config.moments:  # the loop of the bundle's scripts/sampler.py
            channels = told[..., None, None, None].expand(-1, -1, 6, 8, 6)
            time_of = torch.tensor([step])
            noise = model.diffusion(torch.cat([latent, channels], 1), timesteps=time_of, context=told[None])
            latent, _ = theirs.step(noise, step, latent)
        wanted = model.autoencoder.decode_stage_2_outputs(latent)[0, 0].clamp(0, 1).numpy()
    assert np.abs(model.draw(told[0].tolist(), 7) - wanted).max() < 1e-5


def test_published_config_is_the_bundles_and_makes_volumes_of_1_mm(tmp_path):
    assert PUBLISHED.shape == (160, 224, 160)
    published = {
        **CONFIG,
        "autoencoder_def": {"_target_": "generative.networks.nets.AutoencoderKL", **PUBLISHED.autoencoder},
        "diffusion_def": CONFIG["diffusion_def"] | PUBLISHED.diffusion,
        "noise": "$torch.randn((1, 3, 20, 28, 20)).to(@device)",
        "set_timesteps": "$@scheduler.set_timesteps(num_inference_steps=50)",
    }
    published["autoencoder_def"]["num_channels"] = published["autoencoder_def"].pop("channels")
    (tmp_path / "inference.json").write_text(json.dumps(published))
    read = read_config(tmp_path / "inference.json")
    for name in ("latent", "steps", "train_steps", "beta", "schedule", "shape"):
        assert getattr(read, name) == getattr(PUBLISHED, name)
    with torch.device("meta"):
        unet, decoder = DiffusionUNet(**read.diffusion), AutoencoderKL(**read.autoencoder)
        assert 550e6 < sum(parameter.numel() for parameter in unet.parameters()) < 560e6  # "553M", as others counted
        assert decoder.encoder.blocks[0].conv.weight.shape == (64, 1, 3, 3, 3)


def test_float32_is_multiplied_whole_on_a_gpu(bundle, tmp_path, monkeypatch):
    seen = []
    forward = DiffusionUNet.forward

    def watched(self, *inputs, **named):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return forward(self, *inputs, **named)

    monkeypatch.setattr(DiffusionUNet, "forward", watched)
    before = torch.backends.cudnn.allow_tf32
    synthesize(1, tmp_path, bundle=bundle)
    assert set(seen) == {(False, False)}
    assert torch.backends.cudnn.allow_tf32 == before


def test_weights_by_the_names_of_monai_itself_are_the_same(bundle, tmp_path):
    new = write_bundle(tmp_path / "new", monai_names=True)
    synthesize(1, tmp_path / "a", bundle=bundle)
    synthesize(1, tmp_path / "b", bundle=new)
    image = rows(tmp_path / "a")[0]["image_path"]
    assert (tmp_path / "a" / image).read_bytes() == (tmp_path / "b" / image).read_bytes()


# --- Stopped and resumed --------------------------------------------------------------------------


@pytest.mark.slow
def test_run_that_is_killed_goes_on_and_ends_the_same(bundle, tmp_path):
    def command(folder):
        return [sys.executable, "-m", "brainfm", "synthesize", "--n=12", f"--out={folder}", f"--bundle={bundle}"]

    # With as many threads each: another number rounds otherwise, and pytest's own process may have been set one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, env=environment)
    with subprocess.Popen(command(tmp_path / "run"), stderr=subprocess.DEVNULL, env=environment) as process:
        until = time.monotonic() + 900
        while time.monotonic() < until and len(list((tmp_path / "run").glob("synth*.nii.gz"))) < 2:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("synth*.nii.gz")}
    assert 2 <= len(left) < 12
    subprocess.run(command(tmp_path / "run"), check=True, capture_output=True, env=environment)
    assert {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in left} == left
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_folder_takes_more_of_the_same_and_nothing_else(bundle, tmp_path):
    out = tmp_path / "out"
    synthesize(1, out, bundle=bundle, age=(0.5, 0.5))
    first = rows(out)
    synthesize(2, out, bundle=bundle, age=(0.5, 0.5))
    assert rows(out)[:1] == first
    assert len(list_scans(out / "manifest.csv")) == 2
    with pytest.raises(BrainfmError, match=r"holds other volumes \(age was \[0.5, 0.5\] and is \[0.0, 1.0\]\)"):
        synthesize(2, out, bundle=bundle)
    with pytest.raises(BrainfmError, match=r"holds other volumes .*diffusion_sha256 was"):
        synthesize(2, out, bundle=write_bundle(tmp_path / "other", seed=1), age=(0.5, 0.5))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(BrainfmError, match="not an empty folder"):
        synthesize(1, tmp_path / "full", bundle=bundle)


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--age", "61"], "age is 61, and must be from 0 to 1: the scale that the model was trained with"),
        (["--age", "0.6:0.2"], "age is 0.6 to 0.2, and must be from 0 to 1"),
        (["--sex", "0.5"], r"sex is 0.5, and must be 0 (female) or 1 (male)"),
        (["--ventricles", "large"], "ventricles is 'large'; write a number from 0 to 1, or two as LOW:HIGH"),
        (["--brain-volume", "nan"], "brain_volume is nan, and must be from 0 to 1"),
    ],
)
def test_wrong_condition_is_refused_before_anything_is_written(bundle, tmp_path, arguments, said):
    code, output = run("--n", 1, "--out", tmp_path / "out", "--bundle", bundle, *arguments)
    assert code == 1
    assert output.startswith(f"BrainfmError: {said}")
    assert not (tmp_path / "out").exists()


def changed(**parts):
    return {**CONFIG, **{name: CONFIG[name] | part if isinstance(part, dict) else part for name, part in parts.items()}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(diffusion_def={"in_channels": 3}), "diffusion_def has in_channels 3, and 7 is expected"),
        (changed(diffusion_def={"cross_attention_dim": 8}), "cross_attention_dim 8, and 4 is expected"),
        (changed(diffusion_def={"channels": "$__import__('os').getpid()"}), "channels is an expression, "),
        (changed(autoencoder_def={"_target_": "os.system"}), "os.system where AutoencoderKL is expected"),
        (changed(scheduler={"prediction_type": "v_prediction"}), "a scheduler with scaled_linear_beta and "),
        (changed(noise="$torch.zeros(3)"), "it does not say the shape of the noise"),
        ({"autoencoder_def": {}}, "no 'scheduler'"),
        ([], "list indices"),
    ],
)
def test_config_of_another_model_is_refused(tmp_path, config, said):
    folder = write_bundle(tmp_path / "bundle", config)
    with pytest.raises(WeightsError, match=r"inference\.json: not the config of a bundle that draws brains") as refused:
        synthesize(1, tmp_path / "out", bundle=folder)
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_the_bundles_are_refused(bundle, tmp_path):
    code, said = run("--n", 1, "--out", tmp_path / "out", "--bundle", tmp_path)
    assert code == 1
    assert f"WeightsNotFoundError: {tmp_path / 'autoencoder.pt'}: not there; give the folder of the bundle" in said
    config, (autoencoder, diffusion) = find_bundle(bundle)
    cpu = torch.device("cpu")
    with pytest.raises(WeightsError, match=r"model.pt: not the weights of this bundle's AutoencoderKL"):
        LatentDiffusion(config, diffusion, diffusion, cpu)
    state = torch.load(diffusion)
    for name, edited in {
        "less": {key: value for key, value in state.items() if not key.startswith("out.2")},
        "more": state | {"odd.weight": torch.zeros(1)},
    }.items():
        torch.save(edited, tmp_path / f"{name}.pt")
        with pytest.raises(WeightsError, match=f"{name}.pt: not the weights of this bundle's DiffusionUNet"):
            LatentDiffusion(config, autoencoder, tmp_path / f"{name}.pt", cpu)
    with pytest.raises(WeightsError, match="not the weights of this bundle's AutoencoderKL"):
        LatentDiffusion(replace(config, autoencoder=PUBLISHED.autoencoder), autoencoder, diffusion, cpu)


def test_bundle_that_cannot_be_fetched_can_be_given(hub, tmp_path):
    code, said = run("--n", 1, "--out", tmp_path / "out")
    assert code == 1
    assert "models/autoencoder.pt" in said
    assert "and give their folder as the bundle (--bundle FOLDER)" in said
    assert "brainfm fetch" not in said
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_fetched_files_are_held_to_those_of_the_first_time(bundle, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("brainfm.synthesis.PUBLISHED", find_bundle(bundle)[0])
    files = {f"models/{name}": (bundle / "models" / name).read_bytes() for name in ("autoencoder.pt", "model.pt")}
    hub.add("MONAI/brain_image_synthesis_latent_diffusion_model", files)
    manifest = synthesize(1, tmp_path / "a", cache_dir=tmp_path / "cache")
    synthesize(1, tmp_path / "b", bundle=bundle)
    image = rows(manifest.parent)[0]["image_path"]
    assert (tmp_path / "a" / image).read_bytes() == (tmp_path / "b" / image).read_bytes()
    assert len((tmp_path / "cache" / "brain_ldm" / "model.pt.sha256").read_text().strip()) == 64
    other = write_bundle(tmp_path / "other", seed=1)
    files["models/model.pt"] = (other / "models" / "model.pt").read_bytes()
    hub.add("MONAI/brain_image_synthesis_latent_diffusion_model", files)
    with pytest.raises(
        WeightsError, match=r"sha256 of model.pt is .* when it was first fetched: another file is there"
    ):
        synthesize(1, tmp_path / "c", cache_dir=tmp_path / "cache")
