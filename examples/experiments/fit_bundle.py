"""Fit a tiny latent diffusion model to phantoms, as a bundle that `brainfm synthesize --bundle` takes.

python examples/experiments/fit_bundle.py FOLDER [--phantoms 200] [--autoencoder 600] [--diffusion 1200]
brainfm synthesize --n 200 --bundle FOLDER --out synthetic/

It draws volumes like blurred phantoms: no people, no published model, nothing to learn of brains from. It stands in for
the latent diffusion model of Pinaya et al. 2022, whose layout its files have, where that cannot be had. The latent is
small, so that volumes hang together after few steps: drawn in 3×8×12×8 numbers they fall apart after as many. It takes
some 12 minutes of one processor core, and draws whole blurred brains; of 200 drawn 189 were taken, and 11 lie askew.

What it is told, from 0 to 1: sex, age, how much of the brain is dark (for the ventricles), and how large the brain is.
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL
from scipy.ndimage import affine_transform

import brainfm
from brainfm.diffusion import DiffusionUNet
from brainfm.files import progress_bar, write_json
from brainfm.phantom import make_phantom
from brainfm.synthesis import AUTOENCODER, CONDITIONS, PUBLISHED

LATENT = (4, 5, 7, 5)  # of 40×56×40 voxels of 4 mm, the bundle's box: coarser ones the 4 mm contract refuses
AUTOENCODER_ARGS = dict(PUBLISHED.autoencoder) | {
    "latent_channels": LATENT[0],
    "channels": [4, 8, 16, 16],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "attention_levels": [False, False, False, False],
}
DIFFUSION_ARGS = dict(PUBLISHED.diffusion) | {
    "in_channels": LATENT[0] + len(CONDITIONS),
    "out_channels": LATENT[0],
    "channels": [32],
    "num_res_blocks": 1,
    "norm_num_groups": 8,
    "attention_levels": [True],
    "num_head_channels": [32],
}
STEPS, BETA = 1000, (0.0015, 0.0205)
OUTSIDE = -0.25  # what the decoder learns outside the brain: cut to 0, so that a brain has an edge
BRIGHTEST = 1.5  # of white matter, is 1
AGES = (20.0, 90.0)  # that are 0 and 1
DARK, SIZES = (0.0, 0.2), (18_000, 32_000)  # of a brain's voxels, and its voxels, that are 0 and 1


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the bundle to write")
    parser.add_argument("--phantoms", type=int, default=200, help="to learn from (default: 200)")
    parser.add_argument("--autoencoder", type=int, default=600, help="its steps (default: 600)")
    parser.add_argument("--diffusion", type=int, default=1200, help="its steps (default: 1200)")
    parser.add_argument("--seed", type=int, default=100, help="of the phantoms and of everything that is drawn")
    options = parser.parse_args(arguments)

    volumes, told = learned_from(options.phantoms, options.seed)
    torch.manual_seed(options.seed)
    autoencoder, latents = fit_autoencoder(volumes, options.autoencoder)
    diffusion = fit_diffusion(latents, told, options.diffusion)
    for place in ("models", "configs"):
        (options.folder / place).mkdir(parents=True, exist_ok=True)
    torch.save(autoencoder.state_dict(), options.folder / "models" / "autoencoder.pt")
    torch.save(diffusion.state_dict(), options.folder / "models" / "model.pt")
    write_json(options.folder / "configs" / "inference.json", config())
    print(
        f"{options.folder}: a bundle fitted to {options.phantoms} phantoms, of no people; brainfm synthesize --bundle"
    )


# --- What is learned from -------------------------------------------------------------------------


def learned_from(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, 1, 40, 56, 40] phantoms in the bundle's box, and [n, 4] what is told of each."""
    volumes, told = [], []
    for patient in progress_bar(range(count), total=count, unit="phantom", doing="phantoms", shown=True):
        phantom = make_phantom(patient, spacing=4.0, seed=seed)
        inside = phantom.mask > 0
        levels = phantom.image - phantom.image[~inside].mean()  # as scanners have it: nothing is 0
        white = np.percentile(levels[inside], 90)
        volume = np.where(inside, levels / white / BRIGHTEST, OUTSIDE).clip(OUTSIDE, 1)
        volumes.append(in_box(volume.astype(np.float32), phantom.affine))
        dark = (levels[inside] < 0.5 * white).mean()
        numbers = (phantom.labels.sex, *map(fraction, (phantom.labels.age, dark, inside.sum()), (AGES, DARK, SIZES)))
        told.append(numbers)
    return torch.stack(volumes)[:, None], torch.tensor(told, dtype=torch.float32)


