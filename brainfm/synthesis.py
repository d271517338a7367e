"""Synthetic T1w MRI, drawn by the brain latent diffusion model of Pinaya et al. 2022 (arXiv 2209.07162). Not of people.

The model is the bundle `brain_image_synthesis_latent_diffusion_model` of MONAI's model zoo (Apache-2.0), trained on
31,740 participants of UK Biobank: a U-Net takes noise to a latent, told of age, sex, and the volumes of ventricles and
brain; the decoder of an autoencoder makes of that a whole head at 1 mm. Its files, on the Hugging Face Hub, are
`MONAI/brain_image_synthesis_latent_diffusion_model`, models/autoencoder.pt and models/model.pt; no sha256 of them is
published, so that those of the first fetch are kept, and held against.

By the bundle's configs/inference.json and script: latent of 3×20×28×20, drawn by 50 DDIM steps (eta 0, no clipping) at
t = 980, 960 … 0 of 1000 whose β goes from 0.0015 to 0.0205 linearly in its root; conditions in the order sex, age,
ventricles, brain, each from 0 to 1, given to the attention and as four more channels; the latent decoded as it is,
without a scale factor. The steps are those of MONAI 1.4, which the bundle names; MONAI 1.6 spaces them otherwise, and
is not asked. A config of other sizes is read as data, and an expression in it refused: nothing of a bundle is executed.

Ours: which box of MNI space the voxels are, which the bundle does not say (see the card of `brain_ldm_autoencoder`);
intensities cut to 0…1, which is what the model was trained on; 0 female and 1 male, as UK Biobank writes them. Which
age in years is 0 and which is 1 is not published, and so for the volumes. The published weights were never run here:
the U-Net is held to MONAI's by numbers, the whole path to its loop and scheduler by a tiny untrained bundle.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.contract import Grid, Triple
from brainfm.diffusion import DiffusionUNet
from brainfm.errors import BrainfmError, WeightsError, WeightsNotFoundError
from brainfm.files import atomic_path, file_sha256, held, one_line, progress_bar, write_csv, write_json, write_text
from brainfm.inference import resolve_device
from brainfm.registry import get_pretrained_cfg
from brainfm.system import expanded, tf32
from brainfm.weights.checkpoint import read_checkpoint
from brainfm.weights.fetch import default_cache_dir, find_weights, hub_file

HUB = "MONAI/brain_image_synthesis_latent_diffusion_model"
AUTOENCODER = "brain_ldm_autoencoder.pinaya2022"  # its card: licence, source, and the box of its voxels
CONDITIONS = ("sex", "age", "ventricles", "brain_volume")  # in the bundle's order
RECIPE = 1  # goes up whenever the same arguments would give other volumes

_LEVELS = 4096  # of the stored integers, as many as scanners have; a power of two, so that 1 comes back as 1
_README = """\
These are synthetic volumes, not people: T1w brain MRI drawn by a latent diffusion model (Pinaya et al. 2022,
arXiv 2209.07162). Nothing that is found in them holds of patients. age, sex, ventricles and brain_volume in
manifest.csv are what the model was told, from 0 to 1, and no measurements.
"""

Range = tuple[float, float]


@dataclass(frozen=True)
class Config:
    """What a bundle's networks are made of, and how they are asked.

    Attributes:
        autoencoder: Arguments of MONAI's AutoencoderKL.
        diffusion: Arguments of `DiffusionUNet`, which are those of MONAI's DiffusionModelUNet.
        latent: Channels and cells of the latent.
        steps: DDIM steps.
        train_steps: Of the diffusion.
        beta: First and last.
        schedule: How β goes between them: "scaled_linear_beta" or "linear_beta".
    """

    autoencoder: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    latent: tuple[int, ...] = (3, 20, 28, 20)
    steps: int = 50
    train_steps: int = 1000
    beta: Range = (0.0015, 0.0205)
    schedule: str = "scaled_linear_beta"

    @property
    def shape(self) -> Triple:
        """Voxels of the volumes."""
        x, y, z = (cells * 2 ** (len(self.autoencoder["channels"]) - 1) for cells in self.latent[1:])
        return x, y, z

    @property
    def moments(self) -> range:
        """When in the diffusion the U-Net is asked, last first."""
        stride = self.train_steps // self.steps
        return range(stride * (self.steps - 1), -1, -stride)


PUBLISHED = Config(
    autoencoder={
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 3,
        "channels": (64, 128, 128, 128),
        "num_res_blocks": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "attention_levels": (False, False, False, False),
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    },
    diffusion={
        "spatial_dims": 3,
        "in_channels": 7,
        "out_channels": 3,
        "channels": (256, 512, 768),
        "num_res_blocks": 2,
        "attention_levels": (False, True, True),
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "resblock_updown": True,
        "num_head_channels": (0, 512, 768),
        "with_conditioning": True,
        "transformer_num_layers": 1,
        "cross_attention_dim": 4,
        "upcast_attention": True,
        "use_flash_attention": False,
    },
)


# --- Volumes --------------------------------------------------------------------------------------


def synthesize(
    count: int,
    folder: str | PathLike[str],
    *,
    age: Range = (0.0, 1.0),
    sex: Range = (0.0, 1.0),
    ventricles: Range = (0.0, 1.0),
    brain_volume: Range = (0.0, 1.0),
    bundle: str | PathLike[str] | None = None,
    cache_dir: str | PathLike[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Path:
    """Draw volumes, and write them as NIfTI with a manifest. Not scans of people.

    Volume n is a function of its own seed, which the manifest has, of the weights and of the ranges. A run that was
    interrupted goes on where it stopped, and a folder can be given more volumes later. On a GPU, or with another number
    of threads, the numbers differ by rounding.

    Args:
        count: How many.
        folder: Where to: a new or empty folder, or one of the same settings.
        age: What each volume's age is drawn from, evenly, on the model's own scale from 0 to 1; (0.5, 0.5) is 0.5.
        sex: 0, 1, or either: (0, 1).
        ventricles: Volume of their cerebrospinal fluid, as age.
        brain_volume: Normalised for the size of the head, as age.
        bundle: A bundle's folder, or one with autoencoder.pt and model.pt; None fetches the published ones.
        cache_dir: Where those are kept; None is the Hub's own cache.
        seed: Which volumes.
        device: "auto", "cpu" or "cuda".
        progress: Show a progress bar.

    Returns:
        The manifest: image_path relative to it, patient_id, age, sex, ventricles, brain_volume, source ("synthetic"),
        seed.

    Raises:
        BrainfmError: An argument is out of range, or the folder holds something else.
        WeightsError: The bundle is not one of this model, or damaged.
        WeightsNotFoundError: It is not there, or cannot be fetched.
    """
    ranges = {"sex": sex, "age": age, "ventricles": ventricles, "brain_volume": brain_volume}
    _check(count, seed, ranges)
    config, weights = find_bundle(bundle, cache_dir)
    folder = expanded(folder)
    settings = {"model": HUB, "recipe": RECIPE, "seed": seed, "steps": config.steps, "shape": list(config.shape)}
    settings |= {name: list(map(float, ends)) for name, ends in ranges.items()}
    settings |= {
        f"{name}_sha256": file_sha256(path) for name, path in zip(("autoencoder", "diffusion"), weights, strict=True)
    }
    _claim(folder, settings)
    with held(folder):
        drawn = [_drawn(number, seed, ranges) for number in range(count)]
        todo = [one for one in drawn if not (folder / one["image_path"]).is_file()]
        if todo:
            model = LatentDiffusion(config, *weights, resolve_device(device))
            for one in progress_bar(todo, total=len(todo), unit="volume", doing="drawing", shown=progress):
                volume = model.draw([one[name] for name in CONDITIONS], one["seed"])
                _write_nifti(volume, _affine(config.shape), folder / one["image_path"])
        write_csv(folder / "manifest.csv", [[*drawn[0]], *([*one.values()] for one in drawn)], line_end="\n")
    return folder / "manifest.csv"


def read_range(name: str, text: str | float) -> Range:
    """A condition as it is written: "0.5", or "0.2:0.8". Raises BrainfmError where it is no number from 0 to 1."""
    low, colon, high = str(text).partition(":")
    try:
        ends = float(low), float(high if colon else low)
    except ValueError:
        raise BrainfmError(f"{name} is {text!r}; write a number from 0 to 1, or two as LOW:HIGH") from None
    _check_range(name, ends)
    return ends


def _check(count: int, seed: int, ranges: Mapping[str, Range]) -> None:
    if count < 1 or seed < 0:
        raise BrainfmError(f"n must be at least 1 and seed at least 0, not {count} and {seed}")
    for name, ends in ranges.items():
        _check_range(name, ends)


def _check_range(name: str, ends: Range) -> None:
    low, high = ends
    said = " to ".join(dict.fromkeys((f"{low:g}", f"{high:g}")))
    if not 0 <= low <= high <= 1:
        raise BrainfmError(
            f"{name} is {said}, and must be from 0 to 1: the scale that the "
            "model was trained with, whose ends in years or millilitres are not published"
        )
    if name == "sex" and {low, high} - {0, 1}:
        raise BrainfmError(f"sex is {said}, and must be 0 (female) or 1 (male)")


def _drawn(number: int, seed: int, ranges: Mapping[str, Range]) -> dict[str, Any]:
    """The row of a volume: a function of its own seed."""
    own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    draw = np.random.default_rng(own)
    told = {name: round(low + (high - low) * draw.random(), 4) for name, (low, high) in ranges.items()}
    told["sex"] = round(told["sex"])
    name = f"synth{seed}-{number + 1:06d}"
    ordered = {key: told[key] for key in ("age", "sex", "ventricles", "brain_volume")}
    return {"image_path": f"{name}_T1w.nii.gz", "patient_id": name, **ordered, "source": "synthetic", "seed": own}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the folder's volumes are, or see that those in a folder in use are the same."""
    record = folder / "synthesis.json"
    if record.is_file():
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BrainfmError(f"{record}: damaged ({one_line(error)}); give another folder") from error
        changed = [
            f"{key} was {before.get(key)} and is {settings[key]}"
            for key in settings
            if before.get(key) != settings[key]
        ]
        if changed:
            raise BrainfmError(f"{folder}: holds other volumes ({'; '.join(changed)}); give another folder")
        return
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise BrainfmError(f"{folder}: not an empty folder; synthetic volumes are not mixed with other files")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)
    write_text(folder / "README.txt", _README)


