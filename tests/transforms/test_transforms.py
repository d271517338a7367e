"""`create_transform` and its MONAI dictionary version: every way to hand over a scan gives the contract's tensor."""

import json
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, list_data_collate
from monai.transforms import Compose, ConcatItemsd, EnsureChannelFirstd, Flipd, LoadImaged, SaveImaged
from monai.utils import set_determinism
from torch import nn

import brainfm
from brainfm import ModelNameError, PretrainedCfg, ScanError
from brainfm.contract import Transpose
from brainfm.scan.read import read_image
from brainfm.train.cache import read_whole
from brainfm.transforms import InputTransform, InputTransformd, create_transform
from brainfm.transforms.supervised import SupervisedAugmentation

pytestmark = pytest.mark.filterwarnings("ignore:.*nvImageCodec:UserWarning")


@pytest.fixture(scope="module")
def small(small_sample):
    """The 4 mm scan in memory: voxels float32, mask uint8, affine."""
    image, mask = (nib.load(path) for path in small_sample)
    return np.asarray(image.dataobj), np.asarray(mask.dataobj), image.affine


@pytest.fixture(scope="module")
def expected(small_spec, small_sample):
    return InputTransform(small_spec)(*small_sample)


# --- create_transform -----------------------------------------------------------------------------


def test_transform_comes_from_a_model_its_name_its_cfg_or_its_spec(small_model, small_spec):
    cfg = brainfm.get_pretrained_cfg("test_resnet_3d")
    for given in (small_model, "test_resnet_3d", "test_resnet_3d.phantoms", cfg, small_spec):
        transform = create_transform(given)
        assert transform.spec == small_spec
        assert transform.augment is None


def test_transform_of_an_optimized_model_is_that_of_the_model(small_model, small_spec):
    for dtype in ("float32", "bfloat16"):
        assert create_transform(brainfm.optimize(small_model, dtype)).spec == small_spec


