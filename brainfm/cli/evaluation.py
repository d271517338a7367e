"""The command line of evaluations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

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
        click.option("--refuse-overlap", is_flag=True, help="Refuse models that were pretrained on a task's data."),
    ):
        command = option(command)
    return command


@click.command("benchmark", cls=_ManyValues, context_settings=_HELP)
@click.argument("tasks", nargs=-1, required=True)
@click.option("--models", multiple=True, required=True, help="Such as simclr_resnet18_3d or local-dir:FOLDER.")
@click.option("--modes", multiple=True, default=("probe", "finetune", "scratch"), show_default=True)
@click.option("--fractions", multiple=True, type=float, help="Of the training patients, such as 0.2 0.4 0.6.")
@click.option("--robustness", "corrupted", is_flag=True, help="Also probe test scans that are corrupted more and more.")
@click.option("--manifest", "manifests", multiple=True, metavar="[TASK=]CSV", help="A task's, or that of all.")
@_common
def benchmark_command(
    tasks: tuple[str, ...],
    models: tuple[str, ...],
    modes: tuple[str, ...],
    fractions: tuple[float, ...],
    manifests: tuple[str, ...],
    corrupted: bool,
    **options: Any,
) -> None:
    """Evaluate models on TASKS: names that ship with brainfm (age_ixi), or YAML files; and write tables and a page.

    The same command goes on with a grid that stopped. Of the models, those with weights are probed and fine-tuned, and
    those without are trained from scratch. Exit code 75: a signal stopped a training, which can go on.
    """
    from brainfm.downstream.task import load_task, read_task
    from brainfm.errors import TaskError

    loaded = [load_task(name) for name in tasks]
    for_all = [text for text in manifests if "=" not in text]
    given = dict(text.split("=", 1) for text in manifests if "=" in text)
    if unknown := given.keys() - {task.name for task in loaded}:
        raise TaskError(f"--manifest {sorted(unknown)[0]}=…: no such task; write TASK=FILE.csv")
    if len(for_all) > 1:
        raise TaskError(f"--manifest {for_all[1]}: of which task? Write TASK=FILE.csv")
    data = [
        read_task(task, given.get(task.name) or next(iter(for_all), None) or _beside(name, task))
        for name, task in zip(tasks, loaded, strict=True)
    ]
    _run(data, models, modes, fractions=fractions, corrupted=corrupted, **options)


def _beside(name: str, task: Any) -> Path | None:
    """A task file's manifest, relative to the file."""
    return Path(name).parent / task.manifest if task.manifest else None


def _single(mode: str, title: str) -> click.Command:
    @click.command(mode, cls=_ManyValues, context_settings=_HELP, help=title)
    @click.argument("manifest", type=click.Path(path_type=Path))
    @click.option("--label", required=True, help="The manifest's column to predict.")
    @click.option("--kind", type=click.Choice(["binary", "multiclass", "regression"]), required=True)
    @click.option("--models", multiple=True, required=True, help="Such as simclr_resnet18_3d or local-dir:FOLDER.")
    @click.option("--covariates", multiple=True, help="Columns that a control predicts from without an image.")
    @_common
    def command(
        manifest: Path, label: str, kind: Any, models: tuple[str, ...], covariates: tuple[str, ...], **options: Any
    ) -> None:
        from brainfm.downstream.task import make_task, read_task

        task = make_task(label, kind, covariates)
        _run([read_task(task, manifest)], models, (mode,), **options)

    return command


probe_command = _single(
    "probe",
    "Fit a linear model on the embeddings of the scans in MANIFEST, and say how well it predicts a column.\n\n"
    "The split is the manifest's column 'split', or is drawn by patient, 60/20/20, another for each seed.",
)
finetune_command = _single(
    "finetune",
    "Fine-tune encoders to predict a column of MANIFEST.\n\nThe split is as that of 'brainfm probe'; settings are the "
    "paper's unless --set replaces them.",
)


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
    fractions: tuple[float, ...] = (),
    corrupted: bool = False,
) -> None:
    from brainfm.downstream.benchmark import Plan, benchmark, read_settings
    from brainfm.errors import BrainfmError, RunInterruptedError
    from brainfm.train.trainer import INTERRUPTED

    if corrupted and "probe" not in modes:
        raise BrainfmError("--robustness is of the linear probe; add probe to --modes, or leave it out")
    plan = Plan(
        models=models,
        modes=modes,
        seeds=seeds,
        fractions=fractions,
        epochs_scale=epochs_scale,
        settings=read_settings(settings),
        controls=not no_controls,
    )
    try:
        page = benchmark(data, plan, output, on_overlap="refuse" if refuse_overlap else "mark", progress=True)
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
    from brainfm.system import launched

    if launched().rank != 0:
        return
    click.echo((page.parent / "table.md").read_text(encoding="utf-8"))
    click.echo(f"{page}: the page with all tables and figures")
