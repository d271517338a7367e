"""The command line of a pretraining run."""

from __future__ import annotations

import logging
import sys

import click

from brainfm.errors import BrainfmError, RunInterruptedError
from brainfm.system import launched, says

_REASONS = 5  # of refused scans that a dry run prints
_CTRL_C = 130  # exit code of any program that a person interrupts


@click.command("pretrain", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print recipe, data, steps and memory, try some scans, and stop; exit code 1 if the run would refuse them.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def pretrain_command(recipe: str, overrides: tuple[str, ...], dry_run: bool, debug: bool) -> None:
    """Pretrain an encoder by RECIPE: the name of a published run, or a YAML file.

    Any field can be replaced: manifest=scans.csv output=runs/mine batch_size=12 augmentation.flip=0. The same command
    goes on with a run that stopped. SIGTERM, SIGUSR1 and Ctrl-C stop a run after its step, with a checkpoint: exit code
    75 after a signal, to be started again, and 130 after Ctrl-C. Under torchrun, write 'torchrun … -m brainfm.train
    RECIPE …'.
    """
    sys.exit(_run(recipe, overrides, dry_run, debug))  # with the error gone, and what its traceback kept alive


def _run(recipe: str, overrides: tuple[str, ...], dry_run: bool, debug: bool) -> int:
    """Run the command, and return its exit code."""
    rank = launched().rank
    logger = logging.getLogger("brainfm")
    debug = debug or logger.level == logging.DEBUG  # `brainfm --debug pretrain`
    try:
        _log_lines(logger, rank)
        from brainfm.train.pretraining import pretrain
        from brainfm.train.recipe import load_recipe
        from brainfm.train.summary import summarise, try_scans

        resolved = load_recipe(recipe, overrides)
        if dry_run:
            if rank == 0:
                click.echo(summarise(resolved, launched().world))
                tried, refused = try_scans(resolved)
                click.echo(f"tried        {tried} scans as the run reads them: {len(refused)} refused")
                for reason in list(refused.values())[:_REASONS]:
                    click.echo(f"ScanError: {reason}", err=True)
                return int(len(refused) > resolved.max_bad_fraction * tried)
            return 0
        folder = pretrain(resolved, progress=sys.stderr.isatty())
        if rank == 0:
            click.echo(f"{folder}: load it with create_model('local-dir:{folder}')")
        return 0
    except RunInterruptedError as stopped:
        if rank == 0:
            click.echo(str(stopped), err=True)
        from brainfm.train.trainer import INTERRUPTED

        return INTERRUPTED
    except KeyboardInterrupt as stopped:
        if rank == 0:
            click.echo(str(stopped) or "interrupted; the same command goes on from the last checkpoint", err=True)
        return _CTRL_C
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, BrainfmError | OSError)
        line = f"{type(error).__name__}: {' '.join(str(error).split())}" + ("" if known else " (--debug shows where)")
        if says(line):
            click.echo(line if launched().world == 1 else f"rank {rank}: {line}", err=True)
        return 1


def _log_lines(logger: logging.Logger, rank: int) -> None:
    """Print what is logged, once, and of a group's processes the first one's."""
    if not logger.handlers:  # `brainfm` has set its own
        logger.addHandler(logging.StreamHandler())
    logger.setLevel((logger.level or logging.INFO) if rank == 0 else logging.ERROR)
    logging.getLogger("brainfm.scan").setLevel(logging.WARNING)  # else a line a scan
