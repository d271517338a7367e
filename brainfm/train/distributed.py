"""The process group: who we are under torchrun, what all processes have in common, and BatchNorm over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # now: its functions hold for ever, as a default, the group there is by then
from torch import Tensor, nn

from brainfm.inference import resolve_device
from brainfm.models.resnet.checkpointed import count_batch
from brainfm.system import joined, own_cores


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together, as this one of them sees them.

    Attributes:
        rank: Of this process.
        world: How many there are; 1 without torchrun.
        device: What this one computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over the group, name by name."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        if dist.get_backend() == "nccl":
            total = total.to(self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    def gather(self, item: Any) -> list[Any]:
        """What each process has, on every one."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items


@contextmanager
def process_group(device: str = "auto") -> Iterator[ProcessGroup]:
    """Join the other processes that torchrun started, if any, and leave them again.

    Raises:
        BrainfmError: The device cannot be used here, or as `brainfm.system.joined`.
    """
    place = resolve_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    with own_cores(place), joined("nccl" if place.type == "cuda" else "gloo") as launch:
        yield ProcessGroup(launch.rank, launch.world, place)


def synchronise_batch_norm(network: nn.Module, place: torch.device) -> nn.Module:
    """Let every BatchNorm take its statistics over the process group; torch's own does that on GPUs only."""
    if place.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for module in network.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = _SyncBatchNormCPU  # the same parameters, buffers and names
    return network


class _SyncBatchNormCPU(nn.BatchNorm3d):
    """BatchNorm over the joined batch of the process group, in equal parts; gradients pass between the processes."""

    process_group = None  # the default one, as in nn.SyncBatchNorm

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        world = dist.get_world_size()
        axes = (0, 2, 3, 4)
        mean: Tensor = all_reduce(x.mean(dim=axes)) / world  # type: ignore[no-untyped-call]
        centred = x - mean[None, :, None, None, None]
        variance: Tensor = all_reduce(centred.square().mean(dim=axes)) / world  # type: ignore[no-untyped-call]
        count = x.numel() // x.shape[1] * world
        count_batch(self, mean, variance * count / (count - 1))
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale[None, :, None, None, None] + self.bias[None, :, None, None, None]
