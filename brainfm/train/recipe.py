"""Recipes: everything a run depends on, from a YAML file and `key=value` overrides, checked before anything starts."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from brainfm.columns import Kind
from brainfm.contract import Triple
from brainfm.errors import RecipeError
from brainfm.schema import Checked, check_keys, default_of, read_yaml
from brainfm.stage import SIZE_GB
from brainfm.system import computes_in_bfloat16
from brainfm.train.augment import Augmentation
from brainfm.train.sources import check_fractions

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("brainfm")

RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T", bound="Training")

MethodName = Literal["simclr", "mae", "yaware", "simmim", "supervised", "distill"]


@dataclass(frozen=True, kw_only=True)
class Training(Checked):
    """How a network is trained, whatever it learns.

    Attributes:
        output: The run's folder.
        seed: Of initial weights, order and views.
        epochs: Passes over the patients.
        batch_size: Scans a step, on one process.
        workers: Processes that read scans, for each training process.
        max_bad_fraction: Stop when more than this fraction of the scans cannot be read.
        optimiser: "adam", "adamw" or "lars".
        lr: Learning rate.
        scale_lr: Multiply lr by the joined batch / 256.
        betas: Of Adam and AdamW.
        momentum: Of LARS.
        weight_decay: Not on biases and norms, nor on what the network names in `no_weight_decay`.
        schedule: "constant", or "cosine": half a cosine to 0 over the run. Stepped every iteration.
        warmup_epochs: A linear rise before.
        clip_grad: Largest norm of the gradient; None leaves it.
        device: "auto", "cpu", "cuda".
        precision: "float32", or "bfloat16" by autocast; "auto" is bfloat16 on a GPU that has it and float32 on
            others, and on a processor, where torch's gradients on small maps are wrong in it; "float64" to compare
            runs.
        tf32: Let CUDA multiply in TF32.
        channels_last: Memory layout.
        grad_checkpointing: Recompute activations in the backward pass; a ResNet's stem by slabs.
        sync_bn: BatchNorm statistics over the process group.
        save_every: Keep a checkpoint every so many epochs, beside the last and the best.
        resume: Go on with the run in `output` where there is one.
    """

    output: str = ""
    seed: int = 0
    epochs: int = 150
    batch_size: int = 6
    workers: int = 2
    max_bad_fraction: float = 0.01
    optimiser: Literal["adam", "adamw", "lars"] = "adam"
    lr: float = 3e-4
    scale_lr: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0
    clip_grad: float | None = None
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "float32"
    tf32: bool = True
    channels_last: bool = False
    grad_checkpointing: bool = False
    sync_bn: bool = True
    save_every: int = 10
    resume: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(epochs=1, batch_size=1, workers=0, save_every=1, seed=0, warmup_epochs=0, weight_decay=0)
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}, and must be above 0")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, more than all {self.epochs} epochs")

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        """What `to_dict` described. Raises ValueError as `Checked.from_dict`, and for a key's name of before."""
        if "max_bad_share" in data:
            raise ValueError("max_bad_share is called max_bad_fraction now; write that")
        return super().from_dict(data)

    def on(self: T, device: torch.device) -> T:
        """The same with what precision "auto" means on a device, which is said."""
        is_processor = device.type == "cpu"
        if is_processor and self.precision == "bfloat16":
            # torch 2.13's oneDNN leaves parts of a convolution's gradient on maps smaller than its kernel unwritten,
            # whether the processor has bfloat16's instructions (seen with AVX512-BF16) or not.
            slow = "" if computes_in_bfloat16(device) else "this cpu has no bfloat16 and is slow in it, and "
            logger.warning(
                "%sgradients on small maps can be wrong in bfloat16 on a processor; precision=auto is float32 here",
                slow,
            )
        if self.precision != "auto":
            return self
        precision: Any = "bfloat16" if not is_processor and computes_in_bfloat16(device) else "float32"
        logger.info("precision auto is %s on this %s", precision, device.type)
        return replace(self, precision=precision)

    def _check_least(self, **least: float) -> None:
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least {value}")


