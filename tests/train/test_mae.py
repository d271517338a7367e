"""The masked autoencoder against naive loops, and its names against those of `facebookresearch/mae`."""

from __future__ import annotations

import pytest
import torch

import brainfm
from brainfm.train import MaskedAutoencoder
from brainfm.train.mae import patchify, unpatchify


@pytest.fixture
def network() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(brainfm.create_model("test_vit_3d"), decoder_dim=48, decoder_depth=2, decoder_heads=4)


@pytest.fixture
def volumes() -> torch.Tensor:
    return torch.randn(2, 1, 40, 48, 48, generator=torch.Generator().manual_seed(1))


def test_patches_are_the_blocks_of_the_volume_z_slowest():
    volume = torch.arange(2 * 2 * 4 * 6 * 4).reshape(2, 2, 4, 6, 4)
    patches = patchify(volume, (2, 3, 2))
    n = 0
    for z in range(2):
        for y in range(2):
            for x in range(2):
                block = volume[:, :, 2 * z : 2 * z + 2, 3 * y : 3 * y + 3, 2 * x : 2 * x + 2]
                assert torch.equal(patches[:, n], block.permute(0, 2, 3, 4, 1).flatten(1))
                n += 1
    assert torch.equal(unpatchify(patches, (2, 3, 2), (2, 2, 2)), volume)


def test_patches_line_up_with_the_encoders_tokens(network, volumes):
    embed = network.patch_embed.proj
    tokens = patchify(volumes, network.patch_embed.patch_size) @ embed.weight.flatten(1).T + embed.bias
    assert torch.allclose(tokens, network.patch_embed(volumes), atol=1e-4)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_mean_over_hidden_voxels_alone(norm_pix_loss, network, volumes):
    network.norm_pix_loss = norm_pix_loss
    loss, prediction, mask = network(volumes)
    errors = []
    for scan in range(2):
        for patch in mask[scan].nonzero()[:, 0]:
            target = patchify(volumes, (8, 8, 8))[scan, patch].double()
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            errors.append((prediction[scan, patch].double() - target).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_a_quarter_of_the_patches_is_kept_those_of_lowest_noise(network, volumes):
    noise = torch.rand(2, 180, generator=torch.Generator().manual_seed(2))
    _, _, mask = network(volumes, noise=noise)
    assert mask.sum(dim=1).tolist() == [135, 135]
    for scan in range(2):
        assert noise[scan][mask[scan] == 0].max() < noise[scan][mask[scan] == 1].min()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_predicting_hidden_patches_alone_gives_the_same_loss_and_gradients(norm_pix_loss, network, volumes):
    network.norm_pix_loss, noise = norm_pix_loss, torch.rand(2, 180, dtype=torch.float64)
    network, runs = network.double(), []
    for predict_all in (True, False):
        network.zero_grad()
        loss, prediction, mask = network(volumes.double(), noise=noise, predict_all=predict_all)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
        runs.append((loss, prediction, mask, gradients))
    (loss, everything, mask, gradients), (other, hidden, same, others) = runs
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.equal(mask, same)
    torch.testing.assert_close(others, gradients, rtol=1e-9, atol=1e-12)
    for scan in range(2):
        places = noise[scan].argsort()[45:]
        torch.testing.assert_close(hidden[scan], everything[scan, places])


def test_what_is_hidden_changes_nothing_but_the_loss(network, volumes):
    noise = torch.rand(2, 180, generator=torch.Generator().manual_seed(2))
    loss, prediction, mask = network(volumes, noise=noise)
    patches = patchify(volumes, (8, 8, 8)).clone()
    patches[mask.bool()] += 100
    other_loss, other, _ = network(unpatchify(patches, (8, 8, 8), (5, 6, 6)), noise=noise)
    assert torch.equal(prediction, other)
    assert other_loss > loss + 1000


def test_visible_patches_reach_the_decoder_in_their_places(network, volumes):
    """With nothing hidden, encoding and decoding are those of a plain ViT, whatever the order of the noise."""
    straight, shuffled = (torch.arange(180.0).expand(2, -1), torch.rand(2, 180))
    _, first, _ = network(volumes, mask_ratio=0.0, noise=straight)
    _, second, _ = network(volumes, mask_ratio=0.0, noise=shuffled)
    assert torch.allclose(first, second, atol=1e-4)


def test_encoder_is_shared_and_learns(volumes):
    encoder = brainfm.create_model("test_vit_3d")
    network = MaskedAutoencoder(encoder, 48, 1, 4).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    network(volumes)[0].backward()
    optimiser.step()
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert {"patch_embed.proj.weight", "cls_token", "blocks.0.attn.qkv.weight", "norm.weight"} < changed
    assert "pos_embed" not in changed


def test_names_are_those_of_the_mae_family_and_the_encoder_loads_from_them(network, tmp_path):
    names = set(network.state_dict())
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.norm1.weight",
        "norm.bias",
        "mask_token",
    } < names
    assert {"decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.1.mlp.fc2.bias", "decoder_pred.weight"} < names
    assert not [name for name in names if name.startswith("encoder")]
    torch.save({"model": network.state_dict(), "epoch": 3}, tmp_path / "mae.pth")
    encoder = brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "mae.pth")
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, network.blocks[3].mlp.fc1.weight)


def test_paper_sized_network_has_the_paper_s_tokens_on_meta():
    with torch.device("meta"):
        network = MaskedAutoencoder(brainfm.create_model("mae_vit_tiny_3d"))
    assert network.decoder_pred.out_features == 25 * 16 * 16
    assert network.pos_embed.shape == (1, 865, 192)
    assert network.decoder_pos_embed.shape == (1, 865, 512)
    assert len(network.decoder_blocks) == 8


def test_volume_of_another_size_and_encoder_with_a_head_are_refused(network):
    with pytest.raises(ValueError, match="patches"):
        network(torch.zeros(1, 1, 48, 48, 48))
    with pytest.raises(ValueError, match="reset_classifier"):
        MaskedAutoencoder(brainfm.create_model("test_vit_3d", num_classes=2))
