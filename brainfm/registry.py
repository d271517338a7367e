"""Names → constructors and what is known of their weights. Models of this package are cards; code may register more."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import os
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from brainfm.errors import ModelNameError
from brainfm.schema import Checked
from brainfm.zoo.cards import Card, ModelCard, read_card, zoo_cards

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
        ssl_method: How it was pretrained, or None.
        licence: Of the weights, or None where none is stated.
        gated: Whether they are given out only to those who asked.
        redistribute: Whether they may be passed on.
        source: Where the weights are; "" where there are none.
        facts: "seen", or "third-party" where nobody here could check what is said of the file.
    """

    name: str
    title: str = ""
    num_features: int = 0
    modality: str | None = None
    channels: tuple[str, ...] = ()
    space: str | None = None
    ssl_method: str | None = None
    licence: str | None = None
    gated: bool = False
    redistribute: bool = True
    source: str = ""
    facts: str = "seen"


@dataclass(frozen=True, eq=False)
class _Model:
    """A registered model: what is asked of it is made when it is asked for.

    Attributes:
        module: Where its network is defined.
        entrypoint: Gives the constructor.
        cfgs: Give the cfg, by tag; the first is the default.
        listings: Give the line of the list, by tag.
        card: Its part of a card, where it has one.
    """

    module: str
    entrypoint: Callable[[], Entrypoint]
    cfgs: Mapping[str, Callable[[], PretrainedCfg]]
    listings: Mapping[str, Callable[[], Listing]]
    card: ModelCard | None = None


_registered: dict[str, _Model] = {}
_FAMILIES = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "models")])} - {"encoder"}


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

    Raises:
        ValueError: The name is taken by another constructor, or holds a character other than letters, digits and "_".

    Example:
        >>> @brainfm.register_model(cfgs={"my_lab": PretrainedCfg(file="weights.safetensors", input_spec=spec)})
        ... def my_encoder(**kwargs):
        ...     return MyEncoder(**kwargs)
    """

    def register(entrypoint: E) -> E:
        from brainfm.pretrained import PretrainedCfg

        name = entrypoint.__name__
        _check_name(name)
        known = _models().get(name)
        if known is not None:
            other = known.entrypoint()
            if (other.__module__, getattr(other, "__qualname__", name)) != (
                entrypoint.__module__,
                entrypoint.__qualname__,
            ):
                raise ValueError(f"a model named {name!r} is already registered, by {other.__module__}")
        tagged = {tag: replace(cfg, architecture=name, tag=tag) for tag, cfg in (cfgs or {"": PretrainedCfg()}).items()}
        _registered[name] = _Model(
            module=entrypoint.__module__,
            entrypoint=lambda: entrypoint,
            cfgs={tag: functools.partial(_given, cfg) for tag, cfg in tagged.items()},
            listings={tag: functools.partial(_listing_of_cfg, cfg, entrypoint) for tag, cfg in tagged.items()},
        )
        return entrypoint

    return register if entrypoint is None else register(entrypoint)


def register_card(card: str | os.PathLike[str] | Card) -> list[str]:
    """Register every model of a card: a YAML file, whose relative paths are relative to it.

    A card's `network` is a module of `brainfm.models`, or the name of a constructor under `@register_model`.

    Returns:
        The models' names.

    Raises:
        WeightsError: The file is not a card.
        ValueError: A name is taken by another model.

    Example:
        >>> brainfm.register_card("my_lab.yaml")
        ['my_encoder']
    """
    folder = Path() if isinstance(card, Card) else Path(card).expanduser().resolve().parent
    content = card if isinstance(card, Card) else read_card(Path(card).expanduser().resolve())
    for name in content.models:
        _check_name(name)
        if name in _models():
            raise ValueError(f"a model named {name!r} is already registered, by {_models()[name].module}")
    return _add_card(content, folder)


def _add_card(card: Card, folder: Path) -> list[str]:
    for name, model in card.models.items():
        tags = list(model.weights) or [""]
        _registered[name] = _Model(
            module=f"brainfm.models.{model.network}",
            entrypoint=functools.partial(_carded_constructor, name, model),
            cfgs={tag: functools.cache(functools.partial(_carded_cfg, card, name, tag, folder)) for tag in tags},
            listings={tag: functools.partial(_listing_of_card, card, name, tag) for tag in tags},
            card=model,
        )
    return list(card.models)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w+", name, flags=re.ASCII):
        raise ValueError(f"a model name is made of letters, digits and '_', not {name!r}")


def _given(cfg: PretrainedCfg) -> PretrainedCfg:
    return cfg


def _carded_cfg(card: Card, name: str, tag: str, folder: Path) -> PretrainedCfg:
    from brainfm.pretrained import cfg_of

    return cfg_of(card, name, tag, folder)


def _carded_constructor(name: str, model: ModelCard) -> Entrypoint:
    """The network's constructor with the card's arguments, under the model's name."""
    build = network(model.network)

    def constructor(**kwargs: Any) -> Any:
        return build(**model.args | kwargs)

    constructor.__name__ = constructor.__qualname__ = name
    constructor.__module__ = getattr(build, "__module__", model.network)
    constructor.__doc__ = model.title
    return constructor


def network_of(name: str) -> tuple[str, dict[str, Any]]:
    """The network of a registered model and its arguments; of a constructor under `@register_model`, itself."""
    model = _look_up(name)
    return (model.card.network, dict(model.card.args)) if model.card else (_arch(name), {})


