"""The network of a model without its weights: what is trained from scratch, and the untrained control."""

from __future__ import annotations

from brainfm.factory import create_model
from brainfm.models.encoder import Encoder
from brainfm.names import resolve
from brainfm.schema import as_tuples


def create_untrained(model: str) -> Encoder:
    """An encoder as a model's is built, for the same input contract, with initial weights of torch's generator.

    Raises:
        ModelNameError, WeightsNotFoundError: As `create_model`, of the name alone; no weights are read.
    """
    found = resolve(model)
    if not found.is_place:
        return create_model(found.cfg.architecture)
    cfg, args = found.cfg, {"in_chans": found.cfg.in_chans, **found.args}
    encoder: Encoder = create_model(cfg.architecture, pretrained_cfg=cfg, **args)
    return encoder


def built_as(model: str) -> str:
    """What `create_untrained` builds, as a word: the architecture's name, or that with arguments and contract.

    Models of which it is the same are the same network, for the same volumes, and share one control.
    """
    found = resolve(model)
    registered = resolve(found.cfg.architecture)
    own, usual = ((_comparable(one.args), one.cfg.input_spec, one.cfg.in_chans) for one in (found, registered))
    return found.cfg.architecture if own == usual else f"{found.cfg.architecture} {own}"


def _comparable(args: dict[str, object]) -> dict[str, object]:
    """Arguments as they are compared: whether a config or a card has them."""
    return {key: as_tuples(value) for key, value in sorted(args.items())}
