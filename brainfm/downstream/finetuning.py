"""Fine-tuning and supervised training of an encoder with a linear head, on the trainer of `brainfm.train`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.downstream.probe import LinearHead, Target, draw_head
from brainfm.downstream.statistics import Kind
from brainfm.downstream.volumes import read_volume
from brainfm.errors import BrainfmError, ScanError
from brainfm.manifest import ScanRecord
from brainfm.models.adaptation import add_adapters, add_lora, merge_lora, norms_and_biases
from brainfm.models.encoder import Encoder
from brainfm.models.vit import VisionTransformer
from brainfm.schema import read_yaml
from brainfm.system import tf32
from brainfm.train.data import Batch, TrainingData, stream
from brainfm.train.distributed import ProcessGroup, process_group
from brainfm.train.recipe import Training
from brainfm.train.step import Method
from brainfm.train.trainer import Trainer
from brainfm.transforms import InputTransform, create_transform

RECIPES = Path(__file__).parent / "recipes"

_INSTEAD, _VIEW = 10, 11  # what a random stream is for; brainfm.train.data has its own numbers
_REPLACEMENTS = 10


@dataclass(frozen=True, kw_only=True)
class Finetuning(Training):
    """How an encoder is fine-tuned.

    The defaults are ours but for what is said of them. What was published stands, with the source of each number, in
    the recipes beside this module, see `read_recipe`; evaluations (`brainfm finetune`, `brainfm benchmark`) begin with
    those.

    Attributes:
        epochs: 100 in the paper (Kaczmarek et al. 2025, arXiv 2509.10620), 300 from scratch.
        batch_size: Scans a step, of all processes together; 6 in the released code.
        lr: 1e-4 in the released code, with Adam, constant.
        augment: `SupervisedAugmentation`: in the paper of supervised training and of the MAE, not of SimCLR.
        trained: "all"; the "head" alone; or the head and little else: the norms' scales and shifts and all biases
            ("norm_bias"), a bottleneck "adapter" after each stage of a CNN or block of a ViT, or a change of low rank
            of every linear layer and convolution ("lora"). With these, training starts from what the frozen encoder
            computes, and BatchNorm uses its running statistics and holds them still (`Encoder.hold_statistics`).
        drifting: With trained="head", leave BatchNorm in training mode, as the released code's linear probe does: the
            frozen encoder's running statistics drift, and each embedding depends on its batch. Default: eval mode.
        target: What a regression learns, see `LinearHead`: "raw" in the released code.
        head_std: Of the head's initial weights, see `draw_head`: None in the released code, 2e-5 in
            `facebookresearch/mae`.
        layer_decay: Multiply the learning rate by this for each layer further from the head; None is the same for all.
            0.75 in `mae`.
        drop_path: Stochastic depth of a ViT; 0.1 in `mae`. It is drawn by each process for itself.
        trained_positions: With trained="all", train a ViT's position embedding too, as `mae` does.
        lora_rank: Of the changes of low rank.
        adapter_reduction: Channels of a stage by those of its adapter's bottleneck.
        selection: The best epoch is chosen on val by this metric, or by "loss"; in the released code by the AUC of a
            classification and the loss of a regression.
        val_loss: The loss on val is the mean over the "scans", or as in the released code over the means of
            "batches", of which the last may be smaller.
        global_pool: Pooling before the head; None is the encoder's. "fc_norm" is `mae`'s.
    """

    epochs: int = 100
    lr: float = 1e-4
    save_every: int = 1_000_000  # the last and the best are kept
    max_bad_fraction: float = 0.2  # of few scans, one is a large one; another of the training scans stands in
    augment: bool = False
    trained: Literal["all", "head", "norm_bias", "adapter", "lora"] = "all"
    drifting: bool = False
    target: Target = "standardised"
    head_std: float | None = 0.01
    layer_decay: float | None = None
    drop_path: float = 0.0
    trained_positions: bool = False
    lora_rank: int = 8
    adapter_reduction: int = 16
    selection: str = "loss"
    val_loss: Literal["scans", "batches"] = "scans"
    global_pool: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, and must be above 0 and at most 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}, and must be at least 0 and below 1")
        if self.head_std is not None and self.head_std < 0:
            raise ValueError(f"head_std is {self.head_std}, and must be at least 0")
        if self.lora_rank < 1 or self.adapter_reduction < 1:
            raise ValueError("lora_rank and adapter_reduction must be 1 or more")
        if self.drifting and self.trained != "head":
            raise ValueError("drifting is of a frozen encoder: trained must be 'head'")

    def shared_by(self, processes: int) -> Finetuning:
        """The settings of each of some processes, whose batches together are the batch of these.

        Raises:
            BrainfmError: It cannot be shared in equal parts.
        """
        if self.batch_size % processes:
            raise BrainfmError(
                f"batch_size is {self.batch_size}, of all processes together, and cannot be shared by {processes} in "
                f"equal parts: give a multiple of {processes} (--set batch_size=…), or start another number of them"
            )
        return replace(self, batch_size=self.batch_size // processes)


@cache
def read_recipe(name: str) -> Mapping[str, Any]:
    """The fields of `Finetuning` that a published way sets: those of a YAML file in `RECIPES`, by its name."""
    values: dict[str, Any] = read_yaml((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return MappingProxyType(values)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Scans with their labels; `labels` are classes from 0, or numbers."""

    records: list[ScanRecord]
    labels: NDArray[Any]


