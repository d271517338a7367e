"""The training loop: on one process or under torchrun, resumable at any moment, ending in a model's folder."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from brainfm.errors import BrainfmError, RecipeError
from brainfm.factory import create_model
from brainfm.hub import save_for_hub
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.models.encoder import Encoder
from brainfm.operations import Resize, Triple
from brainfm.pretrained import Cohort, InputSpec
from brainfm.registry import get_pretrained_cfg
from brainfm.train.cache import key_of
from brainfm.train.checkpoint import Progress, read_run, save_checkpoint
from brainfm.train.data import Batch, CropData, CropSample, EpochSampler, PretrainingData, collate
from brainfm.train.distributed import Processes, processes, synchronise_batch_norm
from brainfm.train.method import METHODS, Method
from brainfm.train.optim import learning_rate, make_optimiser
from brainfm.train.recipe import Recipe
from brainfm.weights import atomic_path, save_state

logger = logging.getLogger("brainfm")

INTERRUPTED = 75  # exit code of a run that a signal stopped and that can go on: EX_TEMPFAIL

_STOPPING = (signal.SIGTERM, signal.SIGUSR1)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}  # of parameters


class RunInterruptedError(BrainfmError):
    """A signal stopped the run behind a step; its checkpoint is written, and the same command goes on."""


def pretrain(recipe: Recipe, *, progress: bool = False) -> Path:
    """Pretrain an encoder as a recipe says, or go on with the run in its folder.

    The folder has `log.jsonl` (a line a step), `checkpoints/`, `bad_scans.csv` where there are any, and at the end
    `export/`, which `create_model("local-dir:…")` loads, and the projector or decoder beside it.

    Args:
        recipe: Of `load_recipe`, with its manifest and output.
        progress: Show a progress bar.

    Returns:
        The folder `export`.

    Raises:
        RecipeError: The recipe cannot be run, or the folder holds another run.
        ScanError: The manifest is not one.
        RunInterruptedError: SIGTERM or SIGUSR1 came; a checkpoint is written.
        BrainfmError: Too many scans cannot be read, or the loss is not finite; the message names the scans.
    """
    records, spec = read_data(recipe)
    with processes(recipe.device) as everyone:
        run = _Run(recipe, records, spec, everyone)
        with _signals(run):
            run.train(progress and everyone.is_first)
        export = Path(recipe.output) / "export"
        if everyone.is_first:
            run.export(export)
        return export


def read_data(recipe: Recipe) -> tuple[list[ScanRecord], InputSpec]:
    """The scans and the input contract of a recipe. Raises RecipeError and ScanError."""
    if not recipe.manifest or not recipe.output:
        raise RecipeError("a run needs manifest=FILE.csv and output=FOLDER")
    spec = get_pretrained_cfg(recipe.model).input_spec
    if spec is None:
        raise RecipeError(f"{recipe.model} has no input contract; register it with one")
    return read_manifest(Path(recipe.manifest)), spec


def make_method(recipe: Recipe) -> Method:
    """The recipe's encoder, with initial weights by its seed, in what it is trained with."""
    torch.manual_seed(recipe.seed)
    kwargs: dict[str, Any] = {"img_size": recipe.input_size} if recipe.method == "mae" and recipe.input_size else {}
    try:
        encoder = create_model(recipe.model, **kwargs)
    except TypeError as error:
        raise RecipeError(f"an MAE needs a ViT, and {recipe.model} takes no img_size") from error
    return METHODS[recipe.method](recipe, encoder)


