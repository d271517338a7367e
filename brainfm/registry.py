"""Names → constructors and their cfgs. Models of this package and of third parties register in the same way."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

from brainfm.errors import ModelNameError
from brainfm.pretrained import PretrainedCfg

Entrypoint = Callable[..., Any]
E = TypeVar("E", bound=Entrypoint)

_entrypoints: dict[str, Entrypoint] = {}
_cfgs: dict[str, dict[str, PretrainedCfg]] = {}  # architecture → tag → cfg; the first tag is the default


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
    ones.

    Raises:
        ValueError: The name is taken by another constructor, or holds a character other than letters, digits and "_".

    Example:
        >>> @brainfm.register_model(cfgs={"my_lab": PretrainedCfg(file="weights.safetensors", input_spec=spec)})
        ... def my_encoder(**kwargs):
        ...     return MyEncoder(**kwargs)
    """

    def register(entrypoint: E) -> E:
        name = entrypoint.__name__
        if not re.fullmatch(r"\w+", name, flags=re.ASCII):
            raise ValueError(f"a model name is made of letters, digits and '_', not {name!r}")
        known = _entrypoints.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            entrypoint.__module__,
            entrypoint.__qualname__,
        ):
            raise ValueError(f"a model named {name!r} is already registered, by {known.__module__}")
        tagged = dict(cfgs) if cfgs else {"": PretrainedCfg()}
        _entrypoints[name] = entrypoint
        _cfgs[name] = {tag: replace(cfg, architecture=name, tag=tag) for tag, cfg in tagged.items()}
        return entrypoint

    return register if entrypoint is None else register(entrypoint)


def list_models(filter: str | Sequence[str] = "", *, pretrained: bool = False, module: str = "") -> list[str]:
    """The registered models, sorted.

    Args:
        filter: A wildcard such as "*resnet*", or several; a name that matches any of them is listed.
        pretrained: Only those whose weights exist, by their full names `architecture.tag`.
        module: Only those defined in this module, such as "vit".

    Example:
        >>> brainfm.list_models("*vit*")
        ['mae_vit_base_3d', 'mae_vit_large_3d', 'mae_vit_tiny_3d', 'test_vit_3d', 'vit_tiny_3d']
    """
    names = [name for name in _entrypoints if not module or _entrypoints[name].__module__.split(".")[-1] == module]
    if pretrained:
        names = [cfg.name for name in names for cfg in _cfgs[name].values() if cfg.has_weights]
    patterns = [filter] if isinstance(filter, str) else list(filter)
    if any(patterns):
        names = [
            n for n in names if any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(_arch(n), p) for p in patterns)
        ]
    return sorted(names)


def list_pretrained(filter: str | Sequence[str] = "") -> list[str]:
    """The full names, `architecture.tag`, of all models whose weights exist."""
    return list_models(filter, pretrained=True)


def is_model(name: str) -> bool:
    """Whether `create_model` knows this name, with or without a tag."""
    architecture, dot, tag = name.partition(".")
    return architecture in _entrypoints and (not dot or tag in _cfgs[architecture])


def model_entrypoint(name: str) -> Entrypoint:
    """The constructor registered under a name. Raises ModelNameError (a ValueError) where there is none."""
    _check_known(name)
    return _entrypoints[_arch(name)]


def get_pretrained_cfg(name: str) -> PretrainedCfg:
    """The cfg of `architecture.tag`, or of the default tag of `architecture`.

    Raises:
        ModelNameError: No such model or tag; the message lists the nearest ones. It is a ValueError.
    """
    _check_known(name)
    architecture, _, tag = name.partition(".")
    tagged = _cfgs[architecture]
    return tagged[tag] if tag else next(iter(tagged.values()))


def _check_known(name: str) -> None:
    if is_model(name):
        return
    architecture, _, tag = name.partition(".")
    if architecture in _entrypoints:
        tags = ", ".join(f"{architecture}.{known}" for known in _cfgs[architecture] if known) or "none"
        raise ModelNameError(f"model {architecture!r} has no weights tagged {tag!r}; known: {tags}")
    near = difflib.get_close_matches(architecture, _entrypoints, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "brainfm.list_models() names them all."
    raise ModelNameError(f"unknown model {name!r}; {hint}")


def _arch(name: str) -> str:
    return name.partition(".")[0]
