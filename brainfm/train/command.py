"""The command line of a pretraining run."""

from __future__ import annotations

import logging
import os
import sys

import click

from brainfm.errors import BrainfmError, RunInterruptedError


@click.command("pretrain", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe, the data, the steps and the memory; stop.")
def pretrain_command(recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Pretrain an encoder by RECIPE: the name of a published run, or a YAML file.

    Any field can be replaced: manifest=scans.csv output=runs/mine batch_size=12 augmentation.flip=0. The same command
    goes on with a run that stopped. Exit code 75: a signal stopped the run, and it can go on. Under torchrun, write
    'torchrun … -m brainfm.train RECIPE …'.
    """
    from brainfm.train.pretraining import pretrain
    from brainfm.train.recipe import load_recipe
    from brainfm.train.summary import summarise
    from brainfm.train.trainer import INTERRUPTED

    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    logging.getLogger("brainfm.scan").setLevel(logging.WARNING)  # else a line a scan
    try:
        resolved = load_recipe(recipe, overrides)
        if dry_run:
            if first:
                click.echo(summarise(resolved, int(os.environ.get("WORLD_SIZE", "1"))))
            return
        folder = pretrain(resolved, progress=sys.stderr.isatty())
        if first:
            click.echo(f"{folder}: load it with create_model('local-dir:{folder}')")
    except RunInterruptedError as stopped:
        if first:
            click.echo(str(stopped), err=True)
        sys.exit(INTERRUPTED)
    except (BrainfmError, OSError) as error:
        if first:
            click.echo(f"{type(error).__name__}: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
