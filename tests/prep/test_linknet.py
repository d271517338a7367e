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
    with torch.inference_mode():
        expected = script(image)[:, 1:]
        found = linknet.brain_probability(deepbet._networks()[number], image)
    assert expected.max() - expected.min() > 0.1
    assert torch.allclose(found, expected, atol=1e-5)
