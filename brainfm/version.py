"""The version of this package, and what its distribution is called: `name` in pyproject.toml."""

__version__ = "0.1.0"
DISTRIBUTION = "brainfm"
