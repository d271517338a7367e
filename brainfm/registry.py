"""Names → constructors and what is known of their weights. Models of this package are cards; code may register more."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from brainfm.errors import ModelNameError
from brainfm.schema import Checked
from brainfm.system import expanded
from brainfm.zoo.cards import Card, Licence, ModelCard, read_card, zoo_cards

if TYPE_CHECKING:
    from brainfm.pretrained import PretrainedCfg

Entrypoint = Callable[..., Any]
E = TypeVar("E", bound=Entrypoint)


@dataclass(frozen=True)
class Listing(Checked):
    """One line of `brainfm list`: what can be said of a model without importing its network.

    Attributes:
        name: `architecture.tag`, or the architecture where it has no weights.
        title: What it is.
        num_features: Width of the embedding.
        modality: What the voxels of its input are.
        channels: Its input's channels.
        space: The template whose space a scan must be in, or None.
        contract: The input contract by its name on the card, or None; `brainfm info` says all of it.
        ssl_method: How it was pretrained, or None.
        licence: Of the weights, or None where none is stated.
        gated: Whether they are given out only to those who asked.
        redistribute: Whether they may be passed on.
        accept: Whether their licence has to be accepted before the first load.
        source: Where the weights are; "" where there are none.
        facts: "seen", or "third-party" where nobody here could check what is said of the file.
    """

    name: str
    title: str = ""
    num_features: int = 0
    modality: str | None = None
    channels: tuple[str, ...] = ()
    space: str | None = None
    contract: str | None = None
    ssl_method: str | None = None
    licence: str | None = None
    gated: bool = False
    redistribute: bool = True
    accept: bool = False
    source: str = ""
    facts: str = "seen"


@dataclass(frozen=True, eq=False)
class _Coded:
    """A model under `@register_model`: its constructor, and what is known of its weights, by tag."""

    entrypoint: Entrypoint
    cfgs: Mapping[str, PretrainedCfg]

    @property
    def module(self) -> str:
        return self.entrypoint.__module__

    @property
    def tags(self) -> list[str]:
        return list(self.cfgs)

    def cfg(self, tag: str) -> PretrainedCfg:
        return self.cfgs[tag]

    def listing(self, tag: str) -> Listing:
        cfg = self.cfgs[tag]
        spec = cfg.input_spec
        return Listing(
            name=cfg.name,
            title=(self.entrypoint.__doc__ or "").strip().partition("\n")[0],
            num_features=cfg.num_features,
            modality=spec.representation if spec else None,
            channels=spec.channels if spec else (),
            space=spec.space if spec else None,
            ssl_method=cfg.ssl_method,
            licence=cfg.licence,
            gated=cfg.gated,
            redistribute=cfg.redistribute,
            accept=cfg.accept,
            source=cfg.source,
            facts=cfg.facts,
        )


@dataclass(frozen=True, eq=False)
class _Carded:
    """A model of a card, of a file where it is in one: its network is imported when it is asked for."""

    name: str
    card: Card
    file: Path | None = None

    @property
    def model(self) -> ModelCard:
        return self.card.models[self.name]

    @property
    def module(self) -> str:
        own = _registered.get(self.model.network)
        return own.module if isinstance(own, _Coded) else f"brainfm.models.{self.model.network}"

    @property
    def tags(self) -> list[str]:
        return list(self.model.weights) or [""]

    @cached_property
    def entrypoint(self) -> Entrypoint:
        """The network's constructor with the card's arguments, under the model's name."""
        build = network(self.model.network)

        def constructor(**kwargs: Any) -> Any:
            return build(**self.model.args | kwargs)

        constructor.__name__ = constructor.__qualname__ = self.name
        constructor.__module__, constructor.__doc__ = build.__module__, self.model.title
        return constructor

    def cfg(self, tag: str) -> PretrainedCfg:
        from brainfm.pretrained import cfg_of

        return cfg_of(self.card, self.name, tag)

    def listing(self, tag: str) -> Listing:
        model, contract = self.model, self.card.inputs.get(self.model.input or "")
        weights = model.weights.get(tag)
        licence = self.card.licence if weights else Licence()
        return Listing(
            name=f"{self.name}.{tag}" if tag else self.name,
            title=model.title,
            num_features=model.num_features,
            modality=contract.get("representation", "T1w") if contract is not None else None,
            channels=tuple(contract.get("channels", ("T1w",))) if contract is not None else (),
            space=contract.get("space") if contract is not None else None,
            contract=model.input,
            ssl_method=model.ssl_method,
            licence=licence.weights,
            gated=licence.gated,
            redistribute=licence.redistribute,
            accept=licence.accept or licence.gated,
            source=weights.source.words if weights else "",
            facts=weights.facts if weights else "seen",
        )


