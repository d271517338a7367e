"""OpenMind's and FOMO26's residual encoders against outputs of their authors' own code, from files as they are."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from upstream import check_array, check_tensor, contracts, digest, drawn, error, vectors

import brainfm

BOTH = ["openmind_resencl", "fomo26_resenc_b"]
SMALL = {"widths": [4, 8, 8], "depths": [1, 2, 1]}
STATISTICS = ("mean", "std", "l2")
# The authors' float32 lies a few parts in 100,000 from the exact numbers of single voxels, as this does.
SINGLE_VOXELS = 1e-4


def asparagus(name: str) -> str:
    """A name of ours → that in asparagus."""
    return name.replace("stem.convs.0.", "stem.conv1.").replace(".norm.", ".norm_op.")


def aliased(state: dict) -> dict:
    """Every layer a second time, as `all_modules` of its block; the tensors are the same."""
    again = {}
    for key, value in state.items():
        for number, layer in enumerate(("conv", "norm")):
            block, found, last = key.rpartition(f".{layer}.")
            if found and ("encoder" in key or "convs" in key):
                again[f"{block}.all_modules.{number}.{last}"] = value
    return state | again


def decoder(widths: list[int]) -> dict[str, list[int]]:
    """Names and shapes of nnssl's decoder, whose stages lead back to finer maps."""
    keys: dict[str, list[int]] = {}
    for number, (below, width) in enumerate(zip(widths[:0:-1], widths[-2::-1], strict=True)):
        conv = {"conv.weight": [width, 2 * width, 3, 3, 3], "conv.bias": [width]}
        conv |= {"norm.weight": [width], "norm.bias": [width]}
        keys |= {f"decoder.stages.{number}.convs.0.{name}": shape for name, shape in conv.items()}
        keys |= {
            f"decoder.transpconvs.{number}.weight": [below, width, 2, 2, 2],
            f"decoder.transpconvs.{number}.bias": [width],
        }
        keys |= {f"decoder.seg_layers.{number}.weight": [1, width, 1, 1, 1], f"decoder.seg_layers.{number}.bias": [1]}
    return keys


def nnssl(encoder: dict, rest: dict) -> dict:
    """All that is in nnssl's file: the encoder, the decoder, and in the decoder the encoder once more."""
    state = aliased(encoder)
    return state | aliased(rest) | {f"decoder.{key}": value for key, value in state.items()}


def checkpoint(name: str, encoder: dict[str, torch.Tensor], rest: dict[str, torch.Tensor]) -> dict:
    """The authors' container, of tensors under our names."""
    if name == "openmind_resencl":
        return {
            "network_weights": nnssl(encoder, rest),
            "nnssl_adaptation_plan": {"architecture_plans": {"arch_class_name": "ResEncL"}},
            "trainer_name": "BaseMAETrainer",
            "init_args": {"fold": "all"},
        }
    state = {asparagus(key): value for key, value in aliased(encoder).items()} | rest
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    prefixed = {f"model.{key}": value for key, value in state.items()}
    return {"epoch": 3, "state_dict": prefixed, "optimizer_states": [moments], "hyper_parameters": {"lr": 1e-4}}


def drawn_weights(name: str, recipe_state) -> dict[str, torch.Tensor]:
    """The recipe's numbers under our names. FOMO26's vectors were seeded by its names with `norm` for `norm_op`."""
    numbers = vectors(name)
    keys = {key.replace(".norm_op.", ".norm."): shape for key, shape in numbers["keys"].items()}
    return {
        key.replace("stem.conv1.", "stem.convs.0."): value for key, value in recipe_state(keys, numbers["salt"]).items()
    }


# --- Names, and files in small ---------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_names_and_shapes_are_the_authors(name):
    with torch.device("meta"):
        state = brainfm.create_model(name).state_dict()
    rename = asparagus if name == "fomo26_resenc_b" else str
    assert digest({rename(key): value.shape for key, value in state.items()}) == vectors(name)["keys_sha256"]


def test_container_of_these_tests_has_the_names_of_nnssls_file():
    numbers = vectors("openmind_resencl")
    keys = nnssl(numbers["keys"], decoder([32, 64, 128, 256, 320, 320]))
    assert len(keys) == numbers["full_keys_total"]
    assert digest(keys) == numbers["full_keys_sha256"]


@pytest.mark.parametrize("name", BOTH)
def test_authors_container_and_a_plain_state_dict_give_the_same_network(name, tmp_path):
    torch.manual_seed(0)
    made = brainfm.create_model(name, **SMALL)
    rest = {key: torch.ones(shape) for key, shape in decoder(SMALL["widths"]).items()}
    torch.save(checkpoint(name, made.state_dict(), rest), tmp_path / "published.ckpt")
    rename = asparagus if name == "fomo26_resenc_b" else str
    torch.save({rename(key): value for key, value in made.state_dict().items()}, tmp_path / "plain.pth")
    x = torch.randn(1, 1, 16, 16, 16)
    for file in ("published.ckpt", "plain.pth"):
        model = brainfm.create_model(name, checkpoint_path=tmp_path / file, **SMALL)
        with torch.inference_mode():
            assert torch.equal(model(x), made(x))
    report = brainfm.create_model(name, checkpoint_path=tmp_path / "published.ckpt", **SMALL).weights_report
    assert "decoder" in report.dropped


