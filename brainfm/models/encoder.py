"""The contract that every encoder keeps: timm's words, 3D shapes."""

from __future__ import annotations

import copy
import logging
import re
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from brainfm.contract import Triple
from brainfm.models.fast.chain import Chained, Together
from brainfm.models.fast.folding import fold_batch_norms, weights_made_anew
from brainfm.pretrained import PretrainedCfg

logger = logging.getLogger("brainfm")

M = TypeVar("M", bound=nn.Module)


def stage(
    module: str, num_chs: int, reduction: Triple, offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> dict[str, Any]:
    """An entry of `feature_info`.

    Args:
        module: The stage's module.
        num_chs: Channels of its map.
        reduction: Voxels of the input from one cell of the map to the next, by axis.
        offset: Where the centre of the first cell's receptive field lies, in voxels of the input.
    """
    return {"num_chs": num_chs, "reduction": reduction, "offset": offset, "module": module}


class FeatureInfo(list[dict[str, Any]]):
    """The stages of an encoder, see `stage`, and timm's way to ask for one thing of all, of one (`idx`) or of some."""

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """The channels of each stage's map."""
        return self._of(idx, "num_chs")

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Voxels of the input from one cell of each map to the next, by axis."""
        return self._of(idx, "reduction")

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """The name of each stage's module."""
        return self._of(idx, "module")

    def _of(self, idx: int | Sequence[int] | None, key: str) -> Any:
        if isinstance(idx, int):
            return self[idx][key]
        return [self[n][key] for n in (range(len(self)) if idx is None else idx)]


class Encoder(nn.Module, ABC):
    """A 3D encoder: volumes [B, in_chans, D, H, W] in, embeddings [B, num_features] or logits out.

    A family builds its layers, lists its stages in `feature_info`, sets `num_features`, and calls `reset_classifier`.
    Where stages are modules that are called in turn, and their maps are averaged, nothing more is to be written; else
    it says how volumes become what the first stage takes (`_begin`), what a stage does (`_stage`), what comes after the
    last (`_finish`), how that becomes one vector (`pool`) and a map (`_as_map`).

    Attributes:
        num_features: Width of the embedding.
        num_classes: Outputs of the classifier; 0 without one.
        in_chans: Input channels.
        global_pool: How a feature map or tokens become one vector; one of `pools`.
        drop_rate: The probability of dropout before the classifier, in training.
        feature_info: A dict a stage, see `stage`; a family may set a plain list.
        pretrained_cfg: What the weights are and expect; set by `create_model`; `default_cfg` in old timm.
        cam_layer: The layer whose map Grad-CAM weighs where none is named; "" is the last stage.
        optimizations: What `for_inference` did to this copy, in words; empty for what `create_model` gives.
        adapters: What a stage's output passes through, by the stage's number; see `adaptation.add_adapters`.
    """

    pools: ClassVar[tuple[str, ...]] = ("avg",)  # the first is the default
    classifier_name: ClassVar[str]  # name of the head's module, as in the family's checkpoints
    first_conv: ClassVar[str]  # name of the layer that sees the input channels

    num_features: int
    num_classes: int
    in_chans: int
    global_pool: str
    pretrained_cfg: PretrainedCfg
    network: str  # the constructor's name, by which a config asks for it
    model_args: dict[str, Any]  # what `create_model` gave the constructor, beside channels, classes and dropout
    saved_args: dict[str, Any]  # the same of the model whose weights these are, where their config says
    weights_report: object | None  # what `create_model` loaded, a `brainfm.weights.WeightsReport`
    cam_layer: str = ""
    optimizations: tuple[str, ...] = ()

    def __init__(self, num_classes: int, in_chans: int, global_pool: str | None, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = self.pools[0] if global_pool is None else self._checked_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.adapters = nn.ModuleDict()
        self.pretrained_cfg = PretrainedCfg()
        self.network, self.model_args, self.saved_args = "", {}, {}
        self.weights_report = None
        self.grad_checkpointing = False
        self._frozen = self._statistics_held = False
        self._feature_info = FeatureInfo()
        self._size_was_said = False
        self._plain_on_a_gpu = False  # of a copy for inference: see `computing_in`

    @property
    def feature_info(self) -> FeatureInfo:
        return self._feature_info

    @feature_info.setter
    def feature_info(self, stages: list[dict[str, Any]]) -> None:
        self._feature_info = FeatureInfo(stages)

    @property
    def default_cfg(self) -> PretrainedCfg:
        return self.pretrained_cfg

    # --- what a family may say of itself ---

    def pool(self, features: Tensor) -> Tensor:
        """What `forward_features` gives → [B, num_features]."""
        return features.mean(dim=(2, 3, 4))

    def _begin(self, x: Tensor) -> Any:
        """Volumes [B, in_chans, D, H, W] → what the first stage takes."""
        return x

    def _stage(self, number: int, x: Any, needed: bool) -> Any:  # noqa: ARG002 - for those that can spare a map
        """One stage. Where its map is not `needed` itself, it may give the next stage something cheaper."""
        return self._run(self._part(self.feature_info[number]["module"]), x)

    def _part(self, name: str) -> nn.Module:
        """As `get_submodule`, which torch.export could not follow before torch 2.7."""
        part: nn.Module = self
        for each in name.split("."):
            part = getattr(part, each)
        return part

    def _finish(self, x: Any) -> Tensor:
        """What the last stage gives → what `forward_features` does."""
        return x  # type: ignore[no-any-return]

    def _as_map(self, x: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: ARG002 - for tokens, which do not say
        """What a stage or `forward_features` gives for volumes of a shape → [B, C, d, h, w]."""
        return x

    def _new_head(self, num_classes: int) -> nn.Module:
        """A new classifier of one output or more."""
        head = nn.Linear(self.num_features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - for families of many blocks
        """Patterns that sort the parameters of the trunk into "stem" and "blocks", for layer-wise learning rates.

        Blocks are one pattern, whose groups are numbers that rise with depth, or several, each with its own numbers.
        Here every stage is a block, and what is in none belongs to the stem.
        """
        stages = [rf"{re.escape(info['module'])}\." for info in self.feature_info]
        others = "|".join([*stages, rf"{re.escape(self.classifier_name)}\."])
        return {"stem": f"^(?!{others})", "blocks": [(f"^{stage}", (n,)) for n, stage in enumerate(stages)]}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, beside biases and norms."""
        return set()

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The one place where a family says how checkpoints of others fit: renamed, dropped and reshaped tensors.

        Here: the input layer is adapted to `in_chans`. What is left is loaded strictly.
        """
        weight = state.get(f"{self.first_conv}.weight")
        if weight is not None and weight.ndim == 5 and weight.shape[1] != self.in_chans:
            state = state | {f"{self.first_conv}.weight": adapt_input_weight(weight, self.in_chans)}
        return state

    # --- forward ---

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, D, H, W] → the last feature map [B, num_features, d, h, w], or tokens [B, N, num_features]."""
        self._check_input(x)
        x = self._begin(x)
        for number in range(len(self.feature_info)):
            x = self._adapted(number, self._stage(number, x, needed=False))
        return self._finish(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        intermediates_only: bool = False,
        output_fmt: Literal["NCDHW", "NLC"] = "NCDHW",
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps [B, C, d, h, w] of chosen stages, beside the final features unless `intermediates_only`.

        Args:
            x: [B, in_chans, D, H, W].
            indices: Which stages of `feature_info`: a list (negative counts from the end), the last n, or None for all.
            intermediates_only: Return the list alone, and compute nothing after the last chosen stage.
            output_fmt: "NCDHW" for maps; "NLC" for their cells in a row, [B, d·h·w, C], z slowest, without a class
                token.

        Raises:
            ValueError: There is no such stage or format, or the volumes do not fit.
        """
        if output_fmt not in ("NCDHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCDHW' (maps of three axes) or 'NLC' (cells), not {output_fmt!r}")
        wanted = chosen_stages(indices, len(self.feature_info))
        self._check_input(x)
        shape, found = x.shape[2:], []
        x = self._begin(x)
        for number in range(len(self.feature_info)):
            x = self._adapted(number, self._stage(number, x, needed=number in wanted))
            if number in wanted:
                cells = self._as_map(x, shape)
                found.append(cells if output_fmt == "NCDHW" else cells.flatten(2).transpose(1, 2))
            if intermediates_only and number == wanted[-1]:
                return found
        return self._finish(x), found

    def dense(self, x: Tensor) -> Tensor:
        """[B, in_chans, D, H, W] → the last feature map [B, C, d, h, w]; of tokens, their grid without a class token.

        Cell (i, j, k) looks at the voxel `reduction · (i, j, k) + offset` of the last entry of `feature_info`. The map
        is in the type of x, whatever a copy of `for_inference` computes in.
        """
        kind = next(self.parameters(), x).dtype
        return self.features_and_map(x.to(kind))[1].to(x.dtype)

    def features_and_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward_features` gives, and the map [B, C, d, h, w] that it is or was made of."""
        features = self.forward_features(x)
        return features, self._as_map(features, x.shape[2:])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives → [B, num_features], and through the classifier unless `pre_logits`."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, D, H, W] → [B, num_features], or [B, num_classes] where a head was asked for."""
        return self.forward_head(self.forward_features(x))

    # --- the head, training, inference ---

    def get_classifier(self) -> nn.Module:
        """The last layer: a Linear, or an Identity where there are no classes."""
        return self._part(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of `num_classes` outputs (0: none), and the pooling where one is given.

        Raises:
            ValueError: The number is below 0, or the pooling none of `pools`.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, not {num_classes}")
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
            readout = replace(self.pretrained_cfg.readout, pool=global_pool)
            self.pretrained_cfg = replace(self.pretrained_cfg, readout=readout)
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters(), torch.empty(0))  # beside the trunk's parameters: in place, type and mode
            with torch.device(like.device):
                head = self._new_head(num_classes).to(like.dtype)
        parent, _, name = self.classifier_name.rpartition(".")
        setattr(self.get_submodule(parent), name, head.train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the inputs of each block and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def _apply(self, fn: Any, recurse: bool = True) -> Encoder:
        """What `to` and `cuda` do. A copy for inference takes the layout that is faster there: see `computing_in`."""
        before = [weight.is_cuda for weight in self.parameters()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._plain_on_a_gpu and before != [weight.is_cuda for weight in self.parameters()]:
            for weight in self.parameters():
                if weight.ndim == 5:
                    layout = torch.contiguous_format if weight.is_cuda else torch.channels_last_3d
                    weight.data = weight.data.clone(memory_format=layout)  # `contiguous` keeps strides of 1×1×1
        return self

    def freeze(self) -> Encoder:
        """Hold the trunk still: no gradients, and eval mode (BatchNorm and dropout included) even under `.train()`.

        The classifier stays trainable. Returns the encoder itself.
        """
        self._frozen = True
        self.requires_grad_(False)
        self.get_classifier().requires_grad_(True)
        return self.train(self.training)

    def hold_statistics(self) -> Encoder:
        """Hold the running statistics of BatchNorm still: in eval mode even under `.train()`, and nothing else is.

        Returns the encoder itself.
        """
        self._statistics_held = True
        return self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Training or eval mode; a frozen trunk, and a BatchNorm whose statistics are held, stay in eval mode."""
        super().train(mode)
        if self._statistics_held:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        if self._frozen:
            for name, child in self.named_children():
                if name not in (self.classifier_name, "head_drop"):
                    child.eval()
            self.get_classifier().train(mode)
        return self

    def for_inference(self, dtype: torch.dtype) -> Encoder:
        """A copy that gives the same embeddings, faster and in less memory: `brainfm.optimize` asks for it.

        It takes and returns float32 whatever it computes in, and its `optimizations` say what was done to it. Memory is
        channels-last, and where a family says what of it are chains of layers (`fast.chain`), BatchNorms in them are
        folded, and they are computed together. Hooks on modules within a chain are not called then.
        """
        chained = any(isinstance(module, Chained) for module in self.modules())
        shared = weights_made_anew(self) if chained else {}
        fast = self._copy_for_inference(shared)
        done: list[str] = []
        if shared:
            fold_batch_norms(fast, dtype)
            done.append("BatchNorm folded")
        for module in fast.modules():
            if isinstance(module, Together):
                faster = module.ready()
                if faster and faster not in done and dtype is torch.float32:  # all of them are, of nothing else
                    done.append(faster)
        return computing_in(fast, dtype, tuple(done))

    def _copy_for_inference(self, shared: dict[int, Any] | None = None) -> Encoder:
        """A copy in eval mode without gradients; `shared` are parts that it need not copy, by their ids."""
        fast = copy.deepcopy(self, shared or {}).eval().requires_grad_(False)
        fast.set_grad_checkpointing(False)
        return fast

    # --- shared by the families ---

    def _checked_pool(self, name: str) -> str:
        if name not in self.pools:
            unpooled = "" if name else "; what is not pooled is model.forward_features(x), or model.dense(x) as a map"
            ways = " or ".join(map(repr, self.pools))
            raise ValueError(f"{type(self).__name__} pools by {ways}, not {name!r}{unpooled}")
        return name

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"expected volumes of shape [B, {self.in_chans}, D, H, W], got {list(x.shape)}"
                + ("; add the batch axis: model(tensor[None])" if x.ndim == 4 else "")
            )
        self._check_size(tuple(x.shape[2:]))

    def _check_size(self, size: tuple[int, ...]) -> None:
        """Say once that pretrained weights are shown volumes of another size than their contract makes."""
        if self.weights_report is None or self._size_was_said:
            return
        spec, window = self.pretrained_cfg.input_spec, self.pretrained_cfg.readout.window
        expected = window.shape if window else spec and spec.output_shape and spec.output_shape[1:]
        if expected and size != tuple(expected):
            self._size_was_said = True
            logger.warning(
                "%s expects volumes of %s voxels, and was given %s; brainfm.create_transform(model) makes them",
                self.pretrained_cfg.name or type(self).__name__,
                "×".join(map(str, expected)),
                "×".join(map(str, size)),
            )

    def _adapted(self, number: int, x: Any) -> Any:
        """What a stage gives, through its adapter where it has one."""
        return self.adapters[str(number)](x) if str(number) in self.adapters else x

    def _run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`block(x)`, recomputed in the backward pass where gradient checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                return nullcontext(), self._still_statistics()

            recomputed: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            return recomputed
        return block(x)

    @contextmanager
    def _still_statistics(self) -> Iterator[None]:
        """Keep BatchNorm's running statistics as they are: recomputing a block must not count its batch twice."""
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm) and module.training]
        saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
        try:
            yield
        finally:
            for buffer, value in saved:
                buffer.copy_(value)


class Halved(nn.AvgPool3d):
    """The mean of 2×2×2 voxels, in float32 at least: PyTorch has no such pooling of bfloat16 on a processor."""

    def __init__(self) -> None:
        super().__init__(kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def computing_in(model: M, dtype: torch.dtype, done: tuple[str, ...] = ()) -> M:
    """The module itself, channels-last, computing in a type, while it takes and returns float32.

    Its `optimizations` become what was `done` to it before, and this. With a GroupNorm outside chains it stays in plain
    memory: in the other torch (2.13) adds up in float32, which on a head is off by percents. On a GPU it does with any
    norm over the volume, for which torch would copy each map there and back.
    """
    of_groups, of_volumes = (
        any(isinstance(module, norms) for module in model.modules())
        for norms in (nn.GroupNorm, (nn.GroupNorm, nn.InstanceNorm3d))
    )
    plain = of_groups and not any(isinstance(module, Chained) and module.together for module in model.modules())
    layout = torch.contiguous_format if plain else torch.channels_last_3d
    model = model.to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    if isinstance(model, Encoder):
        model._plain_on_a_gpu = of_volumes
    if dtype is not torch.float32:
        model.register_forward_pre_hook(_cast_input, with_kwargs=True)
        model.register_forward_hook(_cast_output)
    if not plain:
        done = (*done, "channels-last memory")
    optimizations: Any = (*done, str(dtype).removeprefix("torch."))
    model.optimizations = optimizations
    return model


def _cast_input(
    model: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    like = next(model.parameters(), None)  # as it is now: a copy of this copy may compute in another type
    if like is None:
        return inputs, named
    return tuple(x.to(like.dtype) for x in inputs), {name: x.to(like.dtype) for name, x in named.items()}


def _cast_output(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def adapt_input_weight(weight: Tensor, in_chans: int) -> Tensor:
    """A convolution's weight [out, I, …] for `in_chans` input channels, by timm's rule.

    One channel gets the sum over I; more get the I repeated in turn and scaled by I / in_chans, so that copies of one
    image in every channel give what it gave alone.
    """
    have = weight.shape[1]
    weight = weight.float()
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    repeats = -(-in_chans // have)
    return weight.repeat(1, repeats, *[1] * (weight.ndim - 2))[:, :in_chans] * (have / in_chans)


def chosen_stages(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """The stages that `forward_intermediates` was asked for, as indices from 0, in the network's order."""
    if indices is None:
        return list(range(count))
    wanted = (
        list(range(count - indices, count))
        if isinstance(indices, int)
        else [i + count if i < 0 else i for i in indices]
    )
    if not wanted or not all(0 <= i < count for i in wanted):
        raise ValueError(f"indices {indices!r} name no stage: there are {count}")
    return sorted(set(wanted))
