"""Names of other programs that a checkpoint asks for, such as the options of its training: bound to nothing.

`torch.load(weights_only=True)` refuses a name that it does not know. Such a file's tensors are data all the same: the
names are bound to stand-ins that take whatever they are given and do nothing, so that none of the program runs, and
what they would have made is left out.
"""

from __future__ import annotations

import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

# Of Python's own library, what holds values. Everything else of it is refused: that is how pickles are made to act.
_VALUES = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|_codecs\.encode|copyreg\._reconstructor|functools\.partial"
    r"|builtins\.(set|frozenset|slice|complex|bytearray|object|range|list|dict|tuple|int|float|str|bool|bytes)"
    r"|(collections|datetime|decimal|enum|fractions|pathlib|uuid)\.\w+)(\.\w+)*"
)
_ASKED = re.compile(r"GLOBAL ([\w.<>]+)|Unsupported (?:class|global)[: ]+(?:GLOBAL )?([\w.<>]+)")
_MOST_NAMES = 200  # of other programs in one file


class StandIn:
    """Takes anything, and keeps none of it."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Whatever it is made of."""
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Whatever it is given."""

    def __setitem__(self, key: object, value: object) -> None:
        """Whatever it is filled with; torch 2.6 asks no kind of mapping whether it is one of its own."""


class _Mapping:
    """A stand-in of what is filled like a dictionary, which torch's reader does to its own kinds alone."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def asked_for(error: Exception) -> str:
    """The name that torch's reader refused, or an empty string."""
    found = _ASKED.search(str(error))
    return (found[1] or found[2]) if found else ""


def is_inert(name: str) -> bool:
    """Whether a name may be bound to a stand-in: not those of torch, whose modules hold tensors, nor those that act."""
    full = _as_of_now(name)
    if full.partition(".")[0].lstrip("_") == "torch":
        return False
    return not _is_pythons(name) or _VALUES.fullmatch(full) is not None


def _as_of_now(name: str) -> str:
    """A name without those that Python 2 had, which pickles of protocol 2 have, and torch.save writes."""
    module, _, attribute = name.rpartition(".")
    return ".".join(NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute)))


def _is_pythons(name: str) -> bool:
    top = _as_of_now(name).partition(".")[0]
    return not top or top in sys.stdlib_module_names - {"__main__"}


def load(read: Callable[[], Any]) -> tuple[Any, tuple[str, ...]]:
    """What `torch.load(weights_only=True)` reads of a file, and the names of other programs in it.

    Args:
        read: Reads the file from its beginning.

    Raises:
        pickle.UnpicklingError: It asks for a name that is no value's, or is damaged.
    """
    names: dict[str, None] = {}
    kind: Any = StandIn
    while True:
        try:
            with _bound(names, kind):
                return read(), tuple(name for name in names if not _is_pythons(name))
        except pickle.UnpicklingError as error:
            name = asked_for(error)
            if name and name not in names and is_inert(name) and len(names) < _MOST_NAMES:
                names[name] = None
            elif kind is StandIn and StandIn.__name__ in str(error) and "SETITEM" in str(error):
                kind = _Mapping
            else:
                raise


def _bound(names: dict[str, None], kind: Any) -> AbstractContextManager[None]:
    kinds: list[Any] = [(StandIn if name.startswith("numpy.") else kind, name) for name in names]
    return torch.serialization.safe_globals(kinds)
