"""What a weight is, where it lives, and what it expects: `PretrainedCfg`, and the way from a card to it and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from brainfm.contract import InputSpec, Readout
from brainfm.errors import WeightsError
from brainfm.files import one_line
from brainfm.schema import Checked, check_keys
from brainfm.zoo.cards import Card, Cohort, Keys, Licence, ModelCard, Publication, Score, WeightsCard, WeightsSource

# The fields that say which file, and those of them that name one.
_OF_THE_SOURCE = ("file", "hub_id", "hub_revision", "hub_filename", "url", "page", "seed", "sha256", "git_blob")
_SOURCES = ("file", "hub_id", "url", "page", "seed")


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
        page: The page from which people take it, where no program may.
        seed: Of an untrained control, whose weights are drawn.
        file: A file on this machine; comes before the Hub and the URL.
        sha256: Of the file at the source, or its first 8 digits; checked where given. None switches the check off.
        git_blob: The id that Git gives the file at the source, checked likewise.
        container: What the file at the source is, in words.
        keys: How its names become the network's.
        input_spec: The input contract.
        readout: How features become the embedding.
        num_features: Width of the embedding.
        num_classes: Outputs of the classifier in the weights; 0 for an encoder without one.
        in_chans: Input channels of the weights.
        ssl_method: How the weights were pretrained, such as "SimCLR", "MAE", or None.
        cohorts: What they were pretrained on.
        licence: Of the weights (an SPDX name where there is one).
        code_licence: Of the authors' code.
        gated: Whether the weights are given out only to those who asked.
        redistribute: Whether they may be passed on.
        accept: Whether the licence has to be accepted before the first load.
        terms: What else the licence asks.
        title: Of the publication.
        paper: Where they were published.
        repository: The authors' code.
        citation: BibTeX.
        recipe: The recipe of `brainfm.train` that makes such weights.
        notes: What a user should know.
        scores: Published results.
        facts: "seen", or "third-party" where nobody here could check what is said of the file.

    Example:
        >>> import brainfm
        >>> cfg = brainfm.get_pretrained_cfg("test_resnet_3d")
        >>> cfg.name, cfg.num_features, cfg.licence
        ('test_resnet_3d.phantoms', 128, 'Apache-2.0')
        >>> cfg.overlay({"notes": "mine"}).notes
        'mine'
    """

    architecture: str = ""
    tag: str = ""
    hub_id: str | None = None
    hub_revision: str | None = None
    hub_filename: str = "model.safetensors"
    url: str | None = None
    page: str | None = None
    seed: int | None = None
    file: str | None = None
    sha256: str | None = None
    git_blob: str | None = None
    container: str = ""
    keys: Keys = Keys()
    input_spec: InputSpec | None = None
    readout: Readout = Readout()
    num_features: int = 0
    num_classes: int = 0
    in_chans: int = 1
    ssl_method: str | None = None
    cohorts: tuple[Cohort, ...] = ()
    licence: str | None = None
    code_licence: str | None = None
    gated: bool = False
    redistribute: bool = True
    accept: bool = False
    terms: str = ""
    title: str = ""
    paper: str | None = None
    repository: str | None = None
    citation: str | None = None
    recipe: str | None = None
    notes: str = ""
    scores: tuple[Score, ...] = ()
    facts: Literal["seen", "third-party"] = "seen"

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", None if self.file is None else str(self.file))
        super().__post_init__()

    @property
    def name(self) -> str:
        """The full name, `architecture.tag`."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    @property
    def has_weights(self) -> bool:
        """Whether some source of weights is named."""
        return names_a_source(vars(self))

    @property
    def is_drawn(self) -> bool:
        """Whether the weights are those of an untrained control: no file, but drawn by a seed."""
        return self.seed is not None and not any((self.file, self.hub_id, self.url, self.page))

    @property
    def source(self) -> str:
        """Where `create_model(..., pretrained=True)` takes the weights from, in words; empty where there are none."""
        return WeightsSource(
            self.file, self.hub_id, self.hub_revision, self.hub_filename, self.url, self.page, self.seed
        ).words

    def overlay(self, changes: Mapping[str, Any]) -> PretrainedCfg:
        """The same cfg with some fields replaced. Raises ValueError for a field that does not exist.

        A new source replaces the old ones, and with them their digest, unless the changes give that too.
        """
        check_keys(changes, PretrainedCfg)
        given = PretrainedCfg.from_dict(changes)  # what is nested in plain data becomes what it stands for
        values = {name: getattr(given, name) for name in changes}
        if names_a_source(values):
            values = {item.name: item.default for item in fields(self) if item.name in _OF_THE_SOURCE} | values
        return replace(self, **values)

    def with_source_of(self, other: PretrainedCfg) -> PretrainedCfg:
        """The same cfg for the file of another, with its digest and the names in it."""
        return replace(self, **{name: getattr(other, name) for name in (*_OF_THE_SOURCE, "container", "keys")})

    def to_dict(self, *, sparse: bool = False) -> dict[str, Any]:
        """The cfg as plain data. A file on this machine means nothing elsewhere and is left out."""
        data = super().to_dict(sparse=sparse)
        data.pop("file", None)
        return data


def names_a_source(cfg: Mapping[str, Any]) -> bool:
    """Whether the fields of a cfg say where weights are."""
    return any(cfg.get(source) not in (None, "") for source in _SOURCES)


def cfg_of(card: Card, architecture: str, tag: str = "") -> PretrainedCfg:
    """The cfg of one set of weights of a card; without a tag, of the first, or of a model that has none.

    Raises:
        WeightsError: The card's contract or readout is not one.
    """
    model = card.models[architecture]
    tag = tag or next(iter(model.weights), "")
    weights = model.weights.get(tag, WeightsCard(cohorts=(), facts="seen"))
    licence = card.licence if model.weights else Licence(code=card.licence.code)
    source = weights.source
    kind, _, digest = (weights.digest or "").partition(":")
    try:
        spec = InputSpec.from_dict(card.inputs[model.input]) if model.input is not None else None
        readout = Readout.from_dict(model.readout)
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"the card of {architecture}: {one_line(error)}") from error
    return PretrainedCfg(
        architecture=architecture,
        tag=tag,
        hub_id=source.hub,
        hub_revision=source.revision,
        hub_filename=source.filename,
        url=source.url,
        page=source.page,
        seed=source.seed,
        file=source.file,
        sha256=digest if kind == "sha256" else None,
        git_blob=digest if kind == "git-blob" else None,
        container=weights.container,
        keys=weights.keys,
        input_spec=spec,
        readout=readout,
        num_features=model.num_features,
        num_classes=weights.num_classes,
        in_chans=model.in_chans,
        ssl_method=model.ssl_method,
        cohorts=card.cohorts if weights.cohorts is None else weights.cohorts,
        licence=licence.weights,
        code_licence=licence.code,
        gated=licence.gated,
        redistribute=licence.redistribute,
        accept=licence.accept or licence.gated,
        terms=licence.terms,
        title=card.publication.title,
        paper=card.publication.paper,
        repository=card.publication.repository,
        citation=card.publication.citation,
        recipe=model.recipe,
        notes=model.notes if weights.notes is None else weights.notes,
        scores=weights.scores,
        facts=weights.facts,
    )


def card_of(cfg: PretrainedCfg, network: str, args: Mapping[str, Any]) -> Card:
    """A card of one model with one set of weights, whose file lies beside it: that of a model's folder."""
    digest = f"sha256:{cfg.sha256}" if cfg.sha256 else f"git-blob:{cfg.git_blob}" if cfg.git_blob else None
    weights = WeightsCard(
        source=WeightsSource(file=cfg.hub_filename),
        digest=digest,
        num_classes=cfg.num_classes,
        scores=cfg.scores,
        facts=cfg.facts,
    )
    model = ModelCard(
        network=network,
        num_features=cfg.num_features,
        args=dict(args),
        input="input" if cfg.input_spec else None,
        readout=cfg.readout.to_dict(),
        in_chans=cfg.in_chans,
        ssl_method=cfg.ssl_method,
        recipe=cfg.recipe,
        notes=cfg.notes,
        weights={cfg.tag: weights},
    )
    return Card(
        publication=Publication(cfg.title, cfg.paper, cfg.repository, cfg.citation),
        licence=Licence(cfg.code_licence, cfg.licence, cfg.gated, cfg.redistribute, cfg.accept or cfg.gated, cfg.terms),
        cohorts=cfg.cohorts,
        inputs={"input": cfg.input_spec.to_dict()} if cfg.input_spec else {},
        models={cfg.architecture: model},
    )
