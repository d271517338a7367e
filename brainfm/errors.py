"""The errors that brainfm raises on purpose. Each message says what was wrong, where, and what to do next."""

from __future__ import annotations

import logging
import traceback

from brainfm.version import DISTRIBUTION

MOST_LETTERS = 4000  # of a message: what a file holds in place of a name may be as long as the file


def _printable(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else letter.encode("unicode_escape").decode()


class BrainfmError(Exception):
    """Any refusal by brainfm; the command line and notebooks print it as one line, whatever text of a file it quotes.

    A notebook shows its traceback after `logging.getLogger("brainfm").setLevel("DEBUG")`.

    Example:
        >>> import brainfm
        >>> try:
        ...     brainfm.create_transform("test_resnet_3d")("no_such_scan.nii.gz")
        ... except brainfm.BrainfmError as error:
        ...     print(type(error).__name__)
        ScanError
    """

    def __str__(self) -> str:
        said = super().__str__()
        if not said.isprintable():
            said = "".join(map(_printable, said[: MOST_LETTERS + 1]))
        return said if len(said) <= MOST_LETTERS else f"{said[:MOST_LETTERS]}…"

    def _render_traceback_(self) -> list[str]:
        """What IPython prints of the error where nobody catches it."""
        if logging.getLogger("brainfm").isEnabledFor(logging.DEBUG):
            return "".join(traceback.format_exception(self)).splitlines()
        return [f"{type(self).__name__}: {' '.join(str(self).split())}"]


class ScanError(BrainfmError):
    """A scan, a mask or a list of scans that cannot give the tensor its input contract describes.

    Example:
        >>> import brainfm
        >>> try:
        ...     brainfm.create_transform("test_resnet_3d")("no_such_scan.nii.gz")
        ... except brainfm.ScanError as error:
        ...     print(f"{type(error).__name__}: {error}")
        ScanError: ...no_such_scan.nii.gz...
    """


class WeightsError(BrainfmError):
    """A weight file that is not what it should be: unreadable, of another architecture, or with another hash.

    Example:
        >>> import brainfm
        >>> try:
        ...     brainfm.create_model("test_resnet_3d", checkpoint_path="mask.nii.gz")
        ... except brainfm.WeightsError as error:
        ...     print(f"{type(error).__name__}: {error}")
        WeightsError: mask.nii.gz...
    """


class WeightsNotFoundError(WeightsError):
    """Weights that do not exist, or cannot be reached from here.

    Example:
        >>> import brainfm
        >>> try:
        ...     brainfm.create_model("vit_tiny_3d", pretrained=True)
        ... except brainfm.WeightsNotFoundError as error:
        ...     print(f"{type(error).__name__}: {error}")
        WeightsNotFoundError: no weights of vit_tiny_3d are published; ...
    """


class LicenceError(WeightsError):
    """Weights whose licence asks something first, or does not let them be passed on.

    Example:
        >>> import brainfm
        >>> try:
        ...     brainfm.create_model("yaware_densenet121", pretrained=True)
        ... except brainfm.LicenceError as error:
        ...     print(f"{type(error).__name__}: {error}")
        LicenceError: yaware_densenet121...: the licence of its weights is not stated...
    """


class RecipeError(BrainfmError):
    """A training recipe with an unknown field or a value that cannot be.

    Example:
        >>> from brainfm.train.recipe import load_recipe
        >>> import brainfm
        >>> try:
        ...     load_recipe("test_resnet_3d", ["epoch=3"])
        ... except brainfm.RecipeError as error:
        ...     print(f"{type(error).__name__}: {error}")
        RecipeError: ...epoch...
    """


class RunInterruptedError(BrainfmError):
    """A signal stopped a training run after a step; its checkpoint is written, and the same command goes on."""


class TaskError(BrainfmError, ValueError):
    """A downstream task that cannot be: of its labels, its columns or its file."""


class ModelNameError(BrainfmError, ValueError):
    """A model name that means nothing here, or could mean two things.

    Example:
        >>> import brainfm
        >>> try:
        ...     brainfm.create_model("test_resnet")
        ... except brainfm.ModelNameError as error:
        ...     print(f"{type(error).__name__}: {error}")
        ModelNameError: unknown model 'test_resnet'; did you mean ...test_resnet_3d...?
    """


# What is imported by another name than pip knows it by: "sklearn" on PyPI is a package that fails.
_PACKAGED_AS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}


class MissingExtraError(BrainfmError, ImportError):
    """A part of brainfm whose optional packages are not installed; the message names all that its extra lacks.

    Example:
        >>> import brainfm
        >>> print(brainfm.MissingExtraError("umap", "none"))
        umap is not installed; run: pip install umap
    """

    def __init__(self, package: str, extra: str) -> None:
        package = _PACKAGED_AS.get(package, package)
        super().__init__(f"{package} is not installed; run: pip install {' '.join(_lacking(package, extra))}")


def _lacking(package: str, extra: str) -> list[str]:
    """What pip is to be given: a package, and what else its extra lacks by this package's own metadata.

    Not the name and [extra]: `brainfm` on PyPI is another package's.
    """
    wanted = lacking(extra) or {}
    named = wanted.pop(package.lower(), package)
    return [package if named.lower() == package.lower() else named, *wanted.values()]


def lacking(extra: str = "") -> dict[str, str] | None:
    """What is not installed here, or in another version, of what an extra or brainfm itself needs, as pip takes it.

    By the names of the packages in small letters; None where brainfm runs from a folder, and nobody says what it needs.
    """
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    def installed(need: Requirement) -> str | None:
        try:
            return version(need.name)
        except PackageNotFoundError:
            return None

    try:
        needs = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return None
    wanted = {}
    for need in needs:
        if extra and (need.marker is None or "extra" not in str(need.marker)):
            continue
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        have = installed(need)
        if have is not None and need.specifier.contains(have, prereleases=True):
            continue
        # Of what is not here pip takes the newest; only what says otherwise needs its bounds, and quotes for the shell.
        newest = have is None and all(bound.operator in (">", ">=") for bound in need.specifier)
        wanted[need.name.lower()] = need.name if newest else f'"{need.name}{need.specifier}"'
    return wanted
