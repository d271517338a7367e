"""What is known of a weight, in words: said here once, for `brainfm info`, the model card and README's table.

What nobody here could check, and what nobody states, is said too. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import indent

from brainfm.contract import describe
from brainfm.pretrained import PretrainedCfg

Row = tuple[str, ...]

COHORT_COLUMNS = ("data set", "patients", "scans", "conditions")
SCORE_COLUMNS = ("task", "used as", "value", "metric", "source")
NO_CONTRACT = "None was recorded."
NO_COHORTS = "Not recorded: an overlap with a test set cannot be excluded."
THIRD_PARTY = "nobody here has opened the published file; its digest and container are as others report them"


@dataclass(frozen=True)
class About:
    """What is known of a weight.

    Attributes:
        name: The full name, `architecture.tag`.
        has_weights: Whether there is a weight file, or only a network.
        facts: Label → value, in the order to be read in. Where what should be known is not, the value says so.
        notes: What a user should know.
        contract: The input contract in plain words, a line a fact; "" where none was recorded.
        cohorts: A row a pretraining data set, with the `COHORT_COLUMNS`.
        patients: Of all cohorts.
        scans: Likewise.
        scores: A row a published result, with the `SCORE_COLUMNS`.
        citation: BibTeX, or "".
    """

    name: str
    has_weights: bool
    facts: dict[str, str]
    notes: str
    contract: str
    cohorts: tuple[Row, ...]
    patients: str
    scans: str
    scores: tuple[Row, ...]
    citation: str


def about_weight(cfg: PretrainedCfg, weights: str, parameters: int | None = None) -> About:
    """What is known of a weight, by its cfg.

    Args:
        cfg: What the weight is and expects.
        weights: Where it is, in words; "" where there is none.
        parameters: Of the network, where they were counted.
    """
    return About(
        name=cfg.name,
        has_weights=bool(weights),
        facts={label: value for label, value in _facts(cfg, weights, parameters).items() if value},
        notes=cfg.notes,
        contract=describe(cfg.input_spec) if cfg.input_spec else "",
        cohorts=tuple((c.name, _count([c.patients]), _count([c.scans]), ", ".join(c.conditions)) for c in cfg.cohorts),
        patients=_count([c.patients for c in cfg.cohorts]),
        scans=_count([c.scans for c in cfg.cohorts]),
        scores=tuple(
            (s.task, s.mode, f"{s.value:g}" + (f" ± {s.sd:g}" if s.sd is not None else ""), s.metric, s.source)
            for s in cfg.scores
        ),
        citation=cfg.citation or "",
    )


def _facts(cfg: PretrainedCfg, weights: str, parameters: int | None) -> dict[str, str | None]:
    def wanted(value: str | None, unstated: str) -> str | None:
        return value or (unstated if weights else None)

    return {
        "architecture": f"{cfg.architecture}, {millions(parameters)} parameters" if parameters else None,
        "embedding": f"{cfg.num_features}-d" + (f"; {cfg.num_classes} outputs" if cfg.num_classes else ""),
        "readout": str(cfg.readout),
        "input": f"[B, {cfg.in_chans}, D, H, W] float32",
        "weights": weights or "none published",
        "digest": _digest(cfg) if weights else None,
        "container": cfg.container,
        "third-party facts": THIRD_PARTY if weights and cfg.facts == "third-party" else None,
        "pretraining": "none: an untrained control"
        if cfg.is_drawn
        else wanted(cfg.ssl_method, "not stated: no self-supervised method is named"),
        "licence of the weights": wanted(cfg.licence, "not stated: ask whoever made them"),
        "licence of the code": cfg.code_licence or ("not stated" if cfg.repository else None),
        "access": "gated: ask for it where the weights are" if cfg.gated else None,
        "acceptance": "needed once: accept_licence=True" if cfg.accept else None,
        "redistribution": None if cfg.redistribute else "not allowed",
        "terms": cfg.terms,
        "publication": cfg.title,
        "paper": cfg.paper,
        "code": cfg.repository,
    }


def _count(numbers: Sequence[int]) -> str:
    """How many there are together, in words; 0 is a number that nobody says."""
    total = f"{sum(numbers):,}"
    return total if all(numbers) else f"at least {total}" if any(numbers) else "?"


def _digest(cfg: PretrainedCfg) -> str | None:
    if cfg.sha256 or cfg.git_blob:
        begins = "begins with " if cfg.sha256 and len(cfg.sha256) < 64 else ""
        return f"sha256 {begins}{cfg.sha256}" if cfg.sha256 else f"git blob {cfg.git_blob}"
    return None if cfg.file or cfg.is_drawn else "none is known: later downloads are held to the first"


def millions(parameters: int) -> str:
    """A number of parameters, in millions."""
    return f"{parameters / 1e6:.1f} M"


def as_text(known: About) -> str:
    """What is known of a weight, for a terminal: the facts in two columns, then a paragraph a subject."""
    facts = {"model": known.name, **known.facts, "notes": " ".join(known.notes.split())}
    paragraphs = [_columns([(label, value) for label, value in facts.items() if value])]
    paragraphs.append("Input contract\n" + indent(known.contract or NO_CONTRACT, "  "))
    if known.cohorts:
        total = f"Pretrained on {known.patients} patients, {known.scans} scans"
        rows = _columns([COHORT_COLUMNS, *known.cohorts])
        paragraphs.append(f"{total}; testing on these is testing on training data\n{indent(rows, '  ')}")
    elif known.has_weights:
        paragraphs.append(f"Pretraining data\n  {NO_COHORTS}")
    if known.scores:
        paragraphs.append("Published scores\n" + indent(_columns([SCORE_COLUMNS, *known.scores]), "  "))
    if known.citation:
        paragraphs.append("Citation\n" + indent(known.citation, "  "))
    return "\n\n".join(paragraphs)


def _columns(rows: Sequence[Row]) -> str:
    """Rows as lines in columns; a column of whole numbers under its head stands to the right."""
    columns = []
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        is_numeric = all(cell.replace(",", "").isdigit() for cell in column[1:])
        columns.append([cell.rjust(width) if is_numeric else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
