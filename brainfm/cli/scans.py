"""Scans → tables: demo, embed, phantom."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from brainfm.cli.reported import reported
from brainfm.cli.staged import stage_options
from brainfm.cli.verbosity import counted


@click.command("demo")
@click.option("--model", help="The model; by default the published one if its weights are here, else the test model.")
@click.option("-o", "--output", default="brainfm_demo", show_default=True, help="Folder for the two files it writes.")
def demo_command(model: str | None, output: str) -> None:
    """Embed the packaged sample scan, and draw the tensor that the encoder saw."""
    from brainfm import demo as job
    from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN

    name = model or job.default_model()
    click.echo(f"scan       {SAMPLE_SCAN}\nmask       {SAMPLE_MASK}\n           (MNI152 2009a: 152 brains averaged)")
    result = job.run(name, output)
    click.echo(f"model      {result.model_name}: {result.notes}")
    click.echo(
        f"tensor     {list(result.input_shape)}, prepared as the model's input contract says (brainfm info {name})"
    )
    first = ", ".join(f"{value:.4f}" for value in result.vector[:4])
    click.echo(f"embedding  {len(result.vector)} numbers: {first}, …")
    click.echo(
        f"written    {result.embedding_file}\n           {result.picture_file} (the three middle planes of the tensor)"
    )
    if name == job.TEST_MODEL:
        click.echo(
            "\nThis was a tiny test model, not a brain encoder: it shows that everything is in place.\n"
            f"The real one, fetched on first use: brainfm demo --model {job.REAL_MODEL}"
        )


@reported(inputs="inputs")
@click.command("embed")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, help="The table: .csv, .parquet or .npz; of a shard a folder.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Embed the I-th of N equal parts of the scans, into a folder that all of them share, for 'brainfm merge'; "
    "slurm is the task of its array, and need not be said where OUTPUT is a folder.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["simclr_resnet18_3d"],
    show_default=True,
    help="Name of the model; repeat it for several.",
)
@click.option("--mask", help="Brain mask, where INPUT is one scan.")
@click.option("--checkpoint", help="A weight file to use instead of the published weights; of one model.")
@click.option("--batch-size", type=click.IntRange(1), help="Scans a forward pass; without it, by the GPU's memory.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "tf32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Threads that prepare scans.")
@click.option("--dense", metavar="FOLDER", help="Write each scan's dense features there too, NIfTI of [x, y, z, C].")
@click.option("--dense-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@stage_options
@click.option("--strict", is_flag=True, help="Stop at the first bad scan instead of going on.")
@click.option("--strict-qc", is_flag=True, help="Refuse scans that failed in 'brainfm prep' or by 'brainfm qc'.")
def embed_command(
    inputs: tuple[str, ...],
    output: str,
    models: tuple[str, ...],
    mask: str | None,
    checkpoint: str | None,
    batch_size: int | None,
    workers: int,
    strict: bool,
    shard: str | None,
    dense: str | None,
    stage: str | None,
    stage_size: float,
    **options: Any,
) -> None:
    """Embed scans into a table, a row a scan.

    INPUT is a scan (.nii, .nii.gz, .mgz), a manifest (.csv with image_path, or a column a channel such as t1w_path, and
    mask_path), a TurboPrep folder, or a BIDS-derivatives folder. What made the table is in it, of a .csv in the .json
    beside it. Scans that fail are listed in OUTPUT's .errors.csv, and the exit code is 1; so is it where a part of a
    folder cannot be read, or may be a scan. What by BIDS is no T1w scan, such as a phase image, is named, and is no
    failure. Each of several models has its own files, NAME.MODEL.csv and so on, or where OUTPUT is a folder
    embeddings.MODEL.csv there; each scan is read once for all.
    """
    import brainfm
    from brainfm.bids import wrongly
    from brainfm.embed import Options, embed_files, path_of, table_path
    from brainfm.manifest import Listing, ScanRecord, list_scans
    from brainfm.report import current
    from brainfm.shards import Shard
    from brainfm.stage import Stage
    from brainfm.table import FORMATS, check_folder, check_output, errors_path, files_of

    run = current()
    is_folder = Path(output).suffix not in FORMATS
    part = Shard.of(shard) if shard else Shard.of_slurm() if is_folder else None
    models = tuple(dict.fromkeys(models))
    output = str(table_path(output, len(models), part))
    if part is None:
        run.check_apart(files_of(Path(output)))
        check_output(Path(output))
    else:
        check_folder(Path(output))
    if mask is not None:
        if len(inputs) != 1:
            raise brainfm.ScanError("--mask goes with one scan; list several with their masks in a manifest")
        records = Listing([ScanRecord(inputs[0], mask)])
    else:
        with run.step("listing"):
            records = list_scans(inputs)
    encoders: list[Any] = list(models)
    if checkpoint is not None:
        if len(models) != 1:
            raise brainfm.BrainfmError("--checkpoint goes with one model; embed with the others in runs of their own")
        encoders = [brainfm.create_model(models[0], checkpoint_path=checkpoint)]
    several = len(models) > 1
    choices = Options(
        batch_size=batch_size or "auto",
        num_workers=workers,
        on_error="raise" if strict else "skip",
        progress=True,
        shard=part,
        stage=Stage(stage, stage_size) if stage else None,
        **options,
    )
    encoder = encoders if several else encoders[0]
    tables = embed_files(records, encoder, choices, output=output, dense=dense, run=run)
    for model, table in zip(models, tables, strict=True):
        path = path_of(output, model if several else None)
        for _, message in table.errors[:10]:
            click.echo(f"ScanError: {message}", err=True)
        many = len(records) if part is None else len(part.numbers(len(records)))
        if len(table):
            of_all = f" (shard {part} of {len(records)} scans)" if part else ""
            click.echo(f"{counted(len(table))} → {path} ({table.vectors.shape[1]} numbers each){of_all}")
        elif part is not None and not many:
            click.echo(f"no scan is in shard {part} of {len(records)}: there is nothing to do")
        if table.errors and many > 1:
            listed = f"; see {errors_path(path)}" if part is None else ""
            click.echo(f"{len(table.errors)} of {counted(many)} failed{listed}", err=True)
    wrong = wrongly(records.left_out)
    if records.left_out:
        place, why = next(iter((wrong or records.left_out).items()))
        click.echo(f"{len(records.left_out)} left out, such as {place}: {why}", err=True)
    if wrong or any(table.errors for table in tables):
        sys.exit(1)


@reported(inputs="folders")
@click.command("merge")
@click.argument("folders", nargs=-1, required=True, metavar="PARTS...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The table: .csv, .parquet, .npz.")
def merge_command(folders: tuple[str, ...], output: Path) -> None:
    """Make one table of the parts that shards of 'brainfm embed --shard' wrote to the folders PARTS.

    Rows are in the order of the list of scans, each scan once. Exit code 1: scans are missing, or failed; the table of
    the others is written. PARTS are left as they are.
    """
    from brainfm.parts import merge
    from brainfm.report import current
    from brainfm.table import check_output, errors_path, files_of, write

    run = current()
    run.check_apart(files_of(output))
    check_output(output)
    with run.step("reading the parts"):
        merged = merge(folders)
    with run.step("writing"):
        write(merged.table, output)
    run.done = len(merged.table)
    run.asked = run.done + len(merged.table.errors) + merged.missing
    run.details |= {"missing": merged.missing, "shards_to_run_again": list(merged.shards)}
    for record, why in merged.table.errors:
        run.fail(record.name, why)
    click.echo(f"{counted(len(merged.table))} → {output} ({merged.table.vectors.shape[1]} numbers each)")
    if merged.table.errors:
        click.echo(f"{counted(len(merged.table.errors))} failed; see {errors_path(output)}", err=True)
    if merged.missing:
        shards = ", ".join(merged.shards)
        click.echo(f"{merged.missing} scans are in no part: run the shards {shards} again, then merge again", err=True)
    if merged.missing or merged.table.errors:
        sys.exit(1)


@click.command("phantom")
@click.option("--n", "patients", type=click.IntRange(1), required=True, help="Patients.")
@click.option("--out", "folder", required=True, metavar="DIR")
@click.option("--spacing", type=click.FloatRange(1, 8), default=1.0, show_default=True, help="Millimetres a voxel.")
@click.option("--scans-per-patient", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
def phantom_command(
    patients: int, folder: str, spacing: float, scans_per_patient: int, seed: int, workers: int
) -> None:
    """Write a cohort of phantoms: synthetic T1 scans with known labels, for tests and benchmarks. Never real data.

    DIR gets a folder a scan (normalized.nii.gz, mask.nii.gz) and manifest.csv with age, sex, disease and severity. At
    4 mm they fit the test models as they are.
    """
    from brainfm.phantom import make_cohort

    manifest = make_cohort(
        patients,
        folder,
        spacing=spacing,
        scans_per_patient=scans_per_patient,
        seed=seed,
        workers=workers,
        progress=True,
    )
    click.echo(f"{manifest}: {patients * scans_per_patient} scans of {patients} phantoms, not of people")