_FAMILIES = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "models")])} - {
    "adaptation",
    "encoder",
    "features",
}

_ALIASES = {"swin_t_3d": "swin3d_t"}  # other names of models, which are listed under one

_registered: dict[str, _Coded | _Carded] = {}  # beside the models of this package's own cards


@cache
def _zoo() -> dict[str, _Carded]:
    """The models of this package's cards, which are read when a model is first asked for."""
    cards = {file: read_card(file) for file in zoo_cards()}
    return {name: _Carded(name, card, file) for file, card in cards.items() for name in card.models}


def _models() -> dict[str, _Coded | _Carded]:
    return {**_zoo(), **_registered}


# --- Registering ----------------------------------------------------------------------------------


@overload
def register_model(entrypoint: E) -> E: ...


@overload
def register_model(*, cfgs: Mapping[str, PretrainedCfg] | None = None) -> Callable[[E], E]: ...


def register_model(
    entrypoint: E | None = None, *, cfgs: Mapping[str, PretrainedCfg] | None = None
) -> E | Callable[[E], E]:
    """Register a constructor under its function's name, with or without cfgs by tag; the first tag is the default.

    The constructor takes `num_classes`, `in_chans`, `global_pool`, `drop_rate` and its own keywords, and returns a
    module that keeps the contract of `brainfm.models.Encoder`, with initial weights; `create_model` loads the trained
    ones. Its name can be the `network` of a card too.

    Args:
        entrypoint: The constructor; None where `cfgs` are given, and this is called as a decorator's maker.
        cfgs: What is known of its weights, by tag.

    Returns:
        The constructor as it was given, or a decorator that returns it.

    Raises:
        ValueError: The name is taken by another constructor or by a network of this package, or holds a character other
            than letters, digits and "_".

    Example:
        >>> import brainfm
        >>> from brainfm.models.vit import VisionTransformer
        >>> @brainfm.register_model(cfgs={"my_lab": brainfm.PretrainedCfg(file="weights.safetensors", num_features=96)})
        ... def my_vit(**kwargs):
        ...     return VisionTransformer(dim=96, depth=4, num_heads=3, **kwargs)
        >>> brainfm.create_model("my_vit").num_features
        96
    """

    def register(entrypoint: E) -> E:
        from brainfm.pretrained import PretrainedCfg

        name = entrypoint.__name__
        _check_name(name)
        if name in _FAMILIES:
            raise ValueError(f"{name!r} is a network of this package; give yours another name")
        known = _models().get(name)
        if known is not None:
            other = known.entrypoint
            if (other.__module__, other.__qualname__) != (entrypoint.__module__, entrypoint.__qualname__):
                raise ValueError(f"a model named {name!r} is already registered, by {other.__module__}")
        given = cfgs or {"": PretrainedCfg()}
        tagged = {tag: replace(cfg, architecture=name, tag=tag) for tag, cfg in given.items()}
        _registered[name] = _Coded(entrypoint, tagged)
        return entrypoint

    return register if entrypoint is None else register(entrypoint)


