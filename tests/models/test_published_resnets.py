"""MedicalNet's and AnatCL's ResNets against outputs of their authors' own code, from files in their containers."""

from __future__ import annotations

import functools

import nibabel as nib
import numpy as np
import pytest
import torch
from upstream import check_array, check_tensor, contracts, digest, drawn, error, vectors

import brainfm
from brainfm.assets import ASSETS
from brainfm.models import constructor

MEDICALNET = ["medicalnet_resnet10", "medicalnet_resnet18", "medicalnet_resnet34", "medicalnet_resnet50"]
every_medicalnet = pytest.mark.parametrize("name", MEDICALNET)


@pytest.fixture(scope="module")
def published(tmp_path_factory, recipe_state):
    """A function (name) → a file as its authors publish it."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def write(name: str):
        numbers, file = vectors(name), folder / f"{name}.pth"
        state = recipe_state(numbers["keys"], numbers["salt"])
        if name in MEDICALNET:
            torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
        else:
            optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]}
            torch.save({"model": state, "optimizer": optimizer, "epoch": 9}, file)
        return file

    return write


@pytest.fixture(scope="module")
def loaded(published):
    """A function (name) → the model with the weights of its published file. Shared: not to be changed."""
    return functools.cache(lambda name: brainfm.create_model(name, checkpoint_path=published(name)))


def features(model, x):
    with torch.inference_mode():
        found = model.forward_features(x)
        return found, model.forward_head(found, pre_logits=True)


@every_medicalnet
def test_names_and_shapes_are_the_authors(name):
    with torch.device("meta"):
        model = brainfm.create_model(name)
    assert digest({key: value.shape for key, value in model.state_dict().items()}) == vectors(name)["keys_sha256"]


@every_medicalnet
def test_published_file_gives_the_authors_maps_and_embedding(name, loaded):
    numbers, model = vectors(name), loaded(name)
    found, embedding = features(model, drawn(numbers))
    check_array(found, numbers["feature_map"])
    assert error(embedding[0, : len(numbers["embedding"])], numbers["embedding"]) < 1e-5
    with torch.inference_mode():
        maps = model.forward_intermediates(drawn(numbers), [1, 2, 3, 4], intermediates_only=True)
    assert [list(one.shape) for one in maps] == numbers["layer_shapes"]
    for one, mean in zip(maps, numbers["layer_means"], strict=True):
        assert float(one.mean()) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("name", MEDICALNET[:2])
def test_optimised_copy_gives_the_authors_embedding(name, loaded):
    numbers = vectors(name)
    with torch.inference_mode():
        assert error(brainfm.optimize(loaded(name))(drawn(numbers)), numbers["embedding"]) < 1e-5


@every_medicalnet
def test_kernels_that_are_not_dilated_take_the_same_file_and_give_another_embedding(name, loaded):
    numbers = vectors(name)
    with torch.device("meta"):
        plain = brainfm.create_model(name, dilations=(1, 1, 1, 1))
    plain.load_state_dict(loaded(name).state_dict(), strict=True, assign=True)
    assert error(features(plain, drawn(numbers))[1][0, : len(numbers["embedding"])], numbers["embedding"]) > 0.2


def test_shortcut_b_lacks_tensors_that_files_of_shortcut_a_do_not_have(published):
    with pytest.raises(brainfm.WeightsError, match=r"missing: layer2\.0\.downsample"):
        brainfm.create_model("medicalnet_resnet18", checkpoint_path=published("medicalnet_resnet18"), shortcut="B")


def test_shortcut_a_passes_gradients():
    torch.manual_seed(0)
    model = constructor("resnet")(layers=(1, 1, 1, 1), widths=(4, 8, 8, 8), shortcut="A", dilations=(1, 1, 2, 4))
    x = torch.randn(2, 1, 16, 16, 16)
    kept = {name: torch.zeros_like(value) for name, value in model.layer2[0].named_parameters()}
    model.layer2[0].load_state_dict(kept, strict=False)  # what is left of the block is its shortcut
    model(x).sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


@every_medicalnet
def test_packaged_scan_gives_the_authors_embedding(name, loaded, sample):
    numbers = vectors(name)["scan"]
    found = brainfm.embed([sample[0]], loaded(name), num_workers=0).vectors[0]
    assert error(found[: len(numbers["embedding"])], numbers["embedding"]) < 1e-5
    assert np.linalg.norm(found) == pytest.approx(numbers["l2"], rel=1e-5)


@pytest.mark.parametrize("size", ["64x80x64", "56x448x448"])
def test_medicalnets_tensor_is_the_authors_at_any_size(size, sample):
    spec = brainfm.get_pretrained_cfg("medicalnet_resnet10").input_spec
    shape = tuple(map(int, size.split("x")))
    resize = type(spec.operations[0])
    volume = brainfm.load_scan(sample[0], spec=spec)
    check_tensor(spec.with_operation(resize, shape=shape).apply(volume).image, contracts()["medicalnet"][size])


# --- AnatCL ---------------------------------------------------------------------------------------


def test_anatcls_names_and_shapes_are_the_authors_without_their_head():
    with torch.device("meta"):
        model = brainfm.create_model("anatcl_resnet18")
    keys = vectors("anatcl_resnet18")["keys"]
    own = {f"encoder.{key}": list(value.shape) for key, value in model.state_dict().items()}
    assert own == {key: shape for key, shape in keys.items() if not key.startswith("head.")}


@pytest.mark.slow
def test_anatcls_published_file_gives_the_authors_map_and_embedding(loaded):
    numbers = vectors("anatcl_resnet18")
    found, embedding = features(loaded("anatcl_resnet18"), drawn(numbers))
    check_array(found, numbers["feature_map"])
    assert error(embedding, numbers["embedding"]) < 1e-5


def test_anatcls_head_and_optimiser_are_left_out(loaded):
    assert set(loaded("anatcl_resnet18").weights_report.dropped) == {"head", "optimizer", "epoch"}


def test_anatcl_takes_a_grey_matter_map_as_it_is_and_no_image(tmp_path, brain):
    transform = brainfm.create_transform("anatcl_resnet18")
    grey = nib.load(ASSETS / "mni152_grey_matter_4mm.nii.gz")
    values = np.asarray(grey.dataobj, dtype=np.float32)
    fine = np.kron(values / values.max(), np.ones((4, 4, 4), dtype=np.float32))  # at 1 mm
    affine = grey.affine @ np.diag([0.25, 0.25, 0.25, 1])
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, 1.5)  # the first of four voxels, where their middle was
    tensor = transform((fine, affine))
    assert tensor.shape == (1, 121, 145, 121)
    assert 0.1 < float(tensor.max()) <= 1
    with pytest.raises(brainfm.ScanError, match="no fractions of grey matter"):
        transform((brain[0], brain[2]))
