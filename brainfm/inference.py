"""The same forward, faster: an encoder made ready for inference."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal, cast

import torch
from torch import nn

from brainfm.errors import BrainfmError
from brainfm.models.adaptation import merged
from brainfm.models.encoder import Encoder, computing_in
from brainfm.system import launched

logger = logging.getLogger("brainfm")

DTypeName = Literal["auto", "float32", "tf32", "bfloat16", "float16"]


def optimize(model: nn.Module, dtype: DTypeName | torch.dtype = "auto", *, compile: bool | str = False) -> nn.Module:
    """A copy of an encoder for inference that gives the same embeddings, faster and in less memory.

    Memory is channels-last. Where a family's layers are chains (convolutions, norms, activations, pools), BatchNorms
    are folded and a chain is computed together, see `models.fast.chain`; what else can be done, the family knows
    (`Encoder.for_inference`). The copy's `optimizations` say what was. The embeddings are the same to 1e-5 relative in
    float32. The copy takes and returns float32 whatever it computes in, and cannot be trained. Changes of low rank
    (`add_lora`) are merged in it.

    Args:
        model: An encoder of `create_model`; it is not changed.
        dtype: What to compute in. "auto" is float32, which gives the published features on every machine; "bfloat16"
            and "float16" are faster where the processor has them, at the cost of about three digits; "tf32" is float32
            of which a CUDA GPU multiplies three digits. `brainfm.embed`, and all that reads with `Reader`, see to it;
            in a loop of your own torch's switches hold, by which a GPU's convolutions are in TF32 unless
            `torch.backends.cudnn.allow_tf32` is False.
        compile: Hand the copy to `torch.compile`, by its default backend or the one named, for GPUs: the first volume
            takes a minute, and the whole map of each layer is computed.

    Returns:
        The copy: volumes [B, C, z, y, x] → embeddings [B, num_features], both float32.

    Raises:
        ValueError: The dtype is not one of these.

    Example:
        >>> import brainfm, torch
        >>> model, x = brainfm.create_model("test_resnet_3d", pretrained=True), torch.randn(1, 1, 40, 48, 48)
        >>> with torch.inference_mode():
        ...     torch.allclose(brainfm.optimize(model)(x), model(x), rtol=1e-4, atol=1e-5)
        True
    """
    kind, model = resolve_dtype(dtype), merged(model)
    if isinstance(model, Encoder):
        fast: Any = model.for_inference(kind)
    else:
        fast = computing_in(copy.deepcopy(model).eval().requires_grad_(False), kind)
    if compile:
        fast.compile(backend=compile if isinstance(compile, str) else "inductor")
        fast.optimizations = (*fast.optimizations, "torch.compile")
    fast.tf32 = dtype == "tf32"
    logger.debug("%s for inference: %s", type(model).__name__, ", ".join(fast.optimizations))
    return cast(nn.Module, fast)


def resolve_dtype(dtype: DTypeName | torch.dtype) -> torch.dtype:
    """The torch dtype of a name. Raises ValueError for another name."""
    names = {
        **dict.fromkeys(("auto", "float32", "tf32"), torch.float32),
        **{"bfloat16": torch.bfloat16, "float16": torch.float16},
    }
    kind = dtype if isinstance(dtype, torch.dtype) else names.get(dtype)
    if kind is None or kind not in names.values():
        raise ValueError(f"dtype must be one of {', '.join(names)}, not {dtype!r}")
    return kind


def dtype_name(dtype: DTypeName | torch.dtype, device: torch.device | None = None) -> str:
    """What is computed in, by name: "float32", "tf32", "bfloat16" or "float16".

    Raises:
        ValueError: The dtype is not one.
        BrainfmError: The device has no such one.
    """
    if dtype != "tf32":
        return str(resolve_dtype(dtype)).removeprefix("torch.")
    if device is not None and device.type != "cuda":
        raise BrainfmError(f"tf32 is a way in which CUDA GPUs multiply, and this device is {device}; use float32")
    return "tf32"


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" is a GPU where there is one. Raises BrainfmError where it cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{launched().local_rank}"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BrainfmError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); try 'cpu'"
        ) from error
