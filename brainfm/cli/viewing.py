"""Looking at a scan."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("view")
@click.argument("scan", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The page, an .html file.")
@click.option("--mask", type=click.Path(path_type=Path), help="The brain mask of SCAN; a prepared scan has its own.")
@click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="A NIfTI map to show over it: saliency, or dense features of 'brainfm embed --dense'.",
)
@click.option(
    "--head", is_flag=True, help="The whole head although there is a mask: a face can be drawn from the page."
)
def view_command(scan: Path, output: Path, mask: Path | None, overlay: Path | None, head: bool) -> None:
    """Write a page that shows SCAN, an image or the folder of a prepared scan, in any browser and without a network.

    Where there is a mask, the brain alone is shown, and the mask's outline.
    """
    from brainfm.view import write_view

    for sentence in write_view(scan, output, mask=mask, overlay=overlay, head=head):
        click.echo(sentence)
    click.echo(f"{scan} → {output} ({output.stat().st_size / 1e6:.1f} MB)")
