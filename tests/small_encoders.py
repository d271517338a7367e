"""Encoders and volumes of a small size, for every name of the registry."""

from __future__ import annotations

import functools
import inspect

import torch

from brainfm import create_model, get_pretrained_cfg, registry
from brainfm.models.encoder import Encoder


def created(name: str, size: tuple[int, ...] | None = None, seed: int = 0, **kwargs) -> Encoder:
    """An encoder with seeded initial weights; where its constructor asks for the input's size, for that one."""
    torch.manual_seed(seed)
    if size is not None and "img_size" in inspect.signature(type(outline(name))).parameters:
        kwargs["img_size"] = size
    return create_model(name, **kwargs)


@functools.cache
def outline(name: str, size: tuple[int, ...] | None = None, **kwargs) -> Encoder:
    """An encoder without numbers, on the meta device: shapes and names cost little there, whatever the size.

    It is built once, and not to be changed.
    """
    with torch.device("meta"):
        return create_model(name, **kwargs) if size is None else created(name, size, **kwargs)


@functools.cache
def size_of(name: str, cells: int = 2) -> tuple[int, int, int]:
    """The smallest of some inputs that give a last map of so many cells along each axis, or more.

    Where the network takes it, one that its strides do not divide; where it leads back to finer maps, so many cells of
    its deepest one, that each of them has whole cells of all others.
    """
    reductions = outline(name).feature_info.reduction()
    steps = tuple(map(max, zip(*reductions, strict=True)))
    tries = [
        (cells - 1, (1, 2, 3)),
        (cells, (1, 2, 3)),
        (cells, (0, 0, 0)),
        (cells + 1, (1, 2, 3)),
        (cells + 1, (0, 0, 0)),
    ]
    for count, beyond in tries if steps == tuple(reductions[-1]) else [(cells, (0, 0, 0))]:
        if count == 0:
            continue
        size = tuple(count * step + more for step, more in zip(steps, beyond, strict=True))
        try:
            model = outline(name, size)
            found = model.dense(torch.empty(1, model.in_chans, *size, device="meta")).shape[2:]
        except (ValueError, RuntimeError):
            continue
        if min(found) >= cells:
            return size
    raise AssertionError(f"{name} takes no small input")


def parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in outline(name).parameters())


def distinct(names: list[str]) -> list[str]:
    """One name for each network with its arguments: the numbers of others are the same."""
    return list({repr(registry.network_of(name)): name for name in reversed(names)}.values())


# Arguments that make a network narrow and leave it as it is otherwise: numbers of wide ones cost what they do not tell.
NARROW = {
    "resnet": {"widths": (8, 12, 16, 24)},
    "densenet": {"growth": 6, "stem": 12},
    "uncnn": {"widths": (16, 16, 32, 32)},  # of eight groups, which are not to be one channel each
    "kl_autoencoder": {"widths": (16, 32, 32, 32), "groups": 8},
    "sfcn": {"widths": (8, 12, 16, 24, 24, 16)},
}


def narrow(name: str) -> dict[str, tuple[int, ...] | int]:
    return NARROW.get(registry.network_of(name)[0], {}) if parameters(name) > 4e5 else {}


def build(name: str, seed: int = 0, **kwargs) -> Encoder:
    return created(name, size_of(name), seed, **narrow(name), **kwargs)


def small_outline(name: str, **kwargs) -> Encoder:
    return outline(name, size_of(name), **kwargs)


def volume(name: str, more_channels: int = 0, batch: int = 2, device: str = "cpu", cells: int = 2) -> torch.Tensor:
    channels = get_pretrained_cfg(name).in_chans + more_channels
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size_of(name, cells), generator=generator).to(device)
