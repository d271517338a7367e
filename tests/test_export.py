"""`export`: a file that runs without brainfm gives what the model gives, for any batch, or is not written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import brainfm
from brainfm import export as module
from brainfm import registry
from brainfm.cli import main
from brainfm.contract import Readout, Window
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.export import export
from brainfm.models.encoder import Encoder, stage
from brainfm.readout import Reader, windows


@pytest.fixture(scope="module")
def model():
    return brainfm.create_model("test_resnet_3d", pretrained=True)


class Toy(Encoder):
    """A convolution and a max-pool of 4; it takes volumes of any size."""

    classifier_name = "head"
    first_conv = "stem.0"

    def __init__(self, num_classes=0, in_chans=1, global_pool=None, drop_rate=0.0):
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.stem = nn.Sequential(nn.Conv3d(in_chans, 6, 3, padding=1), nn.MaxPool3d(4))
        self.num_features = 6
        self.feature_info = [stage("stem", 6, (4, 4, 4), (1.5, 1.5, 1.5))]
        self.reset_classifier(num_classes)


@pytest.fixture
def toy(small_spec, monkeypatch):
    """A function (readout, changes to the contract of the test models) → a registered model."""
    monkeypatch.setattr(registry, "_registered", dict(registry._models()))

    def make(readout: Readout, **changes) -> Encoder:
        spec = replace(small_spec, **changes)
        cfg = brainfm.PretrainedCfg(input_spec=spec, readout=readout, in_chans=len(spec.channels))

        @brainfm.register_model(cfgs={"toy": cfg})
        def toy_3d(**kwargs):
            return Toy(**kwargs)

        torch.manual_seed(0)
        return brainfm.create_model("toy_3d")

    return make


def batches():
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 40, 48, 48, generator=draws) for size in (1, 3)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_onnx_runs_by_itself_for_any_batch_and_has_its_contract(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "encoder.onnx"
    done = CliRunner().invoke(main, ["export", name, "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert "checked: relative error" in done.output
    session = runtime.InferenceSession(str(path))
    encoder = brainfm.create_model(name, pretrained=True)
    for batch in batches():
        (found,) = session.run(["embeddings"], {"volumes": batch.numpy()})
        with torch.inference_mode():
            assert relative(torch.from_numpy(found), encoder(batch)) < 1e-4
    said = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    assert brainfm.InputSpec.from_dict(said["brainfm_input_spec"]) == encoder.pretrained_cfg.input_spec
    assert Readout.from_dict(said["brainfm_readout"]) == encoder.pretrained_cfg.readout
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_program_of_torch_export_runs_by_itself_for_any_batch(name, tmp_path):
    encoder = brainfm.create_model(name, pretrained=True, num_classes=2)
    torch.nn.init.normal_(encoder.get_classifier().weight)
    report = export(encoder.train(), tmp_path / "encoder.pt2", "torch-export")
    assert report.error < 1e-5
    assert encoder.training
    extra = {"brainfm_input_spec.json": ""}
    program = torch.export.load(str(report.path), extra_files=extra).module()
    for batch in batches():
        with torch.inference_mode():
            assert relative(program(batch), encoder.eval()(batch)) < 1e-5
    assert (
        brainfm.InputSpec.from_dict(json.loads(extra["brainfm_input_spec.json"])) == encoder.pretrained_cfg.input_spec
    )


def test_program_of_a_model_with_a_window_takes_windows_and_says_how_to_average_them(toy, tmp_path):
    readout = Readout("avg", Window((24, 20, 28), overlap=0.25, pad=-1.0))
    model = toy(readout)
    report = export(model, tmp_path / "encoder.pt2", "torch-export")
    assert report.sample == "a window of the packaged scan"
    extra = {"brainfm_readout.json": "", "brainfm_input_spec.json": ""}
    program = torch.export.load(str(report.path), extra_files=extra).module()
    said = Readout.from_dict(json.loads(extra["brainfm_readout.json"]))
    assert said == readout
    assert brainfm.InputSpec.from_dict(json.loads(extra["brainfm_input_spec.json"])) == model.pretrained_cfg.input_spec
    volume = batches()[0]
    with torch.inference_mode():
        cut = torch.cat([volume[(..., *box)] for box in windows(volume.shape[2:], said.window)])
        found = program(cut).mean(dim=0, keepdim=True)
    assert len(cut) > 8
    assert relative(found, Reader(model)(volume).vectors) < 1e-5


def test_window_is_padded_where_the_scan_is_shorter_and_needs_no_contract_of_a_fixed_size(toy, tmp_path, monkeypatch):
    seen, write = [], module._write_program
    monkeypatch.setattr(
        module, "_write_program", lambda model, pair, *rest: seen.append(pair) or write(model, pair, *rest)
    )
    model = toy(Readout(window=Window((64, 20, 20), pad=-7.0)), output_shape=None)
    assert export(model, tmp_path / "encoder.pt2", "torch-export").error < 1e-5
    (pair,) = seen
    assert pair.shape == (2, 1, 64, 20, 20)
    assert (pair[:, :, 40:] == -7).all()  # of the contract's 40 planes
    assert pair[:, :, :40].std() > 0.1  # the scan's middle, not its background


def test_model_that_averages_over_the_brain_is_refused(toy, tmp_path):
    for readout in (Readout("brain"), Readout("brain", Window((24, 24, 24)))):
        with pytest.raises(BrainfmError, match="takes no brain mask; export it with a pooling of its own"):
            export(toy(readout), tmp_path / "encoder.pt2", "torch-export")
    assert not list(tmp_path.iterdir())


def test_model_that_the_packaged_scan_is_no_input_of_is_checked_on_random_numbers(toy, tmp_path):
    model = toy(Readout(), representation="any contrast", channels=("T1w", "FLAIR"), output_shape=(2, 40, 48, 48))
    report = export(model, tmp_path / "encoder.pt2", "torch-export")
    assert report.sample == "random numbers"
    program = torch.export.load(str(report.path)).module()
    batch = torch.cat(batches()).reshape(2, 2, 40, 48, 48)
    with torch.inference_mode():
        assert relative(program(batch), model(batch)) < 1e-5


def test_file_with_other_outputs_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_read_program", lambda path: lambda batch: model(batch) * 1.01)
    (tmp_path / "encoder.pt2").write_text("what was there")
    with pytest.raises(BrainfmError, match=r"not written: its outputs are off by 1\.0e-02"):
        export(model, tmp_path / "encoder.pt2", "torch-export")
    assert (tmp_path / "encoder.pt2").read_text() == "what was there"
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_ending_and_model_without_contract_are_refused(model, tmp_path):
    with pytest.raises(BrainfmError, match=r"ends in \.onnx"):
        export(model, tmp_path / "encoder.pt2", "onnx")
    with pytest.raises(ValueError, match="format must be one of onnx, torch-export"):
        export(model, tmp_path / "encoder.pb", "tensorflow")
    bare = brainfm.create_model("test_resnet_3d", pretrained_cfg=brainfm.PretrainedCfg())
    with pytest.raises(BrainfmError, match="no input contract of a fixed size"):
        export(bare, tmp_path / "encoder.pt2", "torch-export")


def test_missing_onnx_names_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*onnx"):
        export(model, tmp_path / "encoder.onnx", "onnx")
    assert not list(tmp_path.iterdir())