def finetune(
    encoder: Encoder, train: Labelled, val: Labelled, kind: Kind, settings: Finetuning, *, progress: bool = False
) -> FinetunedModel:
    """Train an encoder with a new head, or go on with the run in `settings.output`.

    Under torchrun the processes share each batch, so that their number changes nothing but rounding (and what
    `drop_path` leaves out). Test scans are no argument: what is chosen is chosen on `val`.

    Args:
        encoder: An encoder; it is changed in place.
        train: What is learned from.
        val: What the best epoch is chosen by.
        kind: What the labels are.
        settings: How; its output is the run's folder.
        progress: Show a progress bar.

    Returns:
        The model of the best epoch.

    Raises:
        RecipeError: The folder holds another run, or one that an earlier brainfm began.
        BrainfmError: As `Trainer.train` and `Finetuning.shared_by`.
    """
    torch.manual_seed(settings.seed)
    head = LinearHead(kind, train.labels, settings.target)
    put_head(encoder, head.outputs, settings)
    transform = create_transform(encoder)
    with process_group(settings.device) as group:
        settings = settings.shared_by(group.world).on(group.device)
        data = _LabelledData(train, head, transform, settings)
        method = _Supervised(settings, encoder, head, val, transform)
        trained, total = count_parameters(encoder)
        trainer = Trainer(settings, method, data, group, _data_hash(train, val))
        trainer.train(progress and group.is_first)
        group.gather(None)  # the first process has written the last checkpoint
        best = torch.load(trainer.folder / "checkpoints" / "best.pt", weights_only=True, map_location="cpu")
        encoder.load_state_dict(best["model_state_dict"])
        merge_lora(encoder)
        encoder.eval()
        group.gather(None)  # all have read it
        epoch = best["progress"]["epoch"]
        return FinetunedModel(encoder, head, transform, group.device, epoch, trainer.bad, trained, total)


def _data_hash(*parts: Labelled) -> str:
    rows = [
        f"{' '.join(f'{channel}{image}' for channel, image in record.images.items())} {record.mask} {label}"
        for part in parts
        for record, label in zip(part.records, part.labels, strict=True)
    ]
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, eq=False)
class FinetunedModel:
    """An encoder with its trained head.

    Attributes:
        encoder: With the head, in eval mode; changes of low rank are merged into its weights.
        head: What its outputs mean.
        transform: What it takes scans by.
        device: Where it is.
        epoch: The one that was chosen, counted from 1.
        failed: By number the training scans that could not be read, and why.
        trained_parameters: How many numbers were trained, those of the head too.
        parameters: Of how many: those of the encoder, its head and what was added.
    """

    encoder: Encoder
    head: LinearHead
    transform: InputTransform
    device: torch.device
    epoch: int
    failed: dict[int, str] = field(default_factory=dict)
    trained_parameters: int = 0
    parameters: int = 0

    def predict(self, records: Sequence[ScanRecord], batch_size: int = 1) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Predictions of the scans that can be read, in order, and the reason for each that cannot."""
        tensors: list[Tensor] = []
        outputs: list[Tensor] = []
        failed: dict[int, str] = {}
        self.encoder.eval()
        with torch.inference_mode(), tf32(False):
            for n, record in enumerate(records):
                try:
                    tensors.append(read_volume(self.transform, record))
                except ScanError as error:
                    failed[n] = str(error)
                if len(tensors) == batch_size:
                    outputs.append(self.encoder(torch.stack(tensors).to(self.device)).float().cpu())
                    tensors = []
            if tensors:
                outputs.append(self.encoder(torch.stack(tensors).to(self.device)).float().cpu())
        if not outputs:
            raise BrainfmError(f"none of {len(records)} scans can be read; one: {next(iter(failed.values()))}")
        return self.head.predictions(torch.cat(outputs)), failed


def put_head(encoder: Encoder, outputs: int, settings: Finetuning) -> None:
    """Give an encoder a new head, and freeze or add what the settings say. Raises BrainfmError where it cannot be."""
    encoder.reset_classifier(outputs, settings.global_pool)
    draw_head(encoder.get_classifier(), settings.head_std, settings.seed)
    if settings.drop_path or settings.trained_positions:
        if not isinstance(encoder, VisionTransformer):
            raise BrainfmError(
                f"drop_path and trained_positions are of a ViT, and {type(encoder).__name__} is none; leave them out "
                "(--set drop_path=0 trained_positions=false)"
            )
        encoder.set_drop_path(settings.drop_path)
        encoder.pos_embed.requires_grad_(settings.trained_positions)
    if settings.trained == "head" and not settings.drifting:
        encoder.freeze()
    elif settings.trained != "all":
        learned = _learned(encoder, settings)
        encoder.requires_grad_(False)
        for parameter in (*learned, *encoder.get_classifier().parameters()):
            parameter.requires_grad_(True)


def count_parameters(encoder: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many there are."""
    everything = [(parameter.numel(), parameter.requires_grad) for parameter in encoder.parameters()]
    return sum(size for size, learns in everything if learns), sum(size for size, _ in everything)