# Of a field of `Recipe`: the methods that use it.
_CONTRASTIVE: dict[str, tuple[MethodName, ...]] = {"methods": ("simclr", "yaware")}
_LABELLED: dict[str, tuple[MethodName, ...]] = {"methods": ("supervised", "yaware")}
_MASKED: dict[str, tuple[MethodName, ...]] = {"methods": ("mae", "simmim")}
_YAWARE, _SUPERVISED, _MAE, _SIMMIM, _DISTILL = (
    {"methods": (name,)} for name in ("yaware", "supervised", "mae", "simmim", "distill")
)


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """A pretraining run: as `Training`, and what is learned of which scans.

    Fields that only some methods use (`methods_of`) are refused with another one, unless they are what they are by
    default.

    Attributes:
        method: "simclr", "mae", "yaware", "simmim", "supervised" or "distill": see `brainfm.train.method.METHODS`.
        model: The registered encoder to train.
        model_args: Arguments of its network in place of its card's, such as a ViT's `depth` and `patch_size`.
        contract: The registered model whose input contract the scans are brought to; None is `model` itself. For
            networks whose own contract does not end in a z-score inside the brain mask, which views need.
        init: A model whose weights the encoder begins with, by a name of `create_model`; a projector or decoder begins
            anew. None draws initial weights.
        init_sha256: Of its weight file. A run fills it in, and refuses other weights where it is given.
        manifest: CSV of scans: image_path (or a column a channel, such as t1w_path), mask_path, optional patient_id,
            labels; or a folder of video clips, or one of Kinetics' lists of them.
        sources: Several of these in place of manifest, and what fraction of an epoch's patients and clips is of each.
        patients: The fraction of the patients to train on, drawn by the seed; a smaller one is part of a larger.
        every_scan: An epoch takes every scan once, instead of every patient.
        input_size: Voxels of the views; None is the input contract's. A network that is built for a size is built for
            this one.
        augmentation: What views are drawn from.
        augment_on: Where views are made of their crops: by the "loader"'s workers, or on the training's "device" (for
            few processor cores and a GPU).
        cache: A folder of 'brainfm cache build', of several sources {SOURCE: FOLDER}; None reads the scans themselves.
        stage: A folder on a local disk for copies of scans, or of a cache, that lie on a network's, made ahead
            (`brainfm.stage`).
        stage_size: The most that it holds, in GB.
        views: Contrastive: "separate" passes the first and the second views through the network one after the other, as
            the released code does, so that BatchNorm takes its statistics of each; "joint" passes both at once.
        batch_chunk: Contrastive: scans of the batch that are in memory at a time; the gradient is that of the whole
            batch, BatchNorm's statistics are those of each chunk. None is all.
        temperature, projection_dim, gradient: Contrastive; see `nt_xent_loss`.
        targets: Columns of the manifest that are learned ("age,sex", or a list), or of "yaware" the one, a number, that
            says how alike two scans are. Scans without a label are left out of that label's loss.
        kinds: What a target is, "regression", "binary" or "multiclass", where its values leave doubt.
        kernel_sigma: Of "yaware", in the target's unit: 5 (years) in Dufumier et al. 2021.
        mask_ratio: The fraction that "mae" and "simmim" hide; 0.6 in Xie et al. 2022.
        mask_unit: Of "simmim": voxels that are hidden together, a multiple of the patch; None is a cell of the
            network's last map.
        norm_pix_loss, decoder_dim, decoder_depth, decoder_heads: Of "mae"; see `MaskedAutoencoder`.
        picture_every: Of "mae": every so many epochs, a picture of reconstructions in the run's folder; 0 is none.
        teacher: Of "distill": the model whose features are learned, by a name of `create_model`; its contract must be
            that of the views.
        teacher_sha256: Of its weight file, as `init_sha256`.
        distill_loss: "cosine", or "smooth_l1" of features that are each standardised; see `distillation_loss`.
    """

    method: MethodName
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    contract: str | None = None
    init: str | None = None
    init_sha256: str | None = None
    manifest: str = ""
    sources: dict[str, float] = field(default_factory=dict)
    patients: float = 1.0
    every_scan: bool = False
    input_size: Triple | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    augment_on: Literal["loader", "device"] = "loader"
    cache: str | dict[str, str] | None = None
    stage: str | None = None
    stage_size: float = SIZE_GB
    views: Literal["separate", "joint"] = field(default="separate", metadata=_CONTRASTIVE)
    batch_chunk: int | None = field(default=None, metadata=_CONTRASTIVE)
    temperature: float = field(default=0.5, metadata=_CONTRASTIVE)
    projection_dim: int = field(default=64, metadata=_CONTRASTIVE)
    gradient: Literal["exact", "upstream"] = field(default="exact", metadata=_CONTRASTIVE)
    targets: tuple[str, ...] = field(default=(), metadata=_LABELLED)
    kinds: dict[str, Kind] = field(default_factory=dict, metadata=_SUPERVISED)
    kernel_sigma: float = field(default=5.0, metadata=_YAWARE)
    mask_ratio: float = field(default=0.75, metadata=_MASKED)
    mask_unit: Triple | None = field(default=None, metadata=_SIMMIM)
    norm_pix_loss: bool = field(default=False, metadata=_MAE)
    decoder_dim: int = field(default=512, metadata=_MAE)
    decoder_depth: int = field(default=8, metadata=_MAE)
    decoder_heads: int = field(default=16, metadata=_MAE)
    picture_every: int = field(default=0, metadata=_MAE)
    teacher: str | None = field(default=None, metadata=_DISTILL)
    teacher_sha256: str | None = field(default=None, metadata=_DISTILL)
    distill_loss: Literal["cosine", "smooth_l1"] = field(default="cosine", metadata=_DISTILL)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(
            stage_size=0, projection_dim=1, decoder_dim=6, decoder_depth=1, decoder_heads=1, picture_every=0
        )
        if not 0 < self.patients <= 1:
            raise ValueError(f"patients is {self.patients}, and must be a fraction above 0 and at most 1")
        if self.sources and self.manifest:
            raise ValueError("manifest and sources both say what to train on; give one of them")
        check_fractions(self.sources)
        if self.init_sha256 is not None and self.init is None:
            raise ValueError("init_sha256 is of the weights that init names; give init too")
        if self.temperature <= 0 or self.kernel_sigma <= 0:
            raise ValueError(
                f"temperature is {self.temperature} and kernel_sigma {self.kernel_sigma}, and both must be above 0"
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}, and must be between 0 and 1")
        if self.batch_chunk is not None and not 0 < self.batch_chunk <= self.batch_size:
            raise ValueError(f"batch_chunk is {self.batch_chunk}, and must be between 1 and batch_size")
        self._check_method()

    def _check_method(self) -> None:
        """Raise ValueError where a method has too little to learn from, or a field that is another's."""
        for item in fields(self):
            methods = methods_of(item)
            if methods and self.method not in methods and getattr(self, item.name) != default_of(item):
                raise ValueError(f"{item.name} is of {' and '.join(methods)}, not of {self.method}; leave it out")
        if self.method in ("simclr", "yaware") and self.batch_size < 2:
            raise ValueError(f"{self.method} compares scans with one another: batch_size must be at least 2")
        if self.method == "supervised" and not self.targets:
            raise ValueError("supervised learns columns of the manifest: name them, targets=age,sex")
        if self.method == "yaware" and len(self.targets) != 1:
            raise ValueError("yaware compares scans by one number of the manifest: name its column, targets=age")
        if len(set(self.targets)) < len(self.targets) or "" in self.targets:
            raise ValueError(f"targets are {', '.join(self.targets)}: name each column once")
        if other := [name for name in self.kinds if name not in self.targets]:
            raise ValueError(f"kinds names {other[0]!r}, which is none of the targets")
        if self.method == "distill" and self.teacher is None:
            raise ValueError("distill learns the features of another model: name it, teacher=MODEL")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """What `to_dict` described; targets may be text with commas. Raises ValueError as `Training.from_dict`."""
        if isinstance(data.get("targets"), str):
            data = {**data, "targets": [name.strip() for name in data["targets"].split(",")]}
        return super().from_dict(data)

    def to_dict(self, *, sparse: bool = False) -> dict[str, Any]:
        """The recipe as plain data, what is learned first."""
        data = super().to_dict(sparse=sparse)
        first = ("method", "model", "manifest", "sources", "output")
        return {name: data.pop(name) for name in first if name in data} | data


