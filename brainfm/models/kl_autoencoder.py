"""The encoder of MONAI's autoencoder with a KL penalty, which latent diffusion models begin with (Pinaya et al. 2022).

A convolution; levels of residual blocks, GroupNorm and SiLU before each convolution, with a strided convolution between
levels; a last norm; and the mean of the latent. MONAI's own `AutoencoderKL` (generative 0.2, monai 1.4 to 1.6) has the
same names and numbers. It is written here because only half of it is asked for, whose levels are stages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.encoder import Encoder, stage
from brainfm.models.fast.chain import Chain, Chained

EPS = 1e-6  # of the authors' norms


class KLEncoder(Encoder):
    """Volumes → the mean of the latent, or the features before it.

    The latent itself is drawn about its mean, so that it differs from one call to the next; the mean does not.

    Args:
        widths: Channels of the levels; each but the first halves the volume before it.
        depths: Residual blocks of each level.
        groups: Of the norms.
        latent: Channels of the latent; 0 ends the encoder after its last norm, with the width of the last level.
        num_classes: Outputs of the classifier `head`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg".
        drop_rate: Dropout on the pooled embedding, in training.
    """

    classifier_name = "head"
    first_conv = "encoder.blocks.0.conv"

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 128, 128),
        depths: Sequence[int] = (2, 2, 2, 2),
        groups: int = 32,
        latent: int = 3,
        *,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        blocks: list[nn.Module] = [_conv(in_chans, widths[0], 3)]
        stages = []
        before = widths[0]
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if level:
                blocks.append(_Halve(before))
            for _ in range(depth):
                blocks.append(_Residual(before, width, groups))
                before = width
            if level == len(widths) - 1:
                blocks.append(nn.GroupNorm(groups, width, EPS))
            stages.append((len(blocks) - 1, width, 2**level))
        if latent:
            blocks.append(_conv(widths[-1], latent, 3))
            stages.append((len(blocks) - 1, latent, stages[-1][2]))
        self.encoder = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.quant_conv_mu = _conv(latent, latent, 1) if latent else nn.Identity()
        # A strided convolution sees its cell and the two after it: it is centred one cell further into the volume.
        self.feature_info = [
            stage(f"encoder.blocks.{block}", width, (step,) * 3, (step - 1.0,) * 3) for block, width, step in stages
        ]
        self._ends = [block for block, _, _ in stages]
        self.num_features = stages[-1][1]
        self.reset_classifier(num_classes)

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without a latent, what makes it is left out."""
        if isinstance(self.quant_conv_mu, nn.Identity):
            latent = (f"encoder.blocks.{self._ends[-1] + 1}.", "quant_conv_mu.")
            state = {key: value for key, value in state.items() if not key.startswith(latent)}
        return super().filter_state_dict(state)

    def _blocks(self, number: int) -> range:
        """The blocks of a stage; the first convolution is before all."""
        return range(self._ends[number - 1] + 1 if number else 1, self._ends[number] + 1)

    def _begin(self, x: Tensor) -> Tensor:
        begun: Tensor = self._part("encoder.blocks.0")(x)
        return begun

    def _stage(self, number: int, x: Tensor, needed: bool) -> Tensor:  # noqa: ARG002 - every map is made anyway
        return self._run(lambda x: self._through(number, x), x)

    def _through(self, number: int, x: Tensor) -> Tensor:
        for block in self._blocks(number):
            x = self._part(f"encoder.blocks.{block}")(x)
        return self.quant_conv_mu(x) if number == len(self._ends) - 1 else x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - a level is a block
        """As of every encoder: the first convolution is the stem, and each stage a block."""
        patterns = []
        for number in range(len(self._ends)):
            own = "|".join(map(str, self._blocks(number)))
            last = r"|^quant_conv_mu\." if number == len(self._ends) - 1 else ""
            patterns.append((rf"^encoder\.blocks\.(?:{own})\.{last}", (number,)))
        return {"stem": r"^encoder\.blocks\.0\.", "blocks": patterns}


class _Residual(Chained):
    """x + two convolutions of it, each after a norm and SiLU."""

    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before, EPS), _conv(before, width, 3)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width, EPS), _conv(width, width, 3)
        self.nin_shortcut = nn.Identity() if before == width else _conv(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.norm1, nn.SiLU(), self.conv1, self.norm2, nn.SiLU(), self.conv2]
        return self.through(layers, x, added=self.nin_shortcut(x))


class _Halve(nn.Module):
    """A convolution of stride 2, padded on the far side only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(width, width, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1) * 3))
        return halved


def _conv(before: int, width: int, kernel: int, stride: int = 1, padding: int | None = None) -> Chain:
    """A convolution under the name that MONAI's `Convolution` gives it; padded to keep the size unless told."""
    padding = kernel // 2 if padding is None else padding
    return Chain(OrderedDict(conv=nn.Conv3d(before, width, kernel, stride, padding)))
