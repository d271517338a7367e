"""Checked dataclasses: their fields hold what their types say, and they go to plain data and back by one way.

Cards, contracts, recipes, tasks and records are `Checked`. Plain data is what JSON and YAML hold: a dataclass is a
mapping of its fields, a tuple is a list.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C", bound="Checked")


class Checked:
    """A dataclass whose fields hold what their types say: a word that means nothing is an error, not a default.

    Lists become tuples, so that what was read from a file equals what was written in Python. Raises ValueError.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, list):
                value = as_tuples(value)
                object.__setattr__(self, name, value)
            if not _fits(value, hint):
                raise ValueError(f"{type(self).__name__}: {name} is {value!r:.100}, and must be {_words(hint)}")

    def to_dict(self, *, sparse: bool = False) -> dict[str, Any]:
        """The fields as plain data; with `sparse`, without those that are what they would be anyway."""
        named = {item.name: (getattr(self, item.name), item) for item in fields(self)}  # type: ignore[arg-type]
        if sparse:
            named = {name: (value, item) for name, (value, item) in named.items() if value != default_of(item)}
        return {name: _plain(value, sparse) for name, (value, _) in named.items()}

    @classmethod
    def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
        """What `to_dict` described. Raises ValueError for a field that is unknown, lacking, or of another kind."""
        check_keys(data, cls)
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
        if lacking := [name for name in required if name not in data]:
            raise ValueError(f"{cls.__name__} lacks {', '.join(lacking)}")
        hints = _hints(cls)  # type: ignore[arg-type]
        return cls(**{name: _built(value, hints[name]) for name, value in data.items()})


def check_keys(data: Any, cls: type[Any], prefix: str = "") -> None:
    """Raise ValueError where `data` is no mapping, or has a key that is no field of a dataclass, with the nearest."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is made of named fields, not of {data!r:.60}")
    names = [item.name for item in fields(cls)]
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"it has {', '.join(names)}"
            raise ValueError(f"{cls.__name__} has no field {prefix}{key}; {hint}")


def as_tuples(value: Any) -> Any:
    """Plain data with its lists as the tuples that they were."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


MOST_PARTS = 10**6  # of what a YAML text says, an alias counted as what it stands for


def read_yaml(text: str) -> Any:
    """What a YAML text says, as plain data.

    Raises:
        ValueError: It is not YAML, or a few lines of it whose aliases stand for more than memory holds.
    """
    import yaml

    try:
        data = yaml.load(text, Loader=_yaml_loader())
        if _parts(data, {}) > MOST_PARTS:
            raise ValueError("its aliases stand for millions of parts; write out what is meant")
    except (yaml.YAMLError, RecursionError) as error:  # what holds itself is without end
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from error
    return data


def _parts(data: Any, known: dict[int, int]) -> int:
    """How many parts plain data has, each as often as it is met; looked at once."""
    if not isinstance(data, dict | list | tuple | set):
        return 1
    if id(data) not in known:
        inner = [*data, *data.values()] if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_parts(item, known) for item in inner)
    return known[id(data)]


@cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C, ten times as fast
        """Reads 1e-12 as a number, which YAML 1.1 takes for a word, since it has no point."""

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def default_of(item: Field[Any]) -> Any:
    """What a dataclass's field is where nothing is given."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def _plain(value: Any, sparse: bool = False) -> Any:
    if isinstance(value, Checked):
        return value.to_dict(sparse=sparse)
    if isinstance(value, Mapping):
        return {key: _plain(item, sparse) for key, item in value.items()}
    return [_plain(item, sparse) for item in value] if isinstance(value, tuple | list) else value


def _built(value: Any, hint: Any) -> Any:
    """Plain data as what a type asks for; what does not fit stays as it is, and is refused by `Checked`."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        nested = [part for part in parts if _is_checked(part) or get_origin(part) in (tuple, dict)]
        return _built(value, nested[0]) if nested and value is not None else value
    if kind is tuple and isinstance(value, list | tuple):
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts) + [Any] * (len(value) - len(parts))
        return tuple(_built(item, part) for item, part in zip(value, hints, strict=False))
    if kind is dict and isinstance(value, Mapping):
        return {key: _built(item, parts[1]) for key, item in value.items()}
    if hint is Any:
        return as_tuples(value)
    return hint.from_dict(value) if _is_checked(hint) and isinstance(value, Mapping) else value


def _is_checked(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Checked)


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(_fits(item, part) for item, part in zip(value, parts, strict=True))
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max  # nor NaN, nor an integer that no float holds
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind in (Union, UnionType):
        return " or ".join(_words(part) for part in parts)
    if kind is tuple:
        return "a tuple of " + (f"{_words(parts[0])}s" if parts[-1] is Ellipsis else ", ".join(map(_words, parts)))
    if kind is dict:
        return f"a mapping of {_words(parts[1])}s"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
