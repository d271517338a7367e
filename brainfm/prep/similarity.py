"""How alike a scan's brain and the template are, as mutual information, and where they are most alike, in torch.

It is computed at points that are drawn once, with linear windows of brightness, so that its slope is exact and a dozen
or two of looks at each level are enough where descent by fixed steps takes a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from brainfm.prep.image import sitk, template
from brainfm.prep.registration import SEED

# From points about the template's centre to points of the scan, both LPS mm: [4, 4].
Position: TypeAlias = NDArray[np.float64]
Cost: TypeAlias = Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]


class Level(NamedTuple):
    """How closely scan and template are compared: voxels of about `mm`, at `points`, by steps of `least_step` mm."""

    mm: float
    points: int
    least_step: float


# From coarse to fine. Affine ends of people's heads lie within 0.15 mm of where steps of a hundredth of a voxel led,
# rigid ones within what these differ by from header to header; smaller steps look half as often again.
LEVELS = (
    Level(8.0, 4_000, 0.4),
    Level(4.0, 20_000, 0.2),
    Level(2.0, 60_000, 0.06),
    Level(1.0, 100_000, 0.02),
)
# A level is smoothed like voxels of its size, and the finest like these: without, people's brains ended up to 1 mm
# apart from different beginnings; on voxels of 2 mm instead, the mask's edge took a moved average head 0.9 mm away.
_LEAST_SMOOTH_MM = 1.5
BINS = 32  # of brightness, of both images
_NEAR_CELLS = 2  # points lie in the template's brain or as near to it
_CELL_MM = 4  # one point or a few fall in each cell of the template
_RADIUS_MM = 60.0  # of a brain: a turn in radians times this is millimetres
_SCALE = 100.0  # of what is minimised, so that its slope is about 1 per mm
_LEAST_SEEN = 0.4  # fraction of the points that has to lie in the scan's field of view
_LOOKS = 40  # steps at most, of a level
_MOST_MM = 10.0  # of a step
_LEAST_GAIN = 1e-4  # of what is minimised, that a further step has to promise
_BATCH = 64  # positions at once


class Similarity:
    """A scan's brain against the template, at each level.

    Args:
        brain: The scan, 0 outside the brain.
        device: Where it is computed; positions and results are the processor's.
    """

    def __init__(self, brain: sitk.Image, device: str = "cpu") -> None:
        images = [_shrunk(brain, level.mm) for level in LEVELS]
        inside = sitk.GetArrayViewFromImage(images[2])
        bright = float(np.percentile(inside[inside > 0], 99.5)) if (inside > 0).any() else 1.0
        self.centre = centre_of_mass(images[1])  # LPS mm
        self._device = device
        self._levels = [
            (_smooth(image, level.mm, device).mul_((BINS - 1) / bright), _to_grid(image))
            for image, level in zip(images, LEVELS, strict=True)
        ]

    def at(self, positions: NDArray[np.float64], level: int) -> NDArray[np.float64]:
        """The mutual information, nats [n], at positions [n, 4, 4]; 0 where the scan covers too little."""
        with torch.no_grad():
            parts = [self._information(torch.from_numpy(part), level) for part in _parts(positions)]
        return torch.cat(parts).numpy()

    def climbed(
        self, position: Position, level: int, *, affine: bool = False, voxels: float = math.inf
    ) -> tuple[Position, float]:
        """The position of the best similarity near one, by BFGS at one level, and its mutual information, nats.

        Rigid motions of the template's points are tried, or affine ones, in steps of so many `voxels` at most.
        """
        start = torch.from_numpy(position)
        motion = _affine if affine else _rigid

        def cost(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            parameters = torch.tensor(values, requires_grad=True)
            moved = motion(start, parameters)
            information, rise = self._rise(moved.detach(), level)
            (slope,) = torch.autograd.grad(moved, parameters, rise)
            return -_SCALE * information, -_SCALE * slope.numpy()

        mm, _, least_step = LEVELS[level]
        found, least = _lowest(cost, 12 if affine else 6, least_step, min(_MOST_MM, voxels * mm))
        return motion(start, torch.from_numpy(found)).numpy(), -least / _SCALE

    def _information(self, positions: Tensor, level: int) -> Tensor:
        """The mutual information [n] at positions [n, 4, 4]."""
        counts = self._counted(self._grid(positions, level), level)[0]
        return (_information_of(counts.double())[0] * self._enough(counts, level)).cpu()

    def _rise(self, position: Tensor, level: int) -> tuple[float, Tensor]:
        """The mutual information at a position [4, 4], and by how much it rises with each of the position's numbers.

        A point whose brightness rises moves from one bin to the next: the information rises by the difference of what
        one more point in each of the two gives. So only the interpolation is left to autograd.
        """
        grid = self._grid(position[None], level).requires_grad_()
        counts, values, cells, counted = self._counted(grid, level)
        information, by_count = _information_of(counts.double())
        if not self._enough(counts, level):
            return 0.0, torch.zeros_like(position)
        by_count = by_count.flatten().float()
        by_value = (by_count[cells + 1] - by_count[cells]) * counted
        (by_grid,) = torch.autograd.grad(values, grid, by_value.reshape(values.shape))
        points, to_grid = _points(level, self._device)[0], self._levels[level][1]
        by_position = to_grid[:3].T @ (by_grid[0].T @ points).double().cpu()
        return float(information), by_position

    def _grid(self, positions: Tensor, level: int) -> Tensor:
        """The points [n, points, 3] as grid_sample takes them, at positions [n, 4, 4]."""
        to_grid = self._levels[level][1]
        return _points(level, self._device)[0] @ (to_grid @ positions)[:, :3].transpose(1, 2).float().to(self._device)

    def _counted(self, grid: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How many points fall in each bin of both images [n, bins, bins], by linear windows.

        And of the points [n × points]: their brightness in bins, as autograd knows it; the lower of the two bins that
        each falls in; whether a change of its brightness is counted.
        """
        many = len(grid)
        sampled = F.grid_sample(
            self._levels[level][0].expand(many, -1, -1, -1, -1), grid[:, None, None], align_corners=True
        )
        with torch.no_grad():
            seen = (grid.abs() <= 1).all(-1)
            values = sampled.reshape(many, -1)
            counted = seen & (values >= 0) & (values <= BINS - 1)
            values = values.clamp(0, BINS - 1)
            low = values.floor().clamp_(max=BINS - 2)
            upper = (values - low).mul_(seen).flatten()
            cells = low.long().add_(_points(level, self._device)[1])
            cells += torch.arange(many, device=self._device)[:, None] * BINS**2
            cells = cells.flatten()
            counts = torch.zeros(many * BINS**2, device=self._device)
            counts.index_add_(0, cells, seen.flatten().float() - upper)
            counts.index_add_(0, cells + 1, upper)
        return counts.reshape(many, BINS, BINS), sampled, cells, counted.flatten()

    def _enough(self, counts: Tensor, level: int) -> Tensor:
        """Whether the scan covers enough of the points [n]."""
        return counts.sum((1, 2)) > _LEAST_SEEN * len(_points(level, self._device)[0])


