"""Scans for pretraining: which ones an epoch takes, in which order, and the views of each.

Everything drawn is a pure function of (seed, epoch, patient, view): the number of workers, of processes, and a run
resumed in between change nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from brainfm.contract import InputSpec, Triple
from brainfm.errors import BrainfmError, ScanError
from brainfm.manifest import ScanRecord
from brainfm.stage import Stage, files_of
from brainfm.train.augment import Augmentation, View, draw_view, make_view, new_memory
from brainfm.train.cache import ScanCache, key_of, read_whole
from brainfm.train.quarantine import Quarantine
from brainfm.train.sources import Mixture, Source, check_mixture, items_taken
from brainfm.train.video import check_readers

_DRAWS = 20  # of a view that shows no brain, before its scan is given up; the released code goes on for ever
_REPLACEMENTS = 10  # patients tried in place of one whose scan cannot be read

_T = TypeVar("_T")

_ORDER, _SCAN, _REPLACEMENT, _VIEW, _TURN = range(5)  # what a random stream is for


def stream(seed: int, epoch: int, purpose: int, *names: int) -> np.random.Generator:
    """The random numbers of one decision; no two decisions share any."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, purpose, *names)))


@dataclass(frozen=True, eq=False)
class Sample:
    """The views of one scan, and the scans that could not be read before it was found.

    Attributes:
        views: [views, C, z, y, x] float32.
        scan: Which scan of the list they show.
        failed: Which scans could not be read, and why.
    """

    views: Tensor
    scan: int
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Crop:
    """What one view is made of: its voxels, [C, z, y, x] float32, the brain's mask, [z, y, x] bool, and what to do."""

    image: Tensor
    mask: Tensor
    view: View

    def pin_memory(self) -> Crop:
        """The same in page-locked memory, for the loader."""
        return Crop(self.image.pin_memory(), self.mask.pin_memory(), self.view)


@dataclass(frozen=True, eq=False)
class CropSample:
    """As `Sample`, with the views still to be made: `PretrainingData.make_views` does, on any device.

    Attributes:
        key: (epoch, item).
        crops: Of each view.
        scan: Which scan of the list they show.
        failed: Which scans could not be read, and why.
    """

    key: tuple[int, int]
    crops: tuple[Crop, ...]
    scan: int
    failed: tuple[tuple[int, str], ...] = ()

    def pin_memory(self) -> CropSample:
        """The same in page-locked memory, for the loader."""
        return CropSample(self.key, tuple(crop.pin_memory() for crop in self.crops), self.scan, self.failed)


