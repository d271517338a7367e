"""`brainfm …`: thin, no logic of its own. Errors are one line and a non-zero exit; --debug gives the traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from brainfm.downstream.command import benchmark_command, finetune_command, probe_command
from brainfm.prep.command import prep_command, qc_command

EPILOG = "Documentation: README.md. Every refusal says what to do next."


class _Commands(click.Group):
    """A group whose commands end, on an error of brainfm, with one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        from brainfm.errors import BrainfmError

        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # 'brainfm list | head': click ends in silence
        except (BrainfmError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"{type(error).__name__}: {' '.join(str(error).split())}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; what is finished is kept, and the same command goes on from there", err=True)
            ctx.exit(130)


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="brainfm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and what happens behind the scenes.")
def main(debug: bool) -> None:
    """Pretrained encoders for 3D brain MRI, each with the exact input its weights expect."""
    import logging
    import os

    logger = logging.getLogger("brainfm")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logging.getLogger("brainfm.scan").setLevel(logging.DEBUG if debug else logging.WARNING)  # else a line a scan
    if not debug:  # each retry of a download is no news; what fails in the end is said once
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


@main.command("list")
@click.argument("pattern", default="")
@click.option("--pretrained", is_flag=True, help="Only models whose weights exist, by their full names.")
def list_command(pattern: str, pretrained: bool) -> None:
    """List the models, or those that match PATTERN, such as '*vit*'."""
    import brainfm

    names = brainfm.list_models(pattern, pretrained=pretrained)
    if not names:
        raise brainfm.ModelNameError(f"no model matches {pattern!r}; 'brainfm list' names them all")
    for name in names:
        cfg = brainfm.get_pretrained_cfg(name)
        click.echo(f"{name:34} {cfg.num_features:5}-d  {cfg.source or 'no published weights'}")


@main.command()
@click.argument("model")
@click.argument("datasets", nargs=-1)
@click.option("--overlap", is_flag=True, help="Say which of DATASETS were in the pretraining data.")
def info(model: str, datasets: tuple[str, ...], overlap: bool) -> None:
    """Say what MODEL is: weights, input contract, cohorts, licence, citation.

    With --overlap, say which of DATASETS were in its pretraining data: brainfm info MODEL --overlap IXI ADNI my_study
    """
    from brainfm.factory import hub_mirror, parse_name, resolve
    from brainfm.pretrained import describe
    from brainfm.weights import cached_weights

    if overlap != bool(datasets):
        raise click.UsageError("data sets are named behind --overlap: brainfm info MODEL --overlap IXI ADNI")
    cfg = resolve(model).cfg
    if overlap:
        _say_overlap(cfg, datasets)
        return
    source = cfg.source
    if (mirror := hub_mirror()) and parse_name(model)[0] == "" and not cfg.file:
        source = f"hf-hub:{mirror}/{cfg.name} (by BRAINFM_HUB_ORG)"
    here = cached_weights(cfg) if cfg.has_weights else None
    facts = {
        "model": cfg.name,
        "embedding": f"{cfg.num_features}-d",
        "weights": (source or "none published") + (f" (here: {here})" if here else ""),
        "sha256": cfg.sha256,
        "pretraining": cfg.ssl_method,
        "licence": cfg.licence,
        "paper": cfg.paper,
        "code": cfg.repository,
        "notes": cfg.notes,
    }
    for name, value in facts.items():
        if value:
            click.echo(f"{name:12} {value}")
    if cfg.input_spec:
        click.echo("\nInput contract\n" + _indented(describe(cfg.input_spec)))
    if cfg.cohorts:
        patients, scans = sum(c.patients for c in cfg.cohorts), sum(c.scans for c in cfg.cohorts)
        click.echo(
            f"\nPretrained on {patients:,} patients, {scans:,} scans; testing on these is testing on training data"
        )
        for cohort in cfg.cohorts:
            click.echo(f"  {cohort.name:10} {cohort.patients:6,} {cohort.scans:7,}  {', '.join(cohort.conditions)}")
    if cfg.scores:
        click.echo("\nPublished scores")
        for score in cfg.scores:
            spread = f" ± {score.sd:g}" if score.sd is not None else ""
            click.echo(f"  {score.task:32} {score.mode:14} {score.value:g}{spread} {score.metric}")
    if cfg.citation:
        click.echo("\nCitation\n" + _indented(cfg.citation))