def _affine(shape: Triple) -> NDArray[np.float64]:
    """[4, 4] to RAS mm: the box of the autoencoder's card, divided into these voxels."""
    grid = get_pretrained_cfg(AUTOENCODER).input_spec.grid  # type: ignore[union-attr]
    assert grid is not None
    sizes = [voxels * spacing for voxels, spacing in zip(grid.shape, grid.spacing, strict=True)]
    x, y, z = (size / voxels for size, voxels in zip(sizes, shape, strict=True))
    first = [o + (new - old) / 2 for o, new, old in zip(grid.origin, (x, y, z), grid.spacing, strict=True)]
    return Grid(shape, (x, y, z), (first[0], first[1], first[2])).affine("RAS")


def _write_nifti(volume: NDArray[np.float32], affine: NDArray[np.float64], path: Path) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(np.rint(volume * _LEVELS).astype(np.uint16), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, "mni")
    image.set_qform(affine, "mni")
    image.header.set_slope_inter(1 / _LEVELS, 0)
    image.header["descrip"] = b"synthetic, not of a person"
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


# --- The model ------------------------------------------------------------------------------------


class LatentDiffusion:
    """The two networks with their weights, on a device.

    Args:
        config: What they are made of.
        autoencoder: Its weight file.
        diffusion: The U-Net's.
        device: Where they compute.

    Raises:
        WeightsError: A file does not hold the network's weights, all of them and no others.
    """

    def __init__(self, config: Config, autoencoder: Path, diffusion: Path, device: torch.device) -> None:
        from monai.networks.nets import AutoencoderKL

        self.config, self.device = config, device
        try:
            decoder, unet = AutoencoderKL(**config.autoencoder), DiffusionUNet(**config.diffusion)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{diffusion.parent}: its config makes no network ({one_line(error)})") from error
        self.autoencoder = _loaded(decoder, autoencoder).to(device).eval()
        self.diffusion = _loaded(unet, diffusion).to(device).eval()
        first, last = config.beta
        if config.schedule == "scaled_linear_beta":
            betas = torch.linspace(first**0.5, last**0.5, config.train_steps) ** 2
        else:
            betas = torch.linspace(first, last, config.train_steps)
        self.alphas = torch.cumprod(1 - betas, 0)

    @torch.inference_mode()
    @tf32(False)
    def draw(self, conditions: list[float], seed: int) -> NDArray[np.float32]:
        """A volume [x, y, z] from 0 to 1. The noise is drawn on the processor, so that a GPU has the same.

        Raises:
            WeightsError: The volume is not finite.
        """
        latent = torch.randn(1, *self.config.latent, generator=torch.Generator().manual_seed(seed)).to(self.device)
        told = torch.tensor([conditions], dtype=torch.float32, device=self.device)
        channels = told[..., None, None, None].expand(-1, -1, *latent.shape[2:])
        for step in self.config.moments:
            time = torch.tensor([step], device=self.device)
            noise = self.diffusion(torch.cat([latent, channels], 1), timesteps=time, context=told[:, None])
            latent = self.denoised(latent, noise, step)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):  # as the bundle's script does
            volume: Tensor = self.autoencoder.decode_stage_2_outputs(latent)[0, 0].float()  # type: ignore[operator]
        if not volume.isfinite().all():
            raise WeightsError(
                f"the volume of seed {seed} is not finite: these weights are damaged, or no trained ones"
            )
        drawn: NDArray[np.float32] = volume.clamp(0, 1).cpu().numpy()
        return drawn

    def denoised(self, latent: Tensor, noise: Tensor, step: int) -> Tensor:
        """A DDIM step with eta 0 (Song et al. 2021, arXiv 2010.02502, equation 12)."""
        before = step + self.config.moments.step
        here, there = float(self.alphas[step]), float(self.alphas[before]) if before >= 0 else 1.0
        clean = (latent - math.sqrt(1 - here) * noise) / math.sqrt(here)
        return math.sqrt(there) * clean + math.sqrt(1 - there) * noise