def register_card(card: str | os.PathLike[str] | Card) -> list[str]:
    """Register every model of a card: a YAML file, or what `brainfm.zoo.cards.read_card` gives.

    A card's `network` is a module of `brainfm.models`, or the name of a constructor under `@register_model`. A file
    that is registered again is read again.

    Args:
        card: The file's path, or the card.

    Returns:
        The models' names.

    Raises:
        WeightsError: The file is not a card, or a contract in it is not one.
        ModelNameError: There is no such network (a ValueError).
        ValueError: A name is taken by another model, or holds a character other than letters, digits and "_".

    Example:
        >>> import brainfm
        >>> from pathlib import Path
        >>> card = "models: {my_vit: {network: vit, args: {dim: 96, depth: 4, num_heads: 3}, num_features: 96}}"
        >>> _ = Path("my_lab.yaml").write_text(card)
        >>> brainfm.register_card("my_lab.yaml")
        ['my_vit']
    """
    file = None
    if not isinstance(card, Card):
        file = expanded(card).resolve()
        card = read_card(file)
    models = {name: _Carded(name, card, file) for name in card.models}
    for name, model in models.items():
        _check_name(name)
        known = _models().get(name)
        again = isinstance(known, _Carded) and (known.card == card or (file is not None and known.file == file))
        if known is not None and not again:
            raise ValueError(f"a model named {name!r} is already registered, by {known.module}")
        if not has_network(model.model.network):
            raise ModelNameError(f"{name}: {_no_network(model.model.network)}")
        for tag in model.tags:
            model.cfg(tag)  # reads its contract and readout
    _registered.update(models)
    return list(models)


def additions() -> tuple[list[str], list[Card | Path]]:
    """What was registered beside this package's own cards, for another process: modules, and cards or their files."""
    coded = {model.module for model in _registered.values() if isinstance(model, _Coded)} - {"__main__"}
    cards: dict[int, Card | Path] = {
        id(model.card): model.file or model.card for model in _registered.values() if isinstance(model, _Carded)
    }
    return sorted(coded), list(cards.values())


def register_additions(added: tuple[list[str], list[Card | Path]]) -> None:
    """Register what `additions` gave, where it is not registered yet."""
    modules, cards = added
    for module in modules:
        importlib.import_module(module)
    for card in cards:
        register_card(card)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w+", name, flags=re.ASCII):
        raise ValueError(f"a model name is made of letters, digits and '_', not {name!r}")
    if name in _ALIASES:
        raise ValueError(f"{name!r} is another name of {_ALIASES[name]}; give yours another")


# --- Networks -------------------------------------------------------------------------------------


def network_of(name: str) -> tuple[str, dict[str, Any]]:
    """The network of a registered model and its arguments; of a constructor under `@register_model`, itself."""
    model = _look_up(name)
    return (model.model.network, dict(model.model.args)) if isinstance(model, _Carded) else (_arch(name), {})


def has_network(name: str) -> bool:
    """Whether `network` knows a name; no code of a network is imported."""
    return name in _FAMILIES or isinstance(_registered.get(name), _Coded)


def network(name: str) -> Entrypoint:
    """The constructor that a card calls `network`: a family's of this package, or one under `@register_model`.

    Raises:
        ModelNameError: There is none.
    """
    own = _registered.get(name)
    if isinstance(own, _Coded):
        return own.entrypoint
    if name not in _FAMILIES:
        raise ModelNameError(_no_network(name))
    from brainfm.models import constructor

    return constructor(name)


def _no_network(name: str) -> str:
    known = sorted(_FAMILIES | {name for name, model in _registered.items() if isinstance(model, _Coded)})
    return f"there is no network {name!r}; known: {', '.join(known)}"


# --- Listing --------------------------------------------------------------------------------------


