"""Write an encoder as a file that runs without brainfm, ONNX or a program of `torch.export`, and check it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.contract import InputSpec, Window
from brainfm.errors import BrainfmError, MissingExtraError, ScanError
from brainfm.files import atomic_path
from brainfm.inference import optimize
from brainfm.models.encoder import Encoder
from brainfm.readout import windows
from brainfm.transforms import create_transform

Format = Literal["onnx", "torch-export"]
TOLERANCE = 1e-4  # relative, between two orders of the same float32 sums; ours
_CONTRACT, _READOUT = "brainfm_input_spec", "brainfm_readout"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs are from the model's.

    Attributes:
        path: The file.
        error: ‖file's − model's‖ / ‖model's‖, the larger of a batch of one and of two.
        sample: What both were run on, in words.
    """

    path: Path
    error: float
    sample: str


def export(model: Encoder, path: str | os.PathLike[str], format: Format) -> ExportReport:
    """Write a model for a batch of any size, with its input contract, and check the file against the model.

    The file is run on the packaged scan, alone and in a batch of two, and is kept only if it gives what the model does.
    Its input is named "volumes", [B, in_chans, D, H, W] float32; its output "embeddings", or "logits" of a classifier.
    Where the model's readout has a window, a volume is one window: to cut them, and to average what they give, is left
    to whoever runs the file.

    The input contract and the readout, as JSON, are the metadata entries "brainfm_input_spec" and "brainfm_readout" of
    an ONNX file, and extra files of these names, with the ending .json, of a program of torch.export.

    Args:
        model: An encoder of `create_model`, with an input contract of a fixed size or a readout with a window; it is
            not changed.
        path: The file: .onnx, or .pt2.
        format: "onnx" (needs the extra [export]), or "torch-export".

    Raises:
        MissingExtraError: ONNX is not installed.
        BrainfmError: The model has no input of a fixed size, or averages over the brain; the ending is another; or the
            file gives other outputs than the model.

    Example:
        >>> export(brainfm.create_model("test_resnet_3d", pretrained=True), "encoder.onnx", "onnx")
    """
    path = Path(path)
    ending = {"onnx": ".onnx", "torch-export": ".pt2"}
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, not {format!r}")
    if path.suffix != ending[format]:
        raise BrainfmError(f"{path}: the name of a file of {format} ends in {ending[format]}")
    cfg = model.pretrained_cfg
    name = cfg.name or type(model).__name__
    spec, readout = cfg.input_spec, cfg.readout
    if spec is None or (spec.output_shape is None and readout.window is None):
        raise BrainfmError(f"{name} has no input contract of a fixed size")
    if readout.pool == "brain":
        raise BrainfmError(
            f"{name}: its embedding is the {readout}, and an exported program takes no brain mask; export it with a "
            'pooling of its own: create_model(…, pretrained_cfg_overlay={"readout": {"pool": "avg"}})'
        )
    volume, sample = _sample(spec, readout.window)
    if model.in_chans % len(volume):
        raise BrainfmError(f"{name} takes {model.in_chans} channels, and its input contract gives {len(volume)}")
    pair = torch.stack([volume, volume.flip(-1)]).repeat_interleave(model.in_chans // len(volume), dim=1)
    model = cast(Encoder, model.eval() if not model.training else _eval_copy(model))
    said = {_CONTRACT: spec.to_dict(), _READOUT: replace(readout, pool=model.global_pool).to_dict()}
    write, read = (_write_onnx, _read_onnx) if format == "onnx" else (_write_program, _read_program)
    with atomic_path(path) as temporary:
        write(model, pair, temporary, {key: json.dumps(content) for key, content in said.items()})
        error = _largest_error(read(temporary), optimize(model), pair)
        if not error <= TOLERANCE:
            raise BrainfmError(f"{path}: not written: its outputs are off by {error:.1e}, more than {TOLERANCE:g}")
    return ExportReport(path, error, sample)


def _sample(spec: InputSpec, window: Window | None) -> tuple[Tensor, str]:
    """A volume [C, D, H, W] to run a program on, and what it is, in words: the packaged scan, if the contract takes it.

    With a window, the one in the middle.
    """
    try:
        whole, words = create_transform(spec)(SAMPLE_SCAN, SAMPLE_MASK), "the packaged scan"
    except ScanError:
        shape = spec.output_shape or (len(spec.channels), *cast(Window, window).shape)
        whole, words = torch.randn(shape, generator=torch.Generator().manual_seed(0)), "random numbers"
    if window is None:
        return whole, words
    lacking = [max(0, width - size) for width, size in zip(window.shape, whole.shape[1:], strict=True)]
    padded = F.pad(whole, [end for n in reversed(lacking) for end in (0, n)], value=window.pad)
    boxes = list(windows(padded.shape[1:], window))
    return padded[(..., *boxes[len(boxes) // 2])], f"a window of {words}"


def _eval_copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).eval()


def _largest_error(program: Callable[[Tensor], Tensor], model: nn.Module, pair: Tensor) -> float:
    with torch.inference_mode():
        batches = [(program(batch), model(batch)) for batch in (pair[:1], pair)]
        return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in batches)


def _write_onnx(model: Encoder, pair: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
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
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.save(proto, path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "export") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"volumes": batch.numpy()})[0])


def _write_program(model: Encoder, pair: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    # What later versions do by themselves, torch 2.6 must be told: not to trace strictly, and that batches have an end.
    shapes = {"x": {0: torch.export.Dim("batch", max=2**20)}}
    program = torch.export.export(model, (pair,), dynamic_shapes=shapes, strict=False)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={f"{key}.json": content for key, content in metadata.items()})


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        program: Any = torch.export.load(file).module()
    return lambda batch: program(batch)
