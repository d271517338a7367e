"""Imported by the server that forks the processes of many scans: what each would otherwise import and work out itself.

Nothing here may start a thread, which a fork would lose: no filter of ITK's, and of torch no more than its import.
"""

from contextlib import suppress

import nibabel  # noqa: F401

import brainfm.prep.batch
import brainfm.prep.linknet
import brainfm.prep.similarity  # noqa: F401
from brainfm.errors import BrainfmError
from brainfm.prep import deepbet, quality

quality.get_ready()
with suppress(BrainfmError):  # said of each scan that needs it
    deepbet.get_ready()
