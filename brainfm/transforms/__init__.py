"""Scan → tensor, as an input contract says. `InputTransformd`, beside it, does the same inside a MONAI `Compose`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from brainfm.contract import InputSpec, Volume, describe
from brainfm.contract.volume import with_image
from brainfm.errors import ModelNameError, ScanError
from brainfm.names import resolve
from brainfm.pretrained import PretrainedCfg
from brainfm.scan import ImageLike, Scan, ScanLike, load_scan

if TYPE_CHECKING:
    from brainfm.transforms.dictionary import InputTransformd

__all__ = ["InputTransform", "InputTransformd", "create_transform"]


class InputTransform:
    """Scan → the tensor that a contract's weights expect.

    Args:
        spec: The input contract.
        on_mismatch: What to do with a template-space scan on another grid; see `brainfm.load_scan`.
        augment: Called with the finished tensor, [C, D, H, W] to the same.

    Raises:
        TypeError: `spec` is no input contract, or `augment` cannot be called.
        ValueError: `on_mismatch` is neither of the two.
    """

    def __init__(
        self,
        spec: InputSpec,
        on_mismatch: Literal["resample", "raise"] = "resample",
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.spec = checked_spec(spec)
        if on_mismatch not in ("resample", "raise"):
            raise ValueError(f'on_mismatch must be "resample" or "raise", not {on_mismatch!r}')
        if augment is not None and not callable(augment):
            raise TypeError(f"augment must be called with a tensor, and a {type(augment).__name__} cannot be called")
        self.on_mismatch: Literal["resample", "raise"] = on_mismatch
        self.augment = augment

    def __call__(self, image: ScanLike, mask: ImageLike | None = None) -> Tensor:
        """A scan as [C, D, H, W] float32; add the batch axis with `[None]`.

        Args:
            image: A file, a nibabel image, a pair (array, affine), or {channel: any of these}; see `brainfm.load_scan`.
            mask: Its brain mask; without one, the non-zero voxels of a skull-stripped image.

        Raises:
            ScanError: The scan cannot give the tensor of the contract; the message says why and what to do.
        """
        return self.tensor(self.volume(image, mask))

    def volume(self, image: ScanLike, mask: ImageLike | None = None) -> Volume:
        """The same with its brain mask and its affine. Raises ScanError as the call does."""
        scan = load_scan(image, mask, spec=self.spec, on_mismatch=self.on_mismatch)
        volume = self.apply(scan)
        if np.may_share_memory(volume.stored, scan.stored):
            # A contract without arithmetic must not hand out the caller's own memory, or a read-only file's.
            volume = with_image(volume, volume.image.copy())
        return volume

    def tensor(self, volume: Volume) -> Tensor:
        """What `volume` gives as the tensor [C, D, H, W], augmented where this transform augments."""
        tensor = torch.from_numpy(volume.image)
        return tensor if self.augment is None else self.augment(tensor)

    def apply(self, scan: Scan) -> Volume:
        """The contract's operations on a scan of `load_scan`. Raises ScanError, with the scan's name."""
        try:
            volume = self.steps(scan)
        except ScanError as error:
            raise ScanError(f"{scan.source}: {error}") from error
        promised = self.spec.output_shape
        if promised is not None and volume.stored.shape != promised:
            raise ScanError(
                f"{scan.source}: the contract's operations gave {volume.stored.shape}, and it promises {promised}: "
                "mend the contract"
            )
        return volume

    def steps(self, scan: Scan) -> Volume:
        """The contract's operations alone; `apply` checks what they give."""
        return self.spec.apply(scan)

    def __repr__(self) -> str:
        return "InputTransform\n  " + describe(self.spec).replace("\n", "\n  ")


def checked_spec(spec: InputSpec) -> InputSpec:
    """The contract itself. Raises TypeError where it is none, such as a model's name."""
    if not isinstance(spec, InputSpec):
        raise TypeError(
            f"spec must be a brainfm.InputSpec, not {spec!r:.60}; that of a model is "
            "brainfm.get_pretrained_cfg(name).input_spec"
        )
    return spec


def check_channels(model_or_cfg: Any, spec: InputSpec) -> None:
    """Raise ModelNameError (a ValueError) where a model takes another number of channels than its contract gives.

    A module that does not say what it takes passes.
    """
    given = spec.tensor_channels
    wanted = getattr(model_or_cfg, "in_chans", given)
    if wanted != given:
        names = ", ".join(spec.channels) if given == len(spec.channels) else given
        raise ModelNameError(
            f"the model takes {wanted} channels, and its input contract gives {names}; "
            f"create_model(…, in_chans={given}) fits the weights to it"
        )


def create_transform(
    model_or_name_or_cfg: nn.Module | str | PretrainedCfg | InputSpec, *, is_training: bool = False
) -> InputTransform:
    """The exact preprocessing of a weight, from its own input contract.

    Args:
        model_or_name_or_cfg: A model of `create_model`, its name, its `PretrainedCfg`, or an `InputSpec`.
        is_training: Add the random augmentation of the paper's supervised runs, before the contract's normalisation;
            see `brainfm.transforms.supervised.SupervisedTransform`.

    Returns:
        A callable (image, mask=None) → [C, D, H, W] float32.

    Raises:
        ModelNameError: The name is unknown (a ValueError).
        ValueError: There is no input contract.

    Example:
        >>> import brainfm
        >>> transform = brainfm.create_transform("test_resnet_3d")
        >>> transform("normalized.nii.gz", mask="mask.nii.gz").shape
        torch.Size([1, 40, 48, 48])
    """
    given: Any = model_or_name_or_cfg
    if isinstance(given, str):
        given = resolve(given).cfg
    elif isinstance(given, nn.Module):
        given = getattr(given, "pretrained_cfg", None)
    spec = given.input_spec if isinstance(given, PretrainedCfg) else given
    if not isinstance(spec, InputSpec):
        name = getattr(given, "name", "") or type(model_or_name_or_cfg).__name__
        raise ModelNameError(f"{name} has no input contract; give its PretrainedCfg an input_spec")
    if not is_training:
        return InputTransform(spec)
    from brainfm.transforms.supervised import SupervisedTransform

    return SupervisedTransform(spec)


def __getattr__(name: str) -> Any:
    if name == "InputTransformd":  # imports MONAI
        from brainfm.transforms.dictionary import InputTransformd

        return InputTransformd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
