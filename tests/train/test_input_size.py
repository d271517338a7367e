"""Networks at another size than their card's: what changes of their weights, and that every method trains them so."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import brainfm
from brainfm.models.vit import interpolate_positions, sincos_positions
from brainfm.registry import network_of
from brainfm.train.data import Batch
from brainfm.train.pretraining import contract_of, make_method
from brainfm.train.recipe import recipe_from_dict

# Of each network of the second paper, a size, in multiples of its patches and blocks, and what that size changes.
SIZES = {
    "nit_3d": ((32, 40, 48), {"pos_embed"}),
    "minit_3d": ((32, 48, 48), {"block_embeddings"}),
    "swin_t_3d": ((20, 36, 44), set()),
    "densenet121_3d": ((33, 40, 47), set()),
}


@pytest.fixture(scope="module", params=SIZES)
def network(request, tmp_path_factory):
    """A name, the network of its card's size with positions that nobody computed, and a file of them."""
    name = request.param
    model = brainfm.create_model(name)
    torch.manual_seed(1)
    for key in SIZES[name][1]:
        torch.nn.init.normal_(model.get_parameter(key))
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), file)
    return name, model, file


def test_another_size_changes_the_positions_alone_and_those_are_interpolated(network):
    name, model, file = network
    size, changes = SIZES[name]
    sized = {"img_size": size} if changes else {}
    other = brainfm.create_model(name, checkpoint_path=file, **sized)
    stored = model.state_dict()
    assert other.state_dict().keys() == stored.keys()
    for key, value in other.state_dict().items():
        if key not in changes:
            assert torch.equal(value, stored[key]), key
        elif name == "nit_3d":
            assert torch.equal(value, interpolate_positions(stored[key], (8, 8, 8), (4, 5, 6)))
        else:  # token by token, between the blocks of a token
            assert value.shape == (2 * 3 * 3, 65, 256)
            between = interpolate_positions(stored[key][:, 7][None], (4, 4, 4), (2, 3, 3))[0]
            assert torch.allclose(value[:, 7], between, atol=1e-6)
    assert other(torch.zeros(1, 1, *size)).shape == (1, other.num_features)


def test_fixed_positions_are_computed_anew():
    made, loaded = brainfm.create_model("nit_3d", img_size=(32, 40, 48)), brainfm.create_model("nit_3d")
    assert torch.equal(made.pos_embed, sincos_positions(256, (4, 5, 6)))
    assert torch.equal(loaded.positions((4, 5, 6)), made.pos_embed)


def recipe_of(name, **fields):
    base = {"method": "simclr", "model": name, "contract": "test_vit_3d", "batch_size": 2, "manifest": "m.csv"}
    return recipe_from_dict(base | {"output": "run"} | fields)


@pytest.mark.parametrize("name", SIZES)
def test_a_step_at_another_size_by_the_contract_of_another_model(name):
    recipe = recipe_of(name, input_size=SIZES[name][0], grad_checkpointing=False)
    method = make_method(recipe, contract_of(recipe))
    views = torch.randn(2, 2, 1, *SIZES[name][0], generator=torch.Generator().manual_seed(0))
    method.network.train()
    metrics = method.backward(method.network, Batch(views, [0, 1]), torch.Generator(), slice(0, 2))
    assert metrics["loss"] > 0
    lacking = [key for key, value in method.network.named_parameters() if value.requires_grad and value.grad is None]
    assert not lacking


@pytest.mark.parametrize("name", brainfm.list_models())
def test_every_network_of_the_registry_takes_contrastive_views(name):
    """Without numbers; of a size that its patches divide, or a residual encoder's five halvings."""
    network, args = network_of(name)
    size = args.get("img_size", (150, 192, 192) if network == "vit" else (160, 192, 160))
    recipe = recipe_of(name, contract="simclr_resnet18_3d", input_size=size)
    with torch.device("meta"), torch.no_grad():
        trained = make_method(recipe, contract_of(recipe)).network
        assert trained(torch.empty(2, 1, *size)).shape == (2, 64)
