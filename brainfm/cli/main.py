"""`brainfm …`: thin, no logic of its own. Errors are one line and a non-zero exit; --debug gives the traceback.

A module here is a group of commands. Each imports what it needs when it runs, so that help and lists wait for nothing.
"""

from __future__ import annotations

from typing import Any

import click

from brainfm.cli.analysis import (
    export_extractor_command,
    longitudinal_command,
    recovery_command,
    regions_command,
    segment_command,
)
from brainfm.cli.bids import bids_command
from brainfm.cli.evaluation import (
    benchmark_command,
    compare_command,
    compare_encoders_command,
    finetune_command,
    predict_command,
    probe_command,
)
from brainfm.cli.machine import doctor_command
from brainfm.cli.models import (
    convert_command,
    export_command,
    fetch_command,
    info_command,
    list_command,
    publish_command,
    push_command,
    verify_command,
)
from brainfm.cli.preparation import prep_command, qc_command
from brainfm.cli.scans import demo_command, embed_command, merge_command, phantom_command
from brainfm.cli.synthesis import synthesize_command
from brainfm.cli.training import cache_group, pretrain_command
from brainfm.cli.verbosity import apply, takes_verbosity, wants
from brainfm.cli.viewing import view_command
from brainfm.version import __version__

EPILOG = "Documentation: README.md and docs. Every refusal says what to do next."


class _Commands(click.Group):
    """A group whose commands end, on an error of brainfm, with one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        from brainfm.errors import BrainfmError
        from brainfm.system import says

        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # 'brainfm list | head': click ends in silence
        except (BrainfmError, OSError) as error:
            if wants(ctx, "debug"):
                raise
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if says(line):
                click.echo(line, err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; what is finished is kept, and the same command goes on from there", err=True)
            ctx.exit(130)


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="brainfm")
@click.pass_context
def main(context: click.Context) -> None:
    """Pretrained encoders for 3D brain MRI, each with the exact input its weights expect."""
    import os

    apply(context)
    if not wants(context, "debug"):  # each retry of a download is no news; what fails in the end is said once
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


for _command in (
    *(list_command, info_command, demo_command, doctor_command, embed_command, merge_command),
    *(fetch_command, convert_command, verify_command, push_command, publish_command, export_command),
    *(phantom_command, synthesize_command, cache_group, prep_command, qc_command, view_command, bids_command),
    *(pretrain_command, probe_command, finetune_command, benchmark_command, predict_command),
    *(compare_command, compare_encoders_command, recovery_command, longitudinal_command),
    *(segment_command, regions_command, export_extractor_command),
):
    main.add_command(_command)
takes_verbosity(main)
