"""A comparison as one file: networks × sources × methods are pretrained, and all evaluated on the same tasks at once.

    networks: {nit: {model: nit_3d}, dense: {model: densenet121_3d}}
    sources: {ukb: {manifest: ukb.csv}, clips: {manifest: kinetics/, targets: label}}
    methods: {supervised: {targets: [age, sex]}, contrastive: {method: simclr}, masked: {method: simmim}}
    tasks: {alzheimer_adni: adni.csv}
    pretraining: {contract: simclr_resnet18_3d, epochs: 100, batch_size: 32}

Networks, sources and methods are named fields of a recipe (`brainfm.train.recipe.Recipe`), and `pretraining` has those
of all. A cell is made of one of each: the method's fields come before the source's, those before the network's, and
these before what is of all; a field that only other methods use is left out of it, but of a method's own. Beside the
cells stands each network without pretraining.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.elsewhere import read_tasks
from brainfm.downstream.plan import Plan, checked_settings
from brainfm.downstream.results import Unused
from brainfm.downstream.task import TaskData, load_task
from brainfm.errors import BrainfmError, RecipeError, TaskError
from brainfm.files import one_line
from brainfm.schema import Checked, check_keys, read_yaml
from brainfm.sources import Kind, kind_of_all
from brainfm.system import expanded
from brainfm.train.cache import build_cache
from brainfm.train.pretraining import contract_of, read_data, save_initial
from brainfm.train.recipe import Recipe, methods_of, recipe_from_dict
from brainfm.train.sources import Mixture, read_source
from brainfm.train.summary import summarise
from brainfm.train.sweep import Variant, pretrain_variants

logger = logging.getLogger("brainfm")

NONE = "none"  # the source of a network that is not pretrained
PRETRAIN = "pretrain"  # where the runs are, in the output

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a folder
_OURS = ("output", "resume")  # fields of a recipe that no experiment sets
_WORDS: dict[Kind, str] = {"scans": "", "phantom": "phantoms", "synthetic": "synthetic", "video": "video"}


@dataclass(frozen=True, kw_only=True)
class Tested(Checked):
    """The scans of a task; "" is what the task's own file names.

    Attributes:
        manifest: As `Task.manifest`.
        test_manifest: As `Task.test_manifest`.
    """

    manifest: str = ""
    test_manifest: str = ""


@dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
    """What is compared. Paths are relative to the experiment's file.

    Attributes:
        networks: By name, fields of a recipe: the model (else the name is it), model_args and others.
        sources: By name, fields of a recipe: manifest or sources, targets, cache and others.
        methods: By name, fields of a recipe: the method (else the name is it), and its own.
        tasks: By name, or by the path of a YAML file, their scans: a manifest, or manifest and test_manifest.
        title: Of the page.
        pretraining: Fields of every pretraining run; its seed is that of all, and each is run once.
        modes: As `Plan.modes`. "scratch" is of the networks without pretraining; all others are of the pretrained.
        seeds: Of splits, heads and fine-tuning, as `Plan.seeds`.
        fractions: As `Plan.fractions`.
        epochs: Of fine-tuning and of training from scratch alike; None is the paper's, times epochs_scale.
        epochs_scale: As `Plan.epochs_scale`.
        settings: As `Plan.settings`.
        controls: As `Plan.controls`.
        cache: Keep each source's scans prepared in the output's `cache` folder, so that all cells read them quickly; a
            source with a cache of its own uses that.
    """

    networks: dict[str, dict[str, Any]]
    sources: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    tasks: dict[str, Tested]
    title: str = "Pretraining compared: networks, sources and methods"
    pretraining: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("probe", "finetune", "scratch")
    seeds: int = 5
    fractions: tuple[float, ...] = (1.0,)
    epochs: int | None = None
    epochs_scale: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    controls: bool = True
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for group in ("networks", "sources", "methods"):
            if not (named := getattr(self, group)):
                raise ValueError(f"{group} are none; name at least one")
            for name, values in named.items():
                _check_fields(values, f"{group}: {name}")
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{group}: {name!r} is the name of a folder, of letters, digits, _ - and .")
        _check_fields(self.pretraining, "pretraining")
        if not self.tasks:
            raise ValueError("tasks are none; name at least one")
        if NONE in self.sources:
            raise ValueError(f"sources: {NONE!r} stands for no pretraining, and is there anyway; give another name")
        if both := set(self.sources) & set(self.tasks):
            raise ValueError(f"{min(both)} is a source and a task; name them apart")
        if strange := [name for name, values in self.sources.items() if not values.keys() & {"manifest", "sources"}]:
            raise ValueError(
                f"sources: {strange[0]} needs manifest: (a list of scans or a folder of clips), or sources:"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Experiment:
        """What `to_dict` described; a source may be its manifest alone, and so may a task. Raises ValueError."""
        data = dict(data)
        for group, key in (
            ("sources", "manifest"),
            ("tasks", "manifest"),
            ("networks", "model"),
            ("methods", "method"),
        ):
            named = data.get(group)
            if isinstance(named, list | tuple):
                named = dict.fromkeys(named)
            if isinstance(named, Mapping):
                data[group] = {str(name): _fields_of(values, key) for name, values in named.items()}
        return super().from_dict(data)

    def plan(self, models: Sequence[str], scratch: Sequence[str], titles: Mapping[str, str]) -> Plan:
        """What is evaluated."""
        return Plan(
            models=(*models, *scratch),
            modes=self.modes,
            seeds=self.seeds,
            fractions=self.fractions,
            epochs_scale=self.epochs_scale,
            epochs_of_all=self.epochs,
            settings=checked_settings(self.settings),
            controls=self.controls,
            scratch=tuple(scratch),
            titles=titles,
        )


def _fields_of(values: Any, key: str) -> Any:
    """Fields by their names; a text is the one that matters, and nothing is none of them."""
    return {} if values is None else {key: values} if isinstance(values, str) else values


def _check_fields(values: Mapping[str, Any], where: str) -> None:
    try:
        check_keys(values, Recipe)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if ours := [key for key in values if key in _OURS]:
        raise ValueError(f"{where}: {ours[0]} is not set here: every run has a folder of its own in the output")


# --- From a file ----------------------------------------------------------------------------------


def is_experiment(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an experiment's: YAML with `networks`, and no task. Raises BrainfmError where it is no YAML."""
    file = Path(path)
    if file.suffix.lower() not in (".yaml", ".yml") or not file.is_file():
        return False
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrainfmError(f"{path}: {one_line(error)}") from error
    return isinstance(content, Mapping) and "networks" in content


