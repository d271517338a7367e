"""The autoencoder of the brain's latent diffusion model against outputs of its authors' own code."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from upstream import check_array, digest, drawn, error, vectors

import brainfm

NAME = "brain_ldm_autoencoder"


@pytest.fixture(scope="module")
def numbers():
    return vectors(NAME)


@pytest.fixture(scope="module")
def published(numbers, tmp_path_factory, recipe_state):
    """The authors' file: a bare state dict, with the decoder."""
    file = tmp_path_factory.mktemp(NAME) / "autoencoder.pt"
    torch.save(recipe_state(numbers["keys"], numbers["salt"]), file)
    return file


@pytest.fixture(scope="module")
def maps(numbers, published):
    """The mean of the latent, and the maps of all stages, of the authors' input."""
    model = brainfm.create_model(NAME, checkpoint_path=published)
    with torch.inference_mode():
        return model, *model.forward_intermediates(drawn(numbers))


def test_names_and_shapes_are_the_authors(numbers):
    with torch.device("meta"):
        model = brainfm.create_model(NAME)
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    wanted = {key: shape for key, shape in numbers["keys"].items() if key.startswith(("encoder.", "quant_conv_mu."))}
    assert digest(ours) == digest(wanted)


def test_latent_its_mean_and_the_features_before_it_are_the_authors(numbers, maps):
    model, latent, stages = maps
    check_array(latent, numbers["mu"])
    check_array(stages[-2], numbers["feature_map"])
    assert error(model.forward_head(latent).detach(), numbers["embedding"]) < 1e-5
    assert error(stages[-2].mean(dim=(2, 3, 4)), numbers["pooled128"]) < 1e-5


def test_decoder_and_spread_of_the_latent_are_left_out_and_named(maps):
    dropped = maps[0].weights_report.dropped
    assert {"decoder", "post_quant_conv", "quant_conv_log_sigma"} <= {*dropped}


def test_without_a_latent_it_gives_the_features_before_it_of_the_same_file(published, maps):
    model, x = brainfm.create_model(NAME, checkpoint_path=published, latent=0), torch.randn(1, 1, 16, 16, 24)
    assert model.num_features == 128
    with torch.inference_mode():
        features = maps[0].forward_intermediates(x, [-2], intermediates_only=True)[0]
        assert torch.equal(model(x), features.mean(dim=(2, 3, 4)))


@pytest.mark.slow
def test_padding_both_sides_before_halving_gives_something_else(numbers, published):
    model = brainfm.create_model(NAME, checkpoint_path=published)
    for number in (3, 6, 9):
        halve = model.get_submodule(f"encoder.blocks.{number}")
        halve.forward = lambda x, conv=halve.conv.conv: F.conv3d(x, conv.weight, conv.bias, stride=2, padding=1)
    with torch.inference_mode():
        assert error(model(drawn(numbers)), numbers["embedding"]) > 0.05


def test_whole_head_is_brought_to_the_contracts_box_and_a_bare_brain_is_refused(brain, sample, tmp_path):
    image, mask, affine = brain
    near = mask > 0
    for axis in range(3):
        near = near | np.roll(near, 9, axis) | np.roll(near, -9, axis)
    head = np.where(mask, image, 40 * near).astype(np.uint8)
    nib.Nifti1Image(head, affine).to_filename(tmp_path / "head.nii.gz")
    tensor = brainfm.create_transform(NAME)(tmp_path / "head.nii.gz")
    assert tensor.shape == (1, 160, 224, 160)
    np.testing.assert_allclose(tensor[0], head[16:176, 2:226, 6:166] / 255, atol=1e-6)
    with pytest.raises(brainfm.ScanError, match="skull"):
        brainfm.create_transform(NAME)(sample[0])