class _Run:
    """A run's parts, and how far it is."""

    def __init__(self, recipe: Recipe, records: Sequence[ScanRecord], spec: InputSpec, everyone: Processes) -> None:
        self.recipe, self.everyone, self.folder = recipe, everyone, Path(recipe.output)
        method = METHODS[recipe.method]
        self.data = PretrainingData(
            records,
            spec,
            recipe.augmentation,
            views=method.views,
            seed=recipe.seed,
            cache=recipe.cache,
            root=Path(recipe.manifest).parent,
            every_scan=recipe.every_scan,
            shape=recipe.input_size,
        )
        self.sampler = EpochSampler(
            len(self.data), recipe.batch_size, rank=everyone.rank, world=everyone.world, seed=recipe.seed
        )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.tf32
        self.method = make_method(recipe)
        self.encoder: Encoder = self.method.encoder
        self.encoder.set_grad_checkpointing(recipe.grad_checkpointing)
        layout = torch.channels_last_3d if recipe.channels_last else torch.preserve_format
        network = self.method.network.to(everyone.device, _DTYPES[recipe.precision]).train()
        network = network.to(memory_format=layout)  # type: ignore[call-overload]
        if everyone.world > 1 and recipe.sync_bn:
            network = synchronise_batch_norm(network, everyone.device)
        self.optimiser = make_optimiser(recipe, network)
        self.progress = Progress()
        self.stopped_by: int | None = None
        self.bad: dict[int, str] = {}
        self._resume(network)
        self.network: nn.Module = DistributedDataParallel(network) if everyone.world > 1 else network

    # --- the loop ---

    def train(self, shown: bool) -> None:
        """Run all epochs that are left."""
        on_device = self.recipe.augment_on == "device"
        loader: DataLoader[Any] = DataLoader(
            CropData(self.data) if on_device else self.data,
            self.recipe.batch_size,
            sampler=self.sampler,
            num_workers=self.recipe.workers,
            collate_fn=list if on_device else collate,
            pin_memory=self.everyone.device.type == "cuda",
            persistent_workers=self.recipe.workers > 0,
            worker_init_fn=_deaf_to_signals,
        )
        steps = self.sampler.steps
        with _progress_bar(steps * self.recipe.epochs, self._step_of_run, shown) as bar, self._log() as log:
            while self.progress.epoch < self.recipe.epochs:
                self.sampler.epoch, self.sampler.first_step = self.progress.epoch, self.progress.step
                waiting = time.perf_counter()
                for loaded in loader:
                    started = time.perf_counter()
                    batch = self._with_views(loaded) if on_device else loaded
                    metrics = self._step(batch)
                    ended = time.perf_counter()
                    metrics |= {
                        "scans_per_s": self._joined_batch / (ended - waiting),
                        "data_share": (started - waiting) / (ended - waiting),
                        "peak_memory_gb": _peak_memory(self.everyone.device),
                    }
                    waiting = ended
                    log(metrics)
                    bar.set_postfix(loss=f"{metrics['loss']:.3f}", epoch=self.progress.epoch + 1)
                    bar.update()
                    if self._is_stopped():
                        self._save("last")
                        raise RunInterruptedError(
                            f"stopped by signal {self.stopped_by} in epoch {self.progress.epoch + 1}, step "
                            f"{self.progress.step}; the same command goes on from there"
                        )
                self._end_epoch()

    def _with_views(self, samples: Sequence[CropSample]) -> Batch:
        return collate([self.data.make_views(sample, self.everyone.device) for sample in samples])

    def _step(self, batch: Batch) -> dict[str, float]:
        recipe = self.recipe
        self._note_bad(batch.failed)
        rate = learning_rate(recipe, self._step_of_run, self.sampler.steps, self._joined_batch)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        views = batch.views.to(self.everyone.device, _DTYPES[recipe.precision], non_blocking=True)
        generator = torch.Generator().manual_seed(hash((recipe.seed, self._step_of_run)) % 2**63)
        torch.manual_seed(hash((recipe.seed, self._step_of_run, self.everyone.rank)) % 2**63)
        share = slice(self.everyone.rank * recipe.batch_size, (self.everyone.rank + 1) * recipe.batch_size)
        self.optimiser.zero_grad(set_to_none=True)
        metrics = self.method.backward(self.network, views, generator, share)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip_grad or math.inf)
        metrics = self.everyone.mean(metrics) | {"lr": rate, "grad_norm": float(norm)}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            self._refuse_not_finite(batch, metrics)
        self.optimiser.step()
        self.progress.step += 1
        self.progress.losses += (metrics["loss"],)
        return metrics

    def _refuse_not_finite(self, batch: Batch, metrics: dict[str, float]) -> None:
        scans = [str(self.data.records[n].image) for part in self.everyone.gather(batch.scans) for n in part]
        raise BrainfmError(
            f"the loss is {metrics['loss']} and the gradient's norm {metrics['grad_norm']} in epoch "
            f"{self.progress.epoch + 1}, step {self.progress.step + 1}: a rate that is too high, or a damaged scan in "
            f"this batch: {', '.join(scans)}"
        )

    def _note_bad(self, failed: dict[int, str]) -> None:
        """Keep the list of scans that cannot be read, and stop when there are too many."""
        found = {n: reason for part in self.everyone.gather(failed) for n, reason in part.items()}
        if not found.keys() - self.bad.keys():
            return
        self.bad |= found
        if self.everyone.is_first:
            import csv

            with atomic_path(self.folder / "bad_scans.csv") as temporary, temporary.open("w", newline="") as file:
                rows = [(str(self.data.records[n].image), reason) for n, reason in sorted(self.bad.items())]
                csv.writer(file).writerows([("image_path", "error"), *rows])
        if len(self.bad) > self.recipe.max_bad_share * len(self.data.records):
            first = next(iter(self.bad.values()))
            raise BrainfmError(
                f"{len(self.bad)} of {len(self.data.records)} scans cannot be read, more than max_bad_share="
                f"{self.recipe.max_bad_share:g}; they are listed in {self.folder / 'bad_scans.csv'}; one: {first}"
            )

    def _end_epoch(self) -> None:
        progress = self.progress
        loss = sum(progress.losses) / len(progress.losses)
        improved = loss < progress.best
        self.progress = Progress(progress.epoch + 1, 0, min(loss, progress.best))
        if improved:
            self._save("best")
        if self.progress.epoch % self.recipe.save_every == 0:
            self._save(f"epoch{self.progress.epoch:04d}")
        self._save("last")  # at the end: what it says is done, is done

    @property
    def _joined_batch(self) -> int:
        return self.recipe.batch_size * self.everyone.world

    @property
    def _step_of_run(self) -> int:
        return self.progress.epoch * self.sampler.steps + self.progress.step

    def _is_stopped(self) -> bool:
        return any(stopped is not None for stopped in self.everyone.gather(self.stopped_by))

    # --- what is kept ---

    def _resume(self, network: nn.Module) -> None:
        last = self.folder / "checkpoints" / "last.pt"
        if not last.is_file():
            return
        if not self.recipe.resume:
            raise RecipeError(f"{self.folder}: holds a run, and resume is false; give another output=, or remove it")
        content = read_run(last, self.recipe, self._data_hash, self._joined_batch)
        network.load_state_dict(content["model_state_dict"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.progress = content["progress"]
        if self.everyone.is_first:
            done = f"epoch {self.progress.epoch + 1}, step {self.progress.step}"
            logger.info("%s: going on from %s", self.folder, done)

    def _save(self, name: str) -> None:
        if not self.everyone.is_first:
            return
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        save_checkpoint(
            self.folder / "checkpoints" / f"{name}.pt",
            network.state_dict(),
            self.optimiser.state_dict(),
            self.progress,
            self.recipe,
            self._data_hash,
            self._joined_batch,
        )

    @property
    def _data_hash(self) -> str:
        rows = [f"{key_of(record, self.data.root)} {record.patient_id}" for record in self.data.records]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    @contextmanager
    def _log(self) -> Iterator[Any]:
        """A function that adds a step's line to log.jsonl and to TensorBoard, where that is installed."""
        if not self.everyone.is_first:
            yield lambda _: None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        done = self._step_of_run
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= done]  # not what will be done again
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        board = _tensorboard(self.folder / "tensorboard", done)
        with path.open("a", encoding="utf-8") as file:

            def log(metrics: dict[str, float]) -> None:
                step = self._step_of_run
                line = {"epoch": self.progress.epoch + 1, "step": step, **metrics}
                file.write(json.dumps(line) + "\n")
                file.flush()
                if board is not None:
                    for name, value in metrics.items():
                        board.add_scalar(name, value, step)

            try:
                yield log
            finally:
                if board is not None:
                    board.close()

    def export(self, folder: Path) -> None:
        """Write the encoder as a model's folder, and what it was trained with beside it."""
        encoder = self.encoder.to("cpu", torch.float32).eval()
        encoder.requires_grad_(True)
        patients = len({record.patient_id or str(n) for n, record in enumerate(self.data.records)})
        scans = len(self.data.records) - len(self.bad)
        name = Path(self.recipe.manifest).stem
        overlay = {
            "input_spec": _resized(self.data.spec, self.recipe.input_size),
            "ssl_method": self.method.name,
            "cohorts": (Cohort(name, patients, scans),),
            "recipe": json.dumps(self.recipe.to_dict() | {"manifest": name, "output": "", "cache": None}),
            "notes": f"{self.method.name} on {scans:,} scans of {patients:,} patients ({name}), "
            f"{self.recipe.epochs} epochs, joined batch {self._joined_batch}.",
        }
        save_for_hub(encoder, folder, pretrained_cfg_overlay=overlay)
        what, prefixes = self.method.aside
        state = self.method.network.state_dict()
        save_state(
            {k: v.cpu() for k, v in state.items() if k.startswith(prefixes)}, self.folder / f"{what}.safetensors"
        )


def _deaf_to_signals(_: int) -> None:
    """Schedulers and torchrun send their signals to loader workers too, which are needed until the step has ended."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals(run: _Run) -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 (a scheduler that wants its node back) stop the run behind the step that runs."""

    def stop(number: int, _: Any) -> None:
        run.stopped_by = number

    before = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resized(spec: InputSpec, shape: Triple | None) -> InputSpec:
    """The contract of an encoder that was trained on views of another shape than its contract's."""
    if shape is None or spec.output_shape == (1, *shape):
        return spec
    *before, zscore = spec.operations
    return replace(spec, operations=(*before, Resize(shape), zscore), output_shape=(1, *shape))


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; the last one may be cut off."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.split("\n")[:-1] if line.startswith("{") and line.endswith("}")]


def _tensorboard(folder: Path, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def _progress_bar(total: int, initial: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit="step", desc="pretraining", disable=not shown)


def _peak_memory(device: torch.device) -> float:
    """Peak memory so far in GB: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