def _loaded(network: nn.Module, path: Path) -> nn.Module:
    """The network with a file's weights, by the names of MONAI's GenerativeModels or of MONAI itself."""
    state = {re.sub(r"(transformer_blocks.*)\.out_proj\.", r"\1.to_out.0.", key): value for key, value in _read(path)}
    for key in network.state_dict():
        if "postconv" in key and (before := key.replace("postconv", "conv")) in state:
            state[key] = state.pop(before)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: not the weights of this bundle's {type(network).__name__} ({one_line(error, 120)}); give the "
            "bundle whose configs/inference.json they belong to"
        ) from error
    return network


def _read(path: Path) -> list[tuple[str, Tensor]]:
    return list(read_checkpoint(path).state.items())


# --- The bundle -----------------------------------------------------------------------------------


def find_bundle(
    bundle: str | PathLike[str] | None = None, cache_dir: str | PathLike[str] | None = None
) -> tuple[Config, tuple[Path, Path]]:
    """A bundle's config, and the weight files of its autoencoder and its U-Net; fetched where no folder is named.

    Raises:
        WeightsNotFoundError: A file is not there.
        WeightsError: The config is of another model, or what is fetched is not what it was at first.
    """
    if bundle is None:
        try:
            fetched = (
                find_weights(get_pretrained_cfg(AUTOENCODER), cache_dir),
                hub_file(HUB, "models/model.pt", None, cache_dir),
            )
        except WeightsNotFoundError as error:
            reason, _, _ = str(error).partition("; ")  # what it advises is for encoders
            raise WeightsNotFoundError(
                f"{reason}; where there is a network, download models/autoencoder.pt and models/model.pt of {HUB} from "
                "the Hugging Face Hub, and give their folder as the bundle (--bundle FOLDER)"
            ) from error
        for path in fetched:
            _hold_to_first(path, (expanded(cache_dir) if cache_dir else default_cache_dir()) / "brain_ldm")
        return PUBLISHED, fetched
    folder = expanded(bundle)
    place = folder / "models" if (folder / "models").is_dir() else folder
    weights = place / "autoencoder.pt", place / "model.pt"
    if lacking := [path for path in weights if not path.is_file()]:
        raise WeightsNotFoundError(
            f"{lacking[0]}: not there; give the folder of the bundle {HUB.partition('/')[2]}, with "
            "models/autoencoder.pt and models/model.pt, or leave bundle out to have it fetched"
        )
    config = folder / "configs" / "inference.json"
    return read_config(config) if config.is_file() else PUBLISHED, weights


