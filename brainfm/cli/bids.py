"""The command line of the BIDS App."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from brainfm.cli.reported import reported
from brainfm.cli.verbosity import counted
from brainfm.version import __version__

_FOLDER = click.Path(path_type=Path)
# Those that take one or more values, as BIDS Apps have it: --participant-label 01 02.
_SEVERAL = ("--participant-label", "--session-label", "--derivatives", "-d", "--model")
# What fMRIPrep's users call them too.
_SAME = {"--nprocs": "--n-cpus", "--nthreads": "--n-cpus", "--mem-mb": "--mem"}
_GIGABYTES = {"T": 1e3, "G": 1.0, "M": 1e-3, "K": 1e-6, "B": 1e-9}


class _BidsApp(click.Command):
    """A command whose options are written as those of BIDS Apps: with - or _ in names, several values after one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_as_click_has_it(args)))


def _as_click_has_it(args: list[str]) -> Iterator[str]:
    several, bare = "", False
    for arg in (*args, "--"):
        if not arg.startswith("-"):
            yield from (several, arg) if several else (arg,)
            bare = False
            continue
        if bare:
            raise click.UsageError(f"{several} needs at least one value")
        name, has_value, value = arg.partition("=")
        name = name.replace("_", "-")
        name = _SAME.get(name, name)
        several, bare = (name, True) if name in _SEVERAL and not has_value else ("", False)
        if not several:
            yield f"{name}={value}" if has_value else name


def _gigabytes(text: Any) -> float:
    """Memory: a number of MB, or one with T, G, M, K or B, as fMRIPrep has it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([TGMKB]?)B?", str(text).strip().upper())
    if found is None or float(found[1]) <= 0:
        raise click.BadParameter(f"{text!r} is no amount of memory; write such as 8000 (MB) or 8GB")
    return float(found[1]) * _GIGABYTES[found[2] or "M"]


def _named(text: Any) -> tuple[str, Path]:
    """NAME=PATH, or PATH, which has the name of its folder."""
    name, is_named, path = str(text).partition("=")
    folder = Path(path if is_named else name)
    name = name if is_named else folder.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9]+([-_.][A-Za-z0-9]+)*", name) or name == "raw":
        raise click.BadParameter(f"{text!r}: write NAME=PATH, with a name of letters and digits other than raw")
    return name, folder


def _configured(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Take the options of a file as defaults."""
    if path is None:
        return None
    import yaml

    try:
        # As text, which the options read: to YAML's own types a participant 010 is the number 8.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path}: {' '.join(str(error).split())}", ctx, param) from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path}: no options in it; write such as n-cpus: 4", ctx, param)
    known = {name.lstrip("-"): option for option in ctx.command.params for name in option.opts if option is not param}
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        option = known.get(_SAME.get(f"--{name}", f"--{name}").lstrip("-"))
        if option is None or option.name is None or isinstance(option, click.Argument):
            raise click.BadParameter(f"{path}: there is no option {key}", ctx, param)
        defaults[option.name] = [value] if option.multiple and not isinstance(value, list) else value
    ctx.default_map = defaults
    return path


