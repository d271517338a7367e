"""Video Swin-T's Kinetics weights, as torchvision has them: the file's name holds the first digits of its sha256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from file_server import kept
from weight_files import saved

import brainfm
from brainfm import WeightsError

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/zoo/swin3d_t.json").read_text())["keys"]
SMALL = {"dim": 24, "depths": (1, 1, 1, 1)}  # a sixteenth of the weights of a block, and the first block of each stage


@pytest.fixture(scope="module")
def torchvisions() -> dict[str, torch.Tensor]:
    """A small network's weights by torchvision's own names, its classifier of 400 classes among them."""
    draw = torch.Generator().manual_seed(0)
    counted = ("relative_position_index", "relative_position_bias_table")
    state = {}
    for key, shape in PUBLISHED.items():
        stage, block = [*key.split("."), "", ""][1:3]
        if key.startswith("features.") and int(stage) % 2 == 0 and block != "0":
            continue
        whole = key.endswith(counted)
        small = [n if whole or n % 96 else n // 4 for n in shape]
        state[key] = torch.zeros(small).long() if key.endswith(counted[0]) else torch.randn(small, generator=draw)
    return state


@pytest.fixture
def address(server, torchvisions) -> tuple[str, str]:
    """Where the server has the file, on the published one's path, and the first eight digits of its sha256."""
    content = saved(torchvisions)
    path = brainfm.get_pretrained_cfg("swin3d_t").url.removeprefix("https://download.pytorch.org")
    server.files[path] = content
    return server.url + path, hashlib.sha256(content).hexdigest()[:8]


@pytest.fixture
def create(tmp_path):
    """A function that creates the small network with weights of a URL and a sha256, as a user does."""

    def make(url: str, sha256: str, **arguments):
        return brainfm.create_model(
            "swin3d_t",
            pretrained=True,
            pretrained_cfg_overlay={"url": url, "sha256": sha256},
            accept_licence=True,
            cache_dir=tmp_path,
            **SMALL,
            **arguments,
        )

    return make


def test_kinetics_weights_are_fetched_and_their_head_of_400_classes_is_dropped_and_said_so(
    address, create, torchvisions, server, caplog
):
    caplog.set_level("INFO", logger="brainfm")
    model, again = create(*address), create(*address)
    assert model.num_classes == 0
    assert [path for path, _ in server.requests] == ["/models/swin3d_t-7615ae03.pth"]
    for one in (model, again):
        assert one.weights_report.source == address[0]
        assert one.weights_report.dropped == ("head",)
    assert f"{address[0]}: left out head, its classifier of 400 outputs" in caplog.text
    grey = torchvisions["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"], grey)
    whole, x = create(*address, num_classes=400, in_chans=3), torch.randn(1, 1, 16, 32, 32)
    assert torch.equal(whole.head.weight, torchvisions["head.weight"])
    assert whole.weights_report.dropped == ()
    with torch.inference_mode():
        ours, theirs = model(x), whole.pool(whole.forward_features(x.expand(-1, 3, -1, -1, -1)))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_file_whose_sha256_does_not_begin_with_the_digits_in_its_name_is_refused(address, create, tmp_path):
    (url, digits), published = address, brainfm.get_pretrained_cfg("swin3d_t").sha256
    assert f"-{published}." in url
    with pytest.raises(WeightsError, match=f"sha256 is {digits}.* expects {published}; the file is damaged or not"):
        create(url, published)
    assert not [name for name in kept(tmp_path) if name.startswith(("model", "swin", "sha256"))]


def test_another_file_with_the_same_first_digits_is_refused(address, create, tmp_path):
    url, digits = address
    create(url, digits)
    [pin], [copy] = tmp_path.rglob("sha256"), tmp_path.rglob("model.safetensors")
    assert pin.read_text().startswith(digits)
    copy.unlink()
    pin.write_text(f"{digits}{'0' * 56}\n")  # of the one that was first fetched
    with pytest.raises(WeightsError, match="another file is there now"):
        create(url, digits)