def _say_overlap(cfg: Any, datasets: tuple[str, ...]) -> None:
    import brainfm

    for dataset in datasets:
        found = brainfm.pretraining_overlap(cfg, dataset)
        for overlap in found:
            click.echo(overlap)
        if not found:
            unknown = "not among the pretraining cohorts by any name known here"
            click.echo(f"{dataset}: {unknown if cfg.cohorts else f'{cfg.name} records no pretraining cohorts'}")


@main.command()
@click.argument("model")
@click.option("--to", metavar="DIR", help="A folder for a machine without a network: 'local-dir:DIR' loads it there.")
@click.option("--cache-dir", help="Where to keep the weights instead of the usual cache.")
def fetch(model: str, to: str | None, cache_dir: str | None) -> None:
    """Bring the weights of MODEL to this machine ahead of time; afterwards no network is needed."""
    from brainfm import hub

    path = hub.fetch(model, to, cache_dir)
    click.echo(f"{model} → {path}" + (f" (load it as local-dir:{path})" if to else ""))


@main.command()
@click.argument("source")
@click.argument("folder", metavar="DIR")
@click.option("--model", required=True, help="The registered model that SOURCE holds the weights of.")
@click.option(
    "--cfg", "cfg_file", type=click.File(), help="JSON with fields of the cfg to set: licence, cohorts, notes…"
)
def convert(source: str, folder: str, model: str, cfg_file: Any) -> None:
    """Turn SOURCE, a checkpoint of any kind, into a model's folder, ready for local-dir: and 'brainfm push'.

    SOURCE is the authors' file, a SimCLR or MAE checkpoint, a state dict, or a folder with one of them. With
    --model NAME.TAG it must be the published file, by its hash.
    """
    import json

    import brainfm
    from brainfm import hub
    from brainfm.factory import resolve

    try:
        overlay = json.load(cfg_file) if cfg_file else {}
        path = hub.convert(source, folder, model, pretrained_cfg_overlay=overlay)
    except (ValueError, TypeError) as error:
        if not cfg_file or isinstance(error, brainfm.BrainfmError):
            raise
        raise brainfm.BrainfmError(f"{cfg_file.name}: {error}") from error
    cfg = resolve(f"local-dir:{path}").cfg
    click.echo(f"{path}: {cfg.name}, {cfg.num_features} numbers; sha256 {cfg.sha256}")
    click.echo(cfg.notes)
    unstated = [field for field in ("cohorts", "licence") if not getattr(cfg, field)]
    if unstated:
        click.echo(f"Not stated on its card: {', '.join(unstated)}; say what you know of the weights with --cfg.")


@main.command()
@click.argument("folder", metavar="DIR")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="The branch to commit to, made where there is none.")
def push(folder: str, repository: str, private: bool, revision: str | None) -> None:
    """Upload DIR, a model's folder, to the Hugging Face Hub as ORG/NAME. HF_TOKEN must have the right to write."""
    import brainfm
    from brainfm.factory import resolve

    name = brainfm.push_to_hub(folder, repository, private=private, revision=revision)
    pinned = resolve(f"local-dir:{folder}").cfg.sha256
    click.echo(f"{name}\nsha256 {pinned}: with the commit above, what a cfg must pin")


@main.command()
@click.argument("model")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=["float32", "bfloat16"],
    show_default=True,
    help="What 'brainfm.optimize' computes in; repeat it.",
)
@click.option("--device", default="cpu", show_default=True)
def verify(model: str, dtypes: tuple[Any, ...], device: str) -> None:
    """Check that this machine gives the published features: embed the packaged scan, compare with the fingerprint.

    The exit code is 1 where an error is beyond what rounding explains.
    """
    import brainfm

    checks = brainfm.verify(model, dtypes, device)
    for check in checks:
        verdict = "ok" if check.ok else "OFF"
        click.echo(f"{check.computation:22} relative error {check.error:.1e}   {verdict} (at most {check.tolerance:g})")
    if not all(check.ok for check in checks):
        click.echo(f"these are not the features of {model}; the input, the weights or the arithmetic differ", err=True)
        sys.exit(1)


@main.command()
@click.option("--model", help="The model; by default the published one if its weights are here, else the test model.")
@click.option("-o", "--output", default="brainfm_demo", show_default=True, help="Folder for the two files it writes.")
def demo(model: str | None, output: str) -> None:
    """Embed the packaged sample scan, and draw the tensor that the encoder saw."""
    from brainfm import demo as job
    from brainfm.models.contracts import SAMPLE_MASK, SAMPLE_SCAN

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