class TrainingData(Dataset[Any]):
    """What a run is trained on, item by item.

    Attributes:
        records: The scans.
        item_bytes: Of one item in memory, at the most; 0 where nobody knows.
        quarantine: The scans that are passed over, as the run has found so far; or None.
    """

    records: list[ScanRecord]
    item_bytes: int = 0
    quarantine: Quarantine | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many items an epoch has."""

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Item `key[1]` in epoch `key[0]`: a function of the two."""

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> Any:
        """Items side by side, in a worker of the loader."""

    def ahead(self, keys: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The keys in turn, while the files of the items after them are brought near."""
        return keys

    def batch(self, loaded: Any, device: torch.device) -> Batch:  # noqa: ARG002 - for those that finish it there
        """The batch of what the loader gives."""
        batch: Batch = loaded
        return batch


@dataclass(frozen=True, eq=False)
class _Part:
    """What an epoch takes of one source.

    Attributes:
        items: All that it has.
        taken: How many of them.
        turns: [items] the order in which they come, a window of `taken` an epoch; None where all are taken.
    """

    items: range
    taken: int
    turns: NDArray[np.int64] | None

    def item(self, epoch: int, place: int) -> int:
        """Which item stands at a place of an epoch: each at one place at the most, and each as often as the others."""
        if self.turns is None:
            return self.items[place]
        return self.items[int(self.turns[(epoch * self.taken + place) % len(self.items)])]


class PretrainingData(TrainingData):
    """Views of scans by (epoch, item); an item is a patient, or with `every_scan` a scan.

    Of a mixture an epoch takes as many items of each source as its fraction says and there are without taking one
    twice; of a source that has more, the next ones in the next epoch.

    Args:
        records: The scans; clips of `brainfm.train.video` count as such. Those without a patient_id are patients of
            their own. A `Mixture` has caches and roots of its own.
        spec: The input contract; the views keep its shape unless `shape` is another.
        augmentation: What views are drawn from.
        views: How many of each scan.
        seed: Of everything that is drawn.
        cache: A folder of `build_cache`; None reads the scans themselves.
        root: The manifest's folder, for the cache's keys.
        every_scan: Take every scan once an epoch, as the released code does, instead of every patient.
        shape: Voxels of the views.
        on_device: Leave the views to `batch`, which makes them on the training's device.
        stage: Where copies of the scans, or of the cache's files, are read, which are made ahead.

    Raises:
        BrainfmError: The contract cannot be pretrained on, the cache is another contract's, there are no scans, or
            two sources of a mixture share a file.
        MissingExtraError: There are clips, and PyAV is not installed.
    """

    records: Mixture

    def __init__(
        self,
        records: Sequence[ScanRecord],
        spec: InputSpec,
        augmentation: Augmentation,
        *,
        views: int = 2,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] = ".",
        every_scan: bool = False,
        shape: Triple | None = None,
        on_device: bool = False,
        stage: Stage | None = None,
    ) -> None:
        if spec.output_shape is None:
            raise BrainfmError("pretraining needs an input contract of a fixed shape")
        if not isinstance(records, Mixture):
            records = Mixture([Source(list(records), Path(root), None if cache is None else os.fspath(cache))])
        check_readers(records)
        check_mixture(records)
        self.records, self.spec, self.augmentation = records, spec, augmentation
        self.views, self.seed = views, seed
        self.stored_shape: Triple = spec.output_shape[1:]
        self.shape = shape or self.stored_shape
        self.caches = [ScanCache(one.cache, spec) if one.cache is not None else None for one in records.sources]
        self.on_device, self._stage = on_device, stage
        self._failed = Quarantine()  # of this process: a worker of the loader, or the run itself
        # float32 views, or with on_device crops of any size, and their masks.
        voxels = math.prod(self.stored_shape if on_device else self.shape)
        self.item_bytes = views * voxels * (4 * len(spec.channels) + on_device)
        self.items = [[n] for n in range(len(self.records))] if every_scan else _by_patient(self.records)
        if not self.items:
            raise BrainfmError("there are no scans to pretrain on")
        self._parts = self._shared_out()

    def _shared_out(self) -> list[_Part]:
        """What an epoch takes of each source."""
        sources, of = self.records.sources, [self.records.number_of(item[0]) for item in self.items]
        counts = [of.count(n) for n in range(len(sources))]
        parts, first = [], 0
        for n, taken in enumerate(items_taken(counts, [source.fraction for source in sources])):
            turns = stream(self.seed, 0, _TURN, n).permutation(counts[n]) if taken < counts[n] else None
            parts.append(_Part(range(first, first + counts[n]), taken, turns))
            first += counts[n]
        return parts

    def __len__(self) -> int:
        return sum(part.taken for part in self._parts)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """`self.sample(key)`, or with on_device `self.crops(key)`."""
        return self.crops(key) if self.on_device else self.sample(key)

    def ahead(self, keys: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The keys in turn, while the scans of the items after them are copied to the stage, where there is one."""
        return keys if self._stage is None else self._stage.ahead(keys, self._files_of)

    def _files_of(self, key: tuple[int, int]) -> list[str]:
        """The files of the scan that is tried first for an item."""
        epoch, place = key
        scan = self._order(self._item(epoch, place)[1], epoch)[0]
        cache = self.caches[self.records.number_of(scan)]
        return files_of(self.records[scan]) if cache is None else cache.files(self.records.key_of(scan))

    def _order(self, item: int, epoch: int) -> list[int]:
        """The scans of an item, in the order in which they are tried."""
        order = stream(self.seed, epoch, _SCAN, self._name(item)).permutation(self.items[item])
        return [int(scan) for scan in order]

    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch of samples; crops stay a list."""
        return list(samples) if self.on_device else collate(samples)

    def batch(self, loaded: Any, device: torch.device) -> Batch:
        """The loader's batch, or that of its crops, made on the device."""
        return collate([self.make_views(sample, device) for sample in loaded]) if self.on_device else loaded

    def sample(self, key: tuple[int, int]) -> Sample:
        """The views of item `key[1]` in epoch `key[0]`; of another item where none of its scans can be read.

        Raises:
            ScanError: No scan could be read in a row of items.
        """
        return Sample(*self._first_readable(key, self._views))

    def crops(self, key: tuple[int, int]) -> CropSample:
        """What the views of `sample(key)` are made of. Raises ScanError as that does."""
        return CropSample(key, *self._first_readable(key, self._crops))

    def make_views(self, sample: CropSample, device: torch.device) -> Sample:
        """The views of `self.sample(sample.key)`, made on a device. Raises ScanError as that does."""
        try:
            views = [
                make_view(crop.image.to(device), crop.mask.to(device), crop.view, self.shape) for crop in sample.crops
            ]
        except ValueError:  # a view without brain, or a damaged scan: found out only now, so draw again as the loader
            again = self.sample(sample.key)
            return Sample(again.views.to(device), again.scan, again.failed)
        return Sample(torch.stack(views), sample.scan, sample.failed)

    def read(self, scan: int) -> None:
        """Read a scan as a run does, and drop it. Raises ScanError, OSError or ValueError where the run refuses it."""
        self._crops(scan, 0, 0) if self.on_device else self._views(scan, 0, 0)

    def _first_readable(
        self, key: tuple[int, int], read: Callable[[int, int, int], _T]
    ) -> tuple[_T, int, tuple[tuple[int, str], ...]]:
        """What `read(scan, epoch, name)` gives of the first scan it can read, that scan, and what failed before."""
        epoch, place = key
        part, item = self._item(epoch, place)
        failed: list[tuple[int, str]] = []
        instead = stream(self.seed, epoch, _REPLACEMENT, place)
        for _ in range(1 + _REPLACEMENTS):
            for scan in self._order(item, epoch):
                if why := self._passed_over(scan):
                    failed.append((scan, why))
                    continue
                try:
                    return read(scan, epoch, self._name(item)), scan, tuple(failed)
                except (ScanError, OSError, ValueError) as error:
                    failed.append((scan, str(error)))
                    self._failed.note([(self.records[scan], str(error))])
            item = part.items[int(instead.integers(len(part.items)))]
        raise ScanError(f"{len(failed)} scans in a row cannot be read; the last: {failed[-1][1]}")

    def _passed_over(self, scan: int) -> str:
        """Why a scan is not read, as one that failed before; of a cache there is nothing to save."""
        if self.caches[self.records.number_of(scan)] is not None:
            return ""
        known = [self._failed] if self.quarantine is None else [self._failed, self.quarantine]
        return next((why for each in known if (why := each.why(self.records[scan]))), "")

    def _item(self, epoch: int, place: int) -> tuple[_Part, int]:
        """Which item stands at a place of an epoch, and the part of its source."""
        for part in self._parts:
            if place < part.taken:
                return part, part.item(epoch, place)
            place -= part.taken
        raise IndexError("no such item")

    def _name(self, item: int) -> int:
        """A number for the patient that does not depend on the rest of the list."""
        scan = self.items[item][0]
        return zlib.crc32((self.records[scan].patient_id or self.records.key_of(scan)).encode())

    def _views(self, scan: int, epoch: int, name: int) -> Tensor:
        views = new_memory((self.views, len(self.spec.channels), *self.shape), torch.device("cpu"))
        for out, attempts in zip(views, self._attempts(scan, epoch, name), strict=True):
            for last, crop in attempts:
                try:
                    make_view(crop.image, crop.mask, crop.view, self.shape, out)
                    break
                except ValueError:  # nothing of the brain in the crop
                    if last:
                        raise
        return views

    def _crops(self, scan: int, epoch: int, name: int) -> tuple[Crop, ...]:
        """The first crop of each view that has brain in it, or else the last; `make_views` finds other faults."""
        return tuple(
            next(crop for last, crop in attempts if last or crop.mask.any())
            for attempts in self._attempts(scan, epoch, name)
        )

    def _attempts(self, scan: int, epoch: int, name: int) -> Iterator[Iterator[tuple[bool, Crop]]]:
        """For each view, the crops to try, and whether it is the last."""
        cache = self.caches[self.records.number_of(scan)]
        if cache is None:
            whole = read_whole(self.records[scan], self.spec, self._stage)
            image, mask = (torch.from_numpy(array) for array in whole)

        def read(view: View) -> tuple[Tensor, Tensor]:
            if cache is not None:
                return cache.read(self._cache_key(cache, scan), view.box, self._stage)
            return image[(..., *view.box)], mask[view.box]

        def attempts(draws: np.random.Generator) -> Iterator[tuple[bool, Crop]]:
            for attempt in range(_DRAWS):
                view = draw_view(draws, self.stored_shape, self.augmentation)
                yield attempt == _DRAWS - 1, Crop(*read(view), view)

        for number in range(self.views):
            yield attempts(stream(self.seed, epoch, _VIEW, name, number))

    def _cache_key(self, cache: ScanCache, scan: int) -> str:
        key = self.records.key_of(scan)
        if key not in cache:
            raise ScanError(cache.errors.get(key, f"{self.records[scan].name}: not in the cache {cache.folder}"))
        return key


def take_patients(
    records: Sequence[ScanRecord], fraction: float, seed: int, root: str | os.PathLike[str]
) -> list[ScanRecord]:
    """The scans of a fraction of the patients, one at the least: a smaller fraction is part of a larger.

    Who comes first is a function of the seed and of who it is, whatever else the list holds.
    """

    def place(patient: list[int]) -> str:
        record = records[patient[0]]
        return hashlib.sha256(f"{seed} {record.patient_id or key_of(record, root)}".encode()).hexdigest()

    patients = sorted(_by_patient(records), key=place)
    taken = patients[: max(1, round(fraction * len(patients)))]
    return [records[n] for n in sorted(n for patient in taken for n in patient)]


def count_patients(records: Sequence[ScanRecord]) -> int:
    """How many patients a list has; a scan without a patient_id, and in another source, is another patient."""
    return len(_by_patient(records))


def patients_by_source(records: Mixture) -> list[int]:
    """How many patients each source has."""
    return records.split({items[0] for items in _by_patient(records)})


def _by_patient(records: Sequence[ScanRecord]) -> list[list[int]]:
    patients: dict[tuple[int, str], list[int]] = {}
    for n, record in enumerate(records):
        source = records.number_of(n) if isinstance(records, Mixture) else 0
        patients.setdefault((source, record.patient_id or f"\0{n}"), []).append(n)
    return list(patients.values())


class EpochSampler(Sampler[tuple[int, int]]):
    """This process's items of an epoch, as (epoch, item); every process gets as many, in whole batches.

    The order is drawn for the joined batch: with W processes of batch B, or one of batch W·B, step n has the same
    items. What does not fill a joined batch is left out, and another part each epoch.

    Args:
        items: How many there are.
        batch_size: Of one process.
        rank: Of this process.
        world: Processes of the group.
        seed: Of the order.
    """

    def __init__(self, items: int, batch_size: int, *, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        if items < batch_size * world:
            raise BrainfmError(
                f"{items} patients do not fill one batch of {batch_size} on {world} processes; make batch_size smaller"
            )
        self.items, self.batch_size, self.rank, self.world, self.seed = items, batch_size, rank, world, seed
        self.epoch, self.first_step = 0, 0

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.items // (self.batch_size * self.world)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = stream(self.seed, self.epoch, _ORDER).permutation(self.items)
        joined = order[: self.steps * self.batch_size * self.world].reshape(self.steps, self.world, self.batch_size)
        mine = joined[self.first_step :, self.rank].ravel()
        return ((self.epoch, int(item)) for item in mine)


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side.

    Attributes:
        views: [views, B, C, z, y, x] float32.
        scans: Which scans they show.
        failed: Scans that could not be read, and why.
        targets: [B] what is to be predicted, where something is.
    """

    views: Tensor
    scans: list[int]
    failed: dict[int, str] = field(default_factory=dict)
    targets: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same on a device."""
        targets = self.targets
        if targets is not None:
            targets = targets.to(device, dtype if targets.is_floating_point() else None, non_blocking=True)
        return replace(self, views=self.views.to(device, dtype, non_blocking=True), targets=targets)

    def pin_memory(self) -> Batch:
        """The same with page-locked views, for the loader."""
        targets = None if self.targets is None else self.targets.pin_memory()
        return replace(self, views=self.views.pin_memory(), targets=targets)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples → a batch, views first."""
    failed = {scan: reason for sample in samples for scan, reason in sample.failed}
    views = [sample.views for sample in samples]
    joined = new_memory((len(views[0]), len(views), *views[0].shape[1:]), views[0].device)
    return Batch(torch.stack(views, dim=1, out=joined), [sample.scan for sample in samples], failed)
