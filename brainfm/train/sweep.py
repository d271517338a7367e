"""Sweeps: pretraining runs that differ in some keys of a recipe, each in a folder of its own, and what came of them."""

from __future__ import annotations

import itertools
import json
import logging
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainfm.errors import BrainfmError, RecipeError, RunInterruptedError
from brainfm.files import write_csv
from brainfm.schema import read_yaml
from brainfm.system import launched
from brainfm.train.data import count_patients
from brainfm.train.pretraining import pretrain, read_data
from brainfm.train.recipe import Recipe, load_recipe

logger = logging.getLogger("brainfm")


@dataclass(frozen=True)
class Variant:
    """One run of a sweep.

    Attributes:
        name: Of its folder, such as "augmentation.shift=0.5".
        changes: The keys that it sets, "group.key" in groups, and their values.
        recipe: The whole of it.
    """

    name: str
    changes: dict[str, Any]
    recipe: Recipe

    @property
    def export(self) -> Path:
        """The folder of its encoder, for `create_model("local-dir:…")`."""
        return Path(self.recipe.output) / "export"


def read_sweep(name: str, arguments: Sequence[str]) -> list[Variant]:
    """The variants of a recipe that a command's arguments ask for; none where nothing is swept.

    Args:
        name: Of the recipe, as for `load_recipe`.
        arguments: Overrides, and what is swept: "sweep=KEY:VALUE,VALUE", "sweep=FILE.yaml", which holds "name: {KEY:
            VALUE}" a variant, or "patients=FRACTION,FRACTION". Of several, every combination is a variant.

    Raises:
        RecipeError: A sweep cannot be read, or a variant is no recipe; the message says which.
    """
    swept = [text for text in arguments if _is_sweep(text)]
    if not swept:
        return []
    plain = [text for text in arguments if text not in swept]
    output = load_recipe(name, plain).output
    if not output:
        raise RecipeError("a sweep needs output=FOLDER, in which every variant has a folder of its own")
    variants = []
    for parts in itertools.product(*map(_axis, swept)):
        changes = {key: value for _, part in parts for key, value in part.items()}
        if len(changes) < sum(len(part) for _, part in parts):
            raise RecipeError(f"{' and '.join(swept)} set the same key; leave one out")
        folder = ",".join(label for label, _ in parts)
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        try:
            recipe = load_recipe(name, [*plain, *overrides, f"output={json.dumps(str(Path(output) / folder))}"])
        except RecipeError as error:
            raise RecipeError(f"variant {folder}: {error}") from error
        variants.append(Variant(folder, changes, recipe))
    names = [variant.name.casefold() for variant in variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"the sweep has {twice[0]} twice; name every variant once")
    return variants


def _is_sweep(text: str) -> bool:
    key, _, value = text.partition("=")
    return key == "sweep" or (key == "patients" and "," in value)


def _axis(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The variants of one sweep: what each is called in its folder's name, and the keys that it sets."""
    key, _, value = text.partition("=")
    if value.endswith((".yaml", ".yml")):
        return _of_file(Path(value))
    if key == "sweep":
        key, colon, value = value.partition(":")
        if not colon:
            raise RecipeError(f"{text}: write sweep=KEY:VALUE,VALUE, or sweep=FILE.yaml")
    try:
        values = read_yaml(f"[{value}]")
    except ValueError as error:
        raise RecipeError(f"{text}: {error}") from error
    if not values:
        raise RecipeError(f"{text}: has no values; write sweep=KEY:VALUE,VALUE")
    return [(_folder(f"{key}={_word(one)}"), _flat({key: one}, text)) for one in values]


def _of_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        variants = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as variants ({error})") from error
    if not isinstance(variants, Mapping) or not variants or not all(_folder(str(name)) for name in variants):
        raise RecipeError(f"{path}: variants are lines of 'name: {{key: value}}'")
    return [(_folder(str(name)), _flat(changes, f"{path}: {name}")) for name, changes in variants.items()]


def _flat(changes: Any, where: str) -> dict[str, Any]:
    """Keys and values, those of groups as "group.key"."""
    if not isinstance(changes, Mapping):
        raise RecipeError(f"{where}: a variant is made of 'key: value', not of {changes!r:.60}; {{}} changes nothing")
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        flat |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, Mapping) else {key: value}
    if ours := sorted({"output", "sweep", "resume"} & set(map(str, flat))):
        raise RecipeError(f"{where}: {ours[0]} cannot be swept")
    return {str(key): value for key, value in flat.items()}


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _folder(label: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", label).strip("-. ")


def pretrain_variants(variants: Sequence[Variant], *, progress: bool = False) -> dict[str, str]:
    """Run every variant to its end, or what is left of it; one that has ended is not run again.

    Returns:
        Why each variant failed that did, by its name; the others are run nevertheless.

    Raises:
        RunInterruptedError, KeyboardInterrupt: As `pretrain`; the same sweep goes on from there.
        BrainfmError: A variant failed in a group of processes, which ends with it.
    """
    failed: dict[str, str] = {}
    for number, variant in enumerate(variants, start=1):
        logger.info("variant %d of %d: %s", number, len(variants), variant.name)
        try:
            pretrain(variant.recipe, progress=progress)
        except RunInterruptedError:
            raise
        except (BrainfmError, OSError) as error:
            if launched().world > 1:
                raise
            failed[variant.name] = str(error)
            logger.error("variant %s failed: %s", variant.name, error)
    return failed


def write_table(variants: Sequence[Variant], failed: Mapping[str, str], output: Path) -> Path:
    """Write `sweep.csv` in the sweep's folder, a row a variant: `outcomes`. Returns its path."""
    return write_rows(outcomes(variants, failed), output)


def write_rows(rows: Sequence[Mapping[str, Any]], output: Path) -> Path:
    """Write `sweep.csv` from rows that may have other columns than one another."""
    head = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    head.sort(key=lambda name: name == "error")  # the last column
    write_csv(output / "sweep.csv", [head, *([row.get(name, "") for name in head] for row in rows)])
    return output / "sweep.csv"


def outcomes(variants: Sequence[Variant], failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a variant, as columns of a table: what it sets, what it was trained on, and its last epoch's mean loss."""
    keys = list(dict.fromkeys(key for variant in variants for key in variant.changes))
    rows = []
    for variant in variants:
        records, _ = read_data(variant.recipe)
        lines = list(_log(Path(variant.recipe.output)))
        last = [line["loss"] for line in lines if line["epoch"] == lines[-1]["epoch"]]
        rows.append(
            {"variant": variant.name}
            | {key: _word(variant.changes[key]) if key in variant.changes else "" for key in keys}
            | {"n_patients": count_patients(records), "n_scans": len(records)}
            | {"steps": lines[-1]["step"] if lines else 0, "loss": statistics.fmean(last) if last else ""}
            | {"error": failed.get(variant.name, "")}
        )
    return rows


def _log(folder: Path) -> Iterator[dict[str, Any]]:
    """A run's log, a line a step."""
    path = folder / "log.jsonl"
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            content = json.loads(line)
            if "loss" in content:
                yield content
