"""Weight files for the tests, and a comparison of what is in them."""

from __future__ import annotations

import io

import torch


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def upstream_checkpoint(state: dict[str, torch.Tensor]) -> dict:
    """A checkpoint laid out as the released one: a DDP network and its optimiser's state."""
    projector = {"module.projector.0.weight": torch.ones(2, 2), "module.projector.2.weight": torch.ones(1, 2)}
    moments = {"step": torch.tensor(9.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    return {
        "epoch": 150,
        "model_state_dict": prefixed("module.encoder.", state) | projector,
        "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"lr": 3e-4, "params": [0]}]},
    }


def saved(content: object, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()
