"""Synthetic volumes: synthesize."""

from __future__ import annotations

import click

from brainfm.cli.reported import reported


@reported(inputs="bundle", output="folder", unit="volume")
@click.command("synthesize")
@click.option("--n", "count", type=click.IntRange(1), required=True, help="Volumes.")
@click.option("--out", "folder", required=True, metavar="DIR")
@click.option(
    "--age", default="0:1", show_default=True, metavar="A[:B]", help="From 0 to 1; of two, drawn between them."
)
@click.option("--sex", default="0:1", show_default=True, metavar="A[:B]", help="0 female, 1 male, 0:1 either.")
@click.option("--ventricles", default="0:1", show_default=True, metavar="A[:B]", help="Their volume, from 0 to 1.")
@click.option("--brain-volume", default="0:1", show_default=True, metavar="A[:B]", help="From 0 to 1.")
@click.option("--bundle", metavar="FOLDER", help="The bundle, or its two weight files; without it they are fetched.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
def synthesize_command(
    count: int,
    folder: str,
    age: str,
    sex: str,
    ventricles: str,
    brain_volume: str,
    bundle: str | None,
    seed: int,
    device: str,
) -> None:
    """Draw synthetic T1w volumes with a latent diffusion model, for pretraining. Never real data.

    The model is MONAI's bundle brain_image_synthesis_latent_diffusion_model (Pinaya et al. 2022). Age, sex and volumes
    are on its own scale, from 0 to 1. DIR gets a NIfTI a volume, whole heads at 1 mm, and manifest.csv, whose column
    source says "synthetic". The same command goes on with a run that stopped.
    """
    from brainfm.report import current
    from brainfm.synthesis import read_range, synthesize

    manifest = synthesize(
        count,
        folder,
        age=read_range("age", age),
        sex=read_range("sex", sex),
        ventricles=read_range("ventricles", ventricles),
        brain_volume=read_range("brain_volume", brain_volume),
        bundle=bundle,
        seed=seed,
        device=device,
        progress=True,
    )
    run = current()
    drawn = run.step("drawing")
    run.asked = run.done = count
    run.of_an_earlier_run = count - int(drawn.done)
    click.echo(f"{manifest}: {count} synthetic volumes, drawn by a model and not of people")