def read_config(path: Path) -> Config:
    """A bundle's configs/inference.json, as data. Raises WeightsError where it is of another model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schedule = _arguments(content["scheduler"], "DDIMScheduler")
        cells = re.search(r"randn\(\(1, *([\d, ]+)\)\)", content["noise"])
        steps = re.search(r"num_inference_steps *= *(\d+)", content["set_timesteps"])
        if cells is None or steps is None:
            raise ValueError("it does not say the shape of the noise, or the number of steps")
        config = Config(
            _arguments(content["autoencoder_def"], "AutoencoderKL"),
            _arguments(content["diffusion_def"], "DiffusionModelUNet"),
            tuple(map(int, cells[1].split(","))),
            int(steps[1]),
            int(schedule.pop("num_train_timesteps", 1000)),
            (float(schedule.pop("beta_start", 1e-4)), float(schedule.pop("beta_end", 2e-2))),
            schedule.pop("schedule", "linear_beta"),
        )
        _check_config(config, schedule)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise WeightsError(
            f"{path}: not the config of a bundle that draws brains by four conditions: {what}"
        ) from error
    return config


def _arguments(definition: dict[str, Any], target: str) -> dict[str, Any]:
    """The arguments of a class in a bundle's config; GenerativeModels called "num_channels" what are now "channels"."""
    if str(definition["_target_"]).rpartition(".")[2] != target:
        raise ValueError(f"{definition['_target_']} where {target} is expected")
    arguments = {key: value for key, value in definition.items() if not key.startswith("_")}
    for key, value in arguments.items():
        if isinstance(value, str) and value[:1] in ("$", "@"):
            raise ValueError(f"{key} is an expression, {value!r:.60}, and nothing of a bundle is executed")
    if "num_channels" in arguments:
        arguments["channels"] = arguments.pop("num_channels")
    return arguments


