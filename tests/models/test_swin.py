"""Swin transformers against outputs of their authors' own code: video Swin-T, BrainSegFounder, SwinBrain."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from upstream import check_array, check_tensor, contracts, drawn, error, vectors

import brainfm
from brainfm.models.swin import Merge, WindowAttention

NAMES = ["swin3d_t", "brainsegfounder_swin", "swinbrain"]
every = pytest.mark.parametrize("name", NAMES)
MONAI = ["brainsegfounder_swin", "swinbrain"]


@pytest.fixture(scope="module")
def state_of(recipe_state):
    """A function (name) → the authors' state dict, whose tables of indices are what their network makes of itself."""

    def make(name: str) -> dict[str, torch.Tensor]:
        numbers = vectors(name)
        index = WindowAttention(3, 1, (8, 7, 7) if name == "swin3d_t" else (7, 7, 7), (0, 0, 0)).relative_position_index
        computed = [key for key in numbers["keys"] if key.endswith("relative_position_index")]
        learned = {key: shape for key, shape in numbers["keys"].items() if key not in computed}
        assert all(numbers["keys"][key] == list(index.shape) for key in computed)
        return recipe_state(learned, numbers["salt"]) | dict.fromkeys(computed, index)

    return make


@pytest.fixture(scope="module")
def published(tmp_path_factory, state_of):
    """A function (name) → a file as its authors write it."""

    def write(name: str):
        state, file = state_of(name), tmp_path_factory.mktemp(name) / "published.pth"
        if name == "swinbrain":
            torch.save({f"module.{key}": value for key, value in state.items()}, file)
        elif name == "brainsegfounder_swin":
            heads = {"rotation_head.weight": 4, "contrastive_head.bias": 5, "conv.0.weight": 6}
            inside = {f"swinViT.{key}": value for key, value in state.items()} | {
                key: torch.ones(size) for key, size in heads.items()
            }
            inside = {f"module.{key}": value for key, value in inside.items()}
            torch.save({"epoch": 3, "state_dict": inside, "optimizer": {"state": {}, "param_groups": []}}, file)
        else:
            torch.save(state, file)
        return file

    return write


@pytest.fixture(scope="module")
def loaded(published):
    """A function (name) → the model of its authors' file, as many channels as the authors' input has; built once."""
    models = {}

    def load(name: str):
        if name not in models:
            channels = vectors(name)["input_shape"][1]
            models[name] = brainfm.create_model(name, in_chans=channels, checkpoint_path=published(name))
        return models[name]

    return load


@every
def test_authors_container_loads_strictly_and_what_is_left_out_is_named(name, loaded, state_of):
    model, state = loaded(name), state_of(name)
    left = {
        "swin3d_t": ("head",),
        "brainsegfounder_swin": ("rotation", "contrastive", "conv"),
        "swinbrain": ("encoder1", "encoder4", "decoder5", "out"),
    }[name]
    assert all(any(part in dropped for dropped in model.weights_report.dropped) for part in left)
    gone = ("head.", "out.", "decoder", "encoder1.", "encoder2.", "encoder3.", "encoder4.")
    kept = [value for key, value in state.items() if not key.startswith(gone)]
    assert sum(value.numel() for value in model.state_dict().values()) == sum(value.numel() for value in kept)


def test_video_swin_keeps_its_classifier_where_its_classes_are_asked_for(published, state_of):
    model = brainfm.create_model("swin3d_t", num_classes=400, checkpoint_path=published("swin3d_t"))
    assert torch.equal(model.head.weight, state_of("swin3d_t")["head.weight"])


def test_video_swins_map_embedding_and_logits_are_torchvisions(loaded, state_of):
    numbers, model = vectors("swin3d_t"), loaded("swin3d_t")
    with torch.inference_mode():
        features = model.forward_features(drawn(numbers))
    embedding = model.pool(features)
    check_array(features.movedim(1, -1), numbers["feature_map"])
    assert error(embedding, numbers["embedding"]) < 1e-5
    state = state_of("swin3d_t")
    logits = embedding @ state["head.weight"].T + state["head.bias"]
    assert error(logits[0, :64], numbers["logits_first64_of_400"]) < 1e-5


def test_one_channel_is_the_volume_three_times(loaded, published):
    numbers = vectors("swin3d_t")
    model = brainfm.create_model("swin3d_t", checkpoint_path=published("swin3d_t"))
    shape = [1, 1, *numbers["input_shape"][2:]]
    draw = np.random.RandomState(numbers["input_seed"] + 100).standard_normal(shape).astype(np.float32)
    with torch.inference_mode():
        embedding = model(torch.from_numpy(draw))[0]
    assert error(embedding[:64], numbers["one_channel"]["embedding_first64"]) < 1e-5


@pytest.mark.slow
def test_brainsegfounders_maps_and_embedding_are_the_authors_and_those_of_newer_monai_are_not(loaded):
    numbers, model = vectors("brainsegfounder_swin"), loaded("brainsegfounder_swin")
    with torch.inference_mode():
        features, maps = model.forward_intermediates(drawn(numbers))
        embedding = model.pool(features)[0]
    check_array(features, numbers["feature_map"])
    assert error(embedding, numbers["embedding"]) < 1e-5
    assert [list(found.shape) for found in maps] == numbers["stage_shapes"]
    assert error([float(found.double().norm()) for found in maps], numbers["stage_l2"]) < 1e-5
    merges = [module for module in model.modules() if isinstance(module, Merge)]
    for merge in merges:
        merge.kind = "fixed"
    with torch.inference_mode():
        newer = model(drawn(numbers))[0]
    for merge in merges:
        merge.kind = "legacy"
    assert error(newer[:64], numbers["fixed_merging"]["embedding_first64"]) < 1e-5
    assert error(newer, numbers["embedding"]) > 0.1


