"""Neuro-JEPA against outputs of its authors' own code."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from upstream import check_array, check_tensor, contracts, drawn, error, vectors

import brainfm
from brainfm.models.neurojepa import Gate, Mixture, rotation

NAME = "neurojepa_vitb"


def first_blocks(keys, depth):
    return {k: shape for k, shape in keys.items() if not k.startswith("blocks.") or int(k.split(".")[1]) < depth}


def test_names_and_shapes_are_the_authors():
    with torch.device("meta"):
        model = brainfm.create_model(NAME)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == vectors(NAME)["keys"]


def test_safetensors_of_the_authors_names_load_strictly(tmp_path, recipe_state):
    numbers = vectors(NAME)
    state = recipe_state(first_blocks(numbers["keys"], 2), numbers["salt"])
    save_file(state, tmp_path / "model.safetensors")
    model = brainfm.create_model(NAME, depth=2, checkpoint_path=tmp_path / "model.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    del state["blocks.1.mlp.gate.bias"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(brainfm.WeightsError, match=r"1 missing: blocks\.1\.mlp\.gate\.bias"):
        brainfm.create_model(NAME, depth=2, checkpoint_path=tmp_path / "short.safetensors")


def test_mixture_is_a_sum_over_the_chosen_experts_alone():
    torch.manual_seed(0)
    mixture = Mixture(12, 8, experts=5, shared=2, active=2, scale=4.0)
    mixture.gate.bias += torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0])  # so that the third is always chosen
    x = torch.randn(1, 7, 12)
    with torch.inference_mode():
        weights = mixture.gate(x)[0]
        scores = mixture.gate.gate(x)[0].softmax(dim=-1)
        found = mixture(x)[0]
        for token in range(7):
            best = {2, *[n for n in scores[token].argsort(descending=True).tolist() if n != 2][:1]}
            assert set(weights[token].nonzero().flatten().tolist()) == best
            wanted = mixture.shared_experts(x[0, token])
            for number in best:  # the bias bears on the choice, and not on the weight
                wanted = wanted + 4 * scores[token, number] * mixture.experts[number](x[0, token])
            torch.testing.assert_close(found[token], wanted, rtol=1e-5, atol=1e-6)


def test_gate_without_a_bias_takes_the_likeliest():
    torch.manual_seed(1)
    gate = Gate(6, 9, active=3, scale=1.0)
    with torch.inference_mode():
        weights = gate(torch.randn(2, 4, 6))
    assert ((weights > 0).sum(dim=-1) == 3).all()
    assert (weights.sum(dim=-1) < 1).all()  # softmax over all of them, and not over those that are kept


def test_places_are_counted_as_released_though_a_layer_has_other_rows():
    sine, _ = rotation((8, 9, 8), 64)
    assert sine.shape == (576, 64)
    row = sine[:, 20].asin()  # the first channel of the second axis, of frequency 1
    places = torch.arange(576)
    wanted = (places % 72 // 9).float().sin()
    torch.testing.assert_close(row.sin(), wanted)
    assert not torch.allclose(row.sin(), (places % 72 // 8).float().sin())
    assert (sine[:, 60:] == 0).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory, recipe_state):
    """Of the authors' whole file."""
    numbers, file = vectors(NAME), tmp_path_factory.mktemp(NAME) / "model.safetensors"
    save_file(recipe_state(numbers["keys"], numbers["salt"]), file)
    return brainfm.create_model(NAME, checkpoint_path=file)


@pytest.mark.slow
def test_tokens_and_embedding_are_the_authors(model):
    numbers = vectors(NAME)
    with torch.inference_mode():
        tokens = model.forward_features(drawn(numbers))
    check_array(tokens, numbers["feature_map"])
    assert error(model.pool(tokens), numbers["embedding"]) < 1e-5


@pytest.mark.slow
def test_packaged_scan_gives_the_authors_embedding(model, sample):
    wanted = vectors(NAME)["scan"]["embedding"]
    vector = brainfm.embed([sample[0]], model, num_workers=0).vectors[0]
    assert error(vector[: len(wanted)], wanted) < 1e-5


def test_tensor_of_the_packaged_scan_is_the_notebooks_and_not_the_training_codes(sample):
    tensor = brainfm.create_transform(brainfm.get_pretrained_cfg(NAME).input_spec)(sample[0])
    check_tensor(tensor, contracts()["neurojepa_notebook"]["tensor"])
    other = contracts()["neurojepa_training"]["tensor"]
    assert abs(float(tensor.mean()) - other["mean"]) > 0.1
