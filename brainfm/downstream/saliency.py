"""Where a prediction comes from: occlusion and Grad-CAM maps, as NIfTI on the voxels of the scan that was given.

A map is made on the grid of the model's input and carries that grid's affine, so that going back to the scan is one
trilinear resampling between two affines: axes, flips and spacing are undone by it, and what the input contract cropped
away is 0. Nothing of the model is touched; both methods work on a copy.

MONAI has both methods, and the tests hold ours to its Grad-CAM. They are written here, short, because MONAI's `GradCAM`
leaves its hooks on the model, clears the gradients of its parameters, goes back through the whole network where it is
enough to begin at the layer, and does not know tokens; its `OcclusionSensitivity` passes each box of background through
the network, and indexes tensors in a way that PyTorch has announced to read otherwise.
"""

from __future__ import annotations

import copy
import gzip
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from brainfm.contract import Triple, Volume
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.files import atomic_path, progress_bar
from brainfm.inference import optimize
from brainfm.models.encoder import Encoder
from brainfm.scan import ImageLike, ScanLike
from brainfm.scan.layout import is_prepared
from brainfm.scan.load import image_of
from brainfm.scan.prepared import read_prepared
from brainfm.scan.read import read_image
from brainfm.system import tf32
from brainfm.transforms import create_transform


