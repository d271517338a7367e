"""Encoders on a GPU: what they give is what the processor gives, plain, optimised, compiled, and embedded."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_encoders import build, distinct
from small_encoders import volume as small_volume

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.cli.main import main

pytestmark = pytest.mark.cuda

MODELS = ("test_resnet_3d", "test_vit_3d")
PUBLISHED = ("simclr_resnet18_3d", "mae_vit_tiny_3d", "sfcn_age", "medicalnet_resnet10", "densenet121_3d", "nit_3d")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def volume(model, many=1) -> torch.Tensor:
    spec = model.pretrained_cfg.input_spec
    shape = spec.output_shape or (len(spec.channels), 64, 64, 64)
    return torch.randn(many, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*MODELS, *PUBLISHED])
@torch.inference_mode()
def test_optimised_copy_gives_the_processors_embeddings(name, gpu, plain_float32):
    torch.manual_seed(0)
    model = brainfm.create_model(name)
    x = volume(model)
    wanted = model(x)
    fast = brainfm.optimize(model).to(gpu)
    assert relative(model.to(gpu)(x.to(gpu)), wanted) < 1e-4
    assert relative(fast(x.to(gpu)), wanted) < 1e-4


@pytest.mark.parametrize("name", distinct(brainfm.list_models()))
@torch.inference_mode()
def test_every_network_gives_the_processors_embedding_and_maps(name, gpu, plain_float32):
    """Of a small size, and the wide ones narrow."""
    model, x = build(name), small_volume(name)
    wanted, maps = model(x), model.dense(x)
    fast = brainfm.optimize(model).to(gpu)
    model, x = model.to(gpu), x.to(gpu)
    assert relative(model(x), wanted) < 1e-4
    assert relative(fast(x), wanted) < 1e-4
    assert relative(model.dense(x), maps) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_lower_precision_keeps_the_direction(name, dtype, gpu):
    model = brainfm.create_model(name, pretrained=True)
    x = volume(model, 2)
    found = brainfm.optimize(model, dtype).to(gpu)(x.to(gpu)).cpu()
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found.double(), model(x).double()).min() > 0.999


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_compiled_copy_gives_the_same(name, gpu, plain_float32):
    model = brainfm.create_model(name, pretrained=True)
    x = volume(model)
    assert relative(brainfm.optimize(model, compile=True).to(gpu)(x.to(gpu)), model(x)) < 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_table_is_that_of_the_processor(batch_size, small_sample, small_model, gpu, tmp_path):
    """Though torch multiplies in TF32 by default."""
    scans = [small_sample] * 5
    wanted = brainfm.embed(scans, small_model, device="cpu")
    found = brainfm.embed(
        scans, small_model, device=gpu, batch_size=batch_size, output=tmp_path / "t.csv", dense=tmp_path / "dense"
    )
    assert not found.errors
    assert np.abs(found.vectors - wanted.vectors).max() < 1e-4 * np.abs(wanted.vectors).max()
    (dense,) = (tmp_path / "dense").rglob("*.nii.gz")  # of one scan, five times
    assert np.isfinite(nib.load(dense).get_fdata()).all()


def test_table_in_tf32_says_so(small_sample, small_model, gpu):
    if gpu == "cpu":
        pytest.skip("no TF32")
    before = torch.backends.cudnn.allow_tf32
    wanted = brainfm.embed([small_sample], small_model, device="cpu").vectors
    found = brainfm.embed([small_sample], small_model, device=gpu, dtype="tf32")
    assert found.origin.dtype == "tf32"
    assert torch.backends.cudnn.allow_tf32 == before
    away = np.linalg.norm(found.vectors - wanted) / np.linalg.norm(wanted)
    assert 1e-5 < away < 5e-3


def test_published_size_is_embedded(gpu):
    torch.manual_seed(0)
    model = brainfm.create_model("simclr_resnet18_3d")
    wanted = brainfm.embed([(SAMPLE_SCAN, SAMPLE_MASK)], model, device="cpu").vectors
    found = brainfm.embed([(SAMPLE_SCAN, SAMPLE_MASK)], model, device=gpu).vectors
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", MODELS)
def test_golden_embedding_is_met(name, gpu):
    of_a_gpu = ["--dtype", "tf32"] if gpu != "cpu" else []
    result = CliRunner().invoke(
        main, ["verify", name, "--device", gpu, "--dtype", "float32", "--dtype", "bfloat16", *of_a_gpu]
    )
    assert result.exit_code == 0, result.output


def test_number_of_gpu_that_is_not_there_is_refused(small_sample, small_model, gpu):
    with pytest.raises(brainfm.BrainfmError, match="device 'cuda:99' cannot be used here"):
        brainfm.embed([small_sample], small_model, device="cuda:99")


@pytest.mark.parametrize("name", ["openmind_resencl", "uncnn_dwsep", "sfcn_age"])
@torch.inference_mode()
def test_layout_is_that_which_is_faster_on_the_device(name, gpu, plain_float32):
    model, x = build(name), small_volume(name)
    wanted, fast = model(x), brainfm.optimize(model)
    of_volumes = name != "sfcn_age"
    for device in (gpu, "cpu", gpu):
        fast = fast.to(device)
        plain = device != "cpu" and of_volumes
        layout = torch.contiguous_format if plain else torch.channels_last_3d
        for weight in fast.parameters():
            if weight.ndim == 5:
                assert weight.stride() == torch.empty(weight.shape).to(memory_format=layout).stride()
        assert relative(fast(x.to(device)), wanted) < 1e-4