def _check_config(config: Config, rest: Mapping[str, Any]) -> None:
    latent, told = config.latent[0], len(CONDITIONS)
    wanted = {
        "in_channels": latent + told,
        "out_channels": latent,
        "cross_attention_dim": told,
        "with_conditioning": True,
    }
    for key, value in wanted.items():
        if config.diffusion.get(key) != value:
            raise ValueError(f"diffusion_def has {key} {config.diffusion.get(key)}, and {value} is expected")
    if len(config.latent) != 4 or config.autoencoder.get("latent_channels") != latent:
        raise ValueError(
            f"a latent of {config.latent}, and an autoencoder of {config.autoencoder.get('latent_channels')}"
        )
    usual = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "epsilon"}
    odd = {**{"clip_sample": True}, **rest}  # which MONAI's scheduler does unless told otherwise
    if config.schedule not in ("scaled_linear_beta", "linear_beta") or any(usual.get(key) != odd[key] for key in odd):
        raise ValueError(f"a scheduler with {config.schedule} and {dict(odd)}")
    if not 0 < config.steps <= config.train_steps:
        raise ValueError(f"{config.steps} steps of {config.train_steps}")


def _hold_to_first(path: Path, folder: Path) -> None:
    """Keep the sha256 of the first file that was fetched, or hold another to it. Raises WeightsError."""
    digest, pin = file_sha256(path), folder / f"{path.name}.sha256"
    seen = pin.read_text(encoding="utf-8").strip() if pin.is_file() else digest
    if seen != digest:
        raise WeightsError(
            f"{HUB}: the sha256 of {path.name} is {digest}, and was {seen} when it was first fetched: another file is "
            f"there now; if that is meant, delete {pin}"
        )
    if not pin.is_file():
        write_text(pin, f"{digest}\n")
