"""DenseNets against outputs of MONAI's own, of SynthBA's and y-Aware's authors, from files in their containers."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from upstream import check_array, check_tensor, contracts, digest, drawn, error, vectors

import brainfm

NAMES = {
    "densenet121_3d": "monai_densenet121",
    "synthba_densenet201": "synthba_densenet201",
    "yaware_densenet121": "yaware_densenet121",
}
HEADS = ("class_layers.", "hidden_representation.", "head_projection.")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, recipe_state):
    """A function (name) → the model with the weights of a file as its authors publish it, and their classifier."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def load(name: str):
        numbers, file = vectors(NAMES[name]), folder / f"{name}.pth"
        state = recipe_state(numbers["keys"], numbers["salt"])
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
        torch.save({"epoch": 9, "model": state, "optimizer": optimizer} if "yaware" in name else state, file)
        return brainfm.create_model(name, checkpoint_path=file, num_classes=len(numbers.get("logits", ())))

    return load


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_authors(name, loaded):
    numbers = vectors(NAMES[name])
    found = {
        key.replace(".layers", "") if "yaware" in name else key: value.shape
        for key, value in loaded(name).state_dict().items()
    }
    if "yaware" in name:
        found |= {key: shape for key, shape in numbers["keys"].items() if key.startswith(HEADS)}
    assert digest(found) == numbers["keys_sha256"]


@pytest.mark.parametrize(
    "name", ["densenet121_3d", *(pytest.param(name, marks=pytest.mark.slow) for name in list(NAMES)[1:])]
)
def test_map_embedding_and_logits_are_the_authors(name, loaded):
    numbers, model = vectors(NAMES[name]), loaded(name)
    with torch.inference_mode():
        features = model.forward_features(drawn(numbers))
        logits, embedding = model.forward_head(features), model.forward_head(features, pre_logits=True)
    check_array(features, numbers["feature_map"])
    assert error(embedding, numbers["embedding"]) < 1e-5
    if "logits" in numbers:
        assert error(logits, numbers["logits"]) < 1e-5


def test_a_last_norm_and_none_give_other_embeddings_of_the_same_weights(loaded):
    model = loaded("yaware_densenet121")
    with torch.device("meta"):
        normed = brainfm.create_model("yaware_densenet121", last_norm=True)
    fresh = dict(torch.nn.BatchNorm3d(1024).state_dict(prefix="features.norm5."))
    normed.load_state_dict(model.state_dict() | fresh, strict=True, assign=True)
    x = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # a norm that changes nothing but by its eps: what it would have learned is the rest
        assert error(normed(x), model(x)) < 1e-4
    normed.features.norm5.running_mean.add_(1.0)
    with torch.inference_mode():
        assert error(normed(x), model(x)) > 0.1


def test_files_head_and_optimiser_are_left_out(loaded):
    left = {"hidden_representation", "head_projection", "epoch", "optimizer"}
    assert set(loaded("yaware_densenet121").weights_report.dropped) == left


@pytest.mark.slow
def test_packaged_scan_gives_synthbas_embedding(loaded, sample):
    numbers = vectors("synthba_densenet201")["scan"]
    model = copy.deepcopy(loaded("synthba_densenet201"))
    model.reset_classifier(0)
    found = brainfm.embed([sample[0]], model, num_workers=0).vectors[0]
    assert error(found[: len(numbers["embedding"])], numbers["embedding"]) < 1e-5


def test_synthbas_tensor_is_the_authors(sample):
    spec = brainfm.get_pretrained_cfg("synthba_densenet201").input_spec
    image = spec.apply(brainfm.load_scan(sample[0], spec=spec)).image
    check_tensor(image, contracts()["synthba_run_multiple"]["tensor"], dust=0.005)


def test_yawares_operations_score_the_whole_array(sample):
    spec = brainfm.get_pretrained_cfg("yaware_densenet121").input_spec
    volume = brainfm.load_scan(sample[0], spec=brainfm.InputSpec(orientation="LAS"))
    values = volume.image[0].astype(np.float64)
    np.testing.assert_allclose(spec.apply(volume).image[0], (values - values.mean()) / (values.std() + 1e-8), atol=1e-5)


def test_weights_on_a_shared_drive_are_named_with_their_page():
    with pytest.raises(brainfm.BrainfmError, match=r"no licence|not stated"):
        brainfm.create_model("yaware_densenet121", pretrained=True)
    with pytest.raises(
        brainfm.WeightsNotFoundError, match=r"DenseNet121_BHB-10K_yAwareContrastive\.pth.*drive\.google"
    ):
        brainfm.create_model("yaware_densenet121", pretrained=True, accept_licence=True)