def methods_of(item: Field[Any]) -> tuple[MethodName, ...]:
    """The methods that use a field of `Recipe`; () is all."""
    methods: tuple[MethodName, ...] = item.metadata.get("methods", ())
    return methods


def load_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a published run, or of a YAML file, with fields replaced.

    Args:
        name: Such as "simclr_resnet18_3d", or a path that ends in .yaml; "" is none, so that `overrides` name a method
            and a model.
        overrides: Such as "batch_size=12" or "augmentation.flip=0"; values are YAML.

    Raises:
        RecipeError: No such recipe, an unknown key, or a value that cannot be; the message says which.
    """
    text = str(name)
    if not text:
        values = read_overrides({}, overrides)
        if lacking := [key for key in ("method", "model") if key not in values]:
            raise RecipeError(f"name a recipe, or give method=… and model=…; {' and '.join(lacking)} is not there")
        return recipe_from_dict(values)
    path = Path(text) if text.endswith((".yaml", ".yml")) else RECIPES / f"{text}.yaml"
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if not path.is_file():
        near = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"no recipe {text!r}; {hint}Known: {', '.join(known)}, or the path of a .yaml file")
    values = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a list of 'key: value' lines")
    return recipe_from_dict(read_overrides(values, overrides), str(path))


def read_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values with those of "key=value" or "group.key=value" in their place. Raises RecipeError."""
    replaced = dict(values)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is not key=value")
        group, dot, inner = key.strip().partition(".")
        parsed = _yaml(value, override)
        if not dot:
            replaced[group] = parsed
            continue
        inside = replaced.get(group) or {}
        if not isinstance(inside, Mapping):
            raise RecipeError(f"{override!r}: {group} is {inside!r}, and no group of keys")
        replaced[group] = {**inside, inner: parsed}
    return replaced


def recipe_from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The recipe that `to_dict` described. Raises RecipeError as `load_recipe` does."""
    try:
        augmentation = values.get("augmentation", {})
        if not isinstance(augmentation, Mapping):
            raise ValueError("augmentation is a group: write augmentation.KEY=VALUE")
        check_keys(augmentation, Augmentation, "augmentation.")
        return Recipe.from_dict(values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _yaml(text: str, where: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