def test_s3d_file_is_read_under_all_modules_not_under_its_stale_names(tmp_path):
    torch.manual_seed(0)
    made = brainfm.create_model("openmind_resencl.s3d", **SMALL)
    state = aliased(made.state_dict())
    stale = {key: torch.zeros_like(value) if "all_modules" not in key else value for key, value in state.items()}
    torch.save({"network_weights": stale}, tmp_path / "s3d.pth")
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        found = {
            tag: brainfm.create_model(f"openmind_resencl.{tag}", checkpoint_path=tmp_path / "s3d.pth", **SMALL)(x)
            for tag in ("mae", "s3d")
        }
        assert torch.equal(found["s3d"], made(x))
    assert not torch.equal(found["mae"], found["s3d"])


def test_volume_that_cannot_be_halved_is_refused_with_what_to_do():
    model = brainfm.create_model("openmind_resencl", **SMALL)
    with pytest.raises(ValueError, match=r"multiples of 4, got \[16, 16, 18\]"):
        model(torch.zeros(1, 1, 16, 16, 18))
    with pytest.raises(ValueError, match="shortcut_pool is 'mean'"):
        brainfm.create_model("openmind_resencl", shortcut_pool="mean", **SMALL)


def test_scan_is_seen_in_windows_of_160_voxels_padded_by_0_at_the_far_end(sample):
    model = brainfm.create_model("openmind_resencl", widths=[2, 4], depths=[1, 1])
    tensor = brainfm.create_transform(model)(sample[0])
    assert tensor.shape == (1, 155, 181, 145)
    padded = torch.zeros(1, 1, 160, 181, 160)
    padded[0, :, :155, :, :145] = tensor
    with torch.inference_mode():
        wanted = (model(padded[..., :160, :]) + model(padded[..., 21:, :])) / 2
    found = brainfm.embed([sample[0]], model, num_workers=0).vectors
    assert error(found, wanted) < 1e-5


# --- The authors' numbers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory, recipe_state):
    """A function (name) → a file as its authors publish it."""

    def write(name: str):
        file = tmp_path_factory.mktemp(name) / "published.pth"
        torch.save(
            checkpoint(name, drawn_weights(name, recipe_state), {"decoder.seg_layers.0.bias": torch.ones(1)}), file
        )
        return file

    return write


def held(model, numbers) -> None:
    x = drawn(numbers)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        embedding = model.forward_head(features)[0]
    assert [list(each.shape) for each in maps] == numbers["stage_shapes"]
    figures = numbers["feature_map"]
    check_array(features, {key: value for key, value in figures.items() if key != "samples"}, STATISTICS)
    samples = features.flatten()[np.linspace(0, features.numel() - 1, 16).astype(int)]
    assert error([*samples, features.max()], [*figures["samples"], figures["max"]]) < SINGLE_VOXELS
    assert error(embedding, numbers["embedding"]) < 1e-5
    if "stage_means" in numbers:
        np.testing.assert_allclose([float(each.mean()) for each in maps], numbers["stage_means"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_published_file_gives_the_authors_maps_and_embedding(name, published):
    held(brainfm.create_model(name, checkpoint_path=published(name)), vectors(name))


@pytest.mark.slow
def test_pooling_by_the_maximum_is_the_authors_other_network_and_not_this_one(published):
    numbers = vectors("fomo26_resenc_b")
    file = published("fomo26_resenc_b")
    model = brainfm.create_model("fomo26_resenc_b", checkpoint_path=file, shortcut_pool="max")
    with torch.inference_mode():
        embedding = model(drawn(numbers))[0]
    assert error(embedding[:64], numbers["maxpool_shortcuts"]["embedding_first64"]) < 1e-5
    assert error(embedding, numbers["embedding"]) > 0.5


# --- Their contracts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"),
    [("nnssl", (1, 1, 1)), ("nnssl_resampled_z2mm", (1, 1, 2)), ("nnssl_resampled_2x2x4mm", (2, 2, 4))],
)
def test_openminds_tensor_of_a_scan_of_any_spacing_is_the_authors(name, steps, brain, tmp_path):
    image, _, affine = brain
    thinned = image[tuple(slice(None, None, step) for step in steps)]
    nib.Nifti1Image(thinned, affine @ np.diag([*steps, 1])).to_filename(tmp_path / "scan.nii.gz")
    tensor = brainfm.create_transform("openmind_resencl")(tmp_path / "scan.nii.gz")
    check_tensor(tensor, contracts()[name]["tensor"])


def test_resampling_before_the_score_gives_another_tensor(brain, tmp_path):
    image, _, affine = brain
    nib.Nifti1Image(image[..., ::2], affine @ np.diag([1, 1, 2, 1])).to_filename(tmp_path / "scan.nii.gz")
    spec = brainfm.get_pretrained_cfg("openmind_resencl").input_spec
    turn, crop, score, resample = spec.operations
    spec = replace(spec, operations=(turn, crop, resample, score))
    tensor = spec.apply(brainfm.load_scan(tmp_path / "scan.nii.gz", spec=spec)).image
    assert abs(tensor.mean()) < 1e-4  # and the authors' is 2e-3, since resampling comes after
    assert contracts()["nnssl_resampled_z2mm"]["tensor"]["mean"] > 1e-3


def test_fomos_tensor_is_the_whole_array_turned_to_ras_and_scored(brain, tmp_path):
    image, _, affine = brain
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = image.shape[0] - 1
    nib.Nifti1Image(image[::-1], affine @ flip).to_filename(tmp_path / "las.nii.gz")
    tensor = brainfm.create_transform("fomo26_resenc_b")(tmp_path / "las.nii.gz")[0]
    values = image.astype(np.float64)
    np.testing.assert_allclose(tensor, (values - values.mean()) / values.std(), atol=1e-5)
