"""The training loop: on one process or under torchrun, resumable at any moment."""

from __future__ import annotations

import json
import logging
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm.errors import BrainfmError, RecipeError, RunInterruptedError
from brainfm.files import one_line, progress_bar, write_csv, write_text
from brainfm.report import current
from brainfm.system import peak_memory, tf32
from brainfm.train.checkpoint import Progress, read_newest, save_checkpoint
from brainfm.train.data import Batch, EpochSampler, TrainingData
from brainfm.train.distributed import ProcessGroup, synchronise_batch_norm
from brainfm.train.loader import STOPPING, batches_of, loading
from brainfm.train.optim import learning_rate, make_optimiser
from brainfm.train.recipe import Training
from brainfm.train.step import Method

logger = logging.getLogger("brainfm")

INTERRUPTED = 75  # exit code of a run that a signal stopped and that can go on: EX_TEMPFAIL

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}  # of parameters


class Trainer:
    """A run in a folder: resumed where there is one, logged, saved, and stopped after a step by a signal.

    The folder has `log.jsonl` (a line a step, and one an epoch where the method says something of it; `data_s` are the
    seconds a step waited for data, `step_s` those it took), `checkpoints/`,
    and `bad_scans.csv` where there are any.

    Args:
        settings: How to train; its output is the folder.
        method: What is trained.
        data: On what.
        group: The processes that train.
        data_hash: Says which data these are; a run on others is not resumed.
        after_epoch: Called with the number of epochs done after each, on the first process.

    Raises:
        RecipeError: The folder holds another run.
        BrainfmError: There are too few scans for a batch.
    """

    def __init__(
        self,
        settings: Training,
        method: Method,
        data: TrainingData,
        group: ProcessGroup,
        data_hash: str,
        after_epoch: Callable[[int], None] | None = None,
    ) -> None:
        self.settings, self.method, self.data, self.group = settings, method, data, group
        self.folder, self.data_hash, self.after_epoch = Path(settings.output), data_hash, after_epoch
        self.sampler = EpochSampler(
            len(data), settings.batch_size, rank=group.rank, world=group.world, seed=settings.seed
        )
        method.encoder.set_grad_checkpointing(settings.grad_checkpointing)
        layout = torch.channels_last_3d if settings.channels_last else torch.preserve_format
        network = method.network.to(group.device, _DTYPES[settings.precision]).train()
        network = network.to(memory_format=layout)  # type: ignore[call-overload]
        if group.world > 1 and settings.sync_bn:
            network = synchronise_batch_norm(network, group.device)
        self.optimiser = make_optimiser(settings, network, method.layer_decay)
        self.progress = Progress()
        self.stopped_by: int | None = None
        self.bad: dict[int, str] = {}
        self._resume(network)
        self.network: nn.Module = network

    # --- the loop ---

    def train(self, shown: bool = False) -> None:
        """Run all epochs that are left.

        Args:
            shown: Show a progress bar.

        Raises:
            RunInterruptedError: SIGTERM or SIGUSR1 came; a checkpoint is written.
            KeyboardInterrupt: Ctrl-C came; a checkpoint is written, unless it came twice.
            BrainfmError: Too many scans cannot be read, or the loss is not finite; the message names the scans.
        """
        settings = self.settings
        total = self.sampler.steps * settings.epochs
        bar = progress_bar(total=total, unit="step", doing="training", shown=shown, done=self._step_of_run)
        batches = loading(
            self.data,
            self.sampler,
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=self.group.device,
        )
        lines = logging_redirect_tqdm([logger]) if shown else nullcontext()  # above the bar, not in it
        with tf32(settings.tf32), self._under_ddp(), _signals(self), bar, lines, self._log() as log, batches as loader:
            while self.progress.epoch < settings.epochs:
                self.sampler.epoch, self.sampler.first_step = self.progress.epoch, self.progress.step
                costs = []
                waiting = time.perf_counter()
                for loaded in batches_of(loader):
                    started = time.perf_counter()
                    metrics = self._step(self.data.batch(loaded, self.group.device))
                    ended = time.perf_counter()
                    metrics |= {
                        "scans_per_s": self._joined_batch / (ended - waiting),
                        "data_fraction": (started - waiting) / (ended - waiting),
                        "data_s": started - waiting,
                        "step_s": ended - started,
                    }
                    metrics |= _peak_memory(self.group.device)
                    costs.append((started - waiting, ended - started))
                    waiting = ended
                    log(metrics)
                    bar.set_postfix(loss=f"{metrics['loss']:.3f}", epoch=self.progress.epoch + 1)
                    bar.update()
                    self._stop_if_asked()
                self._say_epoch(costs)
                self._end_epoch(log)

    @contextmanager
    def _under_ddp(self) -> Iterator[None]:
        """Average gradients over the processes; no longer than that, for DDP holds the process group's threads."""
        bare = self.network
        if self.group.world > 1:
            self.network = DistributedDataParallel(bare)
        try:
            yield
        finally:
            self.network = bare

    def _step(self, batch: Batch) -> dict[str, float]:
        settings = self.settings
        self._note_bad(batch.failed)
        rate = learning_rate(settings, self._step_of_run, self.sampler.steps, self._joined_batch)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = rate * parameters.get("lr_scale", 1.0)
        batch = batch.to(self.group.device, _DTYPES[settings.precision])
        generator = torch.Generator().manual_seed(hash((settings.seed, self._step_of_run)) % 2**63)
        torch.manual_seed(hash((settings.seed, self._step_of_run, self.group.rank)) % 2**63)
        rows = slice(self.group.rank * settings.batch_size, (self.group.rank + 1) * settings.batch_size)
        self.optimiser.zero_grad(set_to_none=True)
        metrics = self.method.backward(self.network, batch, generator, rows)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_grad or math.inf)
        metrics = self.group.mean(metrics) | {"lr": rate, "grad_norm": float(norm)}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            self._refuse_not_finite(batch, metrics)
        self.optimiser.step()
        self.progress.step += 1
        self.progress.losses += (metrics["loss"],)
        return metrics

    def _refuse_not_finite(self, batch: Batch, metrics: dict[str, float]) -> None:
        scans = [self._name(n) for part in self.group.gather(batch.scans) for n in part]
        raise BrainfmError(
            f"the loss is {metrics['loss']} and the gradient's norm {metrics['grad_norm']} in epoch "
            f"{self.progress.epoch + 1}, step {self.progress.step + 1}: a rate that is too high, or a damaged scan in "
            f"this batch: {', '.join(scans)}"
        )

    def _note_bad(self, failed: dict[int, str]) -> None:
        """Keep the list of scans that cannot be read, and stop when there are too many."""
        found = {n: reason for part in self.group.gather(failed) for n, reason in part.items()}
        if found and self.data.quarantine is not None and self.group.is_first:
            self.data.quarantine.note((self.data.records[n], reason) for n, reason in found.items())
            current().details["quarantined"] = self.data.quarantine.listed()
        if not found.keys() - self.bad.keys():
            return
        self.bad |= found
        if self.group.is_first:
            rows = [(self._name(n), reason) for n, reason in sorted(self.bad.items())]
            write_csv(self.folder / "bad_scans.csv", [("image_path", "error"), *rows])
            for row in rows:
                current().fail(*row)
        if len(self.bad) > self.settings.max_bad_fraction * len(self.data.records):
            first = next(iter(self.bad.values()))
            raise BrainfmError(
                f"{len(self.bad)} of {len(self.data.records)} scans cannot be read, more than max_bad_fraction="
                f"{self.settings.max_bad_fraction:g}; they are listed in {self.folder / 'bad_scans.csv'}; one: {first}"
            )

    def _name(self, number: int) -> str:
        """What a scan is called: its path or paths; of one in memory, its place in the list."""
        return self.data.records[number].name or f"scan {number}"

    def _say_epoch(self, costs: list[tuple[float, float]]) -> None:
        """Say an epoch's mean loss, what its steps cost by the median, and what the steps that are left will cost."""
        if not costs or not self.group.is_first:
            return
        data, step = (statistics.median(seconds) for seconds in zip(*costs, strict=True))
        left = self.sampler.steps * self.settings.epochs - self._step_of_run
        logger.info(
            "epoch %d of %d: loss %.4g; a step waits %.3g s for data and takes %.3g s; %s left",
            self.progress.epoch + 1,
            self.settings.epochs,
            statistics.fmean(self.progress.losses),
            data,
            step,
            tqdm.format_interval(left * (data + step)),
        )

    def _end_epoch(self, log: Callable[[dict[str, float]], None]) -> None:
        progress = self.progress
        said = self.method.end_epoch(self.group)
        if said:
            log(said)
        score = said.get("score", sum(progress.losses) / len(progress.losses))
        score = math.inf if math.isnan(score) else score
        improved = progress.epoch == 0 or score < progress.best  # there is always a best one
        self.progress = Progress(progress.epoch + 1, 0, min(score, progress.best))
        if self.after_epoch is not None and self.group.is_first:
            self.after_epoch(self.progress.epoch)
        if improved:
            self._save("best")
        if self.progress.epoch % self.settings.save_every == 0:
            self._save(f"epoch{self.progress.epoch:04d}")
        self._save("last")  # at the end: what it says is done, is done

    @property
    def _joined_batch(self) -> int:
        return self.settings.batch_size * self.group.world

    @property
    def _step_of_run(self) -> int:
        return self.progress.epoch * self.sampler.steps + self.progress.step

    def _stop_if_asked(self) -> None:
        """Save the run and end it, where a signal came to any of the processes."""
        came = [signal.Signals(number) for number in self.group.gather(self.stopped_by) if number is not None]
        if not came:
            return
        self._save("last")
        ending = KeyboardInterrupt if came[0] == signal.SIGINT else RunInterruptedError  # Ctrl-C is that in Python
        raise ending(
            f"stopped by {came[0].name} in epoch {self.progress.epoch + 1}, step {self.progress.step}; "
            "the same command goes on from there"
        )

    # --- what is kept ---

    def _resume(self, network: nn.Module) -> None:
        folder = self.folder / "checkpoints"
        if not self.settings.resume and any(folder.glob("*.pt")):
            raise RecipeError(f"{self.folder}: holds a run, and resume is false; give another output=, or remove it")
        found = read_newest(folder, self.settings, self.data_hash, self._joined_batch)
        if found is None:
            return
        _, content = found
        try:
            network.load_state_dict(content["model_state_dict"])
        except RuntimeError as error:  # the settings are the same, and what they mean is not
            raise RecipeError(
                f"{self.folder}: this run was begun by an earlier brainfm, whose network had other tensors; finish it "
                "with that version, or give another output="
            ) from error
        self.optimiser.load_state_dict(content["optimiser"])
        self.progress = content["progress"]
        if self.group.is_first:
            done = f"epoch {self.progress.epoch + 1}, step {self.progress.step}"
            logger.info("%s: going on from %s", self.folder, done)
            self._say_if_shared_anew(content["recipe"]["batch_size"])

    def _say_if_shared_anew(self, batch_size: int) -> None:
        """Say that a joined batch is shared by another number of processes than before the run was resumed."""
        ours = self.settings.batch_size
        if batch_size == ours:
            return
        logger.info(
            "%s: the joined batch of %d is %d × %d now (processes × batch_size) and was %d × %d; steps are the same%s",
            self.folder,
            self._joined_batch,
            self.group.world,
            ours,
            self._joined_batch // batch_size,
            batch_size,
            "" if self.settings.sync_bn else f", but any BatchNorm takes its statistics over {ours} scans",
        )

    def _save(self, name: str) -> None:
        if not self.group.is_first:
            return
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        save_checkpoint(
            self.folder / "checkpoints" / f"{name}.pt",
            network.state_dict(),
            self.optimiser.state_dict(),
            self.progress,
            self.settings,
            self.data_hash,
            self._joined_batch,
        )

    @contextmanager
    def _log(self) -> Iterator[Any]:
        """A function that adds a step's line to log.jsonl and to TensorBoard, where that is installed."""
        if not self.group.is_first:
            yield lambda _: None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        done = self._step_of_run
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= done]  # not what will be done again
        write_text(path, "".join(f"{line}\n" for line in kept))
        board = _Board(self.folder / "tensorboard", done)
        with path.open("a", encoding="utf-8") as file:

            def log(metrics: dict[str, float]) -> None:
                step = self._step_of_run
                line = {"epoch": self.progress.epoch + 1, "step": step, **metrics}
                file.write(json.dumps(line) + "\n")
                file.flush()
                board.add(metrics, step)

            try:
                yield log
            finally:
                board.close()


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """Let a signal stop the run after the step that runs; a second Ctrl-C stops it at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main one is told of signals
        yield
        return

    def stop(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, again)
            logger.info("stopping after this step; Ctrl-C again stops at once")
        trainer.stopped_by = number

    # torchrun passes Ctrl-C on, so that a process of a group may have it twice for once.
    again = signal.default_int_handler if trainer.group.world == 1 else stop
    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(path: Path) -> list[str]:
    """The whole lines of a log, the keys as they are called now; the last one may be cut off."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace").replace('"data_share":', '"data_fraction":')
    return [line for line in text.split("\n")[:-1] if line.startswith("{") and line.endswith("}")]


class _Board:
    """TensorBoard, where it is installed and as long as it works: a run does without."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        except ModuleNotFoundError:
            pass
        except Exception as error:  # another package's; of versions that do not go together there are all kinds
            self._do_without(error)

    def add(self, metrics: dict[str, float], step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        except Exception as error:  # such as of a full disk, in its own thread
            self._do_without(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        self._writer = None
        reason = f"{type(error).__name__}: {one_line(error)}"
        logger.warning("going on without TensorBoard (%s); log.jsonl has the same numbers", reason)


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far in GB: the GPU's, or this process's; nothing where the system does not say."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return {} if peak is None else {"peak_memory_gb": peak / 1e9}
