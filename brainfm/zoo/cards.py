"""A publication as data: its weights, input contracts, cohorts, licences and scores, in one YAML file, a card.

The `config.json` of a model's folder has the same schema. Reading a card imports neither numpy nor torch: contracts
and readouts stay plain data in it until a model is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from brainfm.assets import ASSETS
from brainfm.errors import WeightsError
from brainfm.files import one_line
from brainfm.schema import Checked, read_yaml
from brainfm.system import expanded

ZOO = Path(__file__).parent
COHORTS = ZOO / "cohorts.yaml"


@dataclass(frozen=True)
class Publication(Checked):
    """Where weights were published: the title, the paper, the authors' code, and how to cite it (BibTeX)."""

    title: str = ""
    paper: str | None = None
    repository: str | None = None
    citation: str | None = None


@dataclass(frozen=True)
class Licence(Checked):
    """What may be done with the authors' code and weights.

    Attributes:
        code: SPDX name, where there is one; None where none is stated.
        weights: The same of the weights.
        gated: Whether the weights are given out only to those who asked.
        redistribute: Whether they may be passed on.
        accept: Whether it has to be accepted before the weights are taken: it is for research only, not for commerce,
            not stated, or has terms of its own.
        terms: What else is asked, or where these facts are from.
    """

    code: str | None = None
    weights: str | None = None
    gated: bool = False
    redistribute: bool = True
    accept: bool = False
    terms: str = ""


@dataclass(frozen=True)
class Cohort(Checked):
    """A data set that a weight was pretrained on.

    Attributes:
        name: What it is called.
        patients: In it; 0 where nobody says how many.
        scans: The same.
        conditions: Of the patients.

    Example:
        >>> import brainfm
        >>> brainfm.get_pretrained_cfg("simclr_resnet18_3d").cohorts[0]
        Cohort(name='ADNI', patients=3028, scans=21778, conditions=('H', 'MCI', 'AD'))
    """

    name: str
    patients: int = 0
    scans: int = 0
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score(Checked):
    """A published result: `value` ± `sd` of `metric` on `task`, reached by using the encoder as `mode` says.

    Attributes:
        task: What was predicted, and on which data set.
        metric: Of the score, with its unit, such as "MAE, years".
        mode: How the encoder was used, such as "linear probe" or "fine-tuned".
        value: The mean, in the metric's unit.
        sd: The standard deviation, likewise; None where none was published.
        source: Where it was published.

    Example:
        >>> import brainfm
        >>> score = brainfm.get_pretrained_cfg("simclr_resnet18_3d").scores[3]
        >>> print(f"{score.task}, {score.mode}: {score.value} ± {score.sd} ({score.metric})")
        age (IXI), linear probe: 5.9 ± 0.16 (MAE, years)
    """

    task: str
    metric: str
    mode: str
    value: float
    sd: float | None = None
    source: str = ""


@dataclass(frozen=True)
class WeightsSource(Checked):
    """Where a weight file is; the first that is given is taken.

    Attributes:
        file: On this machine; in a YAML file a relative path is relative to that.
        hub: Repository on the Hugging Face Hub, "org/name".
        revision: Its commit, branch or tag.
        filename: The file there.
        url: Where it can be downloaded.
        page: The page from which people take it, where no program may: it is named, and not fetched.
        seed: Of an untrained control, whose weights are no file: the network's initial ones, drawn by this seed.
    """

    file: str | None = None
    hub: str | None = None
    revision: str | None = None
    filename: str = "model.safetensors"
    url: str | None = None
    page: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page is not None and not self.page.startswith(("https://", "http://")):
            raise ValueError(f"page is {self.page!r}, and must be the address of one: https://…")

    @property
    def words(self) -> str:
        """Where weights are taken from, in words; empty where no source is named."""
        if self.file:
            return "in this package" if Path(self.file).resolve().parent == ASSETS.resolve() else self.file
        if self.hub:
            return f"hf-hub:{self.hub}" + (f"@{self.revision}" if self.revision else "")
        drawn = "" if self.seed is None else f"drawn by seed {self.seed}"
        return self.url or self.page or drawn


@dataclass(frozen=True)
class Keys(Checked):
    """How the names in the authors' file become the network's. A file that has the network's already is left alone.

    Attributes:
        take: Where the file keeps the network, as names one in another with dots, such as "network_weights.encoder";
            None looks in the usual places.
        strip: Prefixes that are taken off, each where every name left has it.
        rename: Regular expression → what takes its place, in order.
        drop: Regular expressions of names, after renaming, that the encoder does not need.
    """

    take: str | None = None
    strip: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict, hash=False)
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern, new in (self.rename | dict.fromkeys(self.drop, "")).items():
            try:
                re.sub(pattern, new, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"Keys: no regular expression: {pattern!r} → {new!r} ({error})") from error


