"""Use an encoder and its preprocessing inside a MONAI pipeline.

python examples/monai_pipeline.py normalized.nii.gz mask.nii.gz --model simclr_resnet18_3d
"""

import argparse

import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, LoadImaged

import brainfm
from brainfm.transforms import InputTransformd


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("mask")
    parser.add_argument("--model", default="simclr_resnet18_3d")
    options = parser.parse_args(arguments)

    model = brainfm.create_model(options.model, pretrained=True)
    pipeline = Compose(
        [
            LoadImaged(["image", "mask"]),  # other MONAI transforms may follow; the affine travels with the image
            InputTransformd(model.pretrained_cfg.input_spec),
        ]
    )
    scans = Dataset([{"image": options.image, "mask": options.mask}], pipeline)
    with torch.inference_mode():
        vectors = torch.cat([model(batch["image"].as_tensor()) for batch in DataLoader(scans, batch_size=1)])
    print(f"embeddings {list(vectors.shape)}")
    return vectors


if __name__ == "__main__":
    main()
