"""The model card: a README.md with the Hub's YAML front matter, made from the cfg and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from brainfm.contract import describe
from brainfm.models.encoder import Encoder
from brainfm.pretrained import PretrainedCfg

# The Hub's identifiers of licences are SPDX's in lower case; these are the ones weights are given.
_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
)

# Encoders whose network is MONAI's own, and the function that builds it there.
_MONAI = {"simclr_resnet18_3d": "resnet18", "resnet18_3d": "resnet18", "simclr_resnet50_3d": "resnet50"}

PLACE = "ORG/NAME"  # in the card, until a push names the repository

_LIMITS = """\
For research on brain MRI: features for classifiers, regressors and retrieval, or a start for fine-tuning. Not a medical
device, and not for decisions about a patient.

- The input contract below is part of the model. A scan prepared in another way gives other features, without an error
  from the network; `brainfm` refuses what it can recognise.
- Whoever evaluates on one of the pretraining data sets tests on training data: `brainfm info MODEL --overlap DATASET`.
- Embeddings hold age, sex, site and scanner, whether or not a task asks for them; a gain in a task should be shown over
  an untrained encoder, and over age, sex and head size alone."""


def model_card(model: Encoder, config: Mapping[str, Any]) -> str:
    """The card of a model, from its cfg and its config's provenance."""
    cfg = model.pretrained_cfg
    title = f"# {cfg.name}\n\n{cfg.notes}".rstrip()
    sections = {
        "Use": _usage(cfg),
        "Intended use and limits": _LIMITS,
        "Input contract": _fenced(describe(cfg.input_spec)) if cfg.input_spec else "None was recorded.",
        "Model": _facts(model),
        "Pretraining data": _cohorts(cfg),
        "Published scores": _scores(cfg),
        "Provenance": _provenance(config),
        "Citation": _fenced(cfg.citation, "bibtex") if cfg.citation else "",
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items() if text)
    return f"---\n{_front_matter(cfg)}\n---\n\n{title}\n\n{body}\n"


def _front_matter(cfg: PretrainedCfg) -> str:
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {
        "library_name": "brainfm",
        "pipeline_tag": "image-feature-extraction",
        "tags": [
            "medical",
            "mri",
            "brain",
            "neuroimaging",
            "3d",
            *([cfg.ssl_method.lower()] if cfg.ssl_method else []),
        ],
    }
    if cfg.licence:
        known = cfg.licence.lower() in _HUB_LICENCES
        data |= (
            {"license": cfg.licence.lower()}
            if known
            else {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", cfg.licence.lower()).strip("-")}
        )
    return ModelCardData(**data).to_yaml().strip()


def _usage(cfg: PretrainedCfg) -> str:
    text = _fenced(
        "import brainfm\n\n"
        f'model = brainfm.create_model("hf-hub:{PLACE}")  # or "local-dir:FOLDER"\n'
        "transform = brainfm.create_transform(model)\n"
        'z = model(transform("normalized.nii.gz", mask="mask.nii.gz")[None])',
        "python",
    )
    text += (
        f"\n\n`brainfm verify hf-hub:{PLACE}` says whether a machine gives the features that these weights gave here."
    )
    if cfg.architecture in _MONAI and not cfg.num_classes:
        text += "\n\nWithout brainfm (and then without its input contract):\n\n" + plain_monai(cfg)
    return text


def plain_monai(cfg: PretrainedCfg) -> str:
    """The lines that load the weight file with safetensors and MONAI alone."""
    name = _MONAI[cfg.architecture]
    build = (
        f"spatial_dims=3, n_input_channels={cfg.in_chans}, conv1_t_stride=1, feed_forward=False, bias_downsample=True"
    )
    return _fenced(
        f"from monai.networks.nets import {name}\n"
        "from safetensors.torch import load_file\n\n"
        f"net = {name}({build}).eval()\n"
        'net.load_state_dict(load_file("model.safetensors"))',
        "python",
    )


def _facts(model: Encoder) -> str:
    cfg = model.pretrained_cfg
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "architecture": f"`{cfg.architecture}`, {parameters / 1e6:.1f} M parameters",
        "embedding": f"{cfg.num_features} numbers" + (f"; {cfg.num_classes} outputs" if cfg.num_classes else ""),
        "input": f"[B, {cfg.in_chans}, D, H, W] float32",
        "pretraining": cfg.ssl_method or "not stated",
        "licence of the weights": cfg.licence or "not stated: ask whoever made them",
        "paper": cfg.paper,
        "code": cfg.repository,
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)


def _cohorts(cfg: PretrainedCfg) -> str:
    if not cfg.cohorts:
        return "Not recorded: an overlap with a test set cannot be excluded."
    rows = [(c.name, f"{c.patients:,}", f"{c.scans:,}", ", ".join(c.conditions)) for c in cfg.cohorts]
    total = ("**total**", f"{sum(c.patients for c in cfg.cohorts):,}", f"{sum(c.scans for c in cfg.cohorts):,}", "")
    return _table(("data set", "patients", "scans", "conditions"), [*rows, total])


def _scores(cfg: PretrainedCfg) -> str:
    rows = [
        (s.task, s.mode, f"{s.value:g}" + (f" ± {s.sd:g}" if s.sd is not None else ""), s.metric, s.source)
        for s in cfg.scores
    ]
    return _table(("task", "used as", "value", "metric", "source"), rows) if rows else ""


def _provenance(config: Mapping[str, Any]) -> str:
    facts = config["provenance"] | {"sha256 of model.safetensors": config["pretrained_cfg"]["sha256"]}
    facts["left_out"] = ", ".join(facts.get("left_out", ()))
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items() if value)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_one_line, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _fenced(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
