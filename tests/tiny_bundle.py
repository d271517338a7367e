"""A latent diffusion bundle that has every part of the published one, tiny and untrained."""

from __future__ import annotations

import json

import torch
from monai.networks.nets import AutoencoderKL

from brainfm.diffusion import DiffusionUNet
from brainfm.synthesis import PUBLISHED

TINY_AUTOENCODER = dict(PUBLISHED.autoencoder) | {
    "channels": [8, 8, 8],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "attention_levels": [False, False, False],
}
TINY_DIFFUSION = dict(PUBLISHED.diffusion) | {
    "channels": [8, 16],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "attention_levels": [False, True],
    "num_head_channels": [0, 16],
}
CONFIG = {
    "imports": ["$import torch"],
    "conditioning": "$torch.tensor([[@gender, @age, @ventricular_vol, @brain_vol]]).to(@device).unsqueeze(1)",
    "autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL", **TINY_AUTOENCODER},
    "diffusion_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", **TINY_DIFFUSION},
    "scheduler": {
        "_target_": "monai.networks.schedulers.DDIMScheduler",
        "_requires_": ["@load_diffusion", "@load_autoencoder"],
        "beta_start": 0.0015,
        "beta_end": 0.0205,
        "num_train_timesteps": 1000,
        "schedule": "scaled_linear_beta",
        "clip_sample": False,
    },
    "noise": "$torch.randn((1, 3, 6, 8, 6)).to(@device)",
    "set_timesteps": "$@scheduler.set_timesteps(num_inference_steps=5)",
}


def write_bundle(folder, config=CONFIG, seed=0, monai_names=False):
    """Untrained networks by the names of the published files, or those that MONAI itself gives them."""
    torch.manual_seed(seed)
    autoencoder, diffusion = (
        AutoencoderKL(**TINY_AUTOENCODER).state_dict(),
        DiffusionUNet(**TINY_DIFFUSION).state_dict(),
    )
    autoencoder = {key: value + 0.05 if "decoder" in key else value for key, value in autoencoder.items()}
    if monai_names:
        diffusion = {key.replace(".to_out.0.", ".out_proj."): value for key, value in diffusion.items()}
    else:
        autoencoder = {key.replace("postconv", "conv"): value for key, value in autoencoder.items()}
    for place in ("models", "configs"):
        (folder / place).mkdir(parents=True)
    torch.save(autoencoder, folder / "models" / "autoencoder.pt")
    torch.save(diffusion, folder / "models" / "model.pt")
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    return folder
