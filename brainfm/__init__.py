"""Pretrained encoders for 3D brain MRI: one name gets an encoder, its weights, and the exact input they expect.

Example:
    >>> import brainfm
    >>> model = brainfm.create_model("simclr_resnet18_3d", pretrained=True)
    >>> transform = brainfm.create_transform(model)
    >>> z = model(transform("normalized.nii.gz", mask="mask.nii.gz")[None])  # [1, 512]
"""

from brainfm import models as models  # registers the encoders
from brainfm.embed import embed
from brainfm.errors import (
    BrainfmError,
    MissingExtraError,
    ModelNameError,
    RecipeError,
    ScanError,
    WeightsError,
    WeightsNotFoundError,
)
from brainfm.factory import create_model
from brainfm.hub import push_to_hub, save_for_hub, verify
from brainfm.inference import optimize
from brainfm.overlap import pretraining_overlap
from brainfm.pretrained import Cohort, Grid, InputSpec, PretrainedCfg, Score, describe
from brainfm.registry import (
    get_pretrained_cfg,
    is_model,
    list_models,
    list_pretrained,
    model_entrypoint,
    register_model,
)
from brainfm.scan import Scan, load_scan
from brainfm.transforms import create_transform

__version__ = "0.1.0"

__all__ = [
    "BrainfmError",
    "Cohort",
    "Grid",
    "InputSpec",
    "MissingExtraError",
    "ModelNameError",
    "PretrainedCfg",
    "RecipeError",
    "Scan",
    "ScanError",
    "Score",
    "WeightsError",
    "WeightsNotFoundError",
    "create_model",
    "create_transform",
    "describe",
    "embed",
    "get_pretrained_cfg",
    "is_model",
    "list_models",
    "list_pretrained",
    "load_scan",
    "model_entrypoint",
    "optimize",
    "pretraining_overlap",
    "push_to_hub",
    "register_model",
    "save_for_hub",
    "verify",
]
