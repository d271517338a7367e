"""Pretrained encoders for 3D brain MRI: one name gets an encoder, its weights, and the exact input they expect.

Example:
    >>> import brainfm
    >>> model = brainfm.create_model("simclr_resnet18_3d", pretrained=True)
    >>> transform = brainfm.create_transform(model)
    >>> z = model(transform("normalized.nii.gz", mask="mask.nii.gz")[None])  # [1, 512]

Names are imported when they are first asked for (PEP 562), so that what needs no network waits for none.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from brainfm.lazy import found_in
from brainfm.version import __version__ as __version__

if TYPE_CHECKING:
    from brainfm.contract import Grid as Grid
    from brainfm.contract import InputSpec as InputSpec
    from brainfm.contract import Readout as Readout
    from brainfm.contract import Window as Window
    from brainfm.contract import describe as describe
    from brainfm.contract import register_operation as register_operation
    from brainfm.embed import embed as embed
    from brainfm.errors import BrainfmError as BrainfmError
    from brainfm.errors import LicenceError as LicenceError
    from brainfm.errors import MissingExtraError as MissingExtraError
    from brainfm.errors import ModelNameError as ModelNameError
    from brainfm.errors import RecipeError as RecipeError
    from brainfm.errors import ScanError as ScanError
    from brainfm.errors import WeightsError as WeightsError
    from brainfm.errors import WeightsNotFoundError as WeightsNotFoundError
    from brainfm.factory import create_model as create_model
    from brainfm.hub import push_to_hub as push_to_hub
    from brainfm.hub import save_for_hub as save_for_hub
    from brainfm.hub import verify as verify
    from brainfm.inference import optimize as optimize
    from brainfm.overlap import pretraining_overlap as pretraining_overlap
    from brainfm.pretrained import PretrainedCfg as PretrainedCfg
    from brainfm.registry import get_pretrained_cfg as get_pretrained_cfg
    from brainfm.registry import is_model as is_model
    from brainfm.registry import list_models as list_models
    from brainfm.registry import list_pretrained as list_pretrained
    from brainfm.registry import model_entrypoint as model_entrypoint
    from brainfm.registry import register_card as register_card
    from brainfm.registry import register_model as register_model
    from brainfm.scan import Scan as Scan
    from brainfm.scan import load_scan as load_scan
    from brainfm.table import Embeddings as Embeddings
    from brainfm.transforms import create_transform as create_transform
    from brainfm.zoo.cards import Cohort as Cohort
    from brainfm.zoo.cards import Score as Score

_MODULES = {
    "contract": ("Grid", "InputSpec", "Readout", "Window", "describe", "register_operation"),
    "embed": ("embed",),
    "errors": (
        *("BrainfmError", "MissingExtraError", "ModelNameError", "RecipeError", "ScanError", "WeightsError"),
        "LicenceError",
        "WeightsNotFoundError",
    ),
    "factory": ("create_model",),
    "hub": ("push_to_hub", "save_for_hub", "verify"),
    "inference": ("optimize",),
    "overlap": ("pretraining_overlap",),
    "pretrained": ("PretrainedCfg",),
    "registry": (
        *("get_pretrained_cfg", "is_model", "list_models", "list_pretrained", "model_entrypoint", "register_card"),
        "register_model",
    ),
    "scan": ("Scan", "load_scan"),
    "table": ("Embeddings",),
    "transforms": ("create_transform",),
    "zoo.cards": ("Cohort", "Score"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = (
    *("contract", "downstream", "hub", "models", "phantom", "prep", "scan", "sklearn", "table", "train", "transforms"),
)

__all__ = [*sorted(_WHERE)]


class _Package(ModuleType):
    """This package, whose `embed` is the function, although a module has that name and its import would hide it."""

    @property
    def embed(self) -> Any:
        return importlib.import_module("brainfm.embed").embed

    @embed.setter
    def embed(self, module: ModuleType) -> None: ...


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    value = found_in(__name__, name, _WHERE)
    if name in _WHERE:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_SUBMODULES})
