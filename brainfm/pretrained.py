"""What a weight is and what tensor it expects: `PretrainedCfg` and `InputSpec`, frozen dataclasses that go to JSON."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.operations import Checked, Operation, Triple, Volume, axes_towards, operation_from_dict, operation_to_dict

_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Grid(Checked):
    """A voxel grid whose axes run along the world's.

    Attributes:
        shape: Voxels along the three axes, in the order of the spec's orientation.
        spacing: Millimetres a voxel along them.
        origin: RAS millimetres of the centre of the first voxel.
    """

    shape: Triple
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]

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

    The first fields say what a scan must be before any step; `operations` are then applied in order. The order is part
    of the contract: swapping two steps gives another tensor.

    Attributes:
        representation: What the voxels are, such as "T1w", "any contrast" or "VBM grey matter".
        channels: The channels' names in order.
        missing_channel: What to do when a channel is missing.
        space: The template whose space the scan must be in, such as "MNI152NLin2009cSym"; None takes any.
        registration: How the scan was brought there.
        orientation: Where the scan's axes point before the first operation, such as "RAS"; None leaves them as stored.
        grid: The template grid, in that orientation; None takes any grid.
        skull_strip: Whether only the brain may be left in the image.
        mask: Where the brain mask comes from. "file or nonzero" takes a mask file, and else the non-zero voxels.
        preparation: The steps before this contract begins, in words, for people.
        operations: The steps, in order.
        output_shape: [C, i, j, k] of the tensor, or None where it depends on the scan.
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
    preparation: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()
    output_shape: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not None and self.orientation is None:
            raise ValueError("an input contract with a grid needs the orientation of its axes")
        if self.orientation is not None:
            axes_towards(np.eye(4), self.orientation)

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

    def to_dict(self) -> dict[str, Any]:
        """The contract as JSON-ready data."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["grid"] = None if self.grid is None else _lists(asdict(self.grid))
        data["operations"] = [operation_to_dict(operation) for operation in self.operations]
        return _lists(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputSpec:
        """The contract that `to_dict` described. Raises ValueError for an unknown field, operation or parameter."""
        values = _known_fields(cls, data)
        if values.get("grid") is not None:
            values["grid"] = Grid(**_known_fields(Grid, values["grid"]))
        if not isinstance(values.get("operations", ()), tuple):
            raise ValueError("the operations of an input contract are a list")
        values["operations"] = tuple(operation_from_dict(item) for item in values.get("operations", ()))
        return cls(**values)


def describe(spec: InputSpec) -> str:
    """An input contract in plain words, a line a fact, the operations numbered in their order."""
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
        lines.append(f"channels     {', '.join(spec.channels)}; a missing one: {spec.missing_channel}")
    lines.append(f"axes         {spec.orientation or 'as stored'}")
    if spec.grid:
        grid = spec.grid
        lines.append(
            f"grid         {'×'.join(map(str, grid.shape))} voxels of {'×'.join(f'{s:g}' for s in grid.spacing)} mm, "
            f"first voxel at RAS ({', '.join(f'{o:g}' for o in grid.origin)}) mm"
        )
    lines.append(f"brain mask   {mask[spec.mask]}")
    lines += [f"step {n:<7} {operation}" for n, operation in enumerate(spec.operations, start=1)]
    if spec.output_shape:
        lines.append(f"tensor       [{', '.join(map(str, spec.output_shape))}] float32")
    return "\n".join(lines)


@dataclass(frozen=True)
class Cohort(Checked):
    """A data set that a weight was pretrained on: its name, its numbers of patients and scans, and their conditions."""

    name: str
    patients: int
    scans: int
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score(Checked):
    """A published result: `value` ± `sd` of `metric` on `task`, reached by using the encoder as `mode` says."""

    task: str
    metric: str
    mode: str
    value: float
    sd: float | None = None
    source: str = ""


@dataclass(frozen=True)
class PretrainedCfg(Checked):
    """What a weight is, where it lives, and the input it expects.

    Attributes:
        architecture: The registered model that the weights fit.
        tag: Which weights of that architecture.
        hub_id: Repository on the Hugging Face Hub, "org/name".
        hub_revision: Its commit; a cfg shipped in this package pins one.
        hub_filename: The weight file there.
        url: Where the file can be downloaded otherwise.
        file: A file on this machine; comes before the Hub and the URL.
        sha256: Of the file at the source; checked where given. None switches the check off.
        input_spec: The input contract.
        num_features: Width of the embedding.
        num_classes: Outputs of the classifier in the weights; 0 for an encoder without one.
        in_chans: Input channels of the weights.
        ssl_method: How the weights were pretrained, such as "SimCLR", "MAE", or None.
        cohorts: What they were pretrained on.
        licence: Of the weights (an SPDX name where there is one).
        paper: Where they were published.
        repository: The authors' code.
        citation: BibTeX.
        recipe: The recipe of `brainfm.train` that makes such weights.
        notes: What a user should know.
        scores: Published results.
    """

    architecture: str = ""
    tag: str = ""
    hub_id: str | None = None
    hub_revision: str | None = None
    hub_filename: str = "model.safetensors"
    url: str | None = None
    file: str | None = None
    sha256: str | None = None
    input_spec: InputSpec | None = None
    num_features: int = 0
    num_classes: int = 0
    in_chans: int = 1
    ssl_method: str | None = None
    cohorts: tuple[Cohort, ...] = ()
    licence: str | None = None
    paper: str | None = None
    repository: str | None = None
    citation: str | None = None
    recipe: str | None = None
    notes: str = ""
    scores: tuple[Score, ...] = ()

    @property
    def name(self) -> str:
        """The full name, `architecture.tag`."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    @property
    def has_weights(self) -> bool:
        """Whether some source of weights is named."""
        return bool(self.file or self.hub_id or self.url)

    @property
    def source(self) -> str:
        """Where `create_model(..., pretrained=True)` takes the weights from, in words; empty where there are none."""
        if self.file:
            return "in this package" if Path(self.file).parent == _ASSETS else self.file
        if self.hub_id:
            return f"hf-hub:{self.hub_id}" + (f"@{self.hub_revision}" if self.hub_revision else "")
        return self.url or ""

    def overlay(self, changes: Mapping[str, Any]) -> PretrainedCfg:
        """The same cfg with some fields replaced. Raises ValueError for a field that does not exist.

        A new source replaces the old ones, and with them their hash, unless the changes give that too.
        """
        values = _cfg_values(changes)
        if any(values.get(source) for source in ("file", "hub_id", "url")):
            cleared = ("file", "hub_id", "hub_revision", "hub_filename", "url", "sha256")
            values = {f.name: f.default for f in fields(self) if f.name in cleared} | values
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """The cfg as JSON-ready data. A file on this machine means nothing elsewhere and is left out."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "file"}
        data["input_spec"] = None if self.input_spec is None else self.input_spec.to_dict()
        data["cohorts"] = [_lists(asdict(cohort)) for cohort in self.cohorts]
        data["scores"] = [asdict(score) for score in self.scores]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PretrainedCfg:
        """The cfg that `to_dict` described. Raises ValueError for an unknown field."""
        return cls(**_cfg_values(data))


def _cfg_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a PretrainedCfg from data that may come from JSON: what is nested there becomes what it stands for."""
    values = _known_fields(PretrainedCfg, data)
    if isinstance(values.get("input_spec"), Mapping):
        values["input_spec"] = InputSpec.from_dict(values["input_spec"])
    for key, cls in (("cohorts", Cohort), ("scores", Score)):
        if key in values:
            items = values[key]
            values[key] = tuple(cls(**_known_fields(cls, i)) if isinstance(i, Mapping) else i for i in items)
    if values.get("file") is not None:
        values["file"] = str(values["file"])
    return values


def _known_fields(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with lists made tuples, after a check that `cls` has every field named there."""
    names = [f.name for f in fields(cls)]
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
            raise ValueError(f"{cls.__name__} has no field {key!r}{hint}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _lists(data: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
