"""Encoders as others' leaderboards take them: a folder with a function, a container's definition, or a wrapper class.

What each asks for is from its own pages, read in November 2026: BrainFMBench (github.com/epics-lab/BrainFMBench,
CONTRIBUTING.md), FOMO26 (github.com/fomo26/container_templates, tasks 6 and 7, which take embeddings; its other tasks
take predictions) and Brainmarks-sMRI (github.com/MedARC-AI/brainmarks-smri, models/base.py). The folders need brainfm
where they run, which prepares each image as the weights' contract says, or refuses it.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainfm.errors import BrainfmError, LicenceError, ScanError
from brainfm.factory import create_model
from brainfm.files import write_text
from brainfm.hub.folder import save_for_hub
from brainfm.models.encoder import Encoder
from brainfm.names import resolve
from brainfm.pretrained import PretrainedCfg
from brainfm.readout import Reader
from brainfm.render import render
from brainfm.scan.load import load_scan
from brainfm.scan.prepared import PreparedScan, for_contract
from brainfm.scan.read import read_image
from brainfm.scan.spaces import space_of
from brainfm.transforms import create_transform
from brainfm.version import __version__

Leaderboard: TypeAlias = Literal["brainfmbench", "fomo26", "brainmarks"]
LEADERBOARDS: tuple[Leaderboard, ...] = get_args(Leaderboard)

MNI_OF_BRAINMARKS = "MNI152NLin6Asym"  # the template of `mni_affine` (brainmarks-smri, scripts/preprocess.py)
_Array: TypeAlias = NDArray[np.float64]


def export_extractor(
    model: str,
    leaderboard: Leaderboard,
    folder: str | os.PathLike[str],
    *,
    weights_url: str = "",
    requirement: str = "",
) -> Path:
    """Write the folder that a leaderboard takes.

    Args:
        model: A name of `create_model` with weights.
        leaderboard: "brainfmbench", "fomo26" or "brainmarks".
        folder: A new or empty folder.
        weights_url: Of BrainFMBench, which downloads weights: where the file can be had, where its card names no such
            place, as for a folder of your own, whose model.safetensors you host.
        requirement: How pip gets brainfm there; by default this version of it.

    Returns:
        The folder.

    Raises:
        BrainfmError: The folder is not empty, the model has no weights, or BrainFMBench could not download them.
        LicenceError: The weights may not be passed on, and the folder would hold them.
    """
    if leaderboard not in LEADERBOARDS:
        raise BrainfmError(f"no leaderboard is called {leaderboard!r}; there are {', '.join(LEADERBOARDS)}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BrainfmError(f"{folder}: not an empty folder; give a new one")
    found = resolve(model)
    if not (found.is_place or found.cfg.has_weights or found.cfg.is_drawn):
        raise BrainfmError(f"{model} has no weights, and a leaderboard ranks frozen ones; pretrain it first")
    about = {
        "title": found.cfg.title or found.cfg.name,
        "name": found.cfg.name,
        "version": __version__,
        "width": found.cfg.num_features,
        "slug": re.sub(r"\W+", "_", found.cfg.architecture),
    }
    requirement = requirement or f"brainfm=={__version__}"
    if leaderboard == "brainfmbench":
        _write_brainfmbench(model, found.cfg, folder, about, weights_url, requirement)
    else:
        if not found.cfg.redistribute:
            raise LicenceError(
                f"{model}: its licence ({found.cfg.licence}) lets nobody pass its weights on, and the folder would "
                "hold them"
            )
        encoder = create_model(model, pretrained=True)
        {"fomo26": _write_fomo26, "brainmarks": _write_brainmarks}[leaderboard](encoder, folder, about, requirement)
    return folder


# --- BrainFMBench ---------------------------------------------------------------------------------


def _write_brainfmbench(
    model: str, cfg: PretrainedCfg, folder: Path, about: dict[str, Any], weights_url: str, requirement: str
) -> None:
    spec = cfg.input_spec
    if spec is None or len(spec.channels) > 1:
        raise BrainfmError(f"{model}: BrainFMBench gives one T1w image a subject, and its contract takes others")
    is_folder = resolve(model).is_place
    own = not is_folder and (cfg.is_drawn or (cfg.file is not None and not cfg.hub_id and not cfg.url))
    url = weights_url or ("" if is_folder else _download(cfg))
    if not own and not url:
        raise BrainfmError(
            f"{model}: BrainFMBench downloads the weights, and nothing says where from; host the file and give its "
            "direct address by --weights-url"
        )
    import yaml

    said: dict[str, Any] = {
        "name": cfg.name,
        "authors": [_authors(cfg)],
        "description": f"{about['title']}, frozen, by brainfm {__version__}",
        "preprocessing": "turboprep",
        "embedding_dim": cfg.num_features,
        "architecture": cfg.architecture,
        "datasets": ["NKI", "HBN"],
        "tasks": ["sex", "age", "bmi"],
    }
    if own:
        said["weightless"] = True
    if cfg.paper:
        said["citation"] = cfg.paper
    lines = ["# In the package: no download.", ""] if own else [url, ""]
    source = "package" if own else "folder" if is_folder else "checkpoint"
    write_text(folder / "model.yaml", yaml.safe_dump(said, sort_keys=False, allow_unicode=True))
    write_text(folder / "weights.txt", "\n".join(lines))
    write_text(folder / "requirements.txt", f"{requirement}\n")
    write_text(folder / "extract.py", render("extractors/brainfmbench_extract.py.txt", **about, source=source))
    if is_folder:
        shutil.copy(Path(str(cfg.file)).with_name("config.json"), folder)


def _download(cfg: PretrainedCfg) -> str:
    """The direct address of a card's weights, or nothing."""
    if cfg.hub_id and not cfg.gated:
        return f"https://huggingface.co/{cfg.hub_id}/resolve/{cfg.hub_revision or 'main'}/{cfg.hub_filename}"
    return "" if cfg.gated else cfg.url or ""


