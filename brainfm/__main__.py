"""`python -m brainfm` is `brainfm`."""

from brainfm.cli import main

main()
