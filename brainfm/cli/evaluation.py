"""The command line of evaluations."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from brainfm.cli.reported import reported

_HELP = {"help_option_names": ["-h", "--help"]}


class _ManyValues(click.Command):
    """A command whose options that can be repeated also take several values at once: --models A B."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        repeated = {name for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        flat: list[str] = []
        current: str | None = None
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in repeated else None
                flat.append(arg)
            elif current is not None and flat[-1] != current:
                flat += [current, arg]
            else:
                flat.append(arg)
        return super().parse_args(ctx, flat)


def _common(command: Any) -> Any:
    """The options of all evaluations."""
    for option in (
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results."),
        click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Runs of each."),
        click.option("--epochs-scale", default=1.0, show_default=True, help="Times the paper's epochs."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Such as lr=1e-3."),
        click.option("--no-controls", is_flag=True, help="Without untrained encoders and covariates."),
        click.option(
            "--replace", "replace_all", is_flag=True, help="Replace another evaluation that the output holds."
        ),
        click.option("--refuse-overlap", is_flag=True, help="Refuse models that were pretrained on a task's data."),
        _rigour,
    ):
        command = option(command)
    return command


def _rigour(command: Any) -> Any:
    """The options of whatever probes embeddings: sites, groups of people, folds."""
    for option in (
        click.option(
            "--harmonise",
            default="",
            metavar="[long](combat|covbat)[-noeb]",
            help="Also probe embeddings without what is of a site; with -noeb without empirical Bayes.",
        ),
        click.option("--site", default="", metavar="COLUMN", help="That site, for --harmonise."),
        click.option("--folds", default=0, type=click.IntRange(0), help="Nested cross-validation, --seeds times."),
        click.option(
            "--fairness", multiple=True, metavar="COLUMN", help="Also say every metric by groups, such as sex."
        ),
        click.option(
            "--least-group", default=20, show_default=True, type=click.IntRange(2), help="Test patients of a group."
        ),
    ):
        command = option(command)
    return command


_keep = click.option("--keep-models", is_flag=True, help="Keep each run's model, for 'brainfm predict'.")


@reported(inputs="inputs")
@click.command("predict", context_settings=_HELP)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The table, a .csv.")
@click.option("--coverage", default=0.9, show_default=True, help="How often an interval or set should hold the truth.")
@click.option("--threshold", type=float, help="Of a binary task, instead of the model's.")
@click.option("--mask", help="Brain mask, where INPUT is one scan.")
@click.option("--batch-size", type=click.IntRange(1), help="Scans a forward pass; without it, by the GPU's memory.")
@click.option("--device", default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Threads that prepare scans.")
@click.option("--strict", is_flag=True, help="Stop at the first bad scan instead of going on.")
@click.option("--strict-qc", is_flag=True, help="Refuse scans that failed in 'brainfm prep' or by 'brainfm qc'.")
def predict_command(
    folder: Path,
    inputs: tuple[str, ...],
    mask: str | None,
    batch_size: int | None,
    workers: int,
    strict: bool,
    output: Path,
    **options: Any,
) -> None:
    """Predict, by the model in FOLDER, what it learned, of new scans.

    FOLDER is one of OUTPUT/models of 'brainfm finetune --keep-models' or 'brainfm benchmark --keep-models'. INPUT is
    what 'brainfm embed' takes. A row a scan: the prediction with its interval (low, high), or a probability a class,
    the predicted class and the set of those that are not refused; and how unlike the training scans it is. Scans that
    fail are listed in OUTPUT's .errors.csv, and the exit code is 1.
    """
    from brainfm.bids import wrongly
    from brainfm.downstream.predicting import predict
    from brainfm.errors import ScanError
    from brainfm.manifest import Listing, ScanRecord, list_scans
    from brainfm.report import current
    from brainfm.system import launched
    from brainfm.table import errors_path

    if mask is not None and len(inputs) != 1:
        raise ScanError("--mask goes with one scan; list several with their masks in a manifest")
    records = list_scans(inputs) if mask is None else Listing([ScanRecord(inputs[0], mask)])
    found = predict(
        folder,
        records,
        output=output,
        batch_size=batch_size or "auto",
        num_workers=workers,
        on_error="raise" if strict else "skip",
        progress=True,
        **options,
    )
    run, wrong = current(), wrongly(records.left_out)
    run.asked, run.done, run.left_out = len(records), len(found.table), records.left_out
    for record, why in found.errors:
        run.fail(record.name, why)
    if launched().rank == 0:
        for _, message in found.errors[:10]:
            click.echo(f"ScanError: {message}", err=True)
        click.echo(f"{len(found.table)} scans → {output}")
        if found.errors and len(records) > 1:
            click.echo(f"{len(found.errors)} of {len(records)} scans failed; see {errors_path(output)}", err=True)
        if records.left_out:
            path, why = next(iter((wrong or records.left_out).items()))
            click.echo(f"{len(records.left_out)} left out, such as {path}: {why}", err=True)
    if wrong or found.errors:
        sys.exit(1)


@reported(inputs="tasks", unit="run")
@click.command("benchmark", cls=_ManyValues, context_settings=_HELP)
@click.argument("tasks", nargs=-1)
@click.option("--from", "sheet", type=click.Path(path_type=Path), help="The run.json of results, to make them again.")
@click.option("--models", multiple=True, help="Such as simclr_resnet18_3d or local-dir:FOLDER.")
@click.option(
    "--modes",
    multiple=True,
    default=("probe", "finetune", "scratch"),
    show_default=True,
    help="Of probe, knn, prototype, probe_paper, probe_adam, norm_bias, adapter, lora, finetune, scratch.",
)
@click.option("--fractions", multiple=True, type=float, help="Of the training patients, such as 0.2 0.4 0.6.")
@click.option("--robustness", "corrupted", is_flag=True, help="Also probe test scans that are corrupted more and more.")
@click.option("--manifest", "manifests", multiple=True, metavar="[NAME=]CSV", help="A task's, or that of all.")
@click.option("--test-manifest", "tested", multiple=True, metavar="TASK=CSV", help="Another cohort, tested whole.")
@_keep
@_common
def benchmark_command(
    tasks: tuple[str, ...],
    models: tuple[str, ...],
    modes: tuple[str, ...],
    fractions: tuple[float, ...],
    manifests: tuple[str, ...],
    tested: tuple[str, ...],
    corrupted: bool,
    sheet: Path | None,
    **options: Any,
) -> None:
    """Evaluate models on TASKS: names that ship with brainfm (age_ixi), or YAML files; and write tables and a page.

    The same command goes on with a grid that stopped. Of the models, those with weights are probed and fine-tuned, and
    those without are trained from scratch.

    TASKS may be one file of a comparison instead, with networks, sources and methods (examples/experiments): each
    combination is pretrained in OUTPUT/pretrain, and all are evaluated. --manifest NAME=PLACE is of a source or a task
    of it, --modes, --fractions, --seeds, --epochs-scale and --set replace its own, and what cannot be run is left out
    with its reason.

    --from RESULTS/run.json does again what made RESULTS, an evaluation of any command, by its data sheet, and says
    whether results.csv is the same to the byte; nothing else but -o is given with it.

    Exit code 1: there was an error, or scans are left out that are not there
    or cannot be read; the results of the others are written. 75: a signal stopped a training, which can go on. 130:
    Ctrl-C.
    """
    from brainfm.downstream.elsewhere import read_tasks
    from brainfm.downstream.experiment import is_experiment
    from brainfm.downstream.task import load_task
    from brainfm.errors import BrainfmError, TaskError

    if sheet is not None:
        _run_again(sheet, options["output"])
        return
    if not tasks:
        raise click.UsageError("Missing argument 'TASKS...'.")
    for_all = [text for text in manifests if "=" not in text]
    given = dict(text.split("=", 1) for text in manifests if "=" in text)
    if alone := [text for text in tested if "=" not in text]:
        raise TaskError(f"--test-manifest {alone[0]}: of which task? Write TASK=FILE.csv")
    elsewhere = dict(text.split("=", 1) for text in tested)
    if any(map(is_experiment, tasks)):
        if len(tasks) > 1 or models or for_all:
            raise BrainfmError(
                "a comparison's file names its networks, sources and tasks itself: give it alone, without --models, "
                "and --manifest as NAME=PLACE"
            )
        _run_experiment(tasks[0], given, elsewhere, corrupted=corrupted, **options)
        return
    if not models:
        raise click.UsageError("Missing option '--models'.")
    loaded = [load_task(name) for name in tasks]
    if unknown := (given.keys() | elsewhere.keys()) - {task.name for task in loaded}:
        raise TaskError(f"--manifest {sorted(unknown)[0]}=…: no such task; write TASK=FILE.csv")
    if own := [task.name for task in loaded if task.name in elsewhere and task.leave_out]:
        raise TaskError(f"--test-manifest {own[0]}=…: it is tested on what it leaves out (leave_out); make two tasks")
    loaded = [replace(task, test_manifest=elsewhere.get(task.name, task.test_manifest)) for task in loaded]
    if len(for_all) > 1:
        raise TaskError(f"--manifest {for_all[1]}: of which task? Write TASK=FILE.csv")
    data = [
        one
        for name, task in zip(tasks, loaded, strict=True)
        for one in read_tasks(
            task,
            given.get(task.name) or next(iter(for_all), None) or _beside(name, task.manifest),
            Path(task.test_manifest) if task.name in elsewhere else _beside(name, task.test_manifest),
        )
    ]
    _run(data, models, modes, fractions=fractions, corrupted=corrupted, **options)


def _run_again(sheet: Path, output: Path) -> None:
    """Do what made a results folder once more, where it was done; exit code 1 where the results are not the same."""
    from contextlib import chdir

    from brainfm.downstream.sheet import SHEET, differences, read_sheet
    from brainfm.errors import BrainfmError

    ctx = click.get_current_context()
    others = [
        name
        for name, value in ctx.params.items()
        if name not in ("sheet", "output")
        and ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        and value != ()  # click 8.1.0 says of an argument that may be several, and is not there, that it was given
    ]
    if others:
        raise BrainfmError(f"--from {sheet} has all options itself; leave {', '.join(others)} out")
    earlier, output = read_sheet(sheet), output.absolute()
    made = earlier["command"]
    command = {one.name: one for one in (probe_command, finetune_command, benchmark_command)}.get(made["name"])
    if command is None:
        raise BrainfmError(f"{sheet}: made by {made['name']!r}, which is not probe, finetune or benchmark")
    if output.resolve() == sheet.absolute().parent.resolve():
        raise BrainfmError(f"{output} holds the results that are to be made again; name another folder")
    known = {one.name: one for one in command.params}
    if strange := made["options"].keys() - known.keys():
        raise BrainfmError(f"{sheet}: {made['name']} has no option {', '.join(sorted(strange))}; of another brainfm?")
    options = {name: _typed(known[name], value) for name, value in made["options"].items()}
    again = click.Context(command, info_name=made["name"], parent=ctx)
    again.params = {**options, "output": output, "replace_all": False, **({"sheet": None} if "sheet" in known else {})}
    code: Any = 0
    try:
        with chdir(made["folder"]), again:
            again.invoke(command.callback, **again.params)  # type: ignore[arg-type]
    except OSError as error:
        raise BrainfmError(f"{sheet}: its command was run in {made['folder']}, which is not there ({error})") from error
    except SystemExit as stopped:  # scans were left out, as before
        code = stopped.code
        if not (output / SHEET).exists():
            raise
    now = read_sheet(output / SHEET)
    if now["results"] == earlier["results"]:
        click.echo(f"{output / 'results.csv'}: the same to the byte as {sheet.parent / 'results.csv'}")
        sys.exit(code)
    why = "; ".join(differences(earlier, now)) or "nothing that is known of: chance in the hardware, or in a library?"
    raise BrainfmError(f"{output / 'results.csv'} differs from {sheet.parent / 'results.csv'}. Not the same: {why}")


def _typed(parameter: click.Parameter, value: Any) -> Any:
    """An option as the command takes it, from plain data."""
    if parameter.multiple if isinstance(parameter, click.Option) else parameter.nargs != 1:
        return tuple(value)
    return Path(value) if isinstance(parameter.type, click.Path) and value is not None else value


def _command() -> dict[str, Any]:
    """The command that is being run, as plain data, for `run.json`."""
    ctx = click.get_current_context()
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in ctx.params.items()}
    options = {name: value for name, value in plain.items() if name not in ("output", "replace_all", "sheet")}
    return {"name": ctx.command.name, "folder": str(Path.cwd()), "options": options}


def _run_experiment(
    file: str,
    places: dict[str, str],
    tested: dict[str, str],
    *,
    output: Path,
    settings: tuple[str, ...],
    no_controls: bool,
    refuse_overlap: bool,
    replace_all: bool,
    corrupted: bool,
    keep_models: bool,
    harmonise: str,
    site: str,
    folds: int,
    fairness: tuple[str, ...],
    **_: Any,
) -> None:
    """Run a comparison's file, with the options that were given in place of its own fields."""
    from brainfm.downstream.experiment import load_experiment, run_experiment
    from brainfm.downstream.plan import read_settings
    from brainfm.errors import BrainfmError, RunInterruptedError
    from brainfm.train.trainer import INTERRUPTED

    for option, was_given in (
        ("--robustness", corrupted),
        ("--keep-models", keep_models),
        ("--harmonise", harmonise or site),
        ("--folds", folds),
        ("--fairness", fairness),
    ):
        if was_given:
            raise BrainfmError(f"{option} is not of a comparison's file; evaluate its models by --models local-dir:…")
    ctx = click.get_current_context()
    changes = {
        name: ctx.params[name]
        for name in ("modes", "fractions", "seeds", "epochs_scale")
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    changes |= {"epochs": None} if "epochs_scale" in changes else {}
    changes |= {"controls": False} if no_controls else {}
    experiment = load_experiment(file, places, tested, **changes)
    experiment = replace(experiment, settings={**experiment.settings, **read_settings(settings)})
    on_overlap: Any = "refuse" if refuse_overlap else "mark"
    try:
        page = run_experiment(experiment, output, on_overlap=on_overlap, replace_all=replace_all, progress=True)
    except RunInterruptedError as stopped:
        click.echo(str(stopped), err=True)
        sys.exit(INTERRUPTED)
    _say_results(page)


def _beside(name: str, manifest: str) -> Path | None:
    """A manifest that a task's file names, relative to the file."""
    return Path(name).parent / manifest if manifest else None


def _own(command: Any) -> Any:
    """The options of evaluations on one's own labels."""
    for option in (
        click.option("--covariates", multiple=True, help="Columns that a control predicts from without an image."),
        click.option("--positive", default="", metavar="WORD", help="The word that is 1; of a label with two."),
        click.option(
            "--kind",
            type=click.Choice(["binary", "multiclass", "regression"]),
            help="What the label is, where its values leave doubt.",
        ),
        click.option("--label", default="", metavar="COLUMN", help="What to predict; a task's file knows."),
    ):
        command = option(command)
    return command


@reported(inputs="labels", unit="run")
@click.command("probe", cls=_ManyValues, context_settings=_HELP)
@click.argument("labels", type=click.Path(path_type=Path))
@click.option(
    "--embeddings", "tables", multiple=True, metavar="TABLE", help="Of 'brainfm embed': .csv, .parquet, .npz."
)
@click.option("--models", multiple=True, help="Such as simclr_resnet18_3d or local-dir:FOLDER.")
@_own
@_common
def probe_command(labels: Path, tables: tuple[str, ...], models: tuple[str, ...], **options: Any) -> None:
    """Fit a linear model on embeddings of scans, and say how well it predicts a column of LABELS.

    With --embeddings, LABELS is any table (.csv, .tsv), joined by patient_id (or participant_id, subject_id, PTID) and
    scan_id, or by image_path; no model and no scan is needed. With --models, LABELS is a manifest of scans. Either may
    be the YAML file of a task that names its table.

    The split is the column 'split' of LABELS, or is drawn by patient, 60/20/20, another for each seed. Exit code 1:
    there was an error, or scans are left out that are not there or cannot be read; the results of the others are
    written.
    """
    from brainfm.errors import BrainfmError

    if bool(tables) == bool(models):
        raise BrainfmError("give --embeddings TABLE, which 'brainfm embed' makes, or --models NAME, and not both")
    if not tables:
        _run(_read_own(labels, options), models, ("probe",), **options)
        return
    from brainfm.downstream.precomputed import read_embedded

    own = {name: options.pop(name) for name in _OWN}
    data = read_embedded(labels, {name: name for name in tables}, **own)
    _run([data], tables, ("probe",), **options)


@click.command("compare", context_settings=_HELP)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--labels", type=click.Path(path_type=Path), help="A table with a column to predict in both ways.")
@click.option("--label", default="", metavar="COLUMN", help="That column.")
@click.option("--kind", type=click.Choice(["binary", "multiclass", "regression"]), help="What it is, where in doubt.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A row a scan, as .csv.")
def compare_command(first: Path, second: Path, labels: Path | None, label: str, kind: Any, output: Path | None) -> None:
    """How much the preparation matters: FIRST and SECOND are tables of 'brainfm embed', of the same scans.

    Says how alike a scan's two embeddings are, whether its own is the nearest among all patients', and with --labels
    how far the predictions of a probe move that learned from the first way.
    """
    from brainfm.downstream.comparison import compare
    from brainfm.errors import BrainfmError

    if label and labels is None:
        raise BrainfmError(f"--label {label}: of which table? Give --labels TABLE")
    if output is not None and output.suffix != ".csv":
        raise BrainfmError(f"{output}: the rows are written as .csv; give a name that ends so")
    found = compare(first, second, labels, label=label, kind=kind)
    for line in found.lines():
        click.echo(line)
    if output is not None:
        found.save(output)
        click.echo(f"{output}: a row a scan")


@reported(inputs="scans", unit="encoder")
@click.command("compare-encoders", cls=_ManyValues, context_settings=_HELP)
@click.argument("scans", nargs=-1, required=True, metavar="SCANS...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--labels", type=click.Path(path_type=Path), help="A table with the label; by default SCANS, a manifest.")
@_own
@click.option("--models", multiple=True, default=("*",), show_default="all", metavar="PATTERN", help="Such as 'open*'.")
@click.option("--untrained", is_flag=True, help="Random weights, said to be, for encoders whose own cannot be had.")
@click.option("--no-controls", is_flag=True, help="Without untrained encoders and covariates.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Splits, each with its own probe.")
@click.option("--device", default="auto", show_default=True)
@click.option("--replace", "replace_all", is_flag=True, help="Replace another comparison that the output holds.")
@click.option("--refuse-overlap", is_flag=True, help="Leave out encoders that were pretrained on these data.")
@_rigour
def compare_encoders_command(
    scans: tuple[str, ...], output: Path, labels: Path | None, no_controls: bool, **options: Any
) -> None:
    """Embed SCANS by every encoder whose contract they meet, and probe all of them alike.

    SCANS are what 'brainfm embed' takes: a folder of 'brainfm prep', a manifest, images. Each scan is embedded once an
    encoder, and its seconds and memory are measured. With --label, OUTPUT has a page with scores beside cost; without,
    the cost alone. Encoders whose contract the scans do not meet, or whose weights cannot be had here, are left out,
    each with its reason: on the page, and in left_out.csv. The same command goes on with a run that was killed.
    """
    from brainfm.downstream.encoders import compare_encoders
    from brainfm.downstream.wording import NONE, cost_text
    from brainfm.report import current

    run = current()
    found = compare_encoders(
        scans[0] if len(scans) == 1 else list(scans),
        output,
        labels=labels,
        controls=not no_controls,
        progress=True,
        **options,
    )
    run.asked, run.done = len(found), sum(bool(one.weights) for one in found)
    run.details["encoders"] = [one.to_dict() for one in found]
    for one in found:
        if one.reason in ("error", "memory"):
            run.fail(one.model, one.why)
        elif not one.weights:
            run.left_out[one.model] = one.why
        elif one.failed:
            run.fail(one.model, f"{one.failed} scans failed; see {output / 'encoders.csv'}")
    if options["label"]:
        from brainfm.downstream.report import short_report

        click.echo(short_report(output))
    else:
        click.echo(f"{'encoder':34} {'weights':8} {'width':>5} {'seconds':>8} {'GB':>5}")
        for one in (each for each in found if each.weights):
            costs = f"{cost_text(one.seconds):>8} {cost_text(one.gigabytes):>5}"
            click.echo(f"{one.model:34} {one.weights or NONE:8} {one.width:5} {costs}")
        click.echo(f"{output / 'encoders.csv'}: all of it")
    if left_out := [one for one in found if not one.weights]:
        click.echo(f"{len(left_out)} encoders were left out; see {output / 'left_out.csv'}", err=True)
    if any(one.failed for one in found):
        click.echo(f"scans failed; see {output / 'encoders.csv'}", err=True)
        sys.exit(1)


@reported(inputs="manifest", unit="run")
@click.command("finetune", cls=_ManyValues, context_settings=_HELP)
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--models", multiple=True, required=True, help="Such as simclr_resnet18_3d or local-dir:FOLDER.")
@_own
@_keep
@_common
def finetune_command(manifest: Path, models: tuple[str, ...], **options: Any) -> None:
    """Fine-tune encoders to predict a column of MANIFEST, or as the YAML file of a task says.

    The split and the exit codes are those of 'brainfm probe', and 75: a signal stopped a training, which can go on.
    Settings are those of the released code of Kaczmarek et al. 2025, of a masked autoencoder those of its authors, but
    that regressions learn standardised labels; --set replaces them. Under torchrun processes share the batch.
    """
    _run(_read_own(manifest, options), models, ("finetune",), **options)


_OWN = ("label", "kind", "covariates", "positive")


def _read_own(path: Path, options: dict[str, Any]) -> list[Any]:
    """The scans and labels of a manifest or of a task's file; takes its options out of all."""
    from brainfm.downstream.elsewhere import read_tasks
    from brainfm.downstream.task import kind_of, load_task, make_task, read_task
    from brainfm.errors import TaskError
    from brainfm.manifest import read_manifest

    own = {name: options.pop(name) for name in _OWN}
    if path.suffix.lower() in (".yaml", ".yml"):
        if any(own.values()):
            raise TaskError(f"{path}: a task's file says label, kind, covariates and positive itself; leave them out")
        task = load_task(path)
        return read_tasks(task, _beside(str(path), task.manifest), _beside(str(path), task.test_manifest))
    if not own["label"]:
        raise TaskError(f"{path}: which column is to be predicted? Say --label COLUMN")
    if not own["kind"]:
        own["kind"] = kind_of([record.extra.get(own["label"], "") for record in read_manifest(path)], own["label"])
    return [read_task(make_task(**own), path)]


def _run(
    data: list[Any],
    models: tuple[str, ...],
    modes: tuple[str, ...],
    *,
    output: Path,
    seeds: int,
    epochs_scale: float,
    settings: tuple[str, ...],
    no_controls: bool,
    refuse_overlap: bool,
    replace_all: bool,
    fractions: tuple[float, ...] = (),
    corrupted: bool = False,
    keep_models: bool = False,
    harmonise: str = "",
    site: str = "",
    folds: int = 0,
    fairness: tuple[str, ...] = (),
    least_group: int = 20,
) -> None:
    from brainfm.downstream.benchmark import benchmark
    from brainfm.downstream.plan import Plan, read_settings
    from brainfm.errors import BrainfmError, RunInterruptedError
    from brainfm.train.trainer import INTERRUPTED

    if corrupted and "probe" not in modes:
        raise BrainfmError("--robustness is of the linear probe; add probe to --modes, or leave it out")
    plan = Plan(
        models=models,
        modes=modes,
        seeds=seeds * (folds or 1),
        folds=folds,
        fractions=fractions,
        epochs_scale=epochs_scale,
        settings=read_settings(settings),
        controls=not no_controls,
        keep_models=keep_models,
        harmonise=harmonise,
        site=site,
        fairness=fairness,
        least_group=least_group,
    )
    on_overlap: Any = "refuse" if refuse_overlap else "mark"
    try:
        page = benchmark(
            data, plan, output, on_overlap=on_overlap, replace_all=replace_all, command=_command(), progress=True
        )
    except RunInterruptedError as stopped:
        click.echo(str(stopped), err=True)
        sys.exit(INTERRUPTED)
    if corrupted:
        from brainfm.downstream.report import write_report
        from brainfm.downstream.robustness import robustness
        from brainfm.names import resolve

        able = [model for model in models if resolve(model).cfg.has_weights]
        robustness(data, able, output, device=str(plan.settings.get("device", "auto")), progress=True)
        write_report(output)
    _say_results(page)


def _say_results(page: Path) -> None:
    """Print the main table, and what was left out; exit code 1 where that should have been used."""
    from brainfm.downstream.report import short_report
    from brainfm.downstream.results import read_evaluation
    from brainfm.report import current
    from brainfm.system import launched

    if launched().rank != 0:
        return
    output = page.parent
    click.echo(short_report(output))
    evaluation = read_evaluation(output / "grid.json")
    run = current()
    for one in evaluation.left_out:
        if one.failed:
            run.fail(one.scan, one.why)
        else:
            run.left_out[one.scan] = one.why
    parts = {one.scan: one.failed for one in evaluation.left_out if not one.task}  # of a comparison
    if parts:
        click.echo(
            f"{len(parts)} parts were left out, such as {next(iter(parts))}; see {output / 'left_out.csv'}", err=True
        )
    failed = {(one.task, one.scan) for one in evaluation.left_out if one.task and one.failed}
    if failed:
        click.echo(f"{len(failed)} scans were left out; see {output / 'left_out.csv'}", err=True)
    if failed or any(parts.values()):
        sys.exit(1)
