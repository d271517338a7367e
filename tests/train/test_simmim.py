"""SimMIM: what is hidden, what stands in its place, and which voxel each output is of."""

from __future__ import annotations

import pytest
import torch

import brainfm
from brainfm.factory import build
from brainfm.train import SimMIM
from brainfm.train.losses import masked_l1_loss

SIZE = (16, 32, 32)
SMALL = {  # a network of each family that has a patch embedding
    "vit": {"dim": 24, "depth": 2, "num_heads": 2, "img_size": SIZE, "patch_size": (8, 8, 8)},
    "nit": {"dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16, "img_size": SIZE},
    "minit": {"dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 16, "skipped": (), "img_size": SIZE},
    "primus": {"dim": 24, "depth": 1, "num_heads": 2, "img_size": SIZE, "patch_size": (8, 8, 8)},
    "neurojepa": {"dim": 24, "depth": 2, "num_heads": 2, "img_size": SIZE, "patch_size": (8, 8, 8), "expert_dim": 8},
    "swin": {
        "dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "patch_size": (2, 4, 4),
        "window": (4, 4, 4),
        "merge": "plane",
        "merges": "between",
        "norm": "affine",
    },
    "swin as in SwinUNETR": {"dim": 12, "depths": (2, 2), "num_heads": (2, 2), "window": (4, 4, 4)},
}


def small(name: str) -> SimMIM:
    torch.manual_seed(0)
    encoder = build(name.split(" ")[0], **SMALL[name]).double().train()
    return SimMIM(encoder, (8, 16, 16) if name in ("nit", "vit") else None).double()


def volumes(size=SIZE):
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mask_of(network: SimMIM, size=SIZE, ratio=0.5):
    units = torch.tensor([-(-n // unit) for n, unit in zip(size, network.unit, strict=True)]).prod()
    noise = torch.rand(2, int(units), generator=torch.Generator().manual_seed(2))
    return network.draw_mask(noise, ratio, size)


@pytest.mark.parametrize("name", SMALL)
def test_encoder_sees_nothing_of_what_is_hidden_and_all_of_what_is_not(name):
    network, x = small(name), volumes()
    mask = mask_of(network)
    assert mask.any(dim=(1, 2, 3, 4)).all()
    other = torch.where(mask, x + 100, x)
    with network.hiding(mask):
        (loss, seen), (worse, same) = network(x), network(other)
    assert torch.equal(seen, same)
    assert worse > loss + 50
    with network.hiding(mask):
        changed = network(torch.where(mask, x, x + 1))[1]
    assert not torch.allclose(seen, changed)
    assert not torch.allclose(seen, network(x)[1])  # outside `hiding`, nothing is


@pytest.mark.parametrize("name", SMALL)
def test_token_and_all_of_the_encoder_learn_with_checkpointing_as_without(name):
    gradients = []
    for checkpointed in (False, True):
        network = small(name)
        network.encoder.set_grad_checkpointing(checkpointed)
        with network.hiding(mask_of(network)):
            network(volumes())[0].backward()
        assert network.mask_token.grad.abs().max() > 0
        found = {key: value.grad for key, value in network.named_parameters() if value.requires_grad}
        assert not [key for key, gradient in found.items() if gradient is None and not key.startswith("encoder.head")]
        gradients.append(found)
    for key, gradient in gradients[0].items():
        assert gradient is None or torch.allclose(gradient, gradients[1][key], rtol=1e-9, atol=1e-15), key


def test_outputs_are_of_the_voxels_of_their_cell():
    """A head that says where a cell is, and a loss that is the naive one of the same prediction."""
    network, x = small("swin"), volumes()
    network.head.weight.data.zero_()
    network.head.bias.data.copy_(torch.arange(2 * 8 * 8).double())
    mask = mask_of(network)
    with network.hiding(mask):
        loss, prediction = network(x)
    assert network.cell == (2, 8, 8)
    for z, y, x_ in [(0, 0, 0), (1, 0, 0), (15, 9, 31), (6, 7, 8)]:
        assert prediction[0, 0, z, y, x_] == 64 * (z % 2) + 8 * (y % 8) + x_ % 8
    assert loss.item() == pytest.approx(masked_l1_loss(prediction, x, mask).item(), rel=1e-12)


def test_volumes_that_units_and_patches_do_not_divide_are_cut():
    network, size = small("swin"), (15, 30, 33)
    network.unit = (4, 16, 16)
    mask = mask_of(network, size)
    assert mask.shape == (2, 1, *size)
    assert len(mask[0, 0, :4, :16, 16:32].unique()) == 1
    with network.hiding(mask):
        loss, prediction = network(volumes(size))
    assert prediction.shape == (2, 1, *size)
    assert loss.isfinite()


def test_units_of_least_noise_are_kept():
    network = small("vit")
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.7, 0.8, 0.3, 0.4]])
    mask = network.draw_mask(noise, 0.75, SIZE)[0, 0]
    units = [mask[z : z + 8, y : y + 16, x : x + 16] for z in (0, 8) for y in (0, 16) for x in (0, 16)]
    assert [bool(unit.all()) for unit in units] == [True, False, True, False, True, True, True, True]
    assert [bool(unit.any()) for unit in units] == [True, False, True, False, True, True, True, True]


def test_network_without_patches_and_units_that_are_no_patches_are_refused():
    with pytest.raises(ValueError, match="patch embedding"):
        SimMIM(brainfm.create_model("test_resnet_3d"))
    with pytest.raises(ValueError, match=r"mask_unit is \(8, 8, 12\)"):
        SimMIM(brainfm.create_model("test_vit_3d"), (8, 8, 12))
    with pytest.raises(ValueError, match="reset_classifier"):
        SimMIM(brainfm.create_model("test_vit_3d", num_classes=2))