def test_transform_comes_from_a_local_folder(tmp_path, small_spec, small_model):
    from brainfm.weights import save_state

    spec = replace(small_spec, operations=(Transpose((2, 1, 0)),))
    cfg = brainfm.get_pretrained_cfg("test_resnet_3d").overlay({"input_spec": spec})
    config = {"architecture": "test_resnet_3d", "model_args": {}, "pretrained_cfg": cfg.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_state(small_model.state_dict(), tmp_path / "model.safetensors")
    assert create_transform(f"local-dir:{tmp_path}").spec == spec


@pytest.mark.parametrize("given", ["no_such_model", "test_resnet_3d.no_such_tag", "some/path", "local-dir:", 42, None])
def test_what_names_no_contract_is_a_value_error(given):
    with pytest.raises(ValueError, match=r"unknown model|no weights tagged|local-dir|no input contract|names no place"):
        create_transform(given)


@pytest.mark.parametrize("given", [PretrainedCfg(architecture="mine", tag="v1"), nn.Linear(2, 2)])
def test_a_model_without_a_contract_is_named_in_the_error(given):
    with pytest.raises(ModelNameError, match=r"^(mine\.v1|Linear) has no input contract"):
        create_transform(given)


def test_a_missing_local_folder_is_a_brainfm_error(tmp_path):
    with pytest.raises(brainfm.WeightsNotFoundError, match=r"config\.json"):
        create_transform(f"local-dir:{tmp_path}")


def test_repr_says_the_steps_in_order(small_spec):
    text = repr(create_transform(small_spec))
    assert text.index("step 1       put the axes") < text.index("step 2       z-score")


# --- InputTransform -------------------------------------------------------------------------------


def test_tensor_is_contiguous_writable_float32_of_the_promised_shape(expected, small_spec):
    assert tuple(expected.shape) == small_spec.output_shape
    assert expected.dtype == torch.float32
    assert expected.is_contiguous()
    assert expected.numpy().flags.writeable
    assert type(expected) is torch.Tensor


@pytest.mark.filterwarnings("error")
def test_contract_without_arithmetic_gives_a_tensor_of_its_own(small, small_spec):
    image, mask, affine = (a.copy() for a in small)
    image.setflags(write=False)
    tensor = InputTransform(replace(small_spec, operations=(), output_shape=None))((image, affine), mask)
    tensor += 1
    assert tensor.shape == (1, *image.shape)
    np.testing.assert_array_equal(image, small[0])


def test_contract_without_arithmetic_leaves_the_callers_array_alone(small, small_spec):
    image, mask, affine = (np.ascontiguousarray(a) for a in small)
    tensor = InputTransform(replace(small_spec, operations=(), output_shape=None))((image, affine), mask)
    tensor += 1
    np.testing.assert_array_equal(image, small[0])


HANDED_OVER = {
    "path": lambda files, arrays: files,
    "str": lambda files, arrays: map(str, files),
    "nibabel image": lambda files, arrays: map(nib.load, files),
    "nibabel image in memory": lambda files, arrays: (nib.Nifti1Image(a, arrays[2]) for a in arrays[:2]),
    "nifti-2 image": lambda files, arrays: (nib.Nifti2Image(a, arrays[2]) for a in arrays[:2]),
    "mgh image": lambda files, arrays: (nib.MGHImage(a, arrays[2]) for a in arrays[:2]),
    "array and affine": lambda files, arrays: ((a, arrays[2]) for a in arrays[:2]),
    "bare mask array": lambda files, arrays: ((arrays[0], arrays[2]), arrays[1]),
    "boolean mask": lambda files, arrays: ((arrays[0], arrays[2]), arrays[1] > 0),
    "affine as a list": lambda files, arrays: ((a, arrays[2].tolist()) for a in arrays[:2]),
    "float64": lambda files, arrays: ((a.astype(np.float64), arrays[2]) for a in arrays[:2]),
    "fortran order": lambda files, arrays: ((np.asfortranarray(a), arrays[2]) for a in arrays[:2]),
    "torch tensors": lambda files, arrays: ((torch.tensor(a), torch.tensor(arrays[2])) for a in arrays[:2]),
    "tensor that requires a gradient": lambda files, arrays: (
        (torch.tensor(arrays[0], requires_grad=True), arrays[2]),
        arrays[1],
    ),
    "meta tensor": lambda files, arrays: (MetaTensor(a, affine=arrays[2]) for a in arrays[:2]),
    "meta tensor with a channel": lambda files, arrays: (MetaTensor(a[None], affine=arrays[2]) for a in arrays[:2]),
}


@pytest.mark.parametrize("kind", HANDED_OVER)
def test_every_way_to_hand_over_a_scan_gives_the_same_tensor(kind, small_sample, small, small_spec, expected):
    image, mask = HANDED_OVER[kind](small_sample, small)
    torch.testing.assert_close(InputTransform(small_spec)(image, mask), expected, rtol=0, atol=1e-6)


def test_on_mismatch_raise_refuses_a_scan_on_another_grid(sample, small_spec, small_sample):
    transform = InputTransform(small_spec, on_mismatch="raise")
    assert transform(*small_sample).shape == small_spec.output_shape
    with pytest.raises(ScanError, match="on_mismatch"):
        transform(*sample)


def test_contract_whose_steps_miss_its_promised_shape_is_refused(small_spec, small_sample):
    broken = replace(small_spec, output_shape=(1, 40, 48, 49))
    with pytest.raises(ScanError, match=r"normalized\.nii\.gz: .*\(1, 40, 48, 48\).*\(1, 40, 48, 49\)"):
        InputTransform(broken)(*small_sample)


def test_transform_goes_through_pickle(small_spec, small_sample, expected):
    again = pickle.loads(pickle.dumps(create_transform(small_spec)))
    assert again(*small_sample).equal(expected)


# --- What it costs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_file(tmp_path_factory, brain):
    """The 1 mm scan as an uncompressed float32 file of 34 MB."""
    path = tmp_path_factory.mktemp("float") / "scan.nii"
    nib.Nifti1Image(brain[0].astype(np.float32), brain[2]).to_filename(path)
    return path


@pytest.mark.parametrize("mask", [False, True])
def test_whole_volume_is_never_copied_in_float64(float_file, brain, spec, mask):
    """A peak of 75 MB was measured, 22 MB of it the tensor; a float64 copy of the crop would add 44 MB."""
    transform = create_transform(spec)
    transform(float_file)  # the imports and the template are not counted
    tracemalloc.start()
    try:
        transform(float_file, (brain[1], brain[2]) if mask else None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6


def test_uncompressed_file_is_mapped_not_read(float_file):
    assert isinstance(read_image(float_file).array, np.memmap)


def test_scan_file_and_array_are_only_read(float_file, brain, spec):
    before = float_file.read_bytes()
    image = brain[0].astype(np.float32)
    create_transform(spec)(float_file)
    create_transform(spec)((image, brain[2]))
    assert float_file.read_bytes() == before
    np.testing.assert_array_equal(image, brain[0])


# --- Augmentation ---------------------------------------------------------------------------------


@pytest.fixture
def seed():
    """Seeds as MONAI's users do, and gives the global state back."""
    yield set_determinism
    set_determinism(None)


def views(small_spec, small_sample, count=3):
    transform = create_transform(small_spec, is_training=True)
    return [transform(*small_sample) for _ in range(count)]


def test_training_views_keep_the_tensors_shape_and_differ(seed, small_spec, small_sample, expected):
    seed(0)
    found = views(small_spec, small_sample)
    for view in found:
        assert type(view) is torch.Tensor
        assert view.shape == expected.shape
        assert view.dtype == torch.float32
        assert not view.equal(expected)
    assert not found[0].equal(found[1])


def test_training_views_are_the_same_for_the_same_seed(seed, small_spec, small_sample):
    seed(7)
    first = views(small_spec, small_sample)
    seed(7)
    again = views(small_spec, small_sample)
    seed(8)
    other = views(small_spec, small_sample)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


class Repeated(torch.utils.data.Dataset):
    """One scan, over and over."""

    def __init__(self, transform, files):
        self.transform = transform
        self.files = files

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(*self.files)


@pytest.mark.parametrize("loader", [torch.utils.data.DataLoader, DataLoader], ids=["torch", "monai"])
def test_training_views_differ_between_workers_and_epochs(loader, seed, small_spec, small_sample):
    seed(0)
    data = Repeated(create_transform(small_spec, is_training=True), small_sample)
    loaded = loader(data, num_workers=2, batch_size=1)
    seen = [batch for _ in range(2) for batch in loaded]
    assert all(not a.equal(b) for n, a in enumerate(seen) for b in seen[:n])


def test_training_views_are_of_the_image_as_stored_and_masked_in_the_z_score_at_the_end(
    seed, small, small_spec, tmp_path
):
    """WhiteStripe leaves a background that is not 0: it is mixed into the rim, and set to 0 by the z-score alone."""
    voxels, mask, affine = small
    striped = np.where(mask > 0, voxels / 100 - 2, -5).astype(np.float32)
    nib.Nifti1Image(striped, affine).to_filename(tmp_path / "image.nii.gz")
    nib.Nifti1Image(mask, affine).to_filename(tmp_path / "mask.nii.gz")
    files = tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz"
    transform = create_transform(small_spec, is_training=True)
    stored, inside = map(
        torch.tensor, read_whole(brainfm.manifest.ScanRecord(*files), small_spec)
    )  # as pretraining does
    assert stored.min() == -5
    differ = 0
    for number in range(4):
        seed(number)
        view = transform(*files)
        seed(number)
        image, brain = transform.augmentation(stored, inside)
        voxels = image[0][brain].double()
        wanted = torch.where(brain, (image[0] - voxels.mean()) / voxels.std(correction=0), 0.0)
        torch.testing.assert_close(view[0], wanted.float(), atol=1e-5, rtol=1e-5)
        seed(number)
        masked, _ = transform.augmentation(stored * inside, inside)
        differ += not torch.allclose(masked[0][brain], image[0][brain], atol=1e-3)
    assert differ


def test_missing_channel_stays_zero_in_training_views(seed, two_channels, channels):
    transform = create_transform(replace(two_channels, missing_channel="zeros"), is_training=True)
    seed(0)
    for _ in range(6):
        view, _ = transform.augmentation(torch.stack([torch.rand(40, 48, 48), torch.zeros(40, 48, 48)]))
        assert view[0].any()
        assert not view[1].any()


def test_training_transform_goes_through_pickle(seed, small_spec, small_sample, expected):
    again = pickle.loads(pickle.dumps(create_transform(small_spec, is_training=True)))
    assert again(*small_sample).shape == expected.shape


def test_training_transform_of_a_contract_without_a_fixed_shape_is_refused(small_spec):
    with pytest.raises(ValueError, match="fixed output shape"):
        create_transform(replace(small_spec, output_shape=None), is_training=True)


# --- InputTransformd ------------------------------------------------------------------------------


@pytest.fixture
def item(small_sample):
    image, mask = map(str, small_sample)
    return {"image": image, "mask": mask, "age": 71}


PIPELINES = {
    "paths": lambda spec: InputTransformd(spec),
    "loaded": lambda spec: Compose([LoadImaged(["image", "mask"]), InputTransformd(spec)]),
    "channel first": lambda spec: Compose(
        [LoadImaged(["image", "mask"]), EnsureChannelFirstd(["image", "mask"]), InputTransformd(spec)]
    ),
    "flipped on the way": lambda spec: Compose(
        [
            LoadImaged(["image", "mask"], ensure_channel_first=True),
            Flipd(["image", "mask"], spatial_axis=0),
            InputTransformd(spec),
        ]
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_dictionary_transform_equals_the_plain_one(name, item, small_spec, expected, small):
    result = PIPELINES[name](small_spec)(item)
    assert isinstance(result["image"], MetaTensor)
    assert result["image"].as_tensor().equal(expected)
    np.testing.assert_array_equal(result["mask"].numpy()[0], small[1].T)
    assert result["age"] == 71
    assert set(item) == {"image", "mask", "age"}
    assert isinstance(item["image"], str)


@pytest.mark.parametrize("name", PIPELINES)
def test_dictionary_transform_keeps_the_file_names(name, item, small_spec):
    result = PIPELINES[name](small_spec)(item)
    assert result["image"].meta["filename_or_obj"] == item["image"]
    assert result["mask"].meta["filename_or_obj"] == item["mask"]


def test_dictionary_transform_keeps_other_metadata(item, small_spec):
    loaded = LoadImaged(["image", "mask"])(item)
    loaded["image"].meta["scanner"] = "Trio"
    result = InputTransformd(small_spec)(loaded)
    assert result["image"].meta["scanner"] == "Trio"
    assert "scanner" not in result["mask"].meta


@pytest.mark.filterwarnings("error:Setting affine")
def test_dictionary_transform_does_not_set_the_affine_twice(item, small_spec):
    result = InputTransformd(small_spec)(item)
    assert result["image"].affine is not result["mask"].affine


@pytest.mark.parametrize("key", ["image", "mask"])
def test_affine_maps_a_voxel_of_the_tensor_to_its_place_in_the_world(key, brain, spec):
    """A mark in the scan is found in the tensor, and the tensor's affine leads back to where the mark was."""
    image, mask, affine = (a.copy() for a in brain)
    voxel = np.array([70, 101, 66, 1])
    if key == "image":
        image[image == 255] = 254
        image[tuple(voxel[:3])] = 255
    else:
        mask[:] = image > 0
        mask[tuple(voxel[:3])] = 0
    result = InputTransformd(spec)({"image": (image, affine), "mask": (mask, affine)})
    tensor = result[key].as_tensor()[0]
    inside = torch.as_tensor(image.T[10:160, 19:211, 1:193].copy() > 0)
    found = torch.nonzero(tensor == tensor.max() if key == "image" else inside & (tensor == 0))
    assert len(found) == 1
    world = result[key].affine.numpy() @ [*found[0].tolist(), 1]
    np.testing.assert_allclose(world, affine @ voxel)


def test_item_without_a_mask_is_taken_as_skull_stripped(item, small_spec, small_sample):
    del item["mask"]
    result = InputTransformd(small_spec)(item)
    assert result["image"].as_tensor().equal(create_transform(small_spec)(small_sample[0]))
    assert result["mask"].shape == result["image"].shape


def test_keys_may_have_other_names_and_masks_may_be_left_alone(item, small_spec, expected, small_sample):
    renamed = {"t1": item["image"], "brain": item["mask"]}
    assert InputTransformd(small_spec, "t1", "brain")(renamed)["t1"].as_tensor().equal(expected)
    result = InputTransformd(small_spec, mask_key=None)(item)
    assert result["mask"] == item["mask"]


def test_later_transforms_find_the_right_places(item, small_spec):
    """A flip after the contract moves image and mask once each."""
    result = InputTransformd(small_spec)(item)
    before = result["image"].affine.clone()
    flipped = Flipd(["image", "mask"], spatial_axis=0)(result)
    origin = before.numpy() @ [39, 0, 0, 1]
    for key in ("image", "mask"):
        np.testing.assert_allclose(flipped[key].affine.numpy()[:, 3], origin)


def test_saved_image_and_mask_do_not_overwrite_each_other(item, small_spec, tmp_path):
    result = Compose([LoadImaged(["image", "mask"]), InputTransformd(small_spec)])(item)
    SaveImaged(["image", "mask"], output_dir=tmp_path, separate_folder=False, print_log=False)(result)
    assert len(list(tmp_path.iterdir())) == 2


def test_dictionary_transform_works_with_cache_and_loader(item, small_spec, expected):
    pipeline = Compose([LoadImaged(["image", "mask"]), InputTransformd(small_spec)])
    data = CacheDataset([item] * 3, pipeline, progress=False, num_workers=0)
    batches = list(DataLoader(data, batch_size=2, collate_fn=list_data_collate))
    assert [batch["image"].shape[0] for batch in batches] == [2, 1]
    for batch in batches:
        for image in batch["image"]:
            assert image.as_tensor().equal(expected)
        assert batch["age"].tolist() == [71] * len(batch["image"])


def test_dictionary_transform_works_in_worker_processes(item, small_spec, expected):
    loader = DataLoader(Dataset([item] * 2, InputTransformd(small_spec)), batch_size=1, num_workers=1)
    assert all(batch["image"].as_tensor()[0].equal(expected) for batch in loader)


@pytest.mark.parametrize("loaded", [False, True])
def test_dictionary_transform_names_the_bad_file(loaded, tmp_path, small, small_spec):
    path = tmp_path / "upside_down.nii.gz"
    nib.Nifti1Image(small[0][:, :, ::-1], small[2]).to_filename(path)
    steps = [LoadImaged("image")] if loaded else []
    with pytest.raises((ScanError, RuntimeError)) as caught:
        Compose([*steps, InputTransformd(small_spec)])({"image": str(path)})
    refusal = caught.value if isinstance(caught.value, ScanError) else caught.value.__cause__
    assert isinstance(refusal, ScanError)
    assert str(refusal).startswith(f"{path}: ")


def test_dictionary_transform_checks_the_promised_shape_too(item, small_spec):
    broken = replace(small_spec, output_shape=(1, 40, 48, 49))
    with pytest.raises(ScanError, match="promises"):
        InputTransformd(broken)(item)


def test_missing_image_key_is_a_key_error(small_spec):
    with pytest.raises(KeyError, match="image"):
        InputTransformd(small_spec)({"t1": Path("scan.nii.gz")})


# --- Several channels -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_channels(small_spec):
    return replace(small_spec, channels=("T1w", "FLAIR"), output_shape=(2, 40, 48, 48))


@pytest.fixture(scope="module")
def channels(small, small_sample, tmp_path_factory):
    """An item with the 4 mm scan as T1w, the same upside down as FLAIR, and their mask."""
    flair = tmp_path_factory.mktemp("flair") / "flair.nii.gz"
    voxels, mask, affine = small
    nib.Nifti1Image((voxels.max() + 1 - voxels) * mask, affine).to_filename(flair)
    return {"t1": str(small_sample[0]), "flair": str(flair), "brain": str(small_sample[1])}


def test_tensor_of_several_channels_has_each_as_it_would_be_alone(channels, two_channels, small_spec, expected):
    tensor = InputTransform(two_channels)({"FLAIR": channels["flair"], "T1w": channels["t1"]}, channels["brain"])
    assert tensor.shape == (2, 40, 48, 48)
    assert tensor[:1].equal(expected)
    alone = replace(small_spec, channels=("FLAIR",), representation="FLAIR")
    assert tensor[1:].equal(InputTransform(alone)(channels["flair"], channels["brain"]))


KEYS = {"by name": {"FLAIR": "flair", "T1w": "t1"}, "in order": ["t1", "flair"], "as a tuple": ("t1", "flair")}


@pytest.mark.parametrize("loaded", [False, True], ids=["paths", "loaded"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_dictionary_transform_gathers_the_channels_under_one_key(keys, loaded, channels, two_channels):
    steps = [LoadImaged(["t1", "flair", "brain"])] if loaded else []
    result = Compose([*steps, InputTransformd(two_channels, keys, "brain")])(channels)
    wanted = InputTransform(two_channels)({"T1w": channels["t1"], "FLAIR": channels["flair"]}, channels["brain"])
    assert result["image"].as_tensor().equal(wanted)
    assert result["image"].meta["filename_or_obj"] == channels["t1"]
    assert result["brain"].shape == (1, 40, 48, 48)
    assert set(result) == {"image", "t1", "flair", "brain"}


def test_dictionary_transform_puts_the_tensor_under_the_key_it_is_told(channels, two_channels, item, small_spec):
    result = InputTransformd(two_channels, ["t1", "flair"], "brain", output_key="t1")(channels)
    assert result["t1"].shape == (2, 40, 48, 48)
    assert "image" not in result
    result = InputTransformd(small_spec, output_key="tensor")(item)
    assert result["image"] == item["image"]
    assert result["tensor"].shape == (1, 40, 48, 48)


def test_dictionary_transform_takes_channels_that_monai_has_joined(channels, two_channels):
    keys = ["t1", "flair"]
    steps = [LoadImaged(keys, ensure_channel_first=True), ConcatItemsd(keys, "image")]
    result = Compose([*steps, InputTransformd(two_channels, mask_key="brain")])(channels)
    wanted = InputTransformd(two_channels, keys, "brain")(channels)["image"]
    assert result["image"].as_tensor().equal(wanted.as_tensor())


def test_dictionary_transform_names_a_missing_channel(channels, two_channels):
    transform = InputTransformd(two_channels, ["t1", "flair"], "brain")
    with pytest.raises(ScanError, match="FLAIR is missing"):
        transform({"t1": channels["t1"], "brain": channels["brain"]})
    with pytest.raises(ScanError, match="T1w, FLAIR is missing"):
        transform({"brain": channels["brain"]})


def test_dictionary_transform_with_too_few_keys_is_refused(two_channels):
    with pytest.raises(ValueError, match="1 keys, and the contract takes 2 channels, T1w, FLAIR"):
        InputTransformd(two_channels, ["t1"])


@pytest.mark.parametrize("build", [InputTransform, InputTransformd, SupervisedAugmentation])
def test_transform_of_a_name_instead_of_a_contract_is_refused_when_it_is_built(build):
    with pytest.raises(
        TypeError, match=r"must be a brainfm\.InputSpec, not 'simclr_resnet18_3d'; .*get_pretrained_cfg"
    ):
        build("simclr_resnet18_3d")


@pytest.mark.parametrize("build", [InputTransform, InputTransformd])
def test_transform_with_an_impossible_argument_is_refused_when_it_is_built(build, small_spec):
    with pytest.raises(ValueError, match='on_mismatch must be "resample" or "raise", not \'crop\''):
        build(small_spec, on_mismatch="crop")
    with pytest.raises(TypeError):
        build(small_spec, **({"augment": 3} if build is InputTransform else {"image_key": {"T1w": []}}))


def test_dictionary_transform_with_impossible_keys_is_refused_when_it_is_built(small_spec, two_channels):
    with pytest.raises(ValueError, match="image_key names 'T2w'; the contract's channels are T1w, FLAIR"):
        InputTransformd(two_channels, {"T1w": "t1", "T2w": "t2"})
    with pytest.raises(ValueError, match="a key of their own"):
        InputTransformd(small_spec, "image", mask_key="image")


def test_dictionary_transform_of_one_image_is_refused_with_the_way_out(item, two_channels):
    with pytest.raises(ScanError, match=r"takes 2 channels; pass \{'T1w': …, 'FLAIR': …\}"):
        InputTransformd(two_channels)(item)


def test_training_views_place_all_channels_alike(seed, two_channels, channels):
    """Noise alone is each channel's own: of 0.1 at most, and in one view of five."""
    transform, noisy = create_transform(two_channels, is_training=True), 0
    scan = {"T1w": channels["t1"], "FLAIR": channels["flair"]}
    plain = InputTransform(two_channels)(scan, channels["brain"])
    seed(0)
    for _ in range(12):
        (first, second), _ = transform.augmentation(torch.stack([plain[0], plain[0]]))
        noisy += not first.equal(second)
        assert (first - second).std() < 0.15
        assert not first.equal(plain[0])
    assert 0 < noisy < 12
    assert transform(scan, channels["brain"]).shape == (2, 40, 48, 48)
