"""What an evaluation runs: the modes, and the recipe of each with the settings put in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from brainfm.downstream.finetuning import Finetuning, read_recipe
from brainfm.errors import BrainfmError, RecipeError
from brainfm.train.recipe import read_overrides

Mode = Literal[
    "probe", "knn", "prototype", "probe_paper", "probe_adam", "norm_bias", "adapter", "lora", "finetune", "scratch"
]
MODES: dict[str, str] = {
    "probe": "linear probe",
    "knn": "nearest neighbours, without training",
    "prototype": "nearest class mean, without training",
    "probe_paper": "linear probe as the paper's",
    "probe_adam": "linear probe as the paper's, but with BatchNorm held still",
    "norm_bias": "fine-tuned in norms and biases",
    "adapter": "fine-tuned by adapters",
    "lora": "fine-tuned by LoRA",
    "finetune": "fine-tuned",
    "scratch": "from scratch",
}
WITHOUT_TRAINING = ("knn", "prototype")
_EFFICIENT = ("norm_bias", "adapter", "lora")
TRAINED = ("probe_paper", *_EFFICIENT, "finetune", "scratch")  # on scans, by `finetune`
RECIPE_OF = {mode: mode for mode in TRAINED} | {"probe_adam": "probe_paper"}  # by which a mode is run
_WHAT = ("trained", "drifting")  # of the encoder is trained
_PRETRAINED_ONLY = (*_WHAT, "lora_rank", "adapter_reduction", "layer_decay")  # settings that mean nothing from scratch
NOT_OF = {  # settings that would make something else of a mode
    "scratch": _PRETRAINED_ONLY,
    "probe_paper": (*_PRETRAINED_ONLY, "augment", "drop_path", "trained_positions", "global_pool"),
    **dict.fromkeys(_EFFICIENT, (*_WHAT, "trained_positions")),
}
HARMONISED = ("probe", "knn", "prototype")  # what learns from vectors, and can do so from harmonised ones too
_HARMONISE = {
    "combat": "ComBat",
    "covbat": "CovBat",
    "longcombat": "longitudinal ComBat",
    "longcovbat": "longitudinal CovBat",
}
NO_EB = "-noeb"  # after a method's name: each feature's own estimates, not drawn towards those of all
HARMONISE = _HARMONISE | {f"{name}{NO_EB}": f"{title} without empirical Bayes" for name, title in _HARMONISE.items()}
FREE = ("workers", "device")  # settings that change no result
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        models: Names of `create_model`, or of tables of embeddings that the tasks' data hold. One without weights is
            trained from scratch only; one with weights is probed and fine-tuned, and trained from scratch where no
            model without weights is in the list.
        modes: Of `MODES`.
        seeds: Runs of each; the paper has five.
        fractions: Of the training patients, for curves of label efficiency; those below 1 are run with one seed.
        epochs_scale: Times the paper's epochs; at least one is run.
        settings: Fields of `Finetuning` in place of those of the mode's recipe (`brainfm.downstream.recipes`).
        controls: Add the same encoders untrained, and covariates alone.
        epochs_of_all: Epochs of every mode that has them, in place of the paper's, which has more of them from scratch.
        scratch: Those of the models that stand for no pretraining: trained from scratch whatever weights they have, in
            place of all others.
        titles: What models are called in tables, in place of their own names.
        keep_models: End each run on all training patients with a folder `models/…` of the model, for `predict`; those
            of controls are not kept.
        harmonise: Of `HARMONISE`: run each mode that is `HARMONISED` once more, on embeddings from which that takes
            away what is a site's.
        site: The column that names it.
        folds: Nested cross-validation: each of so many parts is tested once by what learned from the others, the
            strength of a probe chosen by the inner cross-validation; seeds are then runs, a multiple of the folds. 0 is
            a split drawn anew by each seed.
        fairness: Columns by whose groups of people every metric is said too.
        least_group: Patients that a group has in the test part at least; smaller ones are put together, or left out.
    """

    models: tuple[str, ...]
    modes: tuple[str, ...] = ("probe", "finetune", "scratch")
    seeds: int = 5
    fractions: tuple[float, ...] = (1.0,)
    epochs_scale: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    controls: bool = True
    epochs_of_all: int | None = None
    scratch: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    keep_models: bool = False
    harmonise: str = ""
    site: str = ""
    folds: int = 0
    fairness: tuple[str, ...] = ()
    least_group: int = 20

    def __post_init__(self) -> None:
        if strange := [mode for mode in self.modes if mode not in MODES]:
            raise BrainfmError(f"unknown mode {strange[0]!r}; known: {', '.join(MODES)}")
        if self.seeds < 1 or self.epochs_scale <= 0 or not all(0 < one <= 1 for one in self.fractions):
            raise BrainfmError("seeds must be 1 or more, epochs_scale above 0, and fractions above 0 and at most 1")
        if self.epochs_of_all is not None and self.epochs_of_all < 1:
            raise BrainfmError(f"epochs are {self.epochs_of_all}, and must be 1 or more")
        if self.folds and (self.folds < 3 or self.seeds % self.folds):
            raise BrainfmError(f"--folds is {self.folds}, and must be 3 or more, and seeds a multiple of it")
        if self.least_group < 2:
            raise BrainfmError(f"--least-group is {self.least_group}, and must be 2 or more")
        self._check_harmonise()

    def _check_harmonise(self) -> None:
        if not self.harmonise:
            if self.site:
                raise BrainfmError(f"--site {self.site}: what for? Say --harmonise {' or '.join(_HARMONISE)}")
            return
        if self.harmonise not in HARMONISE:
            raise BrainfmError(f"--harmonise {self.harmonise}: there are {', '.join(HARMONISE)}")
        if not self.site:
            raise BrainfmError(f"--harmonise {self.harmonise}: by which column? Say --site COLUMN")
        if not set(self.modes) & set(HARMONISED):
            raise BrainfmError(
                f"--harmonise {self.harmonise}: {', '.join(MODES[mode] for mode in self.modes)}: learns from scans, "
                "and has no embeddings that stay as they are; only probe, knn and prototype can be "
                "harmonised ('brainfm probe', or --modes)"
            )

    def epochs(self, mode: str) -> int:
        """Epochs of a mode that has them."""
        if self.epochs_of_all is not None:
            return self.epochs_of_all
        return max(1, round(paper_epochs(mode) * self.epochs_scale))

    def of(self, mode: str) -> dict[str, Any]:
        """The settings that apply to a mode."""
        return {name: value for name, value in self.settings.items() if name not in NOT_OF.get(mode, ())}

    def is_as_published(self, mode: str) -> bool:
        """Whether a mode is run by its recipe and nothing else."""
        usual = self.epochs_scale == 1 and self.epochs_of_all is None
        return mode in TRAINED and usual and not self.of(mode).keys() - set(FREE)


def paper_epochs(mode: str) -> int:
    """Epochs of a mode's recipe."""
    epochs: int = read_recipe(RECIPE_OF[mode])["epochs"]
    return epochs


def read_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Fields of `Finetuning` from texts such as "lr=1e-3". Raises RecipeError for an unknown one or a wrong value."""
    return checked_settings(read_overrides({}, overrides))


def checked_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Finetuning` that may be set. Raises RecipeError as `read_settings`."""
    for ours in ("seed", "output", "epochs"):
        if ours in values:
            raise RecipeError(f"{ours} is not set here; see --seeds, --output and --epochs-scale")
    try:
        Finetuning.from_dict(values)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return values
