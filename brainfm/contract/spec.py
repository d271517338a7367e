"""The input contract of a weight, `InputSpec`, and how its features become one vector, `Readout`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.operation import Operation
from brainfm.contract.volume import Triple, Volume, axes_towards, check_shape
from brainfm.schema import Checked

Spacing = tuple[float, float, float]

MOST_MM = 1000.0  # of a grid along an axis: twice what a scanner sees


@dataclass(frozen=True)
class Grid(Checked):
    """A voxel grid whose axes run along the world's.

    Attributes:
        shape: Voxels along the three axes, in the order of the spec's orientation.
        spacing: Millimetres a voxel along them.
        origin: RAS millimetres of the centre of the first voxel.

    Raises:
        ValueError: No array has the shape, a spacing is not above 0, or the grid is over a metre along an axis.

    Example:
        >>> import brainfm
        >>> grid = brainfm.Grid(shape=(193, 229, 193), spacing=(1.0, 1.0, 1.0), origin=(-96.0, -132.0, -78.0))
        >>> grid.affine("RAS")[:, 3]
        array([ -96., -132.,  -78.,    1.])
    """

    shape: Triple
    spacing: Spacing
    origin: Spacing

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.shape, "a grid's shape")
        if min(self.spacing) <= 0:
            raise ValueError(f"a grid's spacing is {self.spacing}, and must be above 0")
        size = [voxels * mm for voxels, mm in zip(self.shape, self.spacing, strict=True)]
        if max(size) > MOST_MM:
            along = "×".join(f"{mm:g}" for mm in size)
            raise ValueError(f"a grid of {self.shape} voxels is {along} mm large, and a scanner sees half a metre")

    def affine(self, axcodes: str) -> NDArray[np.float64]:
        """[4, 4] from voxel indices to RAS millimetres, for axes that point along `axcodes`."""
        axes, flips = axes_towards(np.eye(4), axcodes)
        affine = np.eye(4)
        affine[:3, :3] = 0
        for column, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
            affine[axis, column] = -self.spacing[column] if flip else self.spacing[column]
        affine[:3, 3] = self.origin
        return affine


@dataclass(frozen=True)
class InputSpec(Checked):
    """The input contract of a weight: which scans it takes, and every step from the stored scan to its tensor.

    The identity fields say what a scan must be before any step, and `brainfm.load_scan` refuses what can be seen not to
    be it; what nobody can see in a scan belongs in `preparation`. `operations` are then applied in order. The order is
    part of the contract: swapping two steps gives another tensor.

    Attributes:
        representation: What the voxels are. "T1w" and "T2w" are held against images in MNI152 space, and "grey matter"
            (maps of its fraction, such as VBM's) against images in it or in no space of their own; other words, such as
            "any contrast", take any.
        channels: The channels' names in order; of several, each name is held against its image as `representation` is.
        missing_channel: What to do when a channel is missing: "refuse" the scan, or fill it with "zeros".
        space: The template whose space the scan must be in, such as "MNI152NLin2009cSym"; None takes any. In MNI152,
            whose variants count as one, the brain's place is seen; in another space a scan must lie on `grid` exactly.
        registration: How the scan was brought there. "affine" (or "linear") and "nonlinear" ask, in MNI152, for a brain
            of the template's size; "rigid" leaves it its own.
        orientation: Where the scan's axes point before the first operation, such as "RAS"; None leaves them as stored.
        grid: The template grid, in that orientation; None takes any grid.
        skull_strip: Whether only the brain may be left ("required"), in the image or by a mask outside of which an
            operation blanks it; or whether the whole head must be there ("forbidden").
        mask: Where the brain mask comes from. "file or nonzero" takes a mask file, and else the non-zero voxels.
        intensities: "raw" takes no image that was shifted, as z-scores and WhiteStripe do; "standardised" takes only
            one that lies about 0; "any" is of contracts that cancel it.
        intensity_range: Intensities [lowest, highest] that the scan must keep to and fill in part, such as (0, 255);
            None takes any.
        bias_field: Whether the scan's bias field is "removed" (N4) or "left" as the scanner gave it; "any" takes both.
            Nothing in an image shows it: it is followed, and held against, in scans that `brainfm prep` prepared.
        preparation: The steps before this contract begins, in words, for people.
        operations: The steps, in order.
        output_shape: [C, i, j, k] of the tensor, or None where it depends on the scan.

    Example:
        >>> import brainfm
        >>> spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
        >>> spec.space, spec.grid.shape, spec.output_shape
        ('MNI152NLin2009cSym', (48, 48, 40), (1, 40, 48, 48))
    """

    representation: str = "T1w"
    channels: tuple[str, ...] = ("T1w",)
    missing_channel: Literal["refuse", "zeros"] = "refuse"
    space: str | None = None
    registration: Literal["rigid", "affine", "linear", "nonlinear", "none"] = "none"
    orientation: str | None = None
    grid: Grid | None = None
    skull_strip: Literal["required", "forbidden", "any"] = "any"
    mask: Literal["file or nonzero", "file", "nonzero", "none"] = "none"
    intensities: Literal["raw", "standardised", "any"] = "any"
    intensity_range: tuple[float, float] | None = None
    bias_field: Literal["removed", "left", "any"] = "any"
    preparation: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()
    output_shape: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not None and self.orientation is None:
            raise ValueError("an input contract with a grid needs the orientation of its axes")
        if self.orientation is not None:
            axes_towards(np.eye(4), self.orientation)
        if self.space is not None and not self.in_mni152 and self.grid is None:
            raise ValueError(
                f"nothing in a scan shows whether it is in the space {self.space!r}: give the contract that space's "
                "grid, or say it in preparation"
            )
        if self.space is None and self.registration != "none":
            raise ValueError(
                f"registration is {self.registration!r}, and no space is named that it leads to: name it, or say in "
                "preparation what was registered to what"
            )
        if not self.channels or len({channel.casefold() for channel in self.channels}) != len(self.channels):
            raise ValueError(f"an input contract's channels are different names, not {self.channels}")
        if self.output_shape is not None:
            check_shape(self.output_shape[1:], "output_shape without its channels")
        if self.intensity_range is not None and not self.intensity_range[0] < self.intensity_range[1]:
            raise ValueError(f"intensity_range is {self.intensity_range}, and must rise")

    @property
    def tensor_channels(self) -> int:
        """Channels of the tensor: one an image, where `output_shape` does not say that operations make others."""
        return self.output_shape[0] if self.output_shape else len(self.channels)

    @property
    def in_mni152(self) -> bool:
        """Whether scans must lie in the space of one of the MNI152 templates, which differ by a few millimetres."""
        return self.space is not None and self.space.startswith("MNI152")

    def apply(self, volume: Volume) -> Volume:
        """Run the operations, in order, on a volume that keeps the identity fields, as `brainfm.load_scan` gives it."""
        for operation in self.operations:
            volume = operation(volume)
        return volume

    def with_operation(self, kind: type[Operation], **changes: Any) -> InputSpec:
        """The same contract with the parameters of its operations of class `kind` changed.

        Example:
            >>> spec = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec
            >>> upstream = spec.with_operation(ZScore, method="one_pass")
        """
        if not any(isinstance(operation, kind) for operation in self.operations):
            raise ValueError(f"this input contract has no operation {kind.__name__}")
        changed = (replace(op, **changes) if isinstance(op, kind) else op for op in self.operations)  # type: ignore[type-var]
        return replace(self, operations=tuple(changed))


def describe(spec: InputSpec) -> str:
    """An input contract in plain words, a line a fact, the operations numbered in their order.

    Args:
        spec: The contract.

    Returns:
        Lines, each of a word that names the fact and the fact; no contract raises an error.

    Example:
        >>> import brainfm
        >>> spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
        >>> print(brainfm.describe(spec).splitlines()[-1])
        tensor       [1, 40, 48, 48] float32
    """
    where = f"in the space of {spec.space} ({spec.registration} registration)" if spec.space else "in its own space"
    strip = {"required": "brain only, skull removed", "forbidden": "with skull", "any": "with or without skull"}
    mask = {
        "file or nonzero": "from a file; else the non-zero voxels of the skull-stripped image",
        "file": "from a file",
        "nonzero": "the non-zero voxels of the image",
        "none": "not used",
    }
    lines = [f"image        {spec.representation}, {where}; {strip[spec.skull_strip]}"]
    if spec.preparation:
        lines.append(f"prepared by  {' → '.join(spec.preparation)}")
    if len(spec.channels) > 1:
        missing = {"refuse": "refuse the scan", "zeros": "filled with zeros"}[spec.missing_channel]
        lines.append(f"channels     {', '.join(spec.channels)}; a missing one: {missing}")
    lines.append(f"axes         {spec.orientation or 'as stored'}")
    if spec.grid:
        grid = spec.grid
        lines.append(
            f"grid         {'×'.join(map(str, grid.shape))} voxels of {'×'.join(f'{s:g}' for s in grid.spacing)} mm, "
            f"first voxel at RAS ({', '.join(f'{o:g}' for o in grid.origin)}) mm"
        )
    lines.append(f"brain mask   {mask[spec.mask]}")
    intensities = {
        "raw": ["as the scanner gave them, none shifted below 0"],
        "standardised": ["shifted about 0, as by a z-score"],
        "any": [],
    }[spec.intensities]
    if spec.intensity_range:
        intensities.append(f"from {spec.intensity_range[0]:g} to {spec.intensity_range[1]:g}")
    if spec.bias_field != "any":
        lines.append(f"bias field   {spec.bias_field}")
    if intensities:
        lines.append(f"intensities  {'; '.join(intensities)}")
    lines += [f"step {n:<7} {operation}" for n, operation in enumerate(spec.operations, start=1)]
    if spec.output_shape:
        lines.append(f"tensor       [{', '.join(map(str, spec.output_shape))}] float32")
    return "\n".join(lines)


@dataclass(frozen=True)
class Window(Checked):
    """A window that slides over a tensor: the encoder sees one at a time.

    Attributes:
        shape: Voxels of the window. A tensor that is shorter along an axis is padded there at its far end.
        overlap: The fraction of the window that the next one shares; the last along an axis is moved inwards to fit.
        average: How the windows' embeddings are averaged: each alike ("mean"), or by the brain voxels in it ("brain").
        pad: The intensity that a short tensor is padded with.

    Example:
        >>> import brainfm
        >>> print(brainfm.Window(shape=(96, 96, 96), overlap=0.25))
        windows of 96×96×96 voxels that overlap by 25%, averaged each alike
    """

    shape: Triple
    overlap: float = 0.5
    average: Literal["mean", "brain"] = "mean"
    pad: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.shape) < 1 or not 0 <= self.overlap < 1:
            raise ValueError(f"a window has at least one voxel and overlaps by 0 or more, less than 1, not {self}")
        check_shape(self.shape, "a window's shape")

    def __str__(self) -> str:
        alike = "each alike" if self.average == "mean" else "by the brain voxels in each"
        return (
            f"windows of {'×'.join(map(str, self.shape))} voxels that overlap by {self.overlap:.0%}, averaged {alike}"
        )


@dataclass(frozen=True)
class Readout(Checked):
    """How an encoder's features become the one vector of a scan.

    Attributes:
        pool: One of the encoder's own `pools`, such as "avg" or "token"; "brain" is the average over the cells of the
            last feature map whose centre lies in the brain mask; None is what the encoder is set to.
        window: The window that slides over the tensor; None shows the encoder all of it at once.

    Example:
        >>> import brainfm
        >>> print(brainfm.Readout(pool="avg"))
        average over the last feature map
    """

    pool: str | None = None
    window: Window | None = None

    def __str__(self) -> str:
        pools = {
            "avg": "average over the last feature map",
            "token": "the class token",
            "fc_norm": "average over the patch tokens, then a norm",
            "brain": "average over the brain's cells of the last feature map",
            None: "the encoder's own pooling",
        }
        pool = pools.get(self.pool, str(self.pool))
        return f"{pool}, in {self.window}" if self.window else pool