def fraction(value: float, ends: tuple[float, float]) -> float:
    return float(np.clip((value - ends[0]) / (ends[1] - ends[0]), 0, 1))


def in_box(volume: np.ndarray, affine: np.ndarray) -> torch.Tensor:
    """A volume on the grid of the bundle's voxels, by trilinear interpolation."""
    grid = brainfm.get_pretrained_cfg(AUTOENCODER).input_spec.grid
    shape = [cells * 2 ** (len(AUTOENCODER_ARGS["channels"]) - 1) for cells in LATENT[1:]]
    size = [voxels * spacing / n for voxels, spacing, n in zip(grid.shape, grid.spacing, shape, strict=True)]
    first = [o + (new - old) / 2 for o, new, old in zip(grid.origin, size, grid.spacing, strict=True)]
    box = nib.affines.from_matvec(np.diag(size), first)
    there = np.linalg.inv(affine) @ box
    placed = affine_transform(volume, there[:3, :3], there[:3, 3], shape, order=1, mode="constant", cval=OUTSIDE)
    return torch.from_numpy(placed)


# --- What learns ----------------------------------------------------------------------------------


def fit_autoencoder(volumes: torch.Tensor, steps: int) -> tuple[AutoencoderKL, torch.Tensor]:
    """The autoencoder, and the latents of the volumes, of mean 0 and std 1 a channel, as it decodes them."""
    network = AutoencoderKL(**AUTOENCODER_ARGS)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in progress_bar(range(steps), total=steps, unit="step", doing="autoencoder", shown=True):
        batch = volumes[torch.randint(len(volumes), (1,))]
        mean, std = network.encode(batch)
        made = network.decode(mean + std * torch.randn_like(std))
        divergence = 0.5 * (mean**2 + std**2 - 2 * std.log() - 1).mean()
        loss = F.l1_loss(made, batch) + 1e-4 * divergence
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.inference_mode():
        latents = torch.cat([network.encode(one)[0] for one in volumes.split(8)])
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    # The bundle decodes latents as they are drawn, so that their scale goes into the first layer of the decoder.
    first = network.post_quant_conv.conv
    with torch.no_grad():
        first.bias += first.weight[:, :, 0, 0, 0] @ mean
        first.weight *= std[None, :, None, None, None]
    return network.eval(), (latents - mean[:, None, None, None]) / std[:, None, None, None]


def fit_diffusion(latents: torch.Tensor, told: torch.Tensor, steps: int) -> DiffusionUNet:
    """The U-Net that finds the noise in a latent, told of its volume."""
    network = DiffusionUNet(**DIFFUSION_ARGS)
    alphas = torch.cumprod(1 - torch.linspace(BETA[0] ** 0.5, BETA[1] ** 0.5, STEPS) ** 2, 0)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    for _ in progress_bar(range(steps), total=steps, unit="step", doing="diffusion", shown=True):
        chosen = torch.randint(len(latents), (8,))
        clean, known, moment = latents[chosen], told[chosen], torch.randint(STEPS, (len(chosen),))
        noise, kept = torch.randn_like(clean), alphas[moment][:, None, None, None, None]
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        channels = known[..., None, None, None].expand(-1, -1, *clean.shape[2:])
        found = network(torch.cat([noisy, channels], 1), timesteps=moment, context=known[:, None])
        loss = F.mse_loss(found, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        averaged.update_parameters(network)
    return averaged.module.eval()


def config() -> dict:
    """The bundle's configs/inference.json."""
    return {
        "autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL", **AUTOENCODER_ARGS},
        "diffusion_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", **DIFFUSION_ARGS},
        "scheduler": {
            "_target_": "monai.networks.schedulers.DDIMScheduler",
            "beta_start": BETA[0],
            "beta_end": BETA[1],
            "num_train_timesteps": STEPS,
            "schedule": "scaled_linear_beta",
            "clip_sample": False,
        },
        "noise": f"$torch.randn((1, {', '.join(map(str, LATENT))})).to(@device)",
        "set_timesteps": "$@scheduler.set_timesteps(num_inference_steps=20)",
    }


if __name__ == "__main__":
    main()
