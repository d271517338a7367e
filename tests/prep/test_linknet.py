"""deepbet's network from its weights alone, against its own TorchScript."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from brainfm.prep import deepbet, linknet


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", [0, 1])
def test_brain_probability_is_that_of_deepbets_torchscript(number):
    torch.manual_seed(number)
    image = F.interpolate(torch.randn(1, 1, 8, 12, 8), (64, 96, 64), mode="trilinear")
    script = torch.jit.load(str(deepbet._files()[number]), map_location="cpu").eval()
    weights = deepbet._networks()[number]
    with torch.inference_mode():
        theirs, found = script(image)[:, 1:], linknet.brain_probability(weights, image)
        exact = script.double()(image.double())[:, 1:]
        ours = linknet.brain_probability({name: weight.double() for name, weight in weights.items()}, image.double())
    assert exact.max() - exact.min() > 0.1
    assert torch.allclose(ours, exact, rtol=0, atol=1e-10)
    for each in (found, theirs):
        assert (each - exact).abs().max() < 2e-4  # what float32 is off by


def test_pool_is_torchs():
    x = torch.randn(1, 3, 8, 12, 6)
    assert torch.equal(linknet._pooled(x), F.max_pool3d(x, 3, stride=2, padding=1))
