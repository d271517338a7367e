"""`export`: a file that runs without brainfm gives what the model gives, for any batch, or is not written."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import brainfm
from brainfm import export as module
from brainfm.cli import main
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.export import export


@pytest.fixture(scope="module")
def model():
    return brainfm.create_model("test_resnet_3d", pretrained=True)


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
    (contract,) = (p.value for p in onnx.load(path).metadata_props if p.key == "brainfm_input_spec")
    assert brainfm.InputSpec.from_dict(json.loads(contract)) == encoder.pretrained_cfg.input_spec
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
    with pytest.raises(MissingExtraError, match=r"brainfm\[export\]"):
        export(model, tmp_path / "encoder.onnx", "onnx")
    assert not list(tmp_path.iterdir())
