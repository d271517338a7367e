"""3D ResNets on MONAI's own network, as Kaczmarek et al. 2025 (arXiv 2509.10620) pretrained them with SimCLR.

MONAI's `ResNet` is built and its modules are taken over under the same names, so that a state dict of one loads
strictly in the other. Ours is the encoder contract around them. MONAI is imported when a model is built, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from brainfm.models.contracts import (
    ASSETS,
    CITATION,
    NEURO_SIMCLR_COHORTS,
    PAPER,
    PHANTOMS,
    PHANTOMS_NOTE,
    REPOSITORY,
    TURBOPREP_1MM,
    TURBOPREP_4MM,
)
from brainfm.models.encoder import Encoder, chosen_stages
from brainfm.models.slabs import pooled_stem, residual_block
from brainfm.pretrained import PretrainedCfg, Score
from brainfm.registry import register_model

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class ResNet(Encoder):
    """MONAI's 3D ResNet (stride-1 7×7×7 stem, shortcut type B with biased 1×1×1 convolutions) as an encoder.

    Args:
        block: "basic" (ResNet-18) or "bottleneck" (ResNet-50).
        layers: Blocks in each of the four stages.
        widths: Channels of each stage, before a bottleneck's expansion by 4.
        num_classes: Outputs of the classifier `fc`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg".
        drop_rate: Dropout on the pooled embedding, in training.
    """

    pools = ("avg",)
    classifier = "fc"
    first_conv = "conv1"

    conv1: nn.Conv3d
    bn1: nn.BatchNorm3d
    act: nn.Module
    maxpool: nn.MaxPool3d

    def __init__(
        self,
        block: Literal["basic", "bottleneck"] = "basic",
        layers: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        from monai.networks.nets.resnet import ResNet as MonaiResNet

        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        network = MonaiResNet(
            block=block,
            layers=list(layers),
            block_inplanes=list(widths),
            spatial_dims=3,
            n_input_channels=in_chans,
            conv1_t_stride=1,
            feed_forward=False,
            bias_downsample=True,
        )
        for name, module in network.named_children():
            self.add_module(name, module)
        expansion = 4 if block == "bottleneck" else 1
        self.num_features = widths[-1] * expansion
        self.feature_info = [{"num_chs": widths[0], "reduction": (1, 1, 1), "module": "act"}]
        self.feature_info += [
            {"num_chs": width * expansion, "reduction": (2**n, 2**n, 2**n), "module": stage}
            for n, (width, stage) in enumerate(zip(widths, _STAGES, strict=True), start=1)
        ]
        self.reset_classifier(num_classes)

    def _stem(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv1(x)))  # type: ignore[no-any-return]

    def _pooled_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the first block takes: the stem's output, or where that is not to be kept, what it is made of."""
        if self.grad_checkpointing:
            return pooled_stem(x, self.conv1, self.bn1)
        return (self.maxpool(self._stem(x)),)

    def _stage(self, name: str, *inputs: Tensor) -> Tensor:
        for block in self.get_submodule(name).children():
            inputs = (residual_block(block, *inputs) if self.grad_checkpointing else block(*inputs),)
        return inputs[0]

    def forward_features(self, x: Tensor) -> Tensor:
        self._check_input(x)
        inputs = self._pooled_stem(x)
        for name in _STAGES:
            inputs = (self._stage(name, *inputs),)
        return inputs[0]

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3, 4))

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        wanted = chosen_stages(indices, len(self.feature_info))
        self._check_input(x)
        found = []
        if 0 in wanted:
            found = [self._run(self._stem, x)]
            if intermediates_only and wanted[-1] == 0:
                return found
        inputs = (self.maxpool(found[0]),) if found else self._pooled_stem(x)
        for number, name in enumerate(_STAGES, start=1):
            x = self._stage(name, *inputs)
            inputs = (x,)
            if number in wanted:
                found.append(x)
            if intermediates_only and number == wanted[-1]:
                return found
        return x, found

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the contract says, and the stem goes by slabs, so that its full-size activation never exists.

        Hooks on the stem's modules, on blocks and on what is in them are not called then.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the encoder out of a SimCLR checkpoint (`encoder.…` beside `projector.…`), then as every family does."""
        inside = {key[8:]: value for key, value in state.items() if key.startswith("encoder.")}
        return super().filter_state_dict(inside or state)


