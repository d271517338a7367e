"""The command line."""

from brainfm.cli.main import main

__all__ = ["main"]
