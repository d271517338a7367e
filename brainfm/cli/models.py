"""What is known of models, and their folders: list, info, fetch, convert, push, verify, export."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from brainfm.pretrained import PretrainedCfg


_json_option = click.option("--json", "as_json", is_flag=True, help="As JSON, for a program to read.")


@click.command("list")
@click.argument("pattern", default="")
@click.option("--pretrained", is_flag=True, help="Only models whose weights exist, by their full names.")
@_json_option
def list_command(pattern: str, pretrained: bool, as_json: bool) -> None:
    """List the models, or those that match PATTERN, such as '*vit*'."""
    from brainfm.errors import ModelNameError
    from brainfm.registry import list_models, listing

    names = list_models(pattern, pretrained=pretrained)
    if not names:
        raise ModelNameError(f"no model matches {pattern!r}; 'brainfm list' names them all")
    listings = [listing(name) for name in names]
    if as_json:
        _echo_json([model.to_dict() for model in listings])
        return
    for name, model in zip(names, listings, strict=True):
        click.echo(f"{name:34} {model.num_features:5}-d  {model.source or 'no published weights'}")


@click.command("info")
@click.argument("model")
@click.argument("datasets", nargs=-1)
@click.option("--overlap", is_flag=True, help="Say which of DATASETS were in the pretraining data.")
@_json_option
def info_command(model: str, datasets: tuple[str, ...], overlap: bool, as_json: bool) -> None:
    """Say what is known of MODEL: weights, licences, input contract, cohorts, published scores, citation.

    With --overlap, say which of DATASETS were in its pretraining data: brainfm info MODEL --overlap IXI ADNI my_study
    """
    from brainfm.about import about_weight, as_text
    from brainfm.names import hub_mirror, parse_name, resolve
    from brainfm.weights import cached_weights

    if overlap != bool(datasets):
        raise click.UsageError("data sets are named after --overlap: brainfm info MODEL --overlap IXI ADNI")
    cfg = resolve(model).cfg
    if overlap:
        _say_overlap(cfg, datasets, as_json)
        return
    source = cfg.source
    if (mirror := hub_mirror()) and parse_name(model)[0] == "" and not cfg.file:
        source = f"hf-hub:{mirror}/{cfg.name} (by BRAINFM_HUB_ORG)"
    here = cached_weights(cfg) if cfg.has_weights else None
    if as_json:
        place = {"name": cfg.name, "source": source or None, "cached_file": str(here) if here else None}
        _echo_json(place | cfg.to_dict())
        return
    click.echo(as_text(about_weight(cfg, source + (f" (here: {here})" if here else ""))))


def _say_overlap(cfg: PretrainedCfg, datasets: tuple[str, ...], as_json: bool) -> None:
    from brainfm.overlap import pretraining_overlap

    found = [(dataset, pretraining_overlap(cfg, dataset)) for dataset in datasets]
    if as_json:
        recorded = [cohort.name for cohort in cfg.cohorts]
        shared = [asdict(overlap) for _, overlaps in found for overlap in overlaps]
        _echo_json({"name": cfg.name, "cohorts": recorded, "datasets": datasets, "overlaps": shared})
        return
    none = "not among the pretraining cohorts by any name known here"
    for dataset, overlaps in found:
        for overlap in overlaps:
            click.echo(overlap)
        if not overlaps:
            click.echo(f"{dataset}: {none if cfg.cohorts else f'{cfg.name} records no pretraining cohorts'}")


_SHARE = click.option(
    "--share", is_flag=True, help="It will be passed on: refuse where the licence of the weights does not allow that."
)


@click.command("fetch")
@click.argument("model")
@click.option("--to", metavar="DIR", help="A folder for a machine without a network: 'local-dir:DIR' loads it there.")
@click.option("--cache-dir", help="Where to keep the weights instead of the usual cache.")
@click.option("--accept-licence", is_flag=True, help="Accept the licence of weights that ask for it; it is kept.")
def fetch_command(model: str, to: str | None, cache_dir: str | None, accept_licence: bool) -> None:
    """Bring the weights of MODEL to this machine ahead of time; afterwards no network is needed."""
    from brainfm import hub

    path = hub.fetch(model, to, cache_dir, accept_licence)
    click.echo(f"{model} → {path}" + (f" (load it as local-dir:{path})" if to else ""))


@click.command("convert")
@click.argument("source")
@click.argument("folder", metavar="DIR")
@click.option("--model", required=True, help="The registered model that SOURCE holds the weights of.")
@click.option(
    "--cfg", "cfg_file", type=click.File(), help="JSON with fields of the cfg to set: licence, cohorts, notes…"
)
@_SHARE
def convert_command(source: str, folder: str, model: str, cfg_file: Any, share: bool) -> None:
    """Turn SOURCE, a checkpoint of any kind, into a model's folder, ready for local-dir: and 'brainfm push'.

    SOURCE is the authors' file, a SimCLR or MAE checkpoint, a state dict, or a folder with one of them. With
    --model NAME.TAG it must be the published file, by its hash.
    """
    import json

    import brainfm
    from brainfm import hub
    from brainfm.names import resolve
    from brainfm.weights.licence import check_passing_on

    try:
        overlay = json.load(cfg_file) if cfg_file else {}
        if share:
            check_passing_on(resolve(model, overlay=overlay).cfg, f"{folder}: not written")
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


@click.command("push")
@click.argument("folder", metavar="DIR")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="The branch to commit to, made where there is none.")
def push_command(folder: str, repository: str, private: bool, revision: str | None) -> None:
    """Upload DIR, a model's folder, to the Hugging Face Hub as ORG/NAME. HF_TOKEN must have the right to write."""
    import brainfm
    from brainfm.names import resolve

    name = brainfm.push_to_hub(folder, repository, private=private, revision=revision)
    pinned = resolve(f"local-dir:{folder}").cfg.sha256
    click.echo(f"{name}\nsha256 {pinned}: with the commit above, what a cfg must pin")