@dataclass(frozen=True, eq=False)
class SaliencyMap:
    """How much each place of a scan counts for a prediction.

    Attributes:
        map: [z, y, x] float32 on the model's input grid (without its channel axis), in units of the score for occlusion
            and in no unit for Grad-CAM. Above 0: the place speaks for a higher score.
        affine: [4, 4] from the map's voxel indices to RAS millimetres of the scan's own space.
        scan_shape: Voxels of the scan that was given, along its own axes; of several channels, of the first.
        scan_affine: [4, 4] from those to RAS millimetres.
        score: What is explained: the model's output for the target (a logit or a predicted value), or the projection of
            the embedding on the direction.
        method: "occlusion" or "Grad-CAM".
    """

    map: NDArray[np.float32]
    affine: NDArray[np.float64]
    scan_shape: Triple
    scan_affine: NDArray[np.float64]
    score: float
    method: str

    def on_scan(self) -> NDArray[np.float32]:
        """The map on the scan's own voxels, [i, j, k] in the order of its axes; 0 where the model did not look.

        Raises MissingExtraError without SciPy.
        """
        try:
            import scipy  # noqa: F401 - nibabel.processing needs it, and says so less clearly
        except ModuleNotFoundError as error:
            raise MissingExtraError("scipy", "eval") from error
        import nibabel as nib
        from nibabel.processing import resample_from_to

        # "constant" would take rounding errors at the outermost voxels for places outside; "grid-constant" does not.
        image = nib.Nifti1Image(self.map, self.affine)
        moved = resample_from_to(image, (self.scan_shape, self.scan_affine), order=1, mode="grid-constant")
        voxels: NDArray[np.float32] = np.asarray(moved.dataobj, dtype=np.float32)
        return voxels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `on_scan` as .nii or .nii.gz with the scan's affine, atomically: it overlays the scan voxel by voxel.

        Raises:
            BrainfmError: The name has another ending.
            MissingExtraError: SciPy is not installed.
        """
        import nibabel as nib

        path = Path(path)
        if not path.name.endswith((".nii", ".nii.gz")):
            raise BrainfmError(f"{path}: a saliency map is written as .nii or .nii.gz, by the ending of its name")
        image = nib.Nifti1Image(self.on_scan(), self.scan_affine)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = f"brainfm {self.method}".encode()
        content = image.to_bytes()
        with atomic_path(path) as temporary:
            temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def occlusion(
    model: Encoder,
    scan: ScanLike,
    mask: ImageLike | None = None,
    *,
    target: int = 0,
    direction: ArrayLike | None = None,
    window: int | Triple,
    stride: int | Triple | None = None,
    fill: float = 0.0,
    progress: bool = False,
) -> SaliencyMap:
    """How far the score falls when a box is hidden, for a box at every place (Zeiler and Fergus 2014, arXiv 1311.2901).

    Each voxel gets the mean fall over all boxes that hide it. Boxes in which nothing is to hide, such as those in the
    background of a contract that leaves it 0, cost no forward pass.

    Args:
        model: An encoder of `create_model`, with a classifier or with `direction`.
        scan: As for `brainfm.load_scan`.
        mask: Its brain mask.
        target: Which output of the classifier, or which row of `direction`.
        direction: [num_features] or [outputs, num_features]: what a linear probe multiplies embeddings by, such as
            `coef_` in scikit-learn (divided by the `scale_` of a StandardScaler before it). Then the classifier is not
            used.
        window: Voxels of the box along z, y and x of the model's input.
        stride: Voxels from one box to the next, at most `window`; without it the boxes lie side by side. The last one
            along an axis is moved inwards to fit.
        fill: What the box is filled with. 0 is the brain's mean after a z-score.
        progress: Show a progress bar.

    Raises:
        ScanError: The scan does not keep the model's input contract.
        ValueError: There is neither classifier nor direction, or an argument is out of range.

    Example:
        >>> model = brainfm.create_model("simclr_resnet18_3d", pretrained=True)
        >>> occlusion(model, "normalized.nii.gz", "mask.nii.gz", direction=probe.coef_, window=16).save("why.nii.gz")
    """
    from monai.data.utils import dense_patch_slices

    volume, x = _input(model, scan, mask)
    size, step = _triple(window), _triple(window if stride is None else stride)
    if not all(1 <= s <= w <= n for s, w, n in zip(step, size, volume.shape, strict=True)):
        raise ValueError(
            f"a window of {size} voxels at a stride of {step} does not fit the model's input of {volume.shape} voxels: "
            "along each axis, 1 ≤ stride ≤ window ≤ input"
        )
    explained = _Score(cast(Encoder, optimize(model)), target, direction)
    falls, boxes = np.zeros(volume.shape, np.float32), np.zeros(volume.shape, np.float32)
    places = dense_patch_slices(volume.shape, size, step)
    with torch.inference_mode(), tf32(False):
        score = float(explained(x))
        for box in progress_bar(places, total=len(places), unit="box", doing="hiding", shown=progress):
            boxes[box] += 1
            hidden = x.clone()
            hidden[(..., *box)] = fill
            if not torch.equal(hidden, x):
                falls[box] += score - float(explained(hidden))
    return _saliency_map(falls / boxes, volume, scan, model, score, "occlusion")


def grad_cam(
    model: Encoder,
    scan: ScanLike,
    mask: ImageLike | None = None,
    *,
    target: int = 0,
    direction: ArrayLike | None = None,
    layer: str | None = None,
) -> SaliencyMap:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): the features of a layer, weighted by their mean gradient.

    Only what speaks for a higher score is kept; for what speaks against it, explain `-direction`. The map is
    interpolated to the input's voxels from where each of its cells looks, which the encoder's `feature_info` says: cell
    i looks at voxel offset + reduction·i. Stretching the map over the volume, as is usual, would move a ResNet-18's by
    7.5 voxels, for its cell 0 looks at voxel 0.

    Args:
        model: An encoder of `create_model`, with a classifier or with `direction`.
        scan: As for `brainfm.load_scan`.
        mask: Its brain mask.
        target: Which output of the classifier, or which row of `direction`.
        direction: As for `occlusion`.
        layer: A module of the encoder that gives a feature map, or tokens. Default: the encoder's `cam_layer`, or its
            last stage. That is `norm1` of a ViT's last block: after the block, only the CLS token may count.

    Raises:
        ScanError: The scan does not keep the model's input contract.
        ValueError: There is neither classifier nor direction, the target is out of range, or the layer does not exist,
            gives no map, or has no influence on the score.

    Example:
        >>> model = brainfm.create_model("local-dir:finetuned/", pretrained=True)
        >>> grad_cam(model, "normalized.nii.gz", "mask.nii.gz").save("why.nii.gz")
    """
    volume, x = _input(model, scan, mask)
    layer = layer or model.cam_layer or model.feature_info[-1]["module"]
    features, gradient, score = _features(model, x, target, direction, layer)
    weights = gradient.mean(dim=(2, 3, 4), keepdim=True)
    cam = (weights * features).sum(dim=1)[0].relu().cpu().numpy()
    stage = _stage_of(layer, model, cam.shape, volume.shape)
    return _saliency_map(_on_input(cam, stage, volume.shape), volume, scan, model, score, "Grad-CAM")


class _Score(nn.Module):
    """Volumes [B, C, D, H, W] → the one number that is explained, [B]: an output, or an embedding's projection."""

    def __init__(self, model: Encoder, target: int, direction: ArrayLike | None) -> None:
        super().__init__()
        self.model, self.target, self.direction = model, target, None
        outputs, width = model.num_classes, model.num_features
        if direction is not None:
            readout = model.pretrained_cfg.readout
            if readout.window is not None or readout.pool == "brain":
                raise ValueError(
                    f"this model's embedding is another than the one that would be explained ({readout}): a map is of "
                    "one look at the whole tensor; give the model a classifier, or a readout without window or brain"
                )
            rows = np.atleast_2d(np.asarray(direction, dtype=np.float32))
            if rows.ndim != 2 or rows.shape[1] != width:
                raise ValueError(f"direction must be [{width}] or [outputs, {width}], not {list(np.shape(direction))}")
            outputs = len(rows)
        if not outputs:
            raise ValueError(
                "this encoder has no classifier to explain; create it with num_classes=, or give direction=, the "
                "coefficients of a linear probe"
            )
        if not 0 <= target < outputs:
            raise ValueError(f"target must be 0 to {outputs - 1}, not {target}")
        if direction is not None:
            self.direction = torch.from_numpy(rows[target]).to(_device(model))

    def forward(self, x: Tensor) -> Tensor:
        if self.direction is None:
            outputs: Tensor = self.model(x)
            return outputs[:, self.target]
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True) @ self.direction


