"""torch.hub: every registered model under its name, and `transform`.

model = torch.hub.load(repo, "simclr_resnet18_3d", pretrained=True)
transform = torch.hub.load(repo, "transform", model)
"""

from functools import partial as _partial

from brainfm import create_model as _create_model
from brainfm import create_transform as transform
from brainfm import list_models as _list_models
from brainfm.registry import listing as _listing

dependencies = ["torch", "monai", "nibabel", "huggingface_hub", "safetensors", "numpy", "yaml", "tqdm", "filelock"]

for _name in _list_models():
    globals()[_name] = _partial(_create_model, _name)
    globals()[_name].__doc__ = _listing(_name).title

__all__ = ["transform", *_list_models()]