def _learned(encoder: Encoder, settings: Finetuning) -> list[nn.Parameter]:
    """What is trained beside the head where that is not all; what is new is added."""
    if settings.trained == "head":
        return []
    encoder.hold_statistics()
    if settings.trained == "norm_bias":
        return norms_and_biases(encoder)
    if settings.trained == "adapter":
        return add_adapters(encoder, settings.adapter_reduction)
    return add_lora(encoder, settings.lora_rank)


class _LabelledData(TrainingData):
    """Scans as their contract's tensors, augmented where that is asked for; an item is a scan."""

    def __init__(self, scans: Labelled, head: LinearHead, transform: InputTransform, settings: Finetuning) -> None:
        self.records, self.targets = scans.records, head.targets(scans.labels)
        self.transform = create_transform(transform.spec, is_training=True) if settings.augment else transform
        self.seed = settings.seed
        self.item_bytes = 4 * math.prod(transform.spec.output_shape or (0,))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, dict[int, str]]:
        epoch, item = key
        failed: dict[int, str] = {}
        instead = stream(self.seed, epoch, _INSTEAD, item)
        for _ in range(1 + _REPLACEMENTS):
            try:
                return self._view(epoch, item), item, failed
            except ScanError as error:
                failed[item] = str(error)
                item = int(instead.integers(len(self.records)))
        raise ScanError(f"{len(failed)} scans in a row cannot be read; the last: {list(failed.values())[-1]}")

    def _view(self, epoch: int, item: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(stream(self.seed, epoch, _VIEW, item).integers(2**63)))
            return read_volume(self.transform, self.records[item])

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Tensors side by side, with their targets."""
        tensors, items, failed = zip(*samples, strict=True)
        bad = {n: reason for part in failed for n, reason in part.items()}
        return Batch(torch.stack(tensors)[None], list(items), bad, self.targets[list(items)])


class _Supervised(Method):
    """A loss on labels, and each epoch a look at the validation scans."""

    def __init__(
        self, settings: Finetuning, encoder: Encoder, head: LinearHead, val: Labelled, transform: InputTransform
    ) -> None:
        super().__init__(settings, encoder)
        self.network, self.head, self.val, self.transform = encoder, head, val, transform
        self.selection, self.layer_decay = settings.selection, settings.layer_decay
        self.batches = settings.val_loss == "batches"

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn here
        rows: slice,  # noqa: ARG002
    ) -> dict[str, float]:
        """As `Method.backward`; logs the loss."""
        assert batch.targets is not None
        with self._autocast(batch.views):
            outputs = network(batch.views[0])
        loss = self.head.loss(outputs.to(batch.views.dtype), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())}

    def end_epoch(self, group: ProcessGroup) -> dict[str, float]:
        """The metrics of the validation scans; each process looks at its part of them."""
        mine = range(group.rank, len(self.val.records), group.world)
        outputs: dict[int, Tensor] = {}
        mode = self.encoder.training
        self.encoder.eval()
        with torch.no_grad():
            for n in mine:
                record = self.val.records[n]
                try:
                    tensor = read_volume(self.transform, record)
                except ScanError:
                    continue
                like = next(self.encoder.parameters())
                with self._autocast(tensor.to(like.device)):
                    outputs[n] = self.encoder(tensor[None].to(like)).float().cpu()[0]
        self.encoder.train(mode)
        everything = {n: output for part in group.gather(outputs) for n, output in part.items()}
        if not everything:
            raise BrainfmError(f"none of the {len(self.val.records)} validation scans can be read")
        rows = sorted(everything)
        stacked, labels = torch.stack([everything[n] for n in rows]), self.val.labels[rows]
        joined = self.settings.batch_size * group.world if self.batches else None
        values = self.head.score(stacked, labels, self.selection, joined)
        score = values.pop("score")
        return {f"val_{name}": value for name, value in values.items()} | {"score": score}