def load_experiment(
    path: str | os.PathLike[str],
    places: Mapping[str, str] | None = None,
    tested: Mapping[str, str] | None = None,
    **changes: Any,
) -> Experiment:
    """The experiment of a YAML file, its paths made absolute.

    Args:
        path: The file.
        places: By the name of a source or task, the manifest (or folder of clips) in place of the file's.
        tested: By the name of a task, its test_manifest in place of the file's.
        **changes: Fields in place of the file's.

    Raises:
        BrainfmError: A field is unknown or holds what it cannot, or a name of `places` is in none of both; the message
            says which.
    """
    file = Path(path)
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise ValueError("an experiment is made of networks, sources, methods and tasks")
        experiment = Experiment.from_dict({**content, **changes})
    except (OSError, ValueError, TypeError) as error:
        raise BrainfmError(f"{path}: {one_line(error)}") from error
    named = {Path(name).stem: name for name in experiment.tasks if _is_file(name)}
    places = {named.get(name, name): place for name, place in (places or {}).items()}
    tested = {named.get(name, name): place for name, place in (tested or {}).items()}
    for name in (*places, *tested):
        if name not in experiment.tasks and (name in tested or name not in experiment.sources):
            known = ", ".join([*experiment.tasks, *([] if name in tested else experiment.sources)])
            raise BrainfmError(f"{name}={places.get(name) or tested.get(name)}: {path} has {known}")
    sources = {
        name: ({"manifest": places[name]} | _without(values, "manifest", "sources"))
        if name in places
        else _beside(values, file.parent)
        for name, values in experiment.sources.items()
    }
    tasks = {}
    for name, own in experiment.tasks.items():
        ours = Tested.from_dict({key: _path(text, file.parent) for key, text in own.to_dict().items()})
        given = {"manifest": places.get(name), "test_manifest": tested.get(name)}
        ours = replace(ours, **{key: value for key, value in given.items() if value})
        tasks[_path(name, file.parent) if _is_file(name) else name] = ours
    return replace(experiment, sources=sources, tasks=tasks)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _beside(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A source's fields with paths that are relative to a folder."""
    placed = dict(values)
    for key in ("manifest", "cache"):
        if isinstance(placed.get(key), str):
            placed[key] = _path(placed[key], folder)
    for key in ("sources", "cache"):
        if isinstance(placed.get(key), Mapping):
            places = {_path(str(place), folder): value for place, value in placed[key].items()}
            placed[key] = {p: _path(v, folder) if isinstance(v, str) else v for p, v in places.items()}
    return placed


def _path(text: str, folder: Path) -> str:
    return str(folder / expanded(text)) if text else ""  # an absolute path stays what it is


# --- Cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cell:
    """A network, a source and a method.

    Attributes:
        network, source, method: Their names.
        values: The fields of its recipe, but for its output.
    """

    network: str
    source: str
    method: str
    values: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Its name for readers, before it is known what the source is of."""
        return f"{self.network}, {self.method} on {self.source}"

    def folder(self, output: Path) -> Path:
        """Of its run."""
        return output / PRETRAIN / self.network / self.source / self.method

    def recipe(self, output: Path) -> Recipe:
        """All of it. Raises RecipeError."""
        return recipe_from_dict({**self.values, "output": str(self.folder(output))}, self.title)


def list_cells(experiment: Experiment) -> Iterator[Cell]:
    """Every network with every source and every method, whether they go together or not."""
    for network, of_network in experiment.networks.items():
        for source, of_source in experiment.sources.items():
            for method, of_method in experiment.methods.items():
                own = {"method": method, **of_method}
                shared = {**experiment.pretraining, "model": network, **of_network, **of_source}
                yield Cell(network, source, method, {**_used(shared, own["method"]), **own})


def _used(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Fields of a recipe without those that only other methods use."""
    of = {item.name: methods_of(item) for item in fields(Recipe)}
    return {key: value for key, value in values.items() if not of[key] or method in of[key]}


def _in_words(source: str, records: Mixture) -> str:
    """A source's name, with what its volumes are of where that is no scans of people."""
    kinds = dict.fromkeys(_WORDS[one.kind] for one in records.sources)
    said = [word for word in kinds if word and word.rstrip("s") not in source.lower()]
    return f"{source} ({' and '.join(said)})" if said else source


# --- All of it ------------------------------------------------------------------------------------


def run_experiment(
    experiment: Experiment,
    output: str | os.PathLike[str],
    *,
    on_overlap: Literal["mark", "refuse"] = "mark",
    replace_all: bool = False,
    progress: bool = False,
) -> Path:
    """Pretrain what can be, evaluate all of it, and write one page; or go on with that.

    Every cell is a run of its own in `output/pretrain/NETWORK/SOURCE/METHOD`, by one seed, as `brainfm pretrain` makes
    it; the networks without pretraining are in `output/pretrain/NETWORK/none`, and are trained from scratch. All are
    then rows of one evaluation (`benchmark`), named by network, method and source, with what the source is of where
    that is no scans of people. What cannot be run is left out with its reason, on the page and in `left_out.csv`: a
    manifest or a package that is not there, a network that a method does not take, a run that failed.

    Args:
        experiment: Of `load_experiment`.
        output: As of `benchmark`.
        on_overlap: As of `benchmark`.
        replace_all: As of `benchmark`; pretraining runs stay.
        progress: Show progress bars.

    Returns:
        The page.

    Raises:
        BrainfmError: Not one task can be read, the output holds other runs, or as `benchmark`.
        RunInterruptedError, KeyboardInterrupt: As `pretrain`; the same call goes on from there.
    """
    output = Path(output)
    left_out: list[Unused] = []
    data = list(_read_all(experiment, left_out))
    if not data:
        raise TaskError(f"no task can be run: {'; '.join(one.why for one in left_out)}")
    cells = dict(_checked(experiment, output, left_out))
    for one in left_out:
        logger.warning("%s is left out: %s", one.scan, one.why)
    logger.info("%d of %d cells are pretrained", len(cells), len(list(list_cells(experiment))))
    recipes = [cell.recipe(output) for cell in cells]
    if experiment.cache:
        built: set[str] = set()
        recipes = [_cached(recipe, output, built, progress) for recipe in recipes]
    variants = [Variant(cell.title, {}, recipe) for cell, recipe in zip(cells, recipes, strict=True)]
    failed = pretrain_variants(variants, progress=progress)
    left_out += [Unused("", title, f"its pretraining failed: {why}", failed=True) for title, why in failed.items()]
    models, titles = [], {}
    for cell, title in cells.items():
        if cell.title not in failed:
            model = f"local-dir:{cell.folder(output) / 'export'}"
            models.append(model)
            titles[model] = title
    scratch = []
    for network in experiment.networks:
        try:
            model = f"local-dir:{_without_pretraining(experiment, network, output)}"
        except BrainfmError as error:
            left_out.append(Unused("", f"{network}, without pretraining", one_line(error)))
            continue
        scratch.append(model)
        titles[model] = network
    return benchmark(
        data,
        experiment.plan(models, scratch, titles),
        output,
        title=experiment.title,
        statements=tuple(_statements(experiment, models)),
        left_out=left_out,
        on_overlap=on_overlap,
        replace_all=replace_all,
        progress=progress,
    )


def _read_all(experiment: Experiment, left_out: list[Unused]) -> Iterator[TaskData]:
    """The tasks that can be run, their titles with what their scans are of where that is not people."""
    for name, given in experiment.tasks.items():
        task = load_task(name)
        beside = Path(name).parent  # of a task's own file
        manifest, elsewhere = (
            mine or (str(beside / own) if own else "")
            for mine, own in ((given.manifest, task.manifest), (given.test_manifest, task.test_manifest))
        )
        missing = [text for text in (manifest, elsewhere) if text and not expanded(text).exists()]
        if missing or not manifest:
            why = f"no such file: {missing[0]}" if missing else "it has no manifest"
            left_out.append(Unused("", task.name, f"{why}; give --manifest {task.name}=FILE.csv"))
            continue
        for one in read_tasks(task, manifest, elsewhere or None):
            word = _WORDS[kind_of_all(one.records)]
            said = f" ({word})" if word and word.rstrip("s") not in one.task.title.lower() else ""
            yield replace(one, task=replace(one.task, title=f"{one.task.title}{said}"))


def _checked(experiment: Experiment, output: Path, left_out: list[Unused]) -> Iterator[tuple[Cell, str]]:
    """The cells that can be pretrained, and their titles."""
    words: dict[str, str] = {}
    for cell in list_cells(experiment):
        try:
            recipe = cell.recipe(output)
            _check_is_there(cell, recipe)
            if cell.source not in words:
                words[cell.source] = _in_words(cell.source, read_data(recipe)[0])
            summarise(recipe)
        except BrainfmError as error:
            if (cell.folder(output) / "checkpoints").is_dir():  # it has begun, and cannot go on
                raise type(error)(f"{cell.title}: {error}") from error
            left_out.append(Unused("", cell.title, one_line(error).removeprefix(f"{cell.title}: ")))
        else:
            yield cell, f"{cell.network}, {cell.method} on {words[cell.source]}"


def _check_is_there(cell: Cell, recipe: Recipe) -> None:
    """Raise RecipeError where a source is not there."""
    for place in recipe.sources or {recipe.manifest: 1.0}:
        if not place or not expanded(place).exists():
            raise RecipeError(f"no such file or folder: {place}; give --manifest {cell.source}=PLACE")


def _cached(recipe: Recipe, output: Path, built: set[str], progress: bool) -> Recipe:
    """The recipe with caches of its sources; those that are not `built` in this run are, or what is left of them."""
    if recipe.cache is not None:
        return recipe
    spec, places = contract_of(recipe), [*(recipe.sources or [recipe.manifest])]
    folders = {}
    for place in places:
        plain = re.sub(r"[^\w.-]+", "-", str(place))[-60:].strip("-")
        digest = hashlib.sha256(f"{place} {spec}".encode()).hexdigest()[:8]
        folders[place] = str(output / "cache" / f"{plain}-{digest}")
        if folders[place] in built:
            continue
        built.add(folders[place])
        records, root = read_source(place)
        build_cache(records, folders[place], spec, root=root, workers=max(1, recipe.workers), progress=progress)
    return replace(recipe, cache=folders if recipe.sources else folders[recipe.manifest])


def _without_pretraining(experiment: Experiment, network: str, output: Path) -> Path:
    """The folder of a network with initial weights, as every run of it begins."""
    values = {**experiment.pretraining, "model": network, **experiment.networks[network], "method": "mae"}
    folder = output / PRETRAIN / network / NONE
    values = {**_used(values, "mae"), "output": str(folder), "init": None, "init_sha256": None}
    return save_initial(recipe_from_dict(values, network), folder)


def _statements(experiment: Experiment, models: Sequence[str]) -> Iterator[str]:
    cells, seed = len(list(list_cells(experiment))), experiment.pretraining.get("seed", 0)
    yield (
        f"{len(experiment.networks)} networks × {len(experiment.sources)} sources × {len(experiment.methods)} methods: "
        f"{len(models)} of {cells} cells are pretrained, each once, by seed {seed}. Standard deviations are of splits, "
        "heads and fine-tuning, and not of pretraining."
    )
    yield (
        "Rows from scratch are the same networks, for the same input, without pretraining; their weights are drawn by "
        "each seed."
    )
    if experiment.pretraining:
        yield f"Every pretraining: {json.dumps(experiment.pretraining)}; what differs is in each run's recipe."
