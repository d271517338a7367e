"""BrainIAC's ViT against outputs of its authors' own code, and against MONAI's ViT, which they built it of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from upstream import check_array, check_tensor, contracts, drawn, error, vectors

import brainfm

NAME = "brainiac_vit"


def saved(state, file):
    """The file as Lightning writes it."""
    inside = {f"backbone.{key}": value for key, value in state.items()} | {"projector.0.weight": torch.ones(2, 3)}
    torch.save({"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.3", "state_dict": inside}, file)
    return file


def first_blocks(keys, depth):
    return {k: shape for k, shape in keys.items() if not k.startswith("blocks.") or int(k.split(".")[1]) < depth}


@pytest.fixture(scope="module")
def published(tmp_path_factory, recipe_state):
    """The authors' numbers, and the model of a whole file of theirs."""
    numbers = vectors(NAME)
    file = saved(recipe_state(numbers["keys"], numbers["salt"]), tmp_path_factory.mktemp(NAME) / numbers["file"])
    return numbers, brainfm.create_model(NAME, checkpoint_path=file)


def test_network_has_as_many_numbers_as_the_authors_file():
    keys = vectors(NAME)["keys"]
    with torch.device("meta"):
        model = brainfm.create_model(NAME)
    assert len(model.state_dict()) == len(keys) == 137
    shapes = sorted(tuple(value.shape) for value in model.state_dict().values())
    assert shapes == sorted(map(tuple, keys.values()))


def test_authors_container_loads_strictly_with_or_without_what_newer_monai_adds(tmp_path, recipe_state):
    numbers = vectors(NAME)
    state = recipe_state(first_blocks(numbers["keys"], 2), numbers["salt"])
    cross = {"blocks.0.cross_attn.to_q.weight": [768, 768], "blocks.1.norm_cross_attn.bias": [768]}
    for extra in ({}, recipe_state(cross, numbers["salt"])):
        model = brainfm.create_model(NAME, depth=2, checkpoint_path=saved(state | extra, tmp_path / "two.ckpt"))
        assert "projector" in model.weights_report.dropped
        assert torch.equal(model.pos_embed, state["patch_embedding.position_embeddings"])
        assert torch.equal(model.blocks[1].attn.proj.bias, state["blocks.1.attn.out_proj.bias"])
        assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.linear2.weight"])
    del state["blocks.1.norm2.bias"]
    with pytest.raises(brainfm.WeightsError, match="1 missing"):
        brainfm.create_model(NAME, depth=2, checkpoint_path=saved(state, tmp_path / "short.ckpt"))


def test_first_token_is_the_corner_patchs():
    model = brainfm.create_model(NAME, depth=1)
    x = torch.zeros(1, 1, 96, 96, 96)
    x[..., :16, :16, :16] = 1
    with torch.inference_mode():
        change = (model._begin(x) - model._begin(torch.zeros_like(x))).abs().sum(dim=-1)[0]
    assert change.nonzero().flatten().tolist() == [0]


@pytest.mark.slow
def test_tokens_and_embedding_are_the_authors(published):
    numbers, model = published
    with torch.inference_mode():
        tokens = model.forward_features(drawn(numbers))
    check_array(tokens, numbers["feature_map"])
    assert error(model.pool(tokens), numbers["embedding"]) < 1e-5
    assert error(tokens.mean(dim=1), numbers["mean_tokens"]) < 1e-5
    assert error(model.pool(tokens), numbers["mean_tokens"]) > 0.5  # the corner is no mean


@pytest.fixture(scope="module")
def anywhere():
    """The contract of scans that are where they are: the authors' numbers are of one not in their template's space."""
    spec = brainfm.get_pretrained_cfg(NAME).input_spec
    return replace(spec, space=None, registration="none", orientation=None, grid=None)


def test_tensor_of_the_packaged_scan_is_the_authors(sample, anywhere):
    image = anywhere.apply(brainfm.load_scan(sample[0], spec=anywhere)).image
    check_tensor(image, contracts()["brainiac"]["tensor"])


@pytest.mark.slow
def test_packaged_scan_gives_the_authors_embedding(sample, anywhere, published):
    numbers, model = published
    tensor = brainfm.create_transform(anywhere)(sample[0])
    with torch.inference_mode():
        embedding = model(tensor[None])[0]
    wanted = numbers["scan"]["embedding"]  # its first values
    assert error(embedding[: len(wanted)], wanted) < 1e-5


def test_scan_that_is_not_on_the_authors_template_is_refused(sample):
    with pytest.raises(brainfm.ScanError, match=r"BrainIAC head template|grid"):
        brainfm.load_scan(sample[0], spec=brainfm.get_pretrained_cfg(NAME).input_spec)