@reported(inputs="bids_dir", output="output_dir")
@click.command("bids", cls=_BidsApp, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bids_dir", type=_FOLDER)
@click.argument("output_dir", type=_FOLDER, metavar="OUT_DIR")
@click.argument("level", type=click.Choice(["participant", "group"]))
@click.option("--participant-label", multiple=True, metavar="LABEL...", help="Participants, with or without sub-.")
@click.option("--session-label", multiple=True, metavar="LABEL...", help="Sessions, with or without ses-.")
@click.option("--bids-filter-file", type=_FOLDER, metavar="FILE", help='JSON as fMRIPrep\'s; of it "t1w" counts.')
@click.option(
    *("-d", "--derivatives"),
    multiple=True,
    type=_named,
    metavar="NAME=PATH...",
    help="Embed the T1w images in MNI152 space of these, such as fMRIPrep's, instead of preparing the scans.",
)
@click.option("-w", "--work-dir", type=_FOLDER, help="Where prepared scans are kept; by default in OUT_DIR/prepared.")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["simclr_resnet18_3d"],
    show_default=True,
    metavar="NAME...",
    help="Encoders.",
)
@click.option("--shard", metavar="I/N", help="The I-th of N equal parts of the scans; slurm is the task of its array.")
@click.option("--n-cpus", type=click.IntRange(1), help="Cores to use in all. Also --nprocs, --nthreads.")
@click.option("--omp-nthreads", type=click.IntRange(1), help="Cores for one scan.")
@click.option(
    "--mem",
    type=_gigabytes,
    metavar="MEMORY",
    help="Memory for all, MB or such as 8GB: fewer scans at once. Also --mem-mb.",
)
@click.option("--device", default="auto", show_default=True, help="Of torch, to embed; cuda also to prepare.")
@click.option(
    "--skip-bids-validation", is_flag=True, help="Take a data set whose description lacks what BIDS requires."
)
@click.option("--stop-on-first-crash", is_flag=True, help="Stop at the first scan that fails.")
@click.option(
    "--config-file",
    type=_FOLDER,
    is_eager=True,
    expose_value=False,
    callback=_configured,
    metavar="FILE",
    help="YAML or JSON of these options, such as n-cpus: 4; what is said here goes before.",
)
@click.version_option(__version__, prog_name="brainfm")
def bids_command(
    bids_dir: Path,
    output_dir: Path,
    level: str,
    participant_label: tuple[str, ...],
    session_label: tuple[str, ...],
    bids_filter_file: Path | None,
    derivatives: tuple[tuple[str, Path], ...],
    models: tuple[str, ...],
    shard: str | None,
    mem: float | None,
    skip_bids_validation: bool,
    **options: Any,
) -> None:
    """A BIDS App: prepare and embed the T1w scans of a BIDS data set, as BIDS derivatives.

    participant prepares each scan (or takes the derivatives given) and writes a vector a model beside its quality;
    group makes of all that is in OUT_DIR the tables group_T1w.tsv and group_desc-MODEL_embedding.parquet, and the page
    group_T1w.html. BIDS_DIR is only read. The same command goes on where it stopped; calls of different participants,
    and shards, may share OUT_DIR. Exit code 1: some scans failed, cannot be read, or are not where BIDS has them; the
    others are done. What by BIDS is no T1w scan is named, and is no failure.
    """
    from brainfm.bids import wrongly
    from brainfm.bidsapp.call import Call
    from brainfm.bidsapp.selection import Wanted, read_filters
    from brainfm.errors import BrainfmError
    from brainfm.shards import Shard

    if len(dict(derivatives)) != len(derivatives):
        raise BrainfmError("two derivatives have the same name; give them others: -d NAME=PATH")
    call = Call(
        bids_dir,
        output_dir,
        Wanted(participant_label, session_label, read_filters(bids_filter_file) if bids_filter_file else {}),
        dict(derivatives),
        models=tuple(dict.fromkeys(models)),
        mem_gb=mem,
        shard=Shard.of(shard) if shard else Shard(),
        validate=not skip_bids_validation,
        progress=sys.stderr.isatty(),
        **options,
    )
    done: Any
    if level == "participant":
        from brainfm.bidsapp import participant

        done = participant.run(call)
    else:
        from brainfm.bidsapp import group

        done = group.run(call)
    for path, why in done.left_out.items():
        click.echo(f"left out: {path}: {why}", err=True)
    for name, why in done.failed.items():
        click.echo(f"{name}: {why}", err=True)
    if level == "group":
        for table, many in done.tables.items():
            click.echo(f"{counted(many)} → {table}")
        click.echo(f"{counted(done.scans)} → {output_dir / 'group_T1w.tsv'}, {output_dir / 'group_T1w.html'}")
        for problem in done.problems:
            click.echo(problem, err=True)
        if done.not_run:
            click.echo(f"{len(done.not_run)} scans are not run yet, such as {done.not_run[0]}", err=True)
        bad = bool(done.failed or done.problems or done.not_run)
    else:
        click.echo(f"{done.scans - len(done.failed)} of {counted(done.scans)} → {output_dir}")
        bad = bool(done.failed)
    if bad or wrongly(done.left_out):
        sys.exit(1)
