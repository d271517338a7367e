"""The table of all encoders and a page an encoder, from the cards, with a picture of what each is given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import costs
import numpy as np
import torch
from costs import Cost
from numpy.typing import NDArray
from PIL import Image

import brainfm
from brainfm import InputSpec, PretrainedCfg
from brainfm.about import (
    COHORT_COLUMNS,
    NO_COHORTS,
    NO_CONTRACT,
    SCORE_COLUMNS,
    THIRD_PARTY,
    About,
    about_weight,
    millions,
)
from brainfm.assets import COARSE_GREY_MATTER, SAMPLE_MASK, SAMPLE_SCAN
from brainfm.contract.volume import Volume
from brainfm.hub.card import fenced, inline, table
from brainfm.registry import Listing, list_models, listing

PANEL = 256  # pixels of a slice's longer side, at the most, unless it has more voxels


@dataclass(frozen=True)
class Page:
    """An encoder: a registered architecture with the weights that there are of it.

    Attributes:
        name: Of the architecture.
        weights: Each set of weights, or the one that a network without weights has.
        cost: As measured, or None.
    """

    name: str
    weights: tuple[PretrainedCfg, ...]
    cost: Cost | None

    @property
    def cfg(self) -> PretrainedCfg:
        """What `create_model(name)` means."""
        return self.weights[0]

    @property
    def listing(self) -> Listing:
        """Its line of `brainfm list`."""
        return listing(self.cfg.name)

    @cached_property
    def parameters(self) -> int:
        """Of the network."""
        with torch.device("meta"):  # only counted
            return sum(parameter.numel() for parameter in brainfm.create_model(self.name).parameters())

    @property
    def about(self) -> About:
        """What is known of its first weights."""
        return about_weight(self.cfg, _place(self.cfg), self.parameters)


def pages() -> list[Page]:
    """Every encoder of the registry: those with published weights first."""
    known = costs.measured()
    found = []
    for name in list_models():
        tagged = [brainfm.get_pretrained_cfg(full) for full in brainfm.list_pretrained(f"{name}.*")]
        found.append(Page(name, tuple(tagged) or (brainfm.get_pretrained_cfg(name),), known.get(name)))
    return sorted(found, key=lambda page: (not page.cfg.has_weights, page.name.startswith("test_"), page.name))


# --- The tables -----------------------------------------------------------------------------------


def overview(found: list[Page]) -> str:
    """A table a question, each of few columns, whose first leads to the encoder's page."""
    trained = [page for page in found if page.cfg.has_weights]
    drawn = ", ".join(f"`{page.name}`" for page in found if not page.cfg.has_weights)
    licence = ("encoder", "weights", "code", "how to get them")
    return "\n\n".join(
        [
            *(
                "## What do you have?",
                INPUTS,
                table(map(_input, found), ("encoder", "takes", "as a tensor, by the contract"), html=True),
            ),
            *("## What may you do?", LICENCES, table(map(_licence, trained), licence, html=True)),
            f"Without weights: {drawn}.",
            *("## What was it trained on, and how well does it do?", SCORES),
            table(map(_results, trained), ("encoder", "pretrained on", "published scores"), html=True),
            *("## What does it cost?", COSTS),
            table(map(_cost, found), ("encoder", "size", "width", "s", "GB", "faster"), html=True),
        ]
    )


INPUTS = (
    "An encoder of whole heads refuses a stripped brain, one of grey-matter maps a T1w scan. The tensor is channels × "
    "voxels; the contract's name is that of the card."
)
LICENCES = (
    'A licence of research only, or one that nobody states, is a reason to take another. "Accept once" is a licence '
    'that has to be accepted before the first load, "ask for access" one whose weights are given to those who asked.'
)
SCORES = (
    "Whoever tests on one of these data sets tests on training data. The scores are what its authors published, on "
    "their tasks and splits, and not comparable between rows; `brainfm compare-encoders` ({doc}`evaluate`) compares "
    "encoders on your own labels."
)
COSTS = (
    "Processor seconds of one thread for one volume, and memory, by `brainfm.optimize`; and how many times faster that "
    'is than the network as its authors wrote it. Random weights, a busy machine ({doc}`costs`); "–" was not measured. '
    "The size is the number of parameters, the width that of the embedding."
)


def _link(page: Page) -> str:
    return f"[`{page.name}`](generated/encoders/{page.name}.md)"