def list_models(filter: str | Sequence[str] = "", *, pretrained: bool = False, module: str = "") -> list[str]:
    """The registered models, sorted.

    Args:
        filter: A wildcard such as "*resnet*", or several; a name that matches any of them is listed.
        pretrained: Only those whose weights exist, by their full names `architecture.tag`.
        module: Only those of this network's module, such as "vit".

    Returns:
        Their names; empty where none matches, which raises nothing.

    Example:
        >>> import brainfm
        >>> brainfm.list_models("mae_*")
        ['mae_vit_base_3d', 'mae_vit_large_3d', 'mae_vit_tiny_3d']
    """
    names = [name for name, model in _models().items() if not module or model.module.split(".")[-1] == module]
    if pretrained:
        models = [_models()[name] for name in names]
        listings = [model.listing(tag) for model in models for tag in model.tags]
        names = [listing.name for listing in listings if listing.source]
    patterns = [filter] if isinstance(filter, str) else list(filter)
    if any(patterns):
        names = [
            n for n in names if any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(_arch(n), p) for p in patterns)
        ]
    return sorted(names)


def list_pretrained(filter: str | Sequence[str] = "") -> list[str]:
    """The full names, `architecture.tag`, of all models whose weights exist.

    Args:
        filter: As of `list_models`.

    Returns:
        The names, sorted; empty where none matches, which raises nothing.

    Example:
        >>> import brainfm
        >>> brainfm.list_pretrained("test_*")
        ['test_resnet_3d.phantoms', 'test_vit_3d.phantoms']
    """
    return list_models(filter, pretrained=True)


def listing(name: str) -> Listing:
    """What can be said of a model without importing its network. Raises ModelNameError where there is none."""
    model = _look_up(name)
    return model.listing(_tag(name) or model.tags[0])


# --- Looking up -----------------------------------------------------------------------------------


def is_model(name: str) -> bool:
    """Whether `create_model` knows this name, with or without a tag.

    Args:
        name: Of a registered model; names of folders and repositories are not among them.

    Returns:
        True or False; no name raises an error.

    Example:
        >>> import brainfm
        >>> brainfm.is_model("test_resnet_3d.phantoms"), brainfm.is_model("test_resnet_4d")
        (True, False)
    """
    model = _models().get(_arch(name))
    return model is not None and ("." not in name or _tag(name) in model.tags)


def model_entrypoint(name: str) -> Entrypoint:
    """The constructor registered under a name.

    Args:
        name: With or without a tag.

    Returns:
        The constructor: it takes `num_classes`, `in_chans`, `global_pool`, `drop_rate` and the network's own keywords,
        and gives the network with initial weights.

    Raises:
        ModelNameError: There is none (a ValueError).

    Example:
        >>> import brainfm
        >>> brainfm.model_entrypoint("test_vit_3d")().num_features
        96
    """
    return _look_up(name).entrypoint


def get_pretrained_cfg(name: str) -> PretrainedCfg:
    """The cfg of `architecture.tag`, or of the default tag of `architecture`.

    Args:
        name: Of a registered model.

    Returns:
        What its weights are, where they live, and the input they expect; of a model without weights, all but these.

    Raises:
        ModelNameError: No such model or tag; the message lists the nearest ones. It is a ValueError.

    Example:
        >>> import brainfm
        >>> brainfm.get_pretrained_cfg("test_resnet_3d").tag
        'phantoms'
    """
    model = _look_up(name)
    return model.cfg(_tag(name) or model.tags[0])


def _look_up(name: str) -> _Coded | _Carded:
    architecture, models = _arch(name), _models()
    if is_model(name):
        return models[architecture]
    if architecture in models:
        tags = ", ".join(f"{architecture}.{known}" for known in models[architecture].tags if known) or "none"
        raise ModelNameError(f"model {architecture!r} has no weights tagged {_tag(name)!r}; known: {tags}")
    near = difflib.get_close_matches(architecture, models, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "brainfm.list_models() names them all."
    raise ModelNameError(f"unknown model {name!r}; {hint}")


def _arch(name: str) -> str:
    architecture = name.partition(".")[0]
    return _ALIASES.get(architecture, architecture)


def _tag(name: str) -> str:
    return name.partition(".")[2]
