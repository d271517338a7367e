"""The ResNets are MONAI's, number for number, and give what the released code gave."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import brainfm
from brainfm.train import SimCLR

NAMES = ["simclr_resnet18_3d", "simclr_resnet50_3d"]


def monai_network(name: str) -> torch.nn.Module:
    from monai.networks import nets

    make = nets.resnet18 if "resnet18" in name else nets.resnet50
    return make(spatial_dims=3, n_input_channels=1, conv1_t_stride=1, feed_forward=False, bias_downsample=True)


def randomise(model: torch.nn.Module) -> None:
    """Give BatchNorm's statistics and scales, and every bias, values that show when they are lost."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.ndim == 1:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_monai_load_both_ways_and_outputs_are_bit_identical(name):
    ours, theirs = brainfm.create_model(name), monai_network(name).eval()
    x = torch.randn(2, 1, 32, 40, 40, generator=torch.Generator().manual_seed(0))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))
    randomise(ours.layer2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize(
    ("name", "tensors", "parameters", "width"),
    [("simclr_resnet18_3d", 123, 33_160_896, 512), ("simclr_resnet50_3d", 322, 46_158_912, 2048)],
)
def test_size_is_that_of_the_released_network(name, tensors, parameters, width):
    with torch.device("meta"):
        model = brainfm.create_model(name)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_features == width


def test_supervised_baseline_is_the_same_network():
    with torch.device("meta"):
        baseline, pretrained = brainfm.create_model("resnet18_3d"), brainfm.create_model("simclr_resnet18_3d")
    assert {k: v.shape for k, v in baseline.state_dict().items()} == {
        k: v.shape for k, v in pretrained.state_dict().items()
    }


def test_stem_keeps_every_voxel():
    with torch.device("meta"):
        model = brainfm.create_model("simclr_resnet18_3d")
        stem, *_ = model.forward_intermediates(torch.empty(1, 1, 150, 192, 192), [0], intermediates_only=True)
        features = model.forward_features(torch.empty(1, 1, 150, 192, 192))
    assert stem.shape == (1, 64, 150, 192, 192)
    assert features.shape == (1, 512, 10, 12, 12)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_drawn_as_monai_draws_them(name):
    torch.manual_seed(7)
    ours = brainfm.create_model(name).state_dict()
    torch.manual_seed(7)
    theirs = monai_network(name).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_no_scan_waits_for_what_the_encoder_does_not_need(small_sample, tmp_path):
    """All that MONAI imports takes longer than torch."""
    code = """
import sys
from brainfm.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code
heavy = {"monai", "sklearn", "matplotlib", "scipy.ndimage", "tensorboard", "huggingface_hub", "torch._dynamo"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    scan = [small_sample[0], "--mask", small_sample[1], "--model", "test_resnet_3d", "-o", tmp_path / "t.csv"]
    command = [sys.executable, "-c", code, "embed", *map(str, scan)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t.csv").is_file()


@pytest.mark.parametrize("key", ["layer2.0.downsample.0.bias", "layer4.0.downsample.0.bias"])
def test_checkpoint_without_the_bias_of_a_shortcut_is_refused_by_name(key, small_model, tmp_path):
    state = {k: v for k, v in small_model.state_dict().items() if k != key}
    save_file(state, tmp_path / "biasless.safetensors")
    with pytest.raises(brainfm.WeightsError, match=f"1 missing: {key}"):
        brainfm.create_model("test_resnet_3d", checkpoint_path=tmp_path / "biasless.safetensors")


def test_simclr_checkpoint_loads_into_the_encoder_and_into_the_network_it_was_trained_in(tmp_path):
    torch.manual_seed(0)
    network = SimCLR(brainfm.create_model("test_resnet_3d"), projection_dim=8).eval()
    randomise(network)
    assert [k for k in network.state_dict() if not k.startswith("encoder.")] == [
        "projector.0.weight",
        "projector.2.weight",
    ]
    torch.save({"epoch": 3, "model_state_dict": network.state_dict()}, tmp_path / "simclr.tar")

    encoder = brainfm.create_model("test_resnet_3d", checkpoint_path=tmp_path / "simclr.tar")
    again = SimCLR(brainfm.create_model("test_resnet_3d"), projection_dim=8).eval()
    again.load_state_dict(brainfm.weights.read_checkpoint(tmp_path / "simclr.tar").state, strict=True)

    x = torch.randn(2, 1, 40, 48, 48)
    with torch.inference_mode():
        assert torch.equal(encoder(x), network.encoder(x))
        assert torch.equal(again(x), network(x))
    assert encoder.weights_report.dropped == ("projector", "epoch")


def relative(found: torch.Tensor, wanted: list[float]) -> float:
    wanted = torch.tensor(wanted, dtype=torch.float64)
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "way"), [("resnet18", "plain"), ("resnet18", "optimized"), ("resnet50", "optimized")]
)
def test_embedding_and_projection_of_the_sample_are_those_of_the_released_code(
    depth, way, parity, upstream_state, sample
):
    wanted = parity["models"][depth]
    network = SimCLR(brainfm.create_model(f"simclr_{depth}_3d")).eval()
    network.load_state_dict(upstream_state(depth), strict=True)
    encoder = network.encoder if way == "plain" else brainfm.optimize(network.encoder)
    image, mask = sample
    x = brainfm.create_transform(network.encoder)(image, mask=mask)[None]
    with torch.inference_mode():
        z = encoder(x)
        projection = network.projector(z)[0]
    assert z.shape == (1, network.encoder.num_features)
    assert relative(z[0, : len(wanted["embedding"])], wanted["embedding"]) < 1e-4
    assert relative(projection, wanted["projection"]) < 1e-4