def _features(
    model: Encoder, x: Tensor, target: int, direction: ArrayLike | None, layer: str
) -> tuple[Tensor, Tensor, float]:
    """A layer's feature map [1, C, d, h, w], the score's gradient with respect to it, and the score."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.set_grad_checkpointing(False)
    explained = _Score(model, target, direction)
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())  # the graph begins here: nothing before it is kept for it
        return kept[-1].clone()  # which may be changed in place

    try:
        module = model.get_submodule(layer)
    except AttributeError as error:
        stages = ", ".join(info["module"] for info in model.feature_info)
        raise ValueError(f"this encoder has no layer {layer!r}; its stages are {stages}") from error
    while isinstance(module, nn.Sequential):  # a stage; the encoder calls its blocks one by one
        module = module[-1]
    module.register_forward_hook(keep)
    with torch.enable_grad(), tf32(False):
        score = explained(x)
    if len(kept) != 1 or kept[0].ndim not in (3, 5):
        raise _no_map(layer)
    (output,) = kept
    with tf32(False):
        (gradient,) = torch.autograd.grad(score.sum(), output) if score.requires_grad else (torch.zeros_like(output),)
    try:
        features, gradient = (model._as_map(part, x.shape[2:]) for part in (output.detach(), gradient))
    except RuntimeError as error:  # tokens, but not those of a stage
        raise _no_map(layer) from error
    if features.ndim != 5:
        raise _no_map(layer)
    if not gradient.any():
        raise ValueError(
            f"the score does not depend on the map of {layer!r}: its gradient is 0 everywhere; name an earlier layer "
            "(of a ViT that pools the CLS token, a block's norm1)"
        )
    return features, gradient, float(score.detach())


def _no_map(layer: str) -> ValueError:
    return ValueError(f"layer {layer!r} gives no feature map of [B, C, d, h, w] in the forward pass; name a stage")


def _stage_of(layer: str, model: Encoder, cells: Sequence[int], shape: Triple) -> dict[str, Any]:
    """The entry of `feature_info` that says where the cells of a layer's map look.

    A layer within a stage may come before the stage's own stride: then it is the first stage with as many cells.
    """
    own = [info for info in model.feature_info if f"{layer}.".startswith(f"{info['module']}.")]
    if own and own[0]["module"] == layer:
        return own[0]
    for info in own + model.feature_info:
        steps = zip(shape, info["reduction"], cells, strict=True)
        if all(n // step <= m <= -(-n // step) for n, step, m in steps):  # strides round up, pools down
            return info
    raise ValueError(f"a map of {tuple(cells)} fits none of the reductions in the encoder's feature_info")


def _on_input(cam: NDArray[np.float32], stage: Mapping[str, Any], shape: Triple) -> NDArray[np.float32]:
    """A map [d, h, w] on the voxels of the input: linear between the cells' centres, the edge's value beyond them."""
    for size, step, offset in zip(shape, stage["reduction"], stage["offset"], strict=True):
        cells = np.arange(cam.shape[0])
        places = ((np.arange(size) - offset) / step).clip(0, cells[-1])
        weights = (1 - np.abs(places[:, None] - cells)).clip(0).astype(np.float32)
        # Each product takes the first axis of the three and leaves its result last: three bring the order back.
        cam = np.tensordot(cam, weights, axes=([0], [1]))
    return cam


def _input(model: Encoder, scan: ScanLike, mask: ImageLike | None) -> tuple[Volume, Tensor]:
    """The scan as the model's contract prepares it: with its affine, and as a batch on the model's device."""
    transform = create_transform(model)
    volume = transform.volume(scan, mask)
    return volume, transform.tensor(volume)[None].to(_device(model))


def _saliency_map(
    values: NDArray[np.float32], volume: Volume, scan: ScanLike, model: Encoder, score: float, method: str
) -> SaliencyMap:
    spec = model.pretrained_cfg.input_spec
    image: Any = image_of(scan, spec)
    stored = read_image(image)
    affine = volume.affine
    if spec is not None and is_prepared(image):  # the map lies in the contract's space
        affine = read_prepared(image).from_space(spec) @ affine
    i, j, k = stored.array.shape
    return SaliencyMap(values, affine, (i, j, k), stored.affine, score, method)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device


def _triple(size: int | Triple) -> Triple:
    return (size, size, size) if isinstance(size, int) else size