@click.command("publish")
@click.argument("organisation", metavar="ORG")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option(
    "--file",
    "files",
    metavar="MODEL=FILE",
    multiple=True,
    help="The weight file of MODEL, where it is not in the cache.",
)
@click.option("--private", is_flag=True, help="Make new repositories private.")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and what is left out and why.")
def publish_command(
    organisation: str, patterns: tuple[str, ...], files: tuple[str, ...], private: bool, dry_run: bool
) -> None:
    """Convert and push every weight that is here and whose card lets it be passed on, to ORG/MODEL.TAG on the Hub.

    PATTERN, such as 'medicalnet_*', picks models. What is there with an equal digest is not pushed again: after an
    interruption, the same command goes on. In the end the pins are printed, as the cards have them. HF_TOKEN must have
    the right to write. The exit code is 1 where a weight failed; the others are pushed all the same.
    """
    import yaml

    from brainfm.hub import publish_all

    named = [file.partition("=") for file in files]
    if wrong := [name for name, equals, path in named if not (name and equals and path)]:
        raise click.UsageError(f"--file {wrong[0]}: write MODEL=FILE")
    pins, failed = {}, False
    given = {name: path for name, _, path in named}
    for one in publish_all(organisation, patterns, files=given, private=private, dry_run=dry_run):
        where = f" → hf-hub:{one.repository}" * bool(one.repository) + f"@{one.revision}" * bool(one.revision)
        click.echo(f"{one.state:9} {one.name}{where}" + (f": {one.why}" if one.why else ""))
        failed |= one.state == "failed"
        if one.revision:
            pins[one.name] = one.pin
    if pins:
        click.echo(
            "\nThe pins, for the weights on the models' cards:\n" + yaml.safe_dump(pins, sort_keys=False).rstrip()
        )
    if failed:
        sys.exit(1)


@click.command("verify")
@click.argument("model")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "tf32", "bfloat16", "float16"]),
    default=["float32", "bfloat16"],
    show_default=True,
    help="What 'brainfm.optimize' computes in; repeat it.",
)
@click.option("--device", default="cpu", show_default=True)
@_json_option
def verify_command(model: str, dtypes: tuple[Any, ...], device: str, as_json: bool) -> None:
    """Check that this machine gives the published features: embed the packaged scan, compare with the golden embedding.

    The exit code is 1 where an error is beyond what rounding explains.
    """
    import brainfm

    checks = brainfm.verify(model, dtypes, device)
    good = all(check.ok for check in checks)
    if as_json:
        said = [asdict(check) | {"ok": check.ok, "error": _json_number(check.error)} for check in checks]
        _echo_json({"model": model, "ok": good, "checks": said})
    else:
        for check in checks:
            verdict = "ok" if check.ok else "OFF"
            error = f"relative error {check.error:.1e}"
            click.echo(f"{check.computation:22} {error}   {verdict} (at most {check.tolerance:g})")
    if not good:
        click.echo(f"these are not the features of {model}; the input, the weights or the arithmetic differ", err=True)
        sys.exit(1)


@click.command("export")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file: .onnx, or .pt2.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "torch-export"]),
    help="ONNX, or a program of torch.export; without it, what the ending of OUTPUT says.",
)
@click.option("--checkpoint", help="A weight file to use instead of the published weights.")
@_SHARE
def export_command(model: str, output: Path, kind: Any, checkpoint: str | None, share: bool) -> None:
    """Write MODEL as a file that runs without brainfm, for a batch of any size, and check it against the model."""
    import brainfm
    from brainfm.export import export
    from brainfm.names import resolve
    from brainfm.weights.licence import check_passing_on

    if share:
        check_passing_on(resolve(model).cfg, f"{output}: not written")
    encoder = brainfm.create_model(model, pretrained=checkpoint is None, checkpoint_path=checkpoint)
    report = export(encoder, output, kind or ("torch-export" if output.suffix == ".pt2" else "onnx"))
    click.echo(f"{model} → {report.path}, checked: relative error {report.error:.1e} on {report.sample}")
    click.echo("What it takes and how to read it out is in it: brainfm_input_spec, brainfm_readout")


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def _json_number(number: float) -> float | None:
    """A number, or None where JSON has none: an error that is not finite."""
    return number if math.isfinite(number) else None