def _neuro_simclr(num_features: int, **changes: Any) -> PretrainedCfg:
    return PretrainedCfg(
        input_spec=TURBOPREP_1MM,
        num_features=num_features,
        ssl_method="SimCLR",
        paper=PAPER,
        repository=REPOSITORY,
        citation=CITATION,
    ).overlay(changes)


def _baseline(num_features: int) -> PretrainedCfg:
    return PretrainedCfg(
        input_spec=TURBOPREP_1MM,
        num_features=num_features,
        paper=PAPER,
        repository=REPOSITORY,
        citation=CITATION,
        notes="A supervised baseline of the paper: trained from scratch for each task.",
    )


@register_model(
    cfgs={
        "kaczmarek2025": _neuro_simclr(
            512,
            url=f"{REPOSITORY}/releases/download/v1.0.0/simclr_3d_brain_foundation.tar",
            # Reported by one independent user who downloaded the file; the authors publish no hash.
            sha256="f046dafe009de0cfa113a022c1ef9603d123834f217074eb86d26037e72b98f5",
            licence="MIT",
            cohorts=NEURO_SIMCLR_COHORTS,
            notes="The authors' release. Named .tar, it is a PyTorch checkpoint; projector and optimiser are dropped.",
            # Table 2 of the paper.
            scores=(
                Score("stroke severity (SOOP)", "MAE, NIHSS points", "linear probe", 5.87, 0.07, PAPER),
                Score("Alzheimer's vs healthy (AIBL)", "ROC AUC", "linear probe", 0.904, 0.008, PAPER),
                Score("sex (IXI)", "ROC AUC", "linear probe", 0.896, 0.006, PAPER),
                Score("age (IXI)", "MAE, years", "linear probe", 5.90, 0.16, PAPER),
                Score("stroke severity (SOOP)", "MAE, NIHSS points", "fine-tuned", 5.37, 0.24, PAPER),
                Score("Alzheimer's vs healthy (AIBL)", "ROC AUC", "fine-tuned", 0.929, 0.028, PAPER),
                Score("sex (IXI)", "ROC AUC", "fine-tuned", 0.991, 0.004, PAPER),
                Score("age (IXI)", "MAE, years", "fine-tuned", 4.35, 0.22, PAPER),
            ),
        )
    }
)
def simclr_resnet18_3d(**kwargs: Any) -> ResNet:
    """ResNet-18, 512-d, pretrained with SimCLR on 44,958 T1w scans of 18,759 patients."""
    return ResNet("basic", (2, 2, 2, 2), **kwargs)


@register_model(cfgs={"": _neuro_simclr(2048)})
def simclr_resnet50_3d(**kwargs: Any) -> ResNet:
    """ResNet-50, 2048-d, for SimCLR pretraining; no weights were published."""
    return ResNet("bottleneck", (3, 4, 6, 3), **kwargs)


@register_model(cfgs={"": _baseline(512)})
def resnet18_3d(**kwargs: Any) -> ResNet:
    """ResNet-18, 512-d: the paper's supervised baseline, trained from scratch."""
    return ResNet("basic", (2, 2, 2, 2), **kwargs)


@register_model(
    cfgs={
        "phantoms": PretrainedCfg(
            file=str(ASSETS / "test_resnet_3d.safetensors"),
            input_spec=TURBOPREP_4MM,
            num_features=128,
            ssl_method="SimCLR",
            cohorts=(PHANTOMS,),
            recipe="test_resnet_3d",
            licence="Apache-2.0",
            notes=PHANTOMS_NOTE,
        )
    }
)
def test_resnet_3d(**kwargs: Any) -> ResNet:
    """A ResNet-10 of 0.9 M parameters at 4 mm, 128-d, for tests and demos."""
    return ResNet("basic", (1, 1, 1, 1), (16, 32, 64, 128), **kwargs)
