"""The ways to pretrain an encoder, by the names that a recipe gives them."""

from __future__ import annotations

from brainfm.train.distill import DistillMethod
from brainfm.train.mae import MAEMethod
from brainfm.train.recipe import MethodName
from brainfm.train.simclr import SimCLRMethod
from brainfm.train.simmim import SimMIMMethod
from brainfm.train.step import PretrainingMethod
from brainfm.train.supervised import SupervisedMethod
from brainfm.train.yaware import YAwareMethod

METHODS: dict[MethodName, type[PretrainingMethod]] = {
    "simclr": SimCLRMethod,
    "mae": MAEMethod,
    "yaware": YAwareMethod,
    "simmim": SimMIMMethod,
    "supervised": SupervisedMethod,
    "distill": DistillMethod,
}
