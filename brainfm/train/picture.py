"""What an MAE fills in, as a picture: original, masked and reconstructed, the middle slice of each plane."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainfm.errors import BrainfmError
from brainfm.files import atomic_path, one_line
from brainfm.train.data import PretrainingData
from brainfm.train.mae import MAEMethod, MaskedAutoencoder, patchify, unpatchify

logger = logging.getLogger("brainfm")

_SHOWN = 2  # patients
_SIDE = 192  # pixels that a volume's longest side takes, at the least
_GAP = 4


class Reconstructions:
    """Writes `reconstructions/epochNNNN.png` in a run's folder, every so many epochs: of the same views and patches.

    They are the views of the first patients in epoch 0, with patches hidden by the recipe's seed. Nothing is drawn from
    the generators of the training, so that a run with pictures ends in the weights of one without. A picture that
    cannot be made costs a warning.

    Args:
        method: What is trained.
        data: On what.
        folder: The run's.
    """

    def __init__(self, method: MAEMethod, data: PretrainingData, folder: Path) -> None:
        self.method, self.data, self.folder = method, data, folder / "reconstructions"
        self._views: Tensor | None = None

    def __call__(self, epoch: int) -> None:
        """After an epoch, counted from 1."""
        if epoch % self.method.recipe.picture_every:
            return
        try:
            self._draw(self.folder / f"epoch{epoch:04d}.png")
        except (BrainfmError, OSError, ValueError) as error:
            logger.warning("going on without a picture of reconstructions: %s", one_line(error))

    def _draw(self, path: Path) -> None:
        network, weight = self.method.network, next(self.method.network.parameters())
        assert isinstance(network, MaskedAutoencoder)
        if self._views is None:
            samples = [self.data[(0, item)] for item in range(min(_SHOWN, len(self.data)))]
            self._views = self.data.batch(self.data.collate(samples), weight.device).views[0]
        network.eval()
        try:
            panels = self._panels(network, self._views.to(weight.device, weight.dtype))
        finally:
            network.train()
        write_picture(panels, path)

    @torch.no_grad()
    def _panels(self, network: MaskedAutoencoder, volumes: Tensor) -> NDArray[np.float32]:
        recipe, patch_size = self.method.recipe, network.patch_embed.patch_size
        generator = torch.Generator().manual_seed(recipe.seed)
        noise = torch.rand(len(volumes), network.pos_embed.shape[1] - 1, generator=generator).to(volumes.device)
        with self.method._autocast(volumes):
            _, prediction, mask = network(volumes, recipe.mask_ratio, noise)
        return reconstruction(volumes, prediction, mask, patch_size, network.norm_pix_loss).cpu().numpy()


def reconstruction(
    volumes: Tensor, prediction: Tensor, mask: Tensor, patch_size: tuple[int, int, int], norm_pix_loss: bool
) -> Tensor:
    """The first channel of volumes [B, C, z, y, x] as they are, masked, and filled in: [B, 3, z, y, x] float32.

    Hidden patches are as dark as the darkest voxel where masked; where filled in they are the prediction, which with
    `norm_pix_loss` takes mean and standard deviation from the patch itself. Visible ones stay as they are.
    """
    patches, hidden = patchify(volumes, patch_size).float(), mask[:, :, None].bool()
    guess = prediction.float()
    if norm_pix_loss:
        guess = guess * (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt() + patches.mean(dim=-1, keepdim=True)
    z, y, x = (size // patch for size, patch in zip(volumes.shape[2:], patch_size, strict=True))
    shown = (patches, torch.where(hidden, patches.amin(), patches), torch.where(hidden, guess, patches))
    return torch.stack([unpatchify(part, patch_size, (z, y, x))[:, 0] for part in shown], dim=1)


def write_picture(panels: NDArray[np.float32], path: Path) -> None:
    """[B, 3, z, y, x] as a PNG: three rows a scan, axial, coronal and sagittal; columns original, masked, filled in.

    Front and top are up. Grey values are the original's, from its darkest voxel to its 99.5th percentile.
    """
    from PIL import Image

    rows = []
    for scan in panels:
        low, high = float(scan[0].min()), float(np.percentile(scan[0], 99.5))
        grey = (np.clip((scan - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
        for axis in range(3):
            slices = np.take(grey, grey.shape[1 + axis] // 2, axis=1 + axis)[:, ::-1]
            rows.append(np.concatenate([np.pad(one, _GAP) for one in slices], axis=1))
    width = max(row.shape[1] for row in rows)
    picture = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows])
    scale = -(-_SIDE // max(panels.shape[2:]))
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", optimize=True)
