"""The diffusion model's U-Net, held to numbers of MONAI's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfm.diffusion import DiffusionUNet

SMALL = {"channels": [8, 16, 16], "num_res_blocks": 2, "norm_num_groups": 4, "num_head_channels": [0, 8, 16]}
SMALL |= {"in_channels": 7, "out_channels": 3, "attention_levels": [False, True, True], "cross_attention_dim": 4}

# Every 191st number that DiffusionModelUNet of MONAI 1.6.1 gives in float64 for the same input and weights, which its
# load_old_state_dict took; all of them differed by 6e-15 at the most.
MONAI = [0.205811383, -1.206097514, -0.428742708, 2.282674244, 0.031231354, 0.327578967, 0.456267763]


def test_noise_is_that_of_monais_network(recipe_state):
    network = DiffusionUNet(**SMALL)
    assert len(network.state_dict()) == 526
    network.load_state_dict(recipe_state({key: list(value.shape) for key, value in network.state_dict().items()}, 21))
    latent = torch.from_numpy(np.random.RandomState(3).standard_normal((1, 7, 8, 12, 4)).astype(np.float32)).double()
    told = torch.tensor([[[1.0, 0.3, 0.2, 0.6]]]).double()
    with torch.no_grad():
        noise = network.double().eval()(latent, torch.tensor([420]), told)
    assert noise.shape == (1, 3, 8, 12, 4)
    assert noise.flatten()[::191].tolist() == pytest.approx(MONAI, abs=1e-8)


@pytest.mark.parametrize(
    "changed", [{"resblock_updown": False}, {"attention_levels": [True, True]}, {"num_head_channels": [0, 0, 16]}]
)
def test_what_makes_no_such_network_is_refused(changed):
    with pytest.raises(ValueError, match=r"in this network|of each level|has no heads of 0"):
        DiffusionUNet(**SMALL | changed)
