"""Brain extraction by deepbet's network (Fisch et al. 2024, MIT licence), whose weights come in its wheel.

The package deepbet is not imported: its two networks are TorchScript files, which the wheel drops in a top-level folder
`data` that other packages might overwrite. They are found by the wheel's own list of files and checked by their hashes,
which are those of the versions 1.0.1 and 1.0.2; only their weights are used (`linknet`). Its GUI toolkit is installed
with it and never loaded.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import BrainfmError, MissingExtraError, ScanError
from brainfm.files import file_sha256
from brainfm.prep.image import largest_part, like, sitk, to_array
from brainfm.system import tf32

if TYPE_CHECKING:
    from torch import Tensor

FILES = {
    "data/models/bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
    "data/models/model.pt": "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd",
}
_COARSE, _FINE = 128, 256  # voxels along each side of what the two networks see
_MARGIN = 0.1  # of the brain's box, added on every side
_CLIP = (0.005, 0.995)  # quantiles of the head
_MEAN, _STD = 0.449, 0.226  # of what the networks were trained on


def settings() -> dict[str, Any]:
    """What the networks are given, for the record."""
    return {"networks": {Path(name).name: sha256[:12] for name, sha256 in FILES.items()}, "voxels": [_COARSE, _FINE]}


def get_ready() -> None:
    """Read the networks. Raises BrainfmError where they are not installed, or are others."""
    _networks()


def brain_probability(head: sitk.Image, device: str = "cpu") -> sitk.Image:
    """The probability that each voxel is brain: first where the brain is in the head, then its outline.

    Args:
        head: Its axes nearly R, A, S.
        device: Torch's.

    Raises:
        ScanError: The first network finds no brain.
    """
    import torch  # not where only ITK works
    import torch.nn.functional as F

    from brainfm.prep import linknet

    coarse, fine = _networks(device)
    voxels = torch.from_numpy(np.ascontiguousarray(to_array(head), dtype=np.float32)).to(device)[None, None]
    with torch.inference_mode(), tf32(False):
        small = F.interpolate(voxels, (_COARSE,) * 3, mode="trilinear")
        low, high = map(float, np.quantile(small.cpu().numpy(), _CLIP))  # torch's sorts all of it
        if high <= low:
            raise ScanError("no brain was found: nearly every voxel has the same value")
        found = linknet.brain_probability(coarse, _normalised(small, low, high))[0, 0] > 0.5
        box = _box(found.cpu().numpy(), head)
        crop = voxels[(slice(None), slice(None), *box)]
        seen = F.interpolate(crop, (_FINE,) * 3, mode="trilinear")
        outline = linknet.brain_probability(fine, _normalised(seen, low, high))
        inside = F.interpolate(outline, crop.shape[2:], mode="trilinear")[0, 0].cpu().numpy()
    probability = np.zeros(voxels.shape[2:], dtype=np.float32)
    probability[box] = inside
    return like(probability, head)


def _box(found: NDArray[np.bool_], head: sitk.Image) -> tuple[slice, ...]:
    """The box of the largest part of what was found on the coarse grid, with a margin, in the head's voxels."""
    part = to_array(largest_part(sitk.GetImageFromArray(found.astype(np.uint8).transpose(2, 1, 0)))) > 0
    box = []
    for axis, size in enumerate(head.GetSize()):
        filled = part.mean(axis=tuple(other for other in range(3) if other != axis))
        hits = np.flatnonzero(filled > 0.02)
        if len(hits) == 0:
            raise ScanError("no brain was found in the image; is it a T1w scan of a head?")
        scale = size / _COARSE
        margin = _MARGIN * (hits[-1] + 1 - hits[0]) * scale
        start, stop = hits[0] * scale - margin, (hits[-1] + 1) * scale + margin
        box.append(slice(max(0, round(start)), min(size, round(stop))))
    return tuple(box)


def _normalised(image: Tensor, low: float, high: float) -> Tensor:
    """The image as the networks were trained on it, in its own memory."""
    clipped = image.sub_(low).div_(high - low).clamp_(0, 1)
    mean, std = clipped.mean(), clipped.std()
    return clipped.sub_(mean).div_(std).mul_(_STD).add_(_MEAN)


@cache
def _networks(device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the network that finds the brain, and of that which draws its outline."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have another format than TorchScript
        scripts: list[Any] = [torch.jit.load(str(path), map_location=device) for path in _files()]  # type: ignore[no-untyped-call]
    coarse, fine = ({name: weight.detach() for name, weight in script.state_dict().items()} for script in scripts)
    return coarse, fine


def _files() -> list[Path]:
    try:
        wheel = distribution("deepbet")
    except PackageNotFoundError as error:
        raise MissingExtraError("deepbet", "prep") from error
    paths = []
    for name, sha256 in FILES.items():
        path = Path(str(wheel.locate_file(name)))
        if not path.exists() or file_sha256(path) != sha256:
            raise BrainfmError(
                f"{path}: not the weights of deepbet 1.0.2, or another package has overwritten them; "
                "run: pip install --force-reinstall --no-deps deepbet==1.0.2"
            )
        paths.append(path)
    return paths
