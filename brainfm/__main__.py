"""`brainfm`, which is `python -m brainfm`. Ctrl-C ends it with one line and exit code 130, during imports too."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: After the program's name; None is what the process was given.
    """
    signal.signal(signal.SIGINT, _interrupt)
    gc.set_threshold(50_000, 20, 50)  # what is imported is no garbage: looking through it was 5 % of a small `embed`
    from brainfm.cli import main as command

    command(arguments, prog_name="brainfm")


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt where a command works; before and after, and in imports, end at once.

    There nothing is under way that an exception would have to bring to an end, and some imports swallow it.
    """
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        if frame.f_code.co_name == "invoke":  # of a click command
            raise KeyboardInterrupt
        frame = frame.f_back
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