@dataclass(frozen=True)
class Head(Checked):
    """What the classifier in a model's folder predicts: `head` of its config.json, beside the card.

    Attributes:
        label: What is predicted: the column that was learned.
        kind: What its values are.
        title: Of the task, for readers.
        unit: Of a regression, such as "years".
        classes: Their words, in the order of the outputs; of a binary one the second is the positive, whose probability
            the one output gives.
        mean: Of a regression, whose prediction is output · std + mean.
        std: The same.
        slope: Of the correction of age bias by Cole's rule: (prediction − intercept) / slope.
        intercept: The same.
        threshold: The probability from which the positive class of a binary one is predicted.
        optimised: Whether it learned from embeddings of `brainfm.optimize`, as a probe does, or of the network itself.
        sha256: Of the file of arrays beside the weights.
        run: What the run was made of, as a digest.
    """

    label: str
    kind: Literal["binary", "multiclass", "regression"]
    title: str = ""
    unit: str = ""
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = 0.5
    optimised: bool = False
    sha256: str = ""
    run: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"Head: threshold is {self.threshold}, and must be a probability")
        if self.slope == 0:
            raise ValueError("Head: slope is 0, and predictions are divided by it")
        if self.kind != "regression" and len(self.classes) < 2:
            raise ValueError(f"Head: a {self.kind} one has two classes or more, and here are {len(self.classes)}")

    @property
    def outputs(self) -> int:
        """Of the classifier."""
        return len(self.classes) if self.kind == "multiclass" else 1


@dataclass(frozen=True)
class WeightsCard(Checked):
    """One set of weights of a model.

    Attributes:
        source: Where it is.
        digest: "sha256:…" or "git-blob:…" of the file at the source, in hex; None where none is known. Of a sha256, the
            first 8 digits are enough, as torch.hub's file names have them.
        container: What the authors' file is, in words.
        keys: How its names become the network's.
        num_classes: Outputs of the classifier in the file; 0 for an encoder without one.
        notes: What a user should know, instead of the model's.
        cohorts: What it was trained on; None is the card's.
        scores: Published results.
        facts: "seen" where somebody here opened the file, "third-party" where digest and container are others' word.
    """

    source: WeightsSource = WeightsSource()
    digest: str | None = None
    container: str = ""
    keys: Keys = Keys()
    num_classes: int = 0
    notes: str | None = None
    cohorts: tuple[Cohort, ...] | None = None
    scores: tuple[Score, ...] = ()
    facts: Literal["seen", "third-party"] = "third-party"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digest is not None and not re.fullmatch(
            r"sha256:([0-9a-fA-F]{8}|[0-9a-fA-F]{64})|git-blob:[0-9a-fA-F]{40}", self.digest
        ):
            raise ValueError(
                f"digest is {self.digest!r}, and must be sha256: and 64 hex digits, or git-blob: and 40; or the first "
                "8 digits of a sha256"
            )


@dataclass(frozen=True)
class ModelCard(Checked):
    """A model: a network with its arguments, its input, and its weights by tag; the first is the default.

    Attributes:
        network: A constructor of `brainfm.models`, or one that was registered.
        title: What it is, in one line.
        args: Of the constructor.
        input: Which of the card's inputs.
        readout: Of a `Readout`.
        num_features: Width of the embedding.
        in_chans: Input channels.
        ssl_method: How it is pretrained, such as "SimCLR"; None for a supervised network.
        recipe: The recipe of `brainfm.train` that makes such weights.
        notes: What a user should know.
        weights: By tag; none where none were published.
    """

    network: str
    num_features: int
    title: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    input: str | None = None
    readout: dict[str, Any] = field(default_factory=dict)
    in_chans: int = 1
    ssl_method: str | None = None
    recipe: str | None = None
    notes: str = ""
    weights: dict[str, WeightsCard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_features < 1 or self.in_chans < 1:
            raise ValueError(f"num_features is {self.num_features}, in_chans {self.in_chans}; both are 1 or more")


@dataclass(frozen=True)
class Card(Checked):
    """A publication.

    Attributes:
        publication: Where it was published.
        licence: Of its code and weights.
        cohorts: What its weights were pretrained on.
        inputs: Input contracts by name: the fields of an `InputSpec`.
        models: By name.
    """

    publication: Publication = Publication()
    licence: Licence = Licence()
    cohorts: tuple[Cohort, ...] = ()
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, ModelCard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, model in self.models.items():
            if model.input is not None and model.input not in self.inputs:
                raise ValueError(f"{name}: its input {model.input!r} is none of the card's: {', '.join(self.inputs)}")


@dataclass(frozen=True)
class CohortNames(Checked):
    """What data sets are called, `cohorts.yaml`: of each cohort, what another name is to it → the names.

    Attributes:
        names: Names that are of the cohort wherever they are met.
        names_if_asked: Names that are too short or too common to be taken from a folder.
        folders_of_others: Folders that are called as a cohort is, and hold something else.
    """

    names: dict[str, dict[str, tuple[str, ...]]]
    names_if_asked: dict[str, dict[str, tuple[str, ...]]]
    folders_of_others: tuple[str, ...]


def read_card(path: Path) -> Card:
    """The card in a YAML file. Raises WeightsError, which says what is wrong with it."""
    try:
        card = Card.from_dict(read_yaml(path.read_text(encoding="utf-8")))
        return replace(card, models={name: _beside(path, model) for name, model in card.models.items()})
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # of no home, of recursion
        raise WeightsError(f"{path}: not a card ({one_line(error)})") from error


def _beside(path: Path, model: ModelCard) -> ModelCard:
    """A model whose weight files are where they are for who reads its card here."""
    weights = {
        tag: replace(w, source=replace(w.source, file=str((path.parent / expanded(w.source.file)).resolve())))
        for tag, w in model.weights.items()
        if w.source.file
    }
    return replace(model, weights=model.weights | weights)


def zoo_cards() -> list[Path]:
    """The files of all cards in this package."""
    return sorted(path for path in ZOO.glob("*.yaml") if path != COHORTS)


@cache
def cohort_names() -> CohortNames:
    """The names of cohorts that this package knows."""
    return CohortNames.from_dict(read_yaml(COHORTS.read_text(encoding="utf-8")))
