"""The server that forks the processes of scans, and what it has imported. Light: the command starts it first of all."""

from brainfm.forks import start_server

# Read by ITK, OpenMP and the BLAS libraries when a process begins.
THREAD_VARIABLES = (
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def start(*, alone: bool) -> None:
    """Start the server, where it is not running; on one thread, for a fork loses all others.

    A scan alone imports torch itself, while ITK works. For many the server does it, and all else that each would do.
    """
    imported = ["brainfm.prep.batch", "nibabel"] if alone else ["brainfm.prep.ready"]
    start_server(imported, dict.fromkeys(THREAD_VARIABLES, "1"))