def _input(page: Page) -> tuple[str, ...]:
    line, spec = page.listing, page.cfg.input_spec
    takes = " + ".join(line.channels) if len(line.channels) > 1 else line.modality or "–"
    head = {"required": "brain", "forbidden": "whole head", "any": ""}[spec.skull_strip] if spec else ""
    shape = spec.output_shape if spec else None
    return (
        _link(page),
        inline(", ".join(filter(None, (takes, head, line.space)))),
        ("×".join(map(str, shape)) if shape else "the scan's size")
        + (f"<br>`{line.contract}`" if line.contract else ""),
    )


def _licence(page: Page) -> tuple[str, ...]:
    weights, code = (inline(licence or "not stated") for licence in (page.cfg.licence, page.cfg.code_licence))
    tags = f"<br>{len(page.weights)} sets of weights" if len(page.weights) > 1 else ""
    return _link(page) + tags, weights, code, _gate(page.cfg)


def _results(page: Page) -> tuple[str, ...]:
    return _link(page), _cohorts(page.cfg), "<br>".join(_scores(page.cfg)) or "–"


def _cost(page: Page) -> tuple[str, ...]:
    known = page.cost
    ratio, _, seconds, gigabytes = known.cells[:4] if known else ("–",) * 4
    return _link(page), millions(page.parameters), str(page.cfg.num_features), seconds, gigabytes, ratio


def _gate(cfg: PretrainedCfg) -> str:
    words = ["ask for access" if cfg.gated else "accept once" if cfg.accept else "open"]
    return "<br>".join([*words, *([] if cfg.redistribute else ["not to be passed on"])])