def _authors(cfg: PretrainedCfg) -> str:
    found = re.search(r"author\s*=\s*[{\"](.+?)[}\"],?\s*\n", cfg.citation or "", re.DOTALL)
    return " ".join(found[1].split()) if found else "to be filled in"


# --- FOMO26 and Brainmarks ------------------------------------------------------------------------


def _write_fomo26(encoder: Encoder, folder: Path, about: dict[str, Any], requirement: str) -> None:
    save_for_hub(encoder, folder / "model")
    write_text(folder / "predict.py", render("extractors/fomo26_predict.py.txt", **about))
    write_text(folder / "Apptainer.def", render("extractors/fomo26_apptainer.def.txt", **about))
    write_text(folder / "requirements.txt", f"{requirement}\n")


def _write_brainmarks(encoder: Encoder, folder: Path, about: dict[str, Any], requirement: str) -> None:
    info = encoder.feature_info[-1]
    if info["num_chs"] != encoder.num_features:
        raise BrainfmError(
            f"{about['name']}: its dense features have {info['num_chs']} channels and its embedding "
            f"{encoder.num_features}; Brainmarks takes one width for both"
        )
    MniImages(encoder)  # which refuses contracts that its images cannot meet
    slug = about["slug"]
    save_for_hub(encoder, folder / f"{slug}_weights")
    values = about | {
        "patch": tuple(int(step) for step in info["reduction"]),
        "classname": "".join(part.capitalize() for part in slug.split("_")),
    }
    write_text(folder / f"{slug}.py", render("extractors/brainmarks_model.py.txt", **values))
    write_text(folder / "requirements.txt", f"{requirement}\n")


@dataclass(frozen=True, eq=False)
class MniImage:
    """An image as an encoder takes it.

    Attributes:
        tensor: [C, D, H, W].
        mask: [D, H, W] booleans, the brain, or None.
        dense_affine: [4, 4] from voxels of a grid that is cut into blocks, one a cell of the dense features, to the
            image's world mm: a cell looks at the middle of its block.
    """

    tensor: Tensor
    mask: NDArray[np.bool_] | None
    dense_affine: _Array


