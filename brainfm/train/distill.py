"""Distillation: an encoder learns the features of a frozen teacher, from the same views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from brainfm.contract import InputSpec
from brainfm.errors import RecipeError
from brainfm.factory import create_model
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.names import hub_mirror, resolve
from brainfm.pretrained import PretrainedCfg
from brainfm.train.data import Batch
from brainfm.train.losses import distillation_loss
from brainfm.train.recipe import Recipe
from brainfm.train.step import PretrainingMethod, WithEncoder


class Distilled(WithEncoder):
    """An encoder and a linear layer from its features to the teacher's: volumes → [B, teacher_dim].

    Args:
        encoder: An encoder without a classifier.
        teacher_dim: Width of the teacher's features.
    """

    def __init__(self, encoder: Encoder, teacher_dim: int) -> None:
        super().__init__(encoder)
        self.projector = nn.Linear(encoder.num_features, teacher_dim)

    def forward(self, volumes: Tensor) -> Tensor:
        """Volumes [B, in_chans, D, H, W] → what the teacher's features are predicted to be."""
        return self.projector(self.encoder(volumes))  # type: ignore[no-any-return]


class DistillMethod(PretrainingMethod):
    """One view a scan, which the teacher sees too, in eval mode and in the parameters' own precision."""

    name, views, aside = "distillation", 1, ("projector", ("projector.",))

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Sequence[ScanRecord] = ()) -> None:
        super().__init__(recipe, encoder, records)
        cfg = teacher_of(recipe)
        self.network = Distilled(encoder, cfg.num_features)
        self.teacher: Encoder | None = None
        if next(encoder.parameters()).device.type != "meta":  # a network to be looked at needs none
            assert recipe.teacher is not None
            self.teacher = create_model(recipe.teacher, pretrained=True).requires_grad_(False)

    @classmethod
    def check(cls, recipe: Recipe, encoder: Encoder, spec: InputSpec) -> None:  # noqa: ARG003 - the method's
        """As `PretrainingMethod.check`: the teacher's own contract must be that of the views."""
        theirs = teacher_of(recipe).input_spec
        if theirs is None:
            raise RecipeError(f"teacher={recipe.teacher} has no input contract; register it with one")
        for name in (item.name for item in fields(InputSpec) if item.name != "preparation"):
            if getattr(theirs, name) != getattr(spec, name):
                raise RecipeError(
                    f"teacher={recipe.teacher} takes other input than the views of {recipe.contract or recipe.model}: "
                    f"its {name} is {_shown(getattr(theirs, name))}, not {_shown(getattr(spec, name))}; give a teacher "
                    "of the same contract, or the teacher's own by contract= and input_size="
                )

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn here
        rows: slice,  # noqa: ARG002
    ) -> dict[str, float]:
        """As `Method.backward`; logs the loss."""
        assert self.teacher is not None
        views = batch.views[0]
        with torch.no_grad():
            features = self.teacher.to(views.device, views.dtype)(views)
        with self._autocast(views):
            predicted = network(views)
        loss = distillation_loss(predicted, features, self.recipe.distill_loss)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())}


def teacher_of(recipe: Recipe) -> PretrainedCfg:
    """What is known of a recipe's teacher. Raises BrainfmError as `create_model`."""
    assert recipe.teacher is not None
    return resolve(recipe.teacher, mirror=hub_mirror()).cfg


def _shown(value: object) -> str:
    if isinstance(value, tuple) and value and hasattr(value[0], "to_dict"):
        return ", ".join(type(step).__name__ for step in value)
    return str(value)
