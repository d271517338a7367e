"""SFCN against outputs of its authors' own code, from a file in their container to features and log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import brainfm

VECTORS = Path(__file__).parents[1] / "data" / "zoo"
both = pytest.mark.parametrize("name", ["sfcn_age", "sfcn_sex"])


@pytest.fixture(scope="module")
def upstream(tmp_path_factory, recipe_state):
    """A function (name) → the authors' numbers, and a file as they publish it, of DataParallel's names."""

    def read(name: str) -> tuple[dict, Path]:
        numbers = json.loads((VECTORS / f"{name}.json").read_text())
        file = tmp_path_factory.mktemp(name) / "published.p"
        state = recipe_state(numbers["keys"], numbers["salt"])
        torch.save({f"module.{key}": value for key, value in state.items()}, file)
        return numbers, file

    return read


def error(found, wanted) -> float:
    found, wanted = (np.asarray(values, dtype=np.float64).ravel() for values in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@both
def test_names_and_shapes_are_the_authors(name, upstream):
    numbers, file = upstream(name)
    model = brainfm.create_model(name, checkpoint_path=file, num_classes=len(numbers["logits"]))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == numbers["keys"]


@pytest.mark.slow
@both
def test_map_embedding_and_log_probabilities_are_the_authors(name, upstream):
    numbers, file = upstream(name)
    model = brainfm.create_model(name, checkpoint_path=file, num_classes=len(numbers["logits"]))
    draw = np.random.RandomState(numbers["input_seed"]).standard_normal(numbers["input_shape"])
    with torch.inference_mode():
        features = model.forward_features(torch.from_numpy(draw.astype(np.float32)))
        logits, embedding = model.forward_head(features), model.forward_head(features, pre_logits=True)
    drawn = features.flatten()[np.linspace(0, features.numel() - 1, 16).astype(int)]
    assert list(features.shape) == numbers["feature_map"]["shape"]
    assert error(drawn, numbers["feature_map"]["samples"]) < 1e-5
    assert error(embedding, numbers["embedding"]) < 1e-5
    assert error(logits, numbers["logits"]) < 1e-5


@pytest.mark.slow
@both
def test_packaged_scan_gives_the_authors_embedding_plain_and_optimised(name, upstream, sample):
    numbers, file = upstream(name)
    model = brainfm.create_model(name, checkpoint_path=file)
    for network in (model, brainfm.optimize(model)):
        table = brainfm.embed([sample[0]], network, num_workers=0)
        assert error(table.vectors[0], numbers["scan"]["embedding"]) < 1e-5


@both
def test_a_new_head_of_other_classes_gives_plain_logits(name):
    model = brainfm.create_model(name, num_classes=1)
    with torch.inference_mode():
        features = torch.randn(3, 64, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        assert model.forward_head(features).shape == (3, 1)
        assert model.forward_head(features).abs().sum() > 0  # the log-probability of one class alone would be 0


def test_file_of_the_other_network_is_refused(upstream):
    _, file = upstream("sfcn_sex")
    with pytest.raises(brainfm.WeightsError, match="of another shape"):
        brainfm.create_model("sfcn_age", checkpoint_path=file)