class MniImages:
    """Raw T1w images with a brain mask and their affine to MNI152 → tensors and embeddings of an encoder.

    What `brainfm prep` does by its own registration is done by the matrix that is given: one interpolation to the
    contract's grid, by the whole matrix where the contract takes affine registration, and by its rigid part, which
    keeps the head's size, where it takes rigid. A contract whose scans have no bias field has N4 run first.

    Args:
        encoder: Of `create_model`, with an input contract for one T1w image.

    Raises:
        BrainfmError: The contract takes several channels, or lies in a space from MNI152 to which no way is known.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.transform = create_transform(encoder)
        self.encoder = encoder
        spec = self.transform.spec
        if len(spec.channels) > 1:
            raise BrainfmError("the contract takes several channels, and here is one image a scan")
        if spec.space is not None and not spec.in_mni152:
            raise BrainfmError(f"the contract lies in the space {spec.space!r}, to which no way is known from MNI152")

    def __call__(self, image: Any, brain_mask: Any, mni_affine: Any) -> MniImage:
        """One image, a nibabel image [i, j, k].

        Args:
            image: As the scanner gave it.
            brain_mask: On its voxels; None where the contract needs none.
            mni_affine: [4, 4] from its world to MNI152NLin6Asym, RAS mm; None where the contract has no space.

        Raises:
            ScanError: A mask or a matrix is needed and is not there, or the image is not what the contract takes.
        """
        spec, way = self.transform.spec, np.eye(4)
        if spec.space is None:
            volume = self.transform.volume(image, brain_mask)
        else:
            if brain_mask is None or mni_affine is None:
                raise ScanError("this contract lies in MNI152: the image needs a brain mask and its affine to there")
            scan = _prepared(image, brain_mask, np.asarray(mni_affine, dtype=np.float64), spec.bias_field == "removed")
            way = scan.from_space(spec)
            on_grid, _ = for_contract(scan, replace(spec, bias_field="any"), spec.representation, scan)
            mask = None if spec.mask == "none" else (on_grid.mask, on_grid.affine)
            loaded = load_scan((on_grid.image[0], on_grid.affine), mask, spec=spec)
            volume = self.transform.apply(loaded)
        info = self.encoder.feature_info[-1]
        shift = np.eye(4)
        shift[:3, 3] = np.asarray(info["offset"]) - (np.asarray(info["reduction"]) - 1) / 2
        return MniImage(torch.from_numpy(volume.image.copy()), volume.mask, way @ volume.affine @ shift)

    def embedded(self, image: MniImage, *, dense: bool = False) -> tuple[Tensor, Tensor | None]:
        """The embedding [D], and the dense features [x, y, z, D] where they are asked for, on the encoder's device."""
        device = next(self.encoder.parameters()).device
        found = Reader(self.encoder, dense=dense)(image.tensor[None].to(device), [image.mask])
        maps = None if not dense or found.maps is None else found.maps[0].permute(1, 2, 3, 0)
        return found.vectors[0], maps


def _prepared(image: Any, brain_mask: Any, mni_affine: _Array, without_bias: bool) -> PreparedScan:
    """What `brainfm prep` would have left of an image, with a matrix that somebody else found."""
    head, brain = read_image(image), read_image(brain_mask, "mask")
    if brain.array.shape != head.array.shape:
        raise ScanError(f"the mask has {brain.array.shape} voxels and the image {head.array.shape}")
    if without_bias:
        head = replace(
            head, array=_without_bias(head.array * head.slope + head.inter, head.affine), slope=1.0, inter=0.0
        )
    to_2009c = space_of(MNI_OF_BRAINMARKS).to_2009c @ mni_affine
    record = {
        "contrast": "T1w",
        "affine": to_2009c.tolist(),
        "rigid": rigid_part(to_2009c, head, brain.array > 0).tolist(),
    }
    return PreparedScan(Path(head.source or "image"), record, head, brain.array > 0)


def rigid_part(matrix: _Array, head: Any, brain: NDArray[np.bool_]) -> _Array:
    """[4, 4] the rotation nearest to an affine matrix (by its polar decomposition), about the brain's centre."""
    u, _, v = np.linalg.svd(matrix[:3, :3])
    rigid = np.eye(4)
    rigid[:3, :3] = u @ v
    centre = head.affine[:3, :3] @ np.argwhere(brain).mean(axis=0) + head.affine[:3, 3]
    rigid[:3, 3] = matrix[:3, :3] @ centre + matrix[:3, 3] - rigid[:3, :3] @ centre
    return rigid


def _without_bias(array: NDArray[Any], affine: _Array) -> NDArray[np.float32]:
    """[i, j, k] by N4, as `brainfm prep` has it."""
    from brainfm.prep.bias import n4
    from brainfm.prep.image import sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.astype(np.float32).T))
    image.SetSpacing([float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0)])
    corrected: NDArray[np.float32] = sitk.GetArrayFromImage(n4(image)[0]).T
    return corrected
