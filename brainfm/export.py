"""Write an encoder as a file that runs without brainfm, ONNX or a program of `torch.export`, and check it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.files import atomic_path
from brainfm.inference import optimize
from brainfm.models.encoder import Encoder
from brainfm.transforms import create_transform

Format = Literal["onnx", "torch-export"]
TOLERANCE = 1e-4  # relative, between two orders of the same float32 sums; ours
_CONTRACT = "brainfm_input_spec"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs are from the model's.

    Attributes:
        path: The file.
        error: ‖file's − model's‖ / ‖model's‖, the larger of a batch of one and of two.
    """

    path: Path
    error: float


def export(model: Encoder, path: str | os.PathLike[str], format: Format) -> ExportReport:
    """Write a model for a batch of any size, with its input contract, and check the file against the model.

    The file is run on the packaged scan, alone and in a batch of two, and is kept only if it gives what the model does.
    Its input is named "volumes", [B, in_chans, D, H, W] float32; its output "embeddings", or "logits" of a classifier.
    The input contract, as JSON, is the metadata entry "brainfm_input_spec" of an ONNX file, and the extra file
    "brainfm_input_spec.json" of a program of torch.export.

    Args:
        model: An encoder of `create_model`, with an input contract of a fixed size; it is not changed.
        path: The file: .onnx, or .pt2.
        format: "onnx" (needs the extra [export]), or "torch-export".

    Raises:
        MissingExtraError: ONNX is not installed.
        BrainfmError: The model has no input contract of a fixed size, the ending is another, or the file gives other
            outputs than the model.

    Example:
        >>> export(brainfm.create_model("test_resnet_3d", pretrained=True), "encoder.onnx", "onnx")
    """
    path = Path(path)
    ending = {"onnx": ".onnx", "torch-export": ".pt2"}
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, not {format!r}")
    if path.suffix != ending[format]:
        raise BrainfmError(f"{path}: the name of a file of {format} ends in {ending[format]}")
    spec = model.pretrained_cfg.input_spec
    if spec is None or spec.output_shape is None:
        raise BrainfmError(f"{model.pretrained_cfg.name or type(model).__name__} has no input contract of a fixed size")
    sample = create_transform(spec)(SAMPLE_SCAN, SAMPLE_MASK)
    pair = torch.stack([sample, sample.flip(-1)]).repeat_interleave(model.in_chans // sample.shape[0], dim=1)
    model = cast(Encoder, model.eval() if not model.training else _eval_copy(model))
    write, read = (_write_onnx, _read_onnx) if format == "onnx" else (_write_program, _read_program)
    with atomic_path(path) as temporary:
        write(model, pair, temporary, json.dumps(spec.to_dict()))
        error = _largest_error(read(temporary), optimize(model), pair)
        if not error <= TOLERANCE:
            raise BrainfmError(f"{path}: not written: its outputs are off by {error:.1e}, more than {TOLERANCE:g}")
    return ExportReport(path, error)


def _eval_copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).eval()


def _largest_error(program: Callable[[Tensor], Tensor], model: nn.Module, pair: Tensor) -> float:
    with torch.inference_mode():
        batches = [(program(batch), model(batch)) for batch in (pair[:1], pair)]
        return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in batches)


def _write_onnx(model: Encoder, pair: Tensor, path: Path, contract: str) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "onnx", "export") from error
    program = torch.onnx.export(
        model,
        (pair,),
        dynamo=True,
        input_names=["volumes"],
        output_names=["logits" if model.num_classes else "embeddings"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {_CONTRACT: contract})
    onnx.save(proto, path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "export") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"volumes": batch.numpy()})[0])


def _write_program(model: Encoder, pair: Tensor, path: Path, contract: str) -> None:
    program = torch.export.export(model, (pair,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={f"{_CONTRACT}.json": contract})


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        program: Any = torch.export.load(file).module()
    return lambda batch: program(batch)