@main.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, help="The table: .csv, .parquet or .npz.")
@click.option("--model", default="simclr_resnet18_3d", show_default=True, help="Name of the model.")
@click.option("--mask", help="Brain mask, where INPUT is one scan.")
@click.option("--checkpoint", help="A weight file to use instead of the published weights.")
@click.option("--batch-size", type=click.IntRange(1), help="Scans a forward pass; without it, by the GPU's memory.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Threads that prepare scans.")
@click.option("--strict", is_flag=True, help="Stop at the first bad scan instead of going on.")
@click.option("--strict-qc", is_flag=True, help="Refuse scans that 'brainfm prep' judged to have failed.")
def embed(
    inputs: tuple[str, ...],
    output: str,
    model: str,
    mask: str | None,
    checkpoint: str | None,
    batch_size: int | None,
    device: str,
    dtype: Any,
    workers: int,
    strict: bool,
    strict_qc: bool,
) -> None:
    """Embed scans into a table, a row a scan.

    INPUT is a scan (.nii, .nii.gz, .mgz), a manifest (.csv with image_path, and mask_path), a TurboPrep folder, or a
    BIDS-derivatives folder. Scans that fail are listed in OUTPUT's .errors.csv, and the exit code is 1.
    """
    import brainfm
    from brainfm.embed import check_output, errors_path
    from brainfm.manifest import ScanRecord, list_scans

    path = Path(output)
    check_output(path)
    if mask is not None:
        if len(inputs) != 1:
            raise brainfm.ScanError("--mask goes with one scan; list several with their masks in a manifest")
        records = [ScanRecord(inputs[0], mask)]
    else:
        records = [record for item in inputs for record in list_scans(item)]
    encoder = brainfm.create_model(model, pretrained=checkpoint is None, checkpoint_path=checkpoint)
    table = brainfm.embed(
        records,
        encoder,
        batch_size=batch_size or "auto",
        device=device,
        dtype=dtype,
        num_workers=workers,
        output=path,
        on_error="raise" if strict else "skip",
        strict_qc=strict_qc,
        progress=sys.stderr.isatty() or len(records) > 1,
    )
    for _, message in table.errors[:10]:
        click.echo(f"ScanError: {message}", err=True)
    if len(table):
        click.echo(f"{len(table)} scans → {path} ({table.vectors.shape[1]} numbers each)")
    if table.errors:
        if len(records) > 1:
            click.echo(f"{len(table.errors)} of {len(records)} scans failed; see {errors_path(path)}", err=True)
        sys.exit(1)


@main.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file: .onnx, or .pt2.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "torch-export"]),
    help="ONNX, or a program of torch.export; without it, what the ending of OUTPUT says.",
)
@click.option("--checkpoint", help="A weight file to use instead of the published weights.")
def export(model: str, output: Path, kind: Any, checkpoint: str | None) -> None:
    """Write MODEL as a file that runs without brainfm, for a batch of any size, and check it against the model."""
    import brainfm
    from brainfm.export import export

    encoder = brainfm.create_model(model, pretrained=checkpoint is None, checkpoint_path=checkpoint)
    report = export(encoder, output, kind or ("torch-export" if output.suffix == ".pt2" else "onnx"))
    click.echo(f"{model} → {report.path}, checked: relative error {report.error:.1e} on the packaged scan")
    click.echo("It takes tensors prepared as the input contract says, which is in it: brainfm_input_spec")


@main.command()
@click.option("--n", "patients", type=click.IntRange(1), required=True, help="Patients.")
@click.option("--out", "folder", required=True, metavar="DIR")
@click.option("--spacing", type=click.FloatRange(1, 8), default=1.0, show_default=True, help="Millimetres a voxel.")
@click.option("--scans-per-patient", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
def phantom(patients: int, folder: str, spacing: float, scans_per_patient: int, seed: int, workers: int) -> None:
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


@main.group()
def cache() -> None:
    """Scans prepared for training."""


@cache.command("build")
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


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE [KEY=VALUE]... [--dry-run]")
def pretrain(arguments: tuple[str, ...]) -> None:
    """Pretrain an encoder by a recipe; also 'python -m brainfm.train', which torchrun starts."""
    from brainfm.train.command import pretrain_command

    pretrain_command.main(list(arguments), prog_name="brainfm pretrain")


main.add_command(probe_command)
main.add_command(finetune_command)
main.add_command(benchmark_command)
main.add_command(prep_command)
main.add_command(qc_command)


def _indented(text: str) -> str:
    return "  " + text.replace("\n", "\n  ")


if __name__ == "__main__":
    main()
