"""Names and modules of a package, imported when they are first asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def found_in(package: str, name: str, where: Mapping[str, str] | None = None) -> Any:
    """What a package's `__getattr__` gives: a name out of one of its modules, or a module.

    Args:
        package: The package's own name.
        name: What is asked for.
        where: The module of each name, within the package.

    Raises:
        AttributeError: There is neither.
    """
    if where and name in where:
        return getattr(import_module(f"{package}.{where[name]}"), name)
    if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
        return import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
