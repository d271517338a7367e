"""Register one's own encoder with its weights and its input contract, and use it like any other.

python examples/register_own_model.py normalized.nii.gz mask.nii.gz my_weights.safetensors

The encoder here is a ResNet of another shape; any subclass of `brainfm.models.Encoder` will do. Its contract crops
brains to a box, resizes them, and z-scores the non-zero voxels: the order of the operations is part of it.
"""

import argparse

import torch

import brainfm
from brainfm.contract import CropForeground, Resize, ZScore
from brainfm.models import ResNet
from brainfm.weights import save_state

SPEC = brainfm.InputSpec(
    representation="T1w",
    space="MNI152NLin2009cAsym",
    registration="affine",
    orientation="RAS",
    skull_strip="required",
    mask="file or nonzero",
    operations=(
        CropForeground(region="mask"),
        Resize((32, 40, 32), mode="trilinear"),
        ZScore(region="nonzero", eps_rule="one_if_zero", background="zero"),
    ),
    output_shape=(1, 32, 40, 32),
)


@brainfm.register_model(cfgs={"my_lab": brainfm.PretrainedCfg(input_spec=SPEC, licence="MIT", ssl_method="SimCLR")})
def my_resnet(**kwargs):
    """A small ResNet, 64-d."""
    return ResNet("basic", (1, 1, 1, 1), (8, 16, 32, 64), **kwargs)


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("mask")
    parser.add_argument("weights", help="written with initial values if it is not there yet")
    options = parser.parse_args(arguments)

    try:
        model = brainfm.create_model("my_resnet.my_lab", checkpoint_path=options.weights)
    except brainfm.WeightsNotFoundError:
        model = brainfm.create_model("my_resnet.my_lab")  # you would train it here
        save_state(model.state_dict(), options.weights)
    transform = brainfm.create_transform(model)
    with torch.inference_mode():
        vector = model(transform(options.image, mask=options.mask)[None])
    print(brainfm.describe(SPEC))
    print(f"embedding {list(vector.shape)}")
    return vector


if __name__ == "__main__":
    main()
