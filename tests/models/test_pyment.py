"""pyment's SFCN against outputs of its authors' Keras classes, from a file of Keras to features and prediction."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from upstream import check_array, check_tensor, contracts, drawn, error, vectors

import brainfm

NAME = "pyment_sfcn_reg"
TORCHS = {"kernel": "kernel", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


@pytest.fixture(scope="module")
def file(tmp_path_factory, recipe_state):
    """Keras' file, drawn by the recipe under torch's names and layout."""
    h5py = pytest.importorskip("h5py")
    numbers, path = vectors(NAME), tmp_path_factory.mktemp("pyment") / "weights.h5"
    with h5py.File(path, "w") as out:
        for key, shape in numbers["keys"].items():
            layer, name = key.split("/")
            moved = [shape[-1], shape[-2], *shape[:-2]] if name == "kernel" else shape
            drawn_as = f"{layer}/{TORCHS.get(name, name)}"
            array = recipe_state({drawn_as: moved}, numbers["salt"])[drawn_as].numpy()
            out[f"{layer}/{layer}/{name}:0"] = np.moveaxis(array, (0, 1), (-1, -2)) if name == "kernel" else array
    return path


@pytest.mark.slow
def test_keras_file_gives_the_authors_map_embedding_and_prediction(file):
    numbers = vectors(NAME)
    model = brainfm.create_model(NAME, checkpoint_path=file, num_classes=1)
    with torch.inference_mode():
        features = model.forward_features(drawn(numbers))
        prediction, embedding = model.forward_head(features), model.forward_head(features, pre_logits=True)
    check_array(features, numbers["feature_map"])
    assert error(embedding, numbers["embedding"]) < 1e-5
    assert error(prediction, numbers["prediction_raw"]) < 1e-5
    assert np.allclose(3 + prediction.clamp(0, 92), numbers["prediction_restricted"])


def test_eps_of_peng_takes_the_same_file_and_gives_another_embedding(file):
    load = functools.partial(brainfm.create_model, NAME, checkpoint_path=file)
    x = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert error(load(norm_eps=1e-5)(x), load()(x)) > 1e-4


def test_without_classes_the_embedding_is_as_it_is():
    model = brainfm.create_model(NAME)
    features = torch.randn(2, 64, 1, 1, 1)
    assert torch.equal(model.forward_head(features), features.flatten(1))


def test_tensor_is_the_authors(sample):
    spec = brainfm.get_pretrained_cfg(NAME).input_spec
    image = spec.apply(brainfm.load_scan(sample[0], spec=spec)).image
    check_tensor(image, contracts()["pyment"])
