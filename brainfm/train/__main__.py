"""`python -m brainfm.train RECIPE key=value …`, also under torchrun; the same as `brainfm pretrain`."""

import sys

from brainfm.__main__ import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