def _information_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of points in bins [n, bins, bins]: mutual information [n], and by how much one more in each bin raises it."""
    whole = counts.sum((1, 2), keepdim=True).clamp(min=1)
    joint = counts / whole
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    gain = ((joint + 1e-12) / (apart + 1e-12)).log()
    information = (joint * gain).sum((1, 2), keepdim=True)
    return information[:, 0, 0], (gain - information) / whole


def _lowest(cost: Cost, size: int, least_step: float, most_step: float) -> tuple[NDArray[np.float64], float]:
    """The lowest place near 0 of a function that gives its value and slope, by BFGS with backtracking; and its value.

    Neither torch's, which imports torch's compiler, nor SciPy's: either would take longer to import than all of this.
    """
    place = np.zeros(size)
    value, slope = cost(place)
    curvature = np.eye(size) / max(
        1.0, float(np.linalg.norm(slope))
    )  # the inverse of it; the first step is 1 mm at most
    for look in range(_LOOKS):
        step = -curvature @ slope
        step *= min(1.0, most_step / max(float(np.linalg.norm(step)), 1e-12))
        expected = float(slope @ step)
        if np.linalg.norm(step) < least_step or expected > -_LEAST_GAIN:
            break
        part = 1.0
        new_value, new_slope = cost(place + step)
        while new_value > value + 1e-4 * part * expected and part * np.linalg.norm(step) > least_step:
            part *= float(np.clip(-0.5 * expected * part / (new_value - value - expected * part), 0.1, 0.5))
            new_value, new_slope = cost(place + part * step)
        if new_value >= value:
            break
        moved, bent = part * step, new_slope - slope
        place, value, slope = place + moved, new_value, new_slope
        along = float(bent @ moved)
        if along > 1e-9:
            if look == 0:
                curvature = np.eye(size) * along / float(bent @ bent)
            left = np.eye(size) - np.outer(moved, bent) / along
            curvature = left @ curvature @ left.T + np.outer(moved, moved) / along
    return place, value


def _rigid(start: Tensor, parameters: Tensor) -> Tensor:
    """The template turned about its centre, and the whole shifted; parameters in mm."""
    zero = torch.zeros((), dtype=parameters.dtype)
    x, y, z = parameters[:3] / _RADIUS_MM
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
    angle = (x * x + y * y + z * z + 1e-30).sqrt()  # its slope at 0 is 0, not a division by it
    sine, half = torch.sinc(angle / math.pi), torch.sinc(angle / (2 * math.pi))
    turn = torch.eye(3, dtype=parameters.dtype) + sine * cross + half**2 / 2 * cross @ cross  # Rodrigues' formula
    return _moved(start, turn, parameters[3:])


def _affine(start: Tensor, parameters: Tensor) -> Tensor:
    """The template turned, stretched and sheared about its centre, and the whole shifted; parameters in mm."""
    change = torch.eye(3, dtype=parameters.dtype) + parameters[:9].reshape(3, 3) / _RADIUS_MM
    return _moved(start, change, parameters[9:])


def _moved(start: Tensor, change: Tensor, shift: Tensor) -> Tensor:
    top = torch.cat([start[:3, :3] @ change, (start[:3, 3] + shift)[:, None]], dim=1)
    return torch.cat([top, start[3:]])


@cache
def centre() -> NDArray[np.float64]:
    """The template's centre of mass, LPS mm."""
    return centre_of_mass(_shrunk(template(), _CELL_MM))


