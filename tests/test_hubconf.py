"""torch.hub finds every registered model and the transform in a checkout."""

import importlib.util
from pathlib import Path

import pytest
import torch

import brainfm

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", CHECKOUT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_registered_model_and_the_transform_are_entry_points(hubconf):
    entry_points = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert entry_points == set(brainfm.list_models()) | {"transform"}


def test_each_entry_point_says_what_the_model_is(hubconf):
    assert "512-d" in hubconf.simclr_resnet18_3d.__doc__
    assert all(getattr(hubconf, name).__doc__ for name in brainfm.list_models())


def test_dependencies_are_installed_packages(hubconf):
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


def test_model_and_transform_load_through_torch_hub(small_sample, small_model):
    model = torch.hub.load(str(CHECKOUT), "test_resnet_3d", source="local", pretrained=True)
    transform = torch.hub.load(str(CHECKOUT), "transform", "test_resnet_3d", source="local")
    x = transform(*small_sample)[None]
    with torch.inference_mode():
        assert torch.equal(model(x), small_model(x))
