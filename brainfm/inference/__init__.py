"""The same forward, faster: an encoder made ready for inference."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from brainfm.errors import BrainfmError
from brainfm.inference.streaming import StreamedResNet
from brainfm.models.encoder import Encoder
from brainfm.models.resnet import ResNet

logger = logging.getLogger("brainfm")

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


def optimize(model: nn.Module, dtype: DTypeName | torch.dtype = "auto", *, compile: bool | str = False) -> nn.Module:
    """A copy of an encoder for inference that gives the same embeddings, faster and in less memory.

    BatchNorm is folded into the convolutions, memory is channels-last, and all but the last stage of a ResNet are
    computed a few planes at a time, the first ones only where the scan is not empty, and on a processor, in float32 and
    bfloat16, with fewer multiplications (`brainfm.inference.streaming`). What does not apply is left out; the copy's
    `optimizations` say what was done. The embeddings are the same to 1e-5 relative in float32. The copy takes and
    returns float32 whatever it computes in, and cannot be trained.

    Args:
        model: An encoder of `create_model`; it is not changed.
        dtype: What to compute in. "auto" is float32, which gives the published features on every machine; "bfloat16"
            and "float16" are faster where the processor has them, at the cost of about three digits.
        compile: Hand the copy to `torch.compile`, by its default backend or the one named, for GPUs: the first volume
            takes a minute, and the whole map of each layer is computed.

    Example:
        >>> fast = brainfm.optimize(brainfm.create_model("simclr_resnet18_3d", pretrained=True))
    """
    kind = resolve_dtype(dtype)
    # A weight that is folded is made anew, and need not be copied before.
    folded = list(_convolutions_with_norms(model)) if isinstance(model, ResNet) else []
    shared = {id(conv.weight): nn.Parameter(conv.weight.detach(), requires_grad=False) for _, conv, _ in folded}
    fast: Any = copy.deepcopy(model, shared).eval().requires_grad_(False)
    if isinstance(fast, Encoder):
        fast.set_grad_checkpointing(False)
    done = ["channels-last memory", str(kind).removeprefix("torch.")]
    if isinstance(fast, ResNet):
        _fold_batch_norms(fast, kind)
        done.insert(0, "BatchNorm folded")
    if type(fast) is ResNet:
        fast.__class__ = StreamedResNet  # the same modules under another forward
        done.insert(1, "stem and first three stages by slabs, without what is empty")
    fast = fast.to(memory_format=torch.channels_last_3d)
    if kind is not torch.float32:
        fast = fast.to(kind)
        fast.register_forward_pre_hook(partial(_cast_input, kind), with_kwargs=True)
        fast.register_forward_hook(_cast_output)
    if compile:
        fast.compile(backend=compile if isinstance(compile, str) else "inductor")
        done = [*(part for part in done if "slabs" not in part), "torch.compile"]
    fast.optimizations = tuple(done)
    logger.debug("%s for inference: %s", type(model).__name__, ", ".join(done))
    return cast(nn.Module, fast)


def resolve_dtype(dtype: DTypeName | torch.dtype) -> torch.dtype:
    """The torch dtype of a name. Raises ValueError for another name."""
    names = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = dtype if isinstance(dtype, torch.dtype) else names.get(dtype)
    if kind is None or kind not in names.values():
        raise ValueError(f"dtype must be one of {', '.join(names)}, not {dtype!r}")
    return kind


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" is a GPU where there is one. Raises BrainfmError where it cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BrainfmError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); try 'cpu'"
        ) from error


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cast_input(
    dtype: torch.dtype, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return tuple(x.to(dtype) for x in inputs), {name: x.to(dtype) for name, x in named.items()}


def _cast_output(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _convolutions_with_norms(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Conv3d, str]]:
    """Each convolution of a ResNet that a BatchNorm3d follows, the module they are in, and the norm's name there.

    In MONAI's ResNets the order of registration is that of the forward pass, within a block (conv1, bn1, conv2, bn2, …)
    and within `downsample`; that does not hold for any network, so other families are left as they are.
    """
    previous: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm3d) and isinstance(previous, nn.Conv3d):
            yield module, previous, name
        yield from _convolutions_with_norms(child)
        previous = child


def _fold_batch_norms(model: ResNet, dtype: torch.dtype) -> None:
    """Fold each norm into its convolution, whose weights are made anew in the type, one by one to save memory."""
    for module, conv, name in reversed(list(_convolutions_with_norms(model))):  # the largest first leave no gaps
        norm: Any = getattr(module, name)
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        conv.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        setattr(module, name, nn.Identity().eval())
