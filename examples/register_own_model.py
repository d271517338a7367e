"""Register one's own encoder with its weights and its input contract, in two ways, and use it like any other.

python examples/register_own_model.py normalized.nii.gz mask.nii.gz my_weights.safetensors

A network that brainfm has needs no code: `my_lab.yaml`, beside this file, is a card, and says it all as data. A network
of one's own is a subclass of `brainfm.models.Encoder`: it builds its layers and says what its stages are. Here it also
brings an operation of its own, which its contract names.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import brainfm
from brainfm.contract import Operation, Volume
from brainfm.contract.volume import with_image
from brainfm.models.encoder import Encoder, stage
from brainfm.weights import save_state

# --- One way: a card ------------------------------------------------------------------------------

brainfm.register_card(Path(__file__).parent / "my_lab.yaml")

# --- The other: code ------------------------------------------------------------------------------


@brainfm.register_operation
@dataclass(frozen=True)
class SquareRoot(Operation):
    """Take the square root of all intensities."""

    def __call__(self, volume: Volume) -> Volume:  # noqa: D102 - the class says it
        return with_image(volume, np.sqrt(volume.image))

    def __str__(self) -> str:
        return "take the square root"


class MyEncoder(Encoder):
    """Two convolutions, each followed by a max-pool: the features are averaged, as no other pooling is written here."""

    classifier_name = "head"
    first_conv = "stem.0"

    def __init__(self, num_classes=0, in_chans=1, global_pool=None, drop_rate=0.0):
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.stem = nn.Sequential(nn.Conv3d(in_chans, 8, 3, padding=1), nn.MaxPool3d(2), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(8, 16, 3, padding=1), nn.MaxPool3d(2), nn.ReLU())
        self.num_features = 16
        # Where the first cell of each map looks: a pool of 2 looks between its two voxels.
        self.feature_info = [stage("stem", 8, (2, 2, 2), (0.5,) * 3), stage("body", 16, (4, 4, 4), (1.5,) * 3)]
        self.reset_classifier(num_classes)


CARDED = brainfm.get_pretrained_cfg("my_resnet").input_spec
SPEC = brainfm.InputSpec.from_dict(
    CARDED.to_dict() | {"operations": [SquareRoot().to_dict(), *CARDED.to_dict()["operations"]]}
)


@brainfm.register_model(cfgs={"v1": brainfm.PretrainedCfg(input_spec=SPEC, licence="MIT", num_features=16)})
def my_encoder(**kwargs):
    """Two convolutions, 16-d."""
    return MyEncoder(**kwargs)


# --- Both are used like any other -----------------------------------------------------------------


def embed(name: str, image: str, mask: str, weights: str) -> torch.Tensor:
    try:
        model = brainfm.create_model(name, checkpoint_path=weights)
    except brainfm.WeightsNotFoundError:
        model = brainfm.create_model(name)  # you would train it here
        save_state(model.state_dict(), weights)
    transform = brainfm.create_transform(model)
    volumes = transform(image, mask=mask)[None]
    with torch.inference_mode():
        vector, cells = model(volumes), model.dense(volumes)
    print(f"{brainfm.describe(transform.spec)}\n{name}: embedding {list(vector.shape)}, dense {list(cells.shape)}\n")
    return vector


def main(arguments: list[str] | None = None) -> list[torch.Tensor]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("mask")
    parser.add_argument("weights", help="written with initial values if it is not there yet")
    options = parser.parse_args(arguments)
    other = str(Path(options.weights).with_suffix(".of_my_encoder.safetensors"))
    return [
        embed("my_resnet.v1", options.image, options.mask, options.weights),
        embed("my_encoder.v1", options.image, options.mask, other),
    ]


if __name__ == "__main__":
    main()
