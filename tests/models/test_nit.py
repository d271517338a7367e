"""NiT and MiNiT against outputs of their authors' own code, from a file in their container to features and logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from upstream import check_array, drawn, error, vectors

import brainfm

both = pytest.mark.parametrize("name", ["nit_3d", "minit_3d"])


@pytest.fixture(scope="module")
def published(tmp_path_factory, recipe_state):
    """A function (name) → the authors' numbers, and a file as their training writes it, optimiser and all."""

    def write(name: str):
        numbers = vectors(name.removesuffix("_3d"))
        state = recipe_state(numbers["keys"], numbers["salt"])
        file = tmp_path_factory.mktemp(name) / numbers["file"]
        optimiser = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": optimiser}, file)
        return numbers, state, file

    return write


@both
def test_every_tensor_of_the_authors_file_finds_its_place_but_those_that_nothing_uses(name, published):
    _, state, file = published(name)
    model = brainfm.create_model(name, checkpoint_path=file, num_classes=2)
    unused = sum(value.numel() for key, value in state.items() if key.startswith("distill"))
    assert (
        sum(value.numel() for value in model.state_dict().values()) == sum(v.numel() for v in state.values()) - unused
    )
    assert (unused > 0) == (name == "nit_3d")
    assert "optimizer_state_dict" in model.weights_report.dropped


@both
def test_tokens_embedding_and_logits_are_the_authors(name, published):
    numbers, _, file = published(name)
    model = brainfm.create_model(name, checkpoint_path=file, num_classes=2)
    with torch.inference_mode():
        tokens = model.forward_features(drawn(numbers))
        logits, embedding = model.forward_head(tokens), model.forward_head(tokens, pre_logits=True)
    check_array(tokens.reshape(numbers["feature_map"]["shape"]), numbers["feature_map"])
    assert error(embedding, numbers["embedding"]) < 1e-5
    assert error(logits, numbers["logits"]) < 1e-5


@both
def test_embedding_is_what_a_model_without_a_classifier_gives(name, published):
    numbers, _, file = published(name)
    with torch.inference_mode():
        assert error(brainfm.create_model(name, checkpoint_path=file)(drawn(numbers)), numbers["embedding"]) < 1e-5


def test_norm_of_nit_is_its_classifiers(published):
    numbers, _, file = published("nit_3d")
    model = brainfm.create_model("nit_3d", checkpoint_path=file, num_classes=2)
    with torch.inference_mode():
        normed = model.head.norm(torch.tensor(numbers["embedding"])[None])
    assert error(normed, numbers["embedding_normed"]) < 1e-5
    assert error(numbers["embedding"], numbers["embedding_normed"]) > 0.5


def test_logits_of_minits_blocks_are_the_authors_in_their_order(published):
    numbers, _, file = published("minit_3d")
    model = brainfm.create_model("minit_3d", checkpoint_path=file, num_classes=2)
    with torch.inference_mode():
        tokens = model.forward_features(drawn(numbers))
        assert error(model.head.of_block(tokens[0, :, 0]), numbers["block_logits"]) < 1e-5


def test_minit_that_skips_no_layer_is_another_network(published):
    numbers, _, file = published("minit_3d")
    model = brainfm.create_model("minit_3d", checkpoint_path=file, skipped=())
    with torch.inference_mode():
        embedding = model(drawn(numbers))[0]
    assert error(embedding[:32], numbers["all_layers"]["embedding_first32"]) < 1e-5
    assert error(embedding, numbers["embedding"]) > 0.5


@pytest.mark.parametrize("skipped", [(6,), (-1,), range(6)])
def test_layers_that_are_not_there_or_all_of_them_cannot_be_skipped(skipped):
    with pytest.raises(ValueError, match="skipped layers are some of 0 to 5"):
        brainfm.create_model("minit_3d", skipped=tuple(skipped))


@both
def test_new_head_of_other_classes_is_linear_and_takes_the_embedding(name):
    model = brainfm.create_model(name, num_classes=3, img_size=(32, 32, 32))
    assert type(model.head) is torch.nn.Linear
    with torch.inference_mode():
        features = model.forward_features(torch.randn(2, 1, 32, 32, 32))
        embedding = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.forward_head(features), model.head(embedding))


def test_blocks_that_do_not_divide_a_volume_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        brainfm.create_model("minit_3d", img_size=(64, 64, 40))
    with pytest.raises(ValueError, match=r"takes volumes of \(64, 64, 64\)"):
        brainfm.create_model("minit_3d")(torch.zeros(1, 1, 32, 64, 64))


def test_last_axis_of_the_scan_comes_first_as_the_authors_loader_has_it():
    image = np.zeros((10, 12, 14), dtype=np.float32)
    image[1:9, 2:11, 3:13] = 1
    image[4, 5, 6] = 9
    spec = brainfm.get_pretrained_cfg("nit_3d").input_spec
    last = spec.operations[-1](brainfm.contract.Volume(image[None], None, np.eye(4))).image
    assert np.unravel_index(last[0].argmax(), last[0].shape) == (6, 4, 5)  # tensor[0, k, i, j] = array[i, j, k]


@both
def test_packaged_scan_becomes_the_tensor_that_its_contract_says(name, sample):
    transform = brainfm.create_transform(brainfm.create_model(name))
    tensor = transform(sample[0])
    assert list(tensor.shape) == [1, 64, 64, 64]
    assert (tensor.min(), tensor.max()) == (0, 1)