def has_network(name: Any) -> bool:
    """Whether `network` knows a name; no code of a network is imported."""
    known = _registered.get(name) if isinstance(name, str) else None
    return name in _FAMILIES or (known is not None and known.card is None)


def network(name: str) -> Entrypoint:
    """The constructor that a card calls `network`: a third party's, or a family's of this package.

    Raises:
        ModelNameError: There is none.
    """
    known = _registered.get(name)
    if known is not None and known.card is None:
        return known.entrypoint()
    if name not in _FAMILIES:
        raise ModelNameError(f"there is no network {name!r}; this package has {', '.join(sorted(_FAMILIES))}")
    from brainfm.models import constructor

    return constructor(name)


def _models() -> dict[str, _Model]:
    """All models; those of this package's cards are read when first asked for."""
    _read_zoo()
    return _registered


@functools.cache
def _read_zoo() -> None:
    for path in zoo_cards():
        _add_card(read_card(path), path.parent)


# --- Listing --------------------------------------------------------------------------------------


def list_models(filter: str | Sequence[str] = "", *, pretrained: bool = False, module: str = "") -> list[str]:
    """The registered models, sorted.

    Args:
        filter: A wildcard such as "*resnet*", or several; a name that matches any of them is listed.
        pretrained: Only those whose weights exist, by their full names `architecture.tag`.
        module: Only those of this network's module, such as "vit".

    Example:
        >>> brainfm.list_models("*vit*")
        ['mae_vit_base_3d', 'mae_vit_large_3d', 'mae_vit_tiny_3d', 'test_vit_3d', 'vit_tiny_3d']
    """
    names = [name for name, model in _models().items() if not module or model.module.split(".")[-1] == module]
    if pretrained:
        listings = [listing() for name in names for listing in _models()[name].listings.values()]
        names = [listing.name for listing in listings if listing.source]
    patterns = [filter] if isinstance(filter, str) else list(filter)
    if any(patterns):
        names = [
            n for n in names if any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(_arch(n), p) for p in patterns)
        ]
    return sorted(names)


def list_pretrained(filter: str | Sequence[str] = "") -> list[str]:
    """The full names, `architecture.tag`, of all models whose weights exist."""
    return list_models(filter, pretrained=True)


def listing(name: str) -> Listing:
    """What can be said of a model without importing its network. Raises ModelNameError where there is none."""
    found: Listing = _of_tag(name, _look_up(name).listings)()
    return found


def _listing_of_card(card: Card, name: str, tag: str) -> Listing:
    model = card.models[name]
    contract = card.inputs.get(model.input or "", {})
    weights = model.weights.get(tag)
    return Listing(
        name=f"{name}.{tag}" if tag else name,
        title=model.title,
        num_features=model.num_features,
        modality=contract.get("representation", "T1w") if model.input else None,
        channels=tuple(contract.get("channels", ("T1w",))) if model.input else (),
        space=contract.get("space"),
        ssl_method=model.ssl_method,
        licence=card.licence.weights if weights else None,
        gated=card.licence.gated,
        redistribute=card.licence.redistribute,
        source=weights.source.words if weights else "",
        facts=weights.facts if weights else "seen",
    )


def _listing_of_cfg(cfg: PretrainedCfg, entrypoint: Entrypoint) -> Listing:
    spec = cfg.input_spec
    return Listing(
        name=cfg.name,
        title=(entrypoint.__doc__ or "").strip().partition("\n")[0],
        num_features=cfg.num_features,
        modality=spec.representation if spec else None,
        channels=spec.channels if spec else (),
        space=spec.space if spec else None,
        ssl_method=cfg.ssl_method,
        licence=cfg.licence,
        gated=cfg.gated,
        redistribute=cfg.redistribute,
        source=cfg.source,
        facts=cfg.facts,
    )


# --- Looking up -----------------------------------------------------------------------------------


def is_model(name: str) -> bool:
    """Whether `create_model` knows this name, with or without a tag."""
    architecture, dot, tag = name.partition(".")
    return architecture in _models() and (not dot or tag in _models()[architecture].cfgs)


def model_entrypoint(name: str) -> Entrypoint:
    """The constructor registered under a name. Raises ModelNameError (a ValueError) where there is none."""
    return _look_up(name).entrypoint()


def get_pretrained_cfg(name: str) -> PretrainedCfg:
    """The cfg of `architecture.tag`, or of the default tag of `architecture`.

    Raises:
        ModelNameError: No such model or tag; the message lists the nearest ones. It is a ValueError.
    """
    cfg: PretrainedCfg = _of_tag(name, _look_up(name).cfgs)()
    return cfg


def _of_tag(name: str, tagged: Mapping[str, Callable[[], Any]]) -> Callable[[], Any]:
    tag = name.partition(".")[2]
    return tagged[tag] if tag else next(iter(tagged.values()))


def _look_up(name: str) -> _Model:
    architecture, _, tag = name.partition(".")
    if is_model(name):
        return _models()[architecture]
    if architecture in _models():
        tags = ", ".join(f"{architecture}.{known}" for known in _models()[architecture].cfgs if known) or "none"
        raise ModelNameError(f"model {architecture!r} has no weights tagged {tag!r}; known: {tags}")
    near = difflib.get_close_matches(architecture, _models(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "brainfm.list_models() names them all."
    raise ModelNameError(f"unknown model {name!r}; {hint}")


def _arch(name: str) -> str:
    return name.partition(".")[0]