@pytest.mark.slow
def test_swinbrains_map_and_embedding_are_the_authors(loaded):
    numbers, model = vectors("swinbrain"), loaded("swinbrain")
    with torch.inference_mode():
        features = model.forward_features(drawn(numbers))
    check_array(features, numbers["feature_map"])
    assert error(model.pool(features), numbers["embedding"]) < 1e-5
    assert error(numbers["fixed_merging"]["embedding_first64"], numbers["embedding"][:64]) > 0.1


@pytest.mark.parametrize("name", MONAI)
def test_legacy_merge_is_another_than_the_fixed_one_which_loads_as_strictly(name, published):
    file, embeddings = published(name), {}
    x = torch.randn(1, vectors(name)["input_shape"][1], 64, 32, 32, generator=torch.Generator().manual_seed(0))
    for merge in ("legacy", "fixed", "v2"):
        model = brainfm.create_model(name, merge=merge, checkpoint_path=file)
        with torch.inference_mode():
            embeddings[merge] = model(x)
    assert error(embeddings["fixed"], embeddings["legacy"]) > 0.02
    assert error(embeddings["v2"], embeddings["fixed"]) > 0.02
    with torch.inference_mode():
        assert torch.equal(brainfm.create_model(name, checkpoint_path=file)(x), embeddings["legacy"])  # the card's


def test_brainsegfounders_file_of_two_channels_loads_where_two_are_asked_for(tmp_path, state_of):
    state = state_of("brainsegfounder_swin")
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].repeat(1, 2, 1, 1, 1)
    torch.save({"state_dict": {f"module.swinViT.{key}": value for key, value in state.items()}}, tmp_path / "two.pt")
    model = brainfm.create_model("brainsegfounder_swin", in_chans=2, checkpoint_path=tmp_path / "two.pt")
    assert torch.equal(model.patch_embed.proj.weight, state["patch_embed.proj.weight"])


@every
def test_cells_look_where_feature_info_says(name):
    model = brainfm.create_model(name, bottleneck=False, depths=(1, 1, 1, 1))
    for part, module in model.named_modules():
        if part.endswith(("attn.proj", "mlp.fc2")):  # each cell by itself
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    step = model.feature_info[-1]["reduction"]
    x = torch.randn(1, model.in_chans, 2 * step[0], step[1], 2 * step[2], requires_grad=True)
    for cells, info in zip(model.forward_intermediates(x)[1], model.feature_info, strict=True):
        last = [n - 1 for n in cells.shape[2:]]
        for cell in ([0, 0, 0], last):
            shown = (cells[(0, slice(None), *cell)] * torch.randn(cells.shape[1])).sum()
            (gradient,) = torch.autograd.grad(shown, x, retain_graph=True)
            looks = np.argwhere(gradient[0].abs().sum(dim=0).numpy())
            middle = (looks.min(axis=0) + looks.max(axis=0)) / 2
            assert np.array_equal(middle, info["offset"] + np.array(cell) * info["reduction"]), info


@every
@pytest.mark.parametrize("size", [(33, 40, 61), (16, 64, 20)])
def test_any_size_runs(name, size):
    model = brainfm.create_model(name)
    with torch.inference_mode():
        assert model(torch.randn(2, model.in_chans, *size)).isfinite().all()


def test_what_no_merge_or_norm_is_called_is_refused():
    for wrong in ({"merge": "old"}, {"merges": "before"}, {"norm": "batch"}):
        with pytest.raises(ValueError, match="merge is one of plane, legacy, fixed, v2"):
            brainfm.create_model("swinbrain", **wrong)
    with pytest.raises(ValueError, match="depths are of 3 stages, and num_heads of 4"):
        brainfm.create_model("swinbrain", depths=(2, 2, 2))


# --- SwinBrain's contract ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(sample, tmp_path_factory):
    """Three channels made of the packaged scan as the authors' numbers were: files by name."""
    folder, image, mask = tmp_path_factory.mktemp("three"), nib.load(sample[0]), nib.load(sample[1])
    voxels, brain = np.asarray(image.dataobj, dtype=np.float32), np.asarray(mask.dataobj) > 0
    channels = {"T1w": voxels, "T2w": 255 - voxels, "FLAIR": voxels**2 / 255}
    for name, values in channels.items():
        nib.Nifti1Image((values * brain).astype(np.float32), image.affine).to_filename(folder / f"{name}.nii")
    return {name: folder / f"{name}.nii" for name in channels}


@pytest.fixture(scope="module")
def tensor(three, sample):
    return brainfm.create_transform(brainfm.create_model("swinbrain"))(three, mask=sample[1])


def test_tensor_of_three_channels_is_swinbrains(tensor):
    check_tensor(tensor, contracts()["swinbrain"]["pretraining"])


@pytest.mark.slow
def test_three_channels_give_swinbrains_embedding(tensor, loaded):
    wanted = vectors("swinbrain")["scan"]["embedding"]
    with torch.inference_mode():
        assert error(loaded("swinbrain")(tensor[None])[0, : len(wanted)], wanted) < 1e-5


@pytest.mark.parametrize("name", ["swin3d_t", "brainsegfounder_swin"])
def test_packaged_scan_becomes_a_tensor_of_the_shape_that_its_contract_says(name, sample):
    tensor = brainfm.create_transform(brainfm.create_model(name))(sample[0])
    assert tuple(tensor.shape) == brainfm.get_pretrained_cfg(name).input_spec.output_shape
    assert tensor.isfinite().all()
