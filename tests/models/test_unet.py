"""BrainFM's U-Net against outputs of its authors' own code, from a file in their container to the map of voxels."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from upstream import check_array, digest, drawn, error, vectors

import brainfm
from brainfm.readout import Reader

NAME = "brainfm_unet3d"
SMALL = {"width": 4, "levels": 3, "groups": 4}


def checkpoint(state: dict[str, torch.Tensor]) -> dict:
    """The authors' container: the backbone beside a head for each task."""
    network = {f"backbone.{key}": value for key, value in state.items()} | {
        "head.T1.weight": torch.ones(1, 64, 1, 1, 1)
    }
    return {"model": network, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 7}


def small(**kwargs):
    torch.manual_seed(0)
    return brainfm.create_model(NAME, **SMALL | kwargs)


def test_names_and_shapes_are_the_authors():
    with torch.device("meta"):
        state = brainfm.create_model(NAME).state_dict()
    assert digest({key: value.shape for key, value in state.items()}) == vectors(NAME)["keys_sha256"]


def test_authors_container_and_a_plain_state_dict_give_the_same_network(tmp_path):
    made, x = small(), torch.randn(1, 1, 16, 12, 20)
    torch.save(checkpoint(made.state_dict()), tmp_path / "brainfm_pretrained.pth")
    torch.save(made.state_dict(), tmp_path / "plain.pth")
    for file in ("brainfm_pretrained.pth", "plain.pth"):
        model = brainfm.create_model(NAME, checkpoint_path=tmp_path / file, **SMALL)
        with torch.inference_mode():
            assert torch.equal(model(x), made(x))


def test_voxels_have_the_length_1_and_any_size_of_4_or_more_is_taken():
    model = small()
    with torch.inference_mode():
        for shape in ((16, 16, 16), (13, 6, 5)):
            features = model.forward_features(torch.randn(1, 1, *shape))
            assert features.shape == (1, 4, *shape)
            np.testing.assert_allclose(features.norm(dim=1), 1, atol=1e-5)
        raw = small(unit_length=False).forward_features(torch.randn(1, 1, 8, 8, 8))
        assert raw.norm(dim=1).std() > 0.01
        with pytest.raises(ValueError, match=r"4 voxels or more along each axis, got \[8, 8, 3\]"):
            model(torch.randn(1, 1, 8, 8, 3))


def test_copies_of_an_image_in_three_channels_give_what_it_gave_alone(tmp_path):
    made, x = small(width=8), torch.randn(1, 1, 16, 16, 16)
    torch.save(checkpoint(made.state_dict()), tmp_path / "published.pth")
    model = brainfm.create_model(NAME, checkpoint_path=tmp_path / "published.pth", in_chans=3, **SMALL | {"width": 8})
    with torch.inference_mode():
        assert error(model(x.expand(-1, 3, -1, -1, -1)), made(x)) < 1e-5


def test_embedding_of_a_scan_is_the_mean_over_what_is_not_0(sample):
    model = small(levels=2)
    tensor = brainfm.create_transform(model)(sample[0])
    inside = tensor[0] > 0
    with torch.inference_mode():
        features = model.forward_features(tensor[None])[0]
    found = brainfm.embed([sample[0]], model, num_workers=0).vectors[0]
    assert error(found, features[:, inside].mean(dim=1)) < 1e-5
    assert error(found, features.mean(dim=(1, 2, 3))) > 0.05


def test_tensor_is_scaled_and_cropped_in_the_stored_order_of_axes(brain, tmp_path):
    image, _, affine = brain
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = image.shape[0] - 1
    nib.Nifti1Image(image[::-1], affine @ flip).to_filename(tmp_path / "las.nii.gz")
    tensor = brainfm.create_transform(NAME)(tmp_path / "las.nii.gz")[0]
    box = np.ix_(*(np.flatnonzero((image[::-1] > 0).any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))))
    assert tensor.shape == (145, 181, 155)
    np.testing.assert_allclose(tensor, image[::-1][box] / 255, atol=1e-6)


@pytest.mark.slow
def test_published_file_gives_the_authors_maps_and_embedding(tmp_path, recipe_state):
    numbers = vectors(NAME)
    torch.save(checkpoint(recipe_state(numbers["keys"], numbers["salt"])), tmp_path / "brainfm_pretrained.pth")
    model, x = brainfm.create_model(NAME, checkpoint_path=tmp_path / "brainfm_pretrained.pth"), drawn(numbers)
    with torch.inference_mode():
        output, maps = model.forward_intermediates(x)
    for found, figures in ((output, numbers["output"]), (maps[5], numbers["feature_map"])):
        statistics = {key: value for key, value in figures.items() if key != "samples"}
        check_array(found, statistics, ("mean", "std", "l2"))
        samples = found.flatten()[np.linspace(0, found.numel() - 1, 16).astype(int)]
        assert (
            error([*samples, found.max()], [*figures["samples"], figures["max"]]) < 1e-4
        )  # the authors' float32 is 3e-5 from the exact numbers
    assert error(maps[5].mean(dim=(2, 3, 4))[0, ::8], numbers["bottleneck_mean_every8"]) < 2e-5
    assert error(Reader(model)(x, [x[0, 0].numpy() > 0]).vectors[0], numbers["embedding"]) < 1e-5
    # What is easily taken for it, and differs: joined the other way round, not of the length 1, an average over all.
    assert error(model.forward_head(output)[0], numbers["embedding"]) > 0.005
    model.unit_length = False
    with torch.inference_mode():
        assert error(model.forward_features(x)[0].mean(dim=(1, 2, 3)), numbers["embedding"]) > 0.1
