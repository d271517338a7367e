"""A Sphinx extension that writes what of the site is generated, into docs/generated, before the pages are read.

From the cards: the table of encoders and their pages. From the source: every refusal. From the package at work: the
pictures. From the repository's own files: what it costs. Nothing that it writes is committed.
"""

from __future__ import annotations

import logging
import re
import shutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import costs
import encoders
import pictures
import refusals

import brainfm
from brainfm.errors import ScanError
from brainfm.scan import kinds

REPOSITORY = Path(__file__).parents[2]
OUT = REPOSITORY / "docs" / "generated"

# The public names, by the module that a reader imports them from.
MODULES = ("", "contract", "transforms", "models", "hub", "errors", "table", "train", "downstream")
MORE = ("downstream.knowledge", "downstream.saliency", "downstream.precomputed", "prep", "sklearn")


def write_all(*_: Any) -> None:
    """Write all that is generated. What has not changed is left as it is, so that Sphinx reads it only once."""
    logging.getLogger("brainfm").setLevel(logging.WARNING)  # what is done to the sample scan is no news
    shutil.rmtree(OUT / "pictures", ignore_errors=True)
    for folder in ("encoders", "cohorts", "pictures"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    found = encoders.pages()
    _write("encoder_table.md", encoders.overview(found))
    _write("encoder_pages.md", "\n".join(f"encoders/{page.name}" for page in found))
    drawn: dict[Any, str] = {}
    for page in found:
        spec = page.cfg.input_spec
        if spec not in drawn:
            drawn[spec] = _picture(page, len(drawn))
        _write(f"encoders/{page.name}.md", encoders.page_of(page, drawn[spec]))
    _write("refusals.md", refusals.as_markdown())
    _write("costs.md", _costs())
    _write("formats.md", _formats())
    for path in sorted((REPOSITORY / "examples" / "cohorts").glob("*.md")):
        _write(f"cohorts/{path.name}", path.read_text(encoding="utf-8"))
    _write("api.md", "\n\n".join(_reference(f"brainfm.{name}".rstrip(".")) for name in modules()))
    _how_it_knows()


def _write(name: str, text: str) -> None:
    path = OUT / name
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _picture(page: encoders.Page, number: int) -> str:
    """The tensor that a contract makes of the packaged scan, drawn; or, where it refuses that, the refusal."""
    spec = page.cfg.input_spec
    if spec is None:
        return ""
    try:
        volume = encoders.tensor_of(spec)
    except ScanError as error:
        said = str(error).replace(f"{encoders.SAMPLE_SCAN.parent}/", "")
        return f"The packaged sample scan is no input of this contract, which says:\n\n> {encoders.inline(said)}"
    encoders.draw(volume, OUT / "pictures" / f"tensor_{number}.png")
    shape = "×".join(map(str, volume.stored.shape))
    alt = "Three grey slices of a brain: the middle planes of the tensor across its first, second and third axis."
    return (
        f"![{alt}](../pictures/tensor_{number}.png)\n\n*What it is given of the packaged sample scan: {shape} voxels, "
        "the middle planes across the tensor's three axes, as the encoder has them.*"
    )


def _how_it_knows() -> None:
    spec = brainfm.get_pretrained_cfg(pictures.ONE_MM).input_spec
    moved = pictures.placements(spec)
    pictures.draw_placements(moved, OUT / "pictures" / "placement.png")
    rows = [(each.what, encoders.inline(each.said)) for each in moved]
    _write("placement.md", encoders.table(rows, ("the packaged scan", "what is said of it"), html=True))
    steps = pictures.draw_steps(OUT / "pictures" / "steps.png")
    _write("steps.md", "\n".join(f"- {step}" for step in steps))
    pictures.draw_overlap(OUT / "pictures" / "overlap.png")
    error = pictures.draw_golden(OUT / "pictures" / "golden.png")
    _write("golden.md", f"Where this site was built, the relative difference was {error:.1e}; 1e-4 is tolerated.")


def _costs() -> str:
    """benchmarks/README.md as a page, with the tables of the results; its links to files as code."""
    text = costs.as_page((REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8").partition("\n")[2])

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        return match[0] if target.startswith(("http", "#")) else f"{words} (`{target}`)"

    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        shutil.copy(REPOSITORY / "benchmarks" / name, OUT / "pictures" / Path(name).name)
    text = re.sub(r"(!\[[^\]]*\])\(([^)]+)\)", r"\1(generated/pictures/\2)", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", link, text)


def _formats() -> str:
    """The kinds of files that are refused by name, and what each refusal says to do."""
    rows = dict.fromkeys((what, do) for _, what, do in (*kinds._BEGINNINGS, *kinds._ENDINGS) if "NRRD" not in what)
    return encoders.table(rows, ("it is", "what to do"))


# --- The reference ----------------------------------------------------------------------------------


def modules() -> list[str]:
    """The modules of the reference that this version has."""
    files = REPOSITORY / "brainfm"
    more = (name for name in MORE if (files / f"{name.replace('.', '/')}.py").exists() or (files / name).is_dir())
    return [*MODULES, *more]


def public(module: ModuleType) -> list[str]:
    """The public names of a module: its __all__, else what it defines itself without an underscore."""
    if module.__name__ == "brainfm.errors":
        return [*refusals.CLASSES]
    names = getattr(module, "__all__", None)
    if names is None:
        own = vars(module).items()
        names = [n for n, v in own if n[0] != "_" and callable(v) and getattr(v, "__module__", "") == module.__name__]
    return list(names)


_SEEN: dict[int, str] = {}


def _reference(name: str) -> str:
    """A module's part of the reference; a name that was documented in another is not documented twice."""
    module = import_module(name)
    parts = [f"## `{name}`", f"```{{eval-rst}}\n.. py:module:: {name}\n```"]
    for each in public(module):
        value = getattr(module, each)
        if id(value) in _SEEN or not hasattr(value, "__module__") or not callable(value):
            continue
        if name == "brainfm" and isinstance(value, type) and issubclass(value, Exception):
            continue  # under brainfm.errors
        _SEEN[id(value)] = f"{name}.{each}"
        kind = "autoexception" if isinstance(value, type) and issubclass(value, Exception) else "autofunction"
        if kind == "autofunction" and isinstance(value, type):
            kind = "autoclass"
        members = "\n   :members:" if kind == "autoclass" else ""
        parts.append(f"```{{eval-rst}}\n.. {kind}:: {name}.{each}{members}\n```")
    return "\n\n".join(parts)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
