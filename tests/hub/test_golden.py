"""`verify`: ok where a machine gives the published features, OFF where the weights or the input are others."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import brainfm
from brainfm import BrainfmError, WeightsError
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.files import file_sha256
from brainfm.hub import Check, golden, save_for_hub, verify
from brainfm.weights import read_checkpoint, save_state


@pytest.fixture(scope="module")
def made(small_model, tmp_path_factory):
    """The folder of the test model. Shared: change a copy."""
    return save_for_hub(small_model, tmp_path_factory.mktemp("made") / "folder")


@pytest.fixture
def folder(made, tmp_path):
    copy = tmp_path / "folder"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def change(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def oks(checks):
    return {check.computation: check.ok for check in checks}


# --- What is kept ---------------------------------------------------------------------------------


def test_golden_embedding_is_that_of_the_packaged_scan(made, small_model):
    stored = json.loads((made / "config.json").read_text())["golden"]
    assert stored["scan_sha256"] == file_sha256(SAMPLE_SCAN)
    assert stored["mask_sha256"] == file_sha256(SAMPLE_MASK)
    assert (stored["dtype"], stored["torch_version"]) == ("float32", torch.__version__)
    expected = brainfm.embed([(SAMPLE_SCAN, SAMPLE_MASK)], small_model).vectors[0]
    np.testing.assert_allclose(np.float32(stored["embedding"]), expected, rtol=1e-5, atol=1e-6)
    assert len(stored["embedding"]) == small_model.num_features


def test_golden_embedding_is_of_the_embedding_even_where_the_model_has_a_classifier(tmp_path):
    model = brainfm.create_model("test_resnet_3d", pretrained=True, num_classes=3)
    folder = save_for_hub(model, tmp_path / "folder")
    assert len(json.loads((folder / "config.json").read_text())["golden"]["embedding"]) == 128
    assert all(oks(verify(f"local-dir:{folder}", ["float32"])).values())


# --- ok -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d", "test_vit_3d.phantoms"])
def test_packaged_models_give_the_published_features_in_every_dtype(name):
    checks = verify(name, ("float32", "bfloat16", "float16"))
    assert oks(checks) == {
        "float32": True,
        "float32, optimized": True,
        "bfloat16, optimized": True,
        "float16, optimized": True,
    }
    assert [check.tolerance for check in checks] == [1e-4, 1e-4, 2e-2, 1e-2]
    assert checks[0].error < 1e-5
    assert checks[2].error > 1e-5  # it was computed in bfloat16


def test_plain_model_comes_first_and_alone_where_no_dtype_is_asked_for():
    assert list(oks(verify("test_resnet_3d", ()))) == ["float32"]
    assert list(oks(verify("test_resnet_3d"))) == ["float32", "float32, optimized", "bfloat16, optimized"]


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_saved_folder_is_ok_with_the_pooling_it_was_saved_with(pool, tmp_path):
    model = brainfm.create_model("test_vit_3d", pretrained=True, global_pool=pool)
    folder = save_for_hub(model, tmp_path / "folder")
    assert all(check.error < 1e-6 for check in verify(f"local-dir:{folder}", ()))


def test_other_pooling_is_off(tmp_path):
    folder = save_for_hub(brainfm.create_model("test_vit_3d", pretrained=True), tmp_path / "folder")
    change(folder, lambda config: config["models"]["test_vit_3d"]["args"].update(global_pool="avg"))
    assert not verify(f"local-dir:{folder}", ())[0].ok


def test_names_that_create_model_takes_are_verified(made, hub, tmp_path, monkeypatch):
    assert verify(f"local-dir:{made}", ())[0].ok
    hub.add("lab/tiny", {path.name: path.read_bytes() for path in made.iterdir()})
    assert verify("hf-hub:lab/tiny", ())[0].ok


@pytest.mark.parametrize(("error", "ok"), [(0.0, True), (1e-4, True), (1.1e-4, False), (math.nan, False)])
def test_check_is_ok_up_to_its_tolerance_and_never_without_a_number(error, ok):
    assert Check("float32", error, 1e-4).ok is ok


# --- OFF ------------------------------------------------------------------------------------------


def test_consistent_folder_with_other_weights_is_off(folder):
    state = read_checkpoint(folder / "model.safetensors").state
    save_state({key: v * 1.01 if key.endswith("conv1.weight") else v for key, v in state.items()}, folder / "m")
    (folder / "m").replace(folder / "model.safetensors")
    digest = f"sha256:{file_sha256(folder / 'model.safetensors')}"
    change(folder, lambda config: config["models"]["test_resnet_3d"]["weights"]["phantoms"].update(digest=digest))
    checks = verify(f"local-dir:{folder}", ["float32"])
    assert oks(checks) == {"float32": False, "float32, optimized": False}
    assert checks[0].error == pytest.approx(checks[1].error, rel=1e-2)


def test_weights_that_do_not_have_the_hash_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(WeightsError, match="sha256"):
        verify(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("operation", "changes"),
    [(0, {"axes": [1, 2, 0]}), (1, {"region": "all"}), (1, {"background": "keep"}), (1, {"eps": 1e6})],
)
def test_other_preprocessing_is_off(operation, changes, folder):
    def edit(config):
        config["inputs"]["input"]["operations"][operation].update(changes)
        config["inputs"]["input"]["output_shape"] = None

    change(folder, edit)
    assert not verify(f"local-dir:{folder}", ())[0].ok


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["scan_sha256", "mask_sha256"])
def test_golden_embedding_of_another_scan_is_refused(key, folder):
    change(folder, lambda config: config["golden"].update({key: "0" * 64}))
    with pytest.raises(BrainfmError, match="another sample scan"):
        verify(f"local-dir:{folder}")


@pytest.mark.parametrize(
    "embedding",
    [
        [1.0] * 127,
        [1.0] * 129,
        [],
        [math.nan] * 128,
        [1.0] * 127 + [math.inf],
        [0.0] * 128,
        [[1.0] * 128],
        None,
        "abc",
        ["a"] * 128,
        [None] * 128,
        [[1.0], [1.0, 2.0]],
        {"a": 1},
        1.0,
    ],
    ids=lambda value: str(value)[:20],
)
def test_golden_embedding_that_is_no_embedding_is_refused(embedding, folder):
    change(folder, lambda config: config["golden"].update(embedding=embedding))
    with pytest.raises(WeightsError, match="its golden embedding is not one of 128 numbers"):
        verify(f"local-dir:{folder}", ())


@pytest.mark.parametrize("stored", [[], "text", 3, {}, {"embedding": [1.0] * 128}, False])
def test_golden_embedding_that_is_none_is_refused(stored, folder):
    change(folder, lambda config: config.update(golden=stored))
    with pytest.raises(WeightsError, match=r"the golden embedding in its config\.json is not one"):
        verify(f"local-dir:{folder}", ())


@pytest.mark.parametrize("missing", [True, False])
def test_folder_without_a_golden_embedding_is_refused_with_what_to_do(missing, folder):
    def edit(config):
        model = config["models"]["test_resnet_3d"]
        model["weights"] = {"mine": model["weights"]["phantoms"]}
        if missing:
            del config["golden"]
        else:
            config["golden"] = None

    change(folder, edit)
    with pytest.raises(BrainfmError, match="no golden embedding is known for these weights; 'brainfm convert'"):
        verify(f"local-dir:{folder}")


def test_model_that_the_packaged_scan_is_no_input_of_has_no_golden_embedding_and_says_so(tmp_path, caplog):
    model = brainfm.create_model("test_resnet_3d", pretrained=True, in_chans=3)
    folder = save_for_hub(model, tmp_path / "folder")
    assert "no golden embedding: the packaged sample scan is no input of this model" in caplog.text
    assert json.loads((folder / "config.json").read_text())["golden"] is None
    with pytest.raises(BrainfmError):
        verify(f"local-dir:{folder}")


def test_model_without_weights_is_refused():
    with pytest.raises(BrainfmError, match="no weights of vit_tiny_3d"):
        verify("vit_tiny_3d")


@pytest.mark.parametrize("dtype", ["float64", "half"])
def test_dtype_that_is_none_is_refused_by_name(dtype):
    with pytest.raises(ValueError, match=dtype):
        verify("test_resnet_3d", [dtype])


def test_dtype_auto_is_float32_as_everywhere():
    assert verify("test_resnet_3d", ["auto"])[1].tolerance == golden.TOLERANCES["float32"]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_device_that_is_not_there_is_refused_by_name(device):
    with pytest.raises(BrainfmError, match=f"device '{device}' cannot be used here"):
        verify("test_resnet_3d", (), device=device)