def spread() -> NDArray[np.float64]:
    """Second moments of the points in and near the template's brain about its centre, mm² [3, 3]."""
    points = _points(0)[0][:, :3].double().numpy()
    moments: NDArray[np.float64] = points.T @ points / len(points)
    return moments


def centre_of_mass(image: sitk.Image) -> NDArray[np.float64]:
    """Of an image that is 0 outside the brain, LPS mm."""
    weights = np.maximum(sitk.GetArrayViewFromImage(image), 0).astype(np.float64)
    index = [
        float(weights.sum(tuple(other for other in range(3) if other != axis)) @ np.arange(size)) / weights.sum()
        for axis, size in enumerate(weights.shape)
    ]
    return np.array(image.TransformContinuousIndexToPhysicalPoint(index[::-1]))


@cache
def _points(level: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Points in and near the template's brain about its centre [n, 4], and BINS times the bin of each's brightness."""
    mm, wanted, _ = LEVELS[level]
    corners, to_points = _near()
    generator = torch.Generator().manual_seed(SEED + level)
    repeats, left = divmod(wanted, len(corners))
    cells = torch.arange(len(corners))
    cells = torch.cat([cells] * repeats + [cells[torch.randperm(len(cells), generator=generator)[:left]]])
    index = corners[cells] + torch.rand((wanted, 3), generator=generator, dtype=torch.float64) - 0.5
    index = index[cells.argsort(stable=True)]  # neighbours after one another: what is read is in the processor's cache
    points = to_points @ torch.cat([index, torch.ones(len(index), 1, dtype=torch.float64)], 1).T
    image = _shrunk(template(), mm)
    grid = (_to_grid(image) @ points)[:3].T.float()
    values = F.grid_sample(_smooth(image, mm), grid[None, None, None], align_corners=True).flatten()
    bins = (values / 256 * BINS).long().clamp(0, BINS - 1)
    points[:3] -= torch.from_numpy(centre())[:, None]
    return points.T.float().contiguous().to(device), (bins * BINS).to(device)


@cache
def _near() -> tuple[Tensor, Tensor]:
    """The cells in and near the template's brain [n, xyz], and their affine to LPS mm."""
    cells = _shrunk(template(), _CELL_MM)
    brain = _voxels(cells) > 0
    near = F.max_pool3d(brain.float(), 2 * _NEAR_CELLS + 1, stride=1, padding=_NEAR_CELLS)[0, 0]
    return near.nonzero().flip(1), _affine_of(cells)


def _shrunk(image: sitk.Image, mm: float) -> sitk.Image:
    """The image averaged to voxels of about this size."""
    factors = [max(1, round(mm / spacing)) for spacing in image.GetSpacing()]
    return sitk.BinShrink(image, factors) if max(factors) > 1 else image


def _smooth(image: sitk.Image, mm: float, device: str = "cpu") -> Tensor:
    """The voxels of a level, smoothed by about as much as they measure: the ruts of interpolation catch what climbs."""
    voxels = _voxels(image).to(device)
    for axis, spacing in enumerate(image.GetSpacing()):
        side = min(1 / 3, (max(mm, _LEAST_SMOOTH_MM) / spacing) ** 2 / 4)  # the same spread, mm, whatever the spacing
        voxels = _with_neighbours(voxels, 4 - axis, side)
    return voxels


def _with_neighbours(voxels: Tensor, axis: int, side: float) -> Tensor:
    """Each voxel with so much of both its neighbours along an axis; at an edge, of itself.

    By sums, where torch's convolution of one channel would hold the volume several times.
    """
    count = voxels.shape[axis]
    mixed = voxels * (1 - 2 * side)
    mixed.narrow(axis, 1, count - 1).add_(voxels.narrow(axis, 0, count - 1), alpha=side)
    mixed.narrow(axis, 0, count - 1).add_(voxels.narrow(axis, 1, count - 1), alpha=side)
    for edge in (0, count - 1):
        mixed.narrow(axis, edge, 1).add_(voxels.narrow(axis, edge, 1), alpha=side)
    return mixed


def _voxels(image: sitk.Image) -> Tensor:
    return torch.from_numpy(sitk.GetArrayFromImage(image)).float()[None, None]


def _affine_of(image: sitk.Image) -> Tensor:
    """From voxels to LPS mm [4, 4]."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return torch.from_numpy(affine)


def _to_grid(image: sitk.Image) -> Tensor:
    """From LPS mm to what grid_sample calls an image's voxels, −1…1 [4, 4]."""
    scale = torch.diag(torch.tensor([2 / max(1, size - 1) for size in image.GetSize()] + [1.0], dtype=torch.float64))
    scale[:3, 3] = -1
    to_voxels: Tensor = torch.linalg.inv(_affine_of(image))
    return scale @ to_voxels


def _parts(positions: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return [positions[start : start + _BATCH] for start in range(0, len(positions), _BATCH)]
