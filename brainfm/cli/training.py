"""Training: cache, pretrain."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from brainfm.cli.reported import reported
from brainfm.cli.staged import stage_options
from brainfm.cli.verbosity import counted
from brainfm.errors import BrainfmError, RecipeError, RunInterruptedError
from brainfm.system import launched, says

if TYPE_CHECKING:
    from brainfm.train.recipe import Recipe
    from brainfm.train.sweep import Variant


@click.group("cache")
def cache_group() -> None:
    """Scans prepared for training."""


@reported(inputs="manifest", output="folder")
@cache_group.command("build")
@click.argument("manifest")
@click.argument("folder", metavar="DIR")
@click.option("--model", default="simclr_resnet18_3d", show_default=True, help="Whose input contract to build for.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Write the I-th of N equal parts of the scans, beside others that write theirs; slurm is its array's task.",
)
@stage_options
def cache_build(
    manifest: str, folder: str, model: str, workers: int, shard: str | None, stage: str | None, stage_size: float
) -> None:
    """Write every scan of MANIFEST to DIR once, cropped and masked, so that training reads any crop of it quickly.

    MANIFEST may be a folder of video clips, or one of Kinetics' lists of them.
    The same command goes on with a build that stopped, and writes scans again whose files have changed. Scans that
    cannot be read are listed, and the exit code is 1.
    """
    import brainfm
    from brainfm.report import current
    from brainfm.shards import Shard
    from brainfm.stage import Stage
    from brainfm.train.cache import build_cache
    from brainfm.train.sources import read_source

    spec = brainfm.get_pretrained_cfg(model).input_spec
    if spec is None:
        raise brainfm.BrainfmError(f"{model} has no input contract to build a cache for")
    run = current()
    with run.step("listing"):
        records, root = read_source(manifest)
    part = Shard.of(shard) if shard else None
    local = Stage(stage, stage_size) if stage else None
    report = build_cache(records, folder, spec, root=root, workers=workers, shard=part, stage=local, progress=True)
    run.done, run.of_an_earlier_run = report.written + report.found, report.found
    run.asked = len(records) if part is None else len(part.numbers(len(records)))
    for name, reason in report.refused.items():
        run.fail(name, reason)
    if report.quarantined:
        run.details["quarantined"] = report.quarantined
    click.echo(f"{folder}: {counted(report.written)} written, {report.found} were there, {len(report.refused)} refused")
    for reason in list(report.refused.values())[:10]:
        click.echo(f"ScanError: {reason}", err=True)
    if report.refused:
        sys.exit(1)


_REASONS = 5  # of refused scans that a dry run prints
_CTRL_C = 130  # exit code of any program that a person interrupts


@reported(inputs="recipe", unit="step")
@click.command("pretrain", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", metavar="[RECIPE]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print recipe, data, steps and memory, try some scans, and stop; exit code 1 if the run would refuse them.",
)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Splits of each evaluate=TASK.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@stage_options
def pretrain_command(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    seeds: int,
    debug: bool,
    stage: str | None,
    stage_size: float,
) -> None:
    """Pretrain an encoder by RECIPE: the name of a published run, or a YAML file.

    Without RECIPE, say method= (simclr or yaware, contrastive; mae or simmim, masked; supervised; distill) and model=:
    'python -m pydoc brainfm.train.recipe' has all fields and what they are else. Labels are columns of the manifest:
    targets=age,sex.

    Any field can be replaced: manifest=scans.csv output=runs/mine batch_size=12 augmentation.flip=0. The same command
    goes on with a run that stopped. SIGTERM, SIGUSR1 and Ctrl-C stop a run after its step, with a checkpoint: exit code
    75 after a signal, to be started again, and 130 after Ctrl-C. Under torchrun, write 'torchrun … -m brainfm.train
    RECIPE …'.

    sweep=KEY:VALUE,VALUE (or sweep=FILE.yaml, 'name: {KEY: VALUE}' a variant; or patients=FRACTION,FRACTION) runs every
    variant, or every combination of several sweeps, in a folder of its own under output, and evaluate=TASK (or
    evaluate=TASK:MANIFEST.csv) probes them all: sweep.csv and a figure a task join them with their controls. Exit code
    1: a variant failed.
    """
    if "=" in recipe and not Path(recipe).is_file():
        recipe, overrides = "", (recipe, *overrides)
    if stage:
        overrides = (*overrides, f"stage={json.dumps(stage)}", f"stage_size={stage_size}")
    sys.exit(_run(recipe, overrides, dry_run, seeds, debug))  # with the error gone, and what its traceback kept alive


def _run(recipe: str, overrides: tuple[str, ...], dry_run: bool, seeds: int, debug: bool) -> int:
    """Run the command, and return its exit code."""
    from brainfm.report import current

    run, rank = current(), launched().rank
    logger = logging.getLogger("brainfm")
    debug = debug or logger.level == logging.DEBUG  # `brainfm --debug pretrain`
    try:
        _log_lines(logger, rank)
        from brainfm.train.recipe import load_recipe
        from brainfm.train.sweep import read_sweep

        tasks = [text.partition("=")[2] for text in overrides if text.startswith("evaluate=")]
        plain = [text for text in overrides if not text.startswith("evaluate=")]
        variants = read_sweep(recipe, plain)
        if tasks and not variants:
            raise RecipeError(
                "evaluate= goes with sweep=; of one run, 'brainfm benchmark TASK --models local-dir:…' tells"
            )
        if dry_run:
            return _try([variant.recipe for variant in variants] or [load_recipe(recipe, plain)])
        if variants:
            return _sweep(variants, tasks, seeds)
        from brainfm.train.pretraining import pretrain

        settled = load_recipe(recipe, plain)
        run.inputs, run.output = tuple(settled.sources) or (settled.manifest,), settled.output
        folder = pretrain(settled, progress=sys.stderr.isatty())
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
        run.error = line
        if says(line):
            click.echo(line if launched().world == 1 else f"rank {rank}: {line}", err=True)
        return 1


def _try(recipes: list[Recipe]) -> int:
    """Say what runs would do, try some of their scans, and return the exit code."""
    from brainfm.train.summary import summarise, try_scans

    if launched().rank != 0:
        return 0
    refuses = False
    for recipe in recipes:
        click.echo(summarise(recipe, launched().world))
        tried, refused = try_scans(recipe)
        click.echo(f"tried        {counted(tried)} as the run reads them: {len(refused)} refused")
        for reason in list(refused.values())[:_REASONS]:
            click.echo(f"ScanError: {reason}", err=True)
        refuses |= len(refused) > recipe.max_bad_fraction * tried
    return int(refuses)


def _sweep(variants: list[Variant], tasks: list[str], seeds: int) -> int:
    """Run the variants of a sweep, evaluate them, and return the exit code. What can fail is tried first."""
    from brainfm.train.summary import summarise
    from brainfm.train.sweep import pretrain_variants

    launch, output = launched(), Path(variants[0].recipe.output).parent
    data: list[Any] = []
    if tasks:
        if launch.world > 1:
            raise RecipeError(
                "evaluate= is for one process: leave it out here, and then give the same command without torchrun, "
                f"with evaluate= and batch_size={variants[0].recipe.batch_size * launch.world}; what has ended is kept"
            )
        from brainfm.downstream.sweep import read_evaluated

        data = [read_evaluated(text) for text in tasks]
    for variant in variants:
        try:
            summarise(variant.recipe, launch.world)
        except BrainfmError as error:
            raise type(error)(f"variant {variant.name}: {error}") from error
    progress = sys.stderr.isatty()
    failed = pretrain_variants(variants, progress=progress)
    if launch.rank != 0:
        return 0
    if data:
        from brainfm.downstream.sweep import evaluate_sweep

        table = evaluate_sweep(variants, failed, data, output, seeds=seeds, progress=progress)
    else:
        from brainfm.train.sweep import write_table

        table = write_table(variants, failed, output)
    click.echo(f"{table}: what came of {len(variants)} variants, of which {len(failed)} failed")
    return int(bool(failed))


def _log_lines(logger: logging.Logger, rank: int) -> None:
    """Print what is logged, once, and of a group's processes the first one's."""
    if not logger.handlers:  # `brainfm` has set its own
        logger.addHandler(logging.StreamHandler())
    logger.setLevel((logger.level or logging.INFO) if rank == 0 else logging.ERROR)
    logging.getLogger("brainfm.scan").setLevel(logging.WARNING)  # else a line a scan
