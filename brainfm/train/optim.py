"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from brainfm.train.recipe import Recipe

_TRUST = 1e-3  # LARS's coefficient, as in SimCLR (Chen et al. 2020)


def make_optimiser(recipe: Recipe, network: nn.Module) -> Optimizer:
    """The recipe's optimiser. Weight decay leaves biases, norms and what the network names alone."""
    spared = set(getattr(network, "no_weight_decay", set)())
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim <= 1 or name in spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if recipe.optimiser == "lars":
        return LARS(groups, recipe.lr, recipe.momentum)
    kind = Adam if recipe.optimiser == "adam" else AdamW
    return kind(groups, lr=recipe.lr, betas=recipe.betas)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, joined_batch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run. Nothing of it needs to be saved."""
    peak = recipe.lr * joined_batch / 256 if recipe.scale_lr else recipe.lr
    epoch = step / steps_per_epoch
    if epoch < recipe.warmup_epochs:
        return peak * epoch / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return peak
    done = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
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
