"""The CNNs that nobody trained, against outputs of their authors' notebook."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from upstream import check_array, check_tensor, contracts, digest, drawn, error, vectors

import brainfm
from brainfm.downstream import grid
from brainfm.downstream.plan import Plan

INPUTS = {"uncnn_doubleconv": "uncnn_rank_sobel", "uncnn_dwsep": "uncnn_unsharp_sobel"}
both = pytest.mark.parametrize("name", INPUTS)


@functools.cache
def untrained(name):
    """Shared: not to be changed."""
    return brainfm.create_model(name)


def picked(vector, count):
    return np.asarray(vector)[np.linspace(0, 7679, count).astype(int)]


@both
def test_names_and_shapes_are_the_authors(name):
    found = {key: value.shape for key, value in untrained(name).state_dict().items()}
    assert digest(found) == vectors(name)["keys_sha256"]


@both
def test_weights_are_those_of_seed_0_whatever_was_drawn_before(name):
    numbers = vectors(name)["seed0_weights"]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = brainfm.create_model(name, pretrained=True).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    for key, values in numbers["first_values"].items():
        torch.testing.assert_close(state[key].flatten()[:4], torch.tensor(values), rtol=1e-5, atol=1e-8)
    assert float(
        sum(value.double().abs().sum() * 0 + value.double().sum() for value in state.values())
    ) == pytest.approx(numbers["sum_of_all"], rel=1e-5)
    torch.testing.assert_close(brainfm.create_model(name, num_classes=2).state_dict()[key], state[key])


@pytest.mark.slow
@both
@pytest.mark.parametrize("which", ["seed0_weights", "recipe_weights"])
def test_map_and_embedding_are_the_authors(name, which, recipe_state):
    numbers, model = vectors(name), untrained(name)
    if which == "recipe_weights":
        model = brainfm.create_model(name)
        model.load_state_dict(recipe_state(numbers["keys"], numbers["salt"]))
    with torch.inference_mode():
        features, last = model.features_and_map(drawn(numbers))
        embedding = model.forward_head(features)[0]
    check_array(last, numbers[which]["feature_map"])
    check_array(embedding, numbers[which]["embedding_stats"])
    assert error(picked(embedding, 256), numbers[which]["embedding_256"]) < 1e-5


@both
def test_tensor_is_the_authors(name, sample):
    spec = brainfm.get_pretrained_cfg(name).input_spec
    image = spec.apply(brainfm.load_scan(sample[0], spec=spec)).image
    numbers = contracts()[INPUTS[name]]
    np.testing.assert_allclose(image.mean(axis=(1, 2, 3), dtype=np.float64), numbers["channel_means"], rtol=1e-5)
    check_tensor(image, numbers["tensor"], dust=0.005)


@pytest.mark.slow
@both
def test_packaged_scan_gives_the_authors_embedding(name, sample):
    numbers = vectors(name)["scan"]
    vector = brainfm.embed([sample[0]], name, num_workers=0).vectors[0]
    assert error(picked(vector, 128), numbers["embedding"]) < 1e-5
    assert np.linalg.norm(vector) == pytest.approx(numbers["l2"], rel=1e-5)


def test_evaluations_probe_it_as_a_model_and_not_as_its_own_control():
    cfgs = {name: brainfm.get_pretrained_cfg(name) for name in INPUTS}
    plan = Plan(models=tuple(cfgs), modes=("probe",))
    assert [row.key for row in grid.model_rows(cfgs, plan)] == ["uncnn_doubleconv/probe", "uncnn_dwsep/probe"]
    assert [row.mode for row in grid.control_rows(cfgs, plan)] == ["covariates"]