def _cohorts(cfg: PretrainedCfg) -> str:
    if cfg.is_drawn:
        return "nothing"
    if not cfg.cohorts:
        return "not recorded"
    names = [cohort.name for cohort in cfg.cohorts]
    return inline(", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


def _scores(cfg: PretrainedCfg) -> Iterator[str]:
    for score in cfg.scores:
        spread = f" ± {score.sd:g}" if score.sd is not None else ""
        source = f" ([source]({score.source}))" if score.source.startswith("http") else f" ({score.source})"
        yield f"{inline(score.task)}, {score.mode}: {score.value:g}{spread} {inline(score.metric)}{source}"


def _place(cfg: PretrainedCfg) -> str:
    return cfg.source


# --- A page ---------------------------------------------------------------------------------------


def page_of(page: Page, picture: str) -> str:
    """One encoder's page, in MyST Markdown. `picture` is what shows its tensor, or why nothing does."""
    cfg, about = page.cfg, page.about
    parts = [f"# `{page.name}`", f"{page.listing.title}.", "## Use it", fenced(snippet(cfg), "python")]
    parts += ["## What goes in", fenced(about.contract, "text") if about.contract else NO_CONTRACT, picture]
    if traps := list(_traps(page)):
        parts += ["## What to look out for", "\n".join(f"- {trap}" for trap in traps)]
    facts = {label: value for label, value in about.facts.items() if label != "third-party facts"}
    parts += ["## What is known of it", _facts(facts)]
    if len(page.weights) > 1:
        rows = [(f"`{weight.name}`", _linked(weight.source), inline(weight.notes) or "–") for weight in page.weights]
        parts += ["### Its sets of weights", table(rows, ("name", "where", "notes"), html=True)]
    if page.cost:
        parts.append(
            f"One volume takes {page.cost.seconds:.2f} s of one processor thread and {page.cost.gigabytes:.2f} GB by "
            "`brainfm.optimize`, measured with random weights; see {doc}`../../costs`."
        )
    if about.cohorts:
        counts = [f"{n} {what}" for n, what in ((about.patients, "patients"), (about.scans, "scans")) if n != "?"]
        total = f"{', '.join(counts) or 'How many scans is not stated'}. Testing on these is testing on training data."
        parts += ["## Pretrained on", total, table(about.cohorts, COHORT_COLUMNS)]
    elif about.has_weights and not cfg.is_drawn:
        parts += ["## Pretrained on", NO_COHORTS]
    if about.scores:
        parts += ["## Published scores", table(about.scores, SCORE_COLUMNS)]
    if about.citation:
        parts += ["## Cite", fenced(about.citation, "bibtex")]
    return "\n\n".join(parts) + "\n"


def snippet(cfg: PretrainedCfg) -> str:
    """The lines that use an encoder: its weights as they can be had, its transform, the embedding."""
    name = f'"{cfg.architecture}"'
    if cfg.has_weights:
        how = f'{name}, checkpoint_path="{cfg.hub_filename}"' if cfg.page else f"{name}, pretrained=True"
        note = f"  # the file that {cfg.page} gives to people" if cfg.page else ""
        if cfg.accept and not cfg.page:
            how, note = how + ", accept_licence=True", "  # after you have read it"
    else:
        how, note = name, "  # random weights: none were published"
    spec = cfg.input_spec
    if spec and len(spec.channels) > 1:
        scan = "{" + ", ".join(f'"{channel}": "{channel.lower()}.nii.gz"' for channel in spec.channels) + "}"
    else:
        scan = '"scan.nii.gz"'
    mask = ', mask="mask.nii.gz"' if spec and spec.mask.startswith("file") else ""
    return f"""\
import brainfm

model = brainfm.create_model({how}){note}
transform = brainfm.create_transform(model)
z = model(transform({scan}{mask})[None])  # [1, {cfg.num_features}]"""


def _traps(page: Page) -> Iterator[str]:
    """What is easily done wrong with an encoder, by what its card says."""
    cfg, spec = page.cfg, page.cfg.input_spec
    if cfg.notes:
        yield inline(cfg.notes)
    if cfg.is_drawn:
        yield "Nobody trained it: it is a control, whose scores a trained encoder has to beat."
    elif not cfg.has_weights:
        yield "No weights were published: until you pretrain it, its features are those of random numbers."
    if cfg.facts == "third-party" and cfg.has_weights:
        yield THIRD_PARTY[0].upper() + THIRD_PARTY[1:] + "."
    if cfg.has_weights and cfg.licence is None:
        yield "Nobody states a licence of the weights: ask whoever made them before you publish with them."
    if not cfg.redistribute:
        yield "The weights may not be passed on: `brainfm push` and `brainfm fetch --to` refuse to."
    if spec is None:
        return
    if spec.skull_strip == "forbidden":
        yield "It takes whole heads: a skull-stripped image is refused."
    if spec.intensities == "raw":
        yield "It takes intensities as the scanner gave them: an image that was z-scored or WhiteStriped is refused."
    if spec.representation.lower().endswith("grey matter"):
        yield "It takes maps of grey matter, such as CAT12's mwp1, not images: a T1w scan is refused."
    if spec.registration in ("affine", "linear", "nonlinear"):
        yield f"Scans must be brought to the template by {spec.registration} registration; rigid leaves another size."
    if page.cfg.readout.window:
        yield f"It reads a scan in {page.cfg.readout.window}: one scan is several passes."


def _facts(facts: dict[str, str]) -> str:
    return table([(label, _linked(value)) for label, value in facts.items()], ("fact", "value"), html=True)


def _linked(text: str) -> str:
    """Text as Markdown, an address in it as a link that shows where it leads and not all of it."""
    if text.startswith(("http://", "https://")) and " " not in text:
        place = re.sub(r"^https?://", "", text)
        return f"[{place if len(place) < 60 else place.partition('/')[0] + '/…'}](<{text}>)"
    if text.startswith("hf-hub:"):
        repository = text.removeprefix("hf-hub:").partition("@")[0]
        return f"[{text}](https://huggingface.co/{repository})"
    return inline(text) or "–"


# --- A picture of the tensor ------------------------------------------------------------------------


def tensor_of(spec: InputSpec) -> Volume:
    """What a contract makes of the packaged scan, or of its map of grey matter. Raises ScanError as for any scan."""
    if spec.representation.lower().endswith("grey matter"):
        return brainfm.create_transform(spec).volume(COARSE_GREY_MATTER)
    return brainfm.create_transform(spec).volume(SAMPLE_SCAN, SAMPLE_MASK if spec.mask.startswith("file") else None)


def draw(volume: Volume, path: Path) -> None:
    """Write a PNG of the three middle planes of a tensor's first channel, across its first, second and third axis."""
    image = np.asarray(volume.image[0], dtype=np.float32)
    planes = [np.take(image, size // 2, axis=axis) for axis, size in enumerate(image.shape)]
    low, high = np.percentile(image[image != image.min()], (1, 99.5)) if np.ptp(image) else (0.0, 1.0)
    panels = [_panel(plane, float(low), float(high), max(image.shape)) for plane in planes]
    height = max(panel.shape[0] for panel in panels)
    padded = [np.pad(panel, ((0, height - panel.shape[0]), (3, 3))) for panel in panels]
    Image.fromarray(np.concatenate(padded, axis=1)).save(path)


def _panel(plane: NDArray[np.float32], low: float, high: float, longest: int) -> NDArray[np.uint8]:
    scale = max(1, round(PANEL / longest))
    grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(np.repeat(grey.astype(np.uint8), scale, axis=0), scale, axis=1)
