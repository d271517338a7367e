"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from brainfm.train.recipe import Training

_TRUST = 1e-3  # LARS's coefficient, as in SimCLR (Chen et al. 2020)


def make_optimiser(settings: Training, network: nn.Module, layer_decay: float | None = None) -> Optimizer:
    """The optimiser of the settings. Weight decay leaves biases, norms and what the network names alone.

    With `layer_decay`, a group's "lr_scale" is this to the power of its distance from the head, by the network's
    `group_matcher`.
    """
    spared = set(getattr(network, "no_weight_decay", set)())
    depths = _depths(network) if layer_decay is not None else {}
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decayed, depth = parameter.ndim > 1 and name not in spared, depths.get(name, 0)
            group = groups.setdefault((not decayed, depth), {"params": [], "weight_decay": 0.0})
            group["params"].append(parameter)
            if decayed:
                group["weight_decay"] = settings.weight_decay
            if layer_decay is not None:
                group["lr_scale"] = layer_decay ** (deepest - depth)
    ordered = [groups[key] for key in sorted(groups)]
    if settings.optimiser == "lars":
        return LARS(ordered, settings.lr, settings.momentum)
    kind = Adam if settings.optimiser == "adam" else AdamW
    return kind(ordered, lr=settings.lr, betas=settings.betas)


def _depths(network: nn.Module) -> dict[str, int]:
    """How many layers lie below each parameter's, by an encoder's `group_matcher`; the head is the last."""
    matcher: dict[str, Any] = network.group_matcher()  # type: ignore[operator]
    blocks = matcher["blocks"]
    patterns = [(blocks, None)] if isinstance(blocks, str) else blocks
    places: dict[str, tuple[float, ...]] = {}
    for name, _ in network.named_parameters():
        found = ((match, own) for pattern, own in patterns if (match := re.match(pattern, name)))
        block, own = next(found, (None, None))
        stem = re.match(matcher["stem"], name) is not None
        places[name] = own or (tuple(map(int, block.groups())) if block else (-1,) if stem else (math.inf,))
    ranks = {place: n for n, place in enumerate(sorted(set(places.values())))}
    return {name: ranks[place] for name, place in places.items()}


def learning_rate(settings: Training, step: int, steps_per_epoch: int, joined_batch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run. Nothing of it needs to be saved."""
    peak = settings.lr * joined_batch / 256 if settings.scale_lr else settings.lr
    epoch = step / steps_per_epoch
    if epoch < settings.warmup_epochs:
        return peak * epoch / settings.warmup_epochs
    if settings.schedule == "constant":
        return peak
    done = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class LARS(Optimizer):
    """SGD with momentum whose steps are scaled, matrix by matrix, to the weights' size: You et al. 2017 (1708.03888).

    Vectors (biases, norms) are neither decayed nor scaled.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss of `closure` where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            size, slope = parameter.norm(), gradient.norm()
            if size > 0 and slope > 0:
                gradient = gradient * (_TRUST * size / slope)
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        velocity: Tensor = state["momentum"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(velocity, alpha=-group["lr"])
