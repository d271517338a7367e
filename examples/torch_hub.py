"""Load an encoder and its preprocessing through torch.hub, from a checkout of brainfm.

python examples/torch_hub.py normalized.nii.gz mask.nii.gz --model simclr_resnet18_3d
"""

import argparse
from pathlib import Path

import torch

CHECKOUT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("mask")
    parser.add_argument("--model", default="simclr_resnet18_3d")
    options = parser.parse_args(arguments)

    model = torch.hub.load(str(CHECKOUT), options.model, source="local", pretrained=True)
    transform = torch.hub.load(str(CHECKOUT), "transform", model, source="local")
    with torch.inference_mode():
        vector = model(transform(options.image, mask=options.mask)[None])
    print(f"embedding {list(vector.shape)}")
    return vector


if __name__ == "__main__":
    main()
