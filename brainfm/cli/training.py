"""Training: cache, pretrain."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from brainfm.cli.verbosity import takes_verbosity


@click.group("cache")
def cache_group() -> None:
    """Scans prepared for training."""


@cache_group.command("build")
@click.argument("manifest")
@click.argument("folder", metavar="DIR")
@click.option("--model", default="simclr_resnet18_3d", show_default=True, help="Whose input contract to build for.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
def cache_build(manifest: str, folder: str, model: str, workers: int) -> None:
    """Write every scan of MANIFEST to DIR once, cropped and masked, so that training reads any crop of it quickly.

    The same command goes on with a build that stopped, and writes scans again whose files have changed. Scans that
    cannot be read are listed, and the exit code is 1.
    """
    import brainfm
    from brainfm.manifest import read_manifest
    from brainfm.train.cache import build_cache

    spec = brainfm.get_pretrained_cfg(model).input_spec
    if spec is None:
        raise brainfm.BrainfmError(f"{model} has no input contract to build a cache for")
    records = read_manifest(Path(manifest))
    report = build_cache(records, folder, spec, root=Path(manifest).parent, workers=workers, progress=True)
    click.echo(f"{folder}: {report.written} scans written, {report.found} were there, {len(report.refused)} refused")
    for reason in list(report.refused.values())[:10]:
        click.echo(f"ScanError: {reason}", err=True)
    if report.refused:
        sys.exit(1)


@click.command("pretrain", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE [KEY=VALUE]... [--dry-run]")
def pretrain_command(arguments: tuple[str, ...]) -> None:
    """Pretrain an encoder by a recipe; also 'python -m brainfm.train', which torchrun starts."""
    from brainfm.train.command import pretrain_command as command

    takes_verbosity(command).main(list(arguments), "pretrain", parent=click.get_current_context().find_root())
