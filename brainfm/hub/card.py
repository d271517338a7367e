"""Markdown about models: the card of one, a README.md with the Hub's YAML front matter, and the table of all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from brainfm.about import (
    COHORT_COLUMNS,
    NO_COHORTS,
    NO_CONTRACT,
    SCORE_COLUMNS,
    Row,
    about_weight,
)
from brainfm.models.encoder import Encoder
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import Listing, get_pretrained_cfg, list_models, listing
from brainfm.render import render

# The Hub's identifiers of licences are SPDX's in lower case; these are the ones weights are given.
_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
)

PLACE = "ORG/NAME"  # in the card, until a push names the repository


# --- The card of a model --------------------------------------------------------------------------


def model_card(model: Encoder, config: Mapping[str, Any]) -> str:
    """The card of a model in its folder, from its cfg, and the provenance and golden embedding in its config."""
    cfg = model.pretrained_cfg
    known = about_weight(cfg, "model.safetensors, beside this card", _parameters(model))
    total = ("**total**", known.patients, known.scans, "")
    provenance = config["provenance"] | {"sha256 of model.safetensors": cfg.sha256}
    provenance["left_out"] = ", ".join(provenance.get("left_out", ()))
    monai = None if cfg.num_classes else plain_monai(model.network, model.model_args, model.in_chans)
    return render(
        "card.md",
        front_matter=_front_matter(cfg),
        name=known.name,
        notes=known.notes,
        place=PLACE,
        golden=config.get("golden") is not None,
        monai=fenced(monai, "python") if monai else "",
        contract=fenced(known.contract) if known.contract else NO_CONTRACT,
        facts=_list({label: value for label, value in known.facts.items() if label != "digest"}),  # see its provenance
        cohorts=table([*known.cohorts, total], COHORT_COLUMNS) if known.cohorts else NO_COHORTS,
        scores=table(known.scores, SCORE_COLUMNS) if known.scores else "",
        provenance=_list({label.replace("_", " "): value for label, value in provenance.items() if value}),
        citation=fenced(known.citation, "bibtex") if known.citation else "",
    )


def _front_matter(cfg: PretrainedCfg) -> str:
    from huggingface_hub import ModelCardData

    tags = ["medical", "mri", "brain", "neuroimaging", "3d", *([cfg.ssl_method.lower()] if cfg.ssl_method else [])]
    data: dict[str, Any] = {"library_name": "brainfm", "pipeline_tag": "image-feature-extraction", "tags": tags}
    licence = (cfg.licence or "").lower()
    if licence in _HUB_LICENCES:
        data["license"] = licence
    elif licence:
        data |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence).strip("-")}
    return ModelCardData(**data).to_yaml().strip()


def plain_monai(network: str, args: Mapping[str, Any], in_chans: int) -> str | None:
    """The lines that load the weight file with safetensors and MONAI alone; None where the network is not MONAI's."""
    if network != "resnet" or args.keys() - {"global_pool"} != {"block", "layers", "widths"}:
        return None
    block, layers, widths = args["block"], list(args["layers"]), list(args["widths"])
    return f"""\
from monai.networks.nets import ResNet
from safetensors.torch import load_file

net = ResNet("{block}", {layers}, {widths}, spatial_dims=3, n_input_channels={in_chans}, feed_forward=False).eval()
net.load_state_dict(load_file("model.safetensors"))"""


# --- The table of all models ----------------------------------------------------------------------


def model_table() -> str:
    """The encoders with published weights as a Markdown table, as README shows it, and the names of the others."""
    lines = [listing(get_pretrained_cfg(name).name) for name in list_models()]
    published = [line for line in lines if line.source and not line.source.startswith(("in this package", "drawn"))]
    others = [line for line in lines if line not in published]
    head = ("encoder", "what it is", "takes", "licence of the weights")
    without = ", ".join(f"`{_architecture(line)}`" for line in others)
    return f"{table(map(_line, published), head)}\n\nControls, test models and networks without weights: {without}."


def _line(model: Listing) -> Row:
    licence = (model.licence or "not stated").removeprefix("LicenseRef-")
    limits = "; gated" * model.gated + "; not to be passed on" * (not model.redistribute)
    return (f"`{_architecture(model)}`", model.title, _input(model), licence + limits)


def _architecture(model: Listing) -> str:
    return model.name.partition(".")[0]


def _input(model: Listing) -> str:
    """What goes in, such as "T1w, MNI152NLin2009cSym"."""
    channels = " + ".join(model.channels) if len(model.channels) > 1 else model.modality
    return ", ".join(filter(None, (channels, model.space))) or "–"


def _parameters(model: Encoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- Markdown -------------------------------------------------------------------------------------


def inline(text: str) -> str:
    """Text that stays in its line, and in its cell of a table, and opens no HTML; links in it stay links."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {label}: {inline(value)}" for label, value in facts.items())


def table(rows: Iterable[Row], head: Row, *, html: bool = False) -> str:
    """Rows of cells as a table. With `html` cells are Markdown already, and may hold tags."""
    clean = str if html else inline
    lines = [head, ("---",) * len(head), *(tuple(map(clean, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str = "") -> str:
    """Text as code, in a fence that it does not hold itself."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
