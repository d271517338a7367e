"""What an operation of an input contract is, and how one is found by its name.

To add one, write a frozen dataclass that is an `Operation`, with `__call__` and `__str__`, under
`@register_operation`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from brainfm.schema import Checked

if TYPE_CHECKING:
    from brainfm.contract.volume import Volume

AnOperation = TypeVar("AnOperation", bound="type[Operation]")

_operations: dict[str, type[Operation]] = {}


class Operation(Checked):
    """A step of an input contract: a frozen dataclass that is data and acts. Its string says what it does."""

    @abstractmethod
    def __call__(self, volume: Volume) -> Volume:
        """Return the changed volume; the given one stays as it was."""

    def to_dict(self, *, sparse: bool = False) -> dict[str, Any]:
        """The operation as plain data: its class under "op", then its parameters."""
        return {"op": type(self).__name__} | super().to_dict(sparse=sparse)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Any:
        """The operation that `to_dict` described. Raises ValueError for an unknown name or a wrong parameter."""
        parameters = dict(data)
        name = parameters.pop("op", cls.__name__)
        if not isinstance(name, str) or name not in _operations:
            known = ", ".join(sorted(_operations))
            raise ValueError(
                f"unknown operation {name!r} in an input contract; known: {known}. One of your own is imported, and "
                "so registered, before its contract is read"
            )
        build: Any = super(Operation, _operations[name])  # the dataclass's own, not this one again
        return build.from_dict(parameters)


def register_operation(cls: AnOperation) -> AnOperation:
    """Make an operation known under its class's name, so that contracts can be read from files that hold it.

    Args:
        cls: A frozen dataclass that is an `Operation`, with `__call__` and, for people, `__str__`.

    Returns:
        The class, so that this is a decorator.

    Raises:
        ValueError: It is no dataclass that is an `Operation` and can be called, or the name is taken by another class.

    Example:
        >>> from dataclasses import dataclass
        >>> import brainfm
        >>> from brainfm.contract import Operation, Volume, with_image
        >>> @brainfm.register_operation
        ... @dataclass(frozen=True)
        ... class Power(Operation):
        ...     exponent: float = 0.5
        ...
        ...     def __call__(self, volume: Volume) -> Volume:
        ...         return with_image(volume, volume.image**self.exponent)
        ...
        ...     def __str__(self) -> str:
        ...         return f"raise to the power of {self.exponent:g}"
        >>> spec = brainfm.InputSpec.from_dict({"operations": [{"op": "Power", "exponent": 0.25}]})
        >>> print(spec.operations[0])
        raise to the power of 0.25
    """
    is_operation = isinstance(cls, type) and issubclass(cls, Operation) and hasattr(cls, "__dataclass_fields__")
    if not is_operation or cls.__call__ is Operation.__call__:
        raise ValueError(
            f"{cls!r} is no operation: write a frozen dataclass that is a brainfm.contract.Operation and has __call__"
        )
    known = _operations.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"an operation named {cls.__name__!r} is already registered, by {known.__module__}")
    _operations[cls.__name__] = cls
    return cls


def times(values: tuple[float, ...]) -> str:
    """Numbers as 1×2×3."""
    return "×".join(f"{value:.12g}" for value in values)
