"""One step of SimCLR against the released loop, written out in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The released main.py and nt_xent.py, without their GPUs: an encoder pass a view, a matrix of cosine similarities, and
# the cross entropy of each row's positive against its negatives. `joint` is the one difference of the other way.
STEP = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import brainfm
from brainfm.train.data import Batch
from brainfm.train.distributed import synchronise_batch_norm
from brainfm.train.method import SimCLRMethod
from brainfm.train.recipe import Recipe
from brainfm.train.simclr import SimCLR

world, way = int(sys.argv[1]), sys.argv[2]
BATCH, TEMPERATURE = 4, 0.5
torch.set_num_threads(1)

def encoder():
    torch.manual_seed(0)
    model = brainfm.create_model("test_resnet_3d").double().train()
    with torch.no_grad():  # norms that are not the identity
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model

def released_step(network, x_i, x_j):
    passes = [torch.cat([x_i, x_j])] if way == "joint" else [x_i, x_j]
    z = torch.cat([network.projector(network.encoder(x)) for x in passes])
    similarity = nn.CosineSimilarity(dim=2)(z.unsqueeze(1), z.unsqueeze(0)) / TEMPERATURE
    loss = 0
    for row in range(2 * BATCH):
        positive = (row + BATCH) % (2 * BATCH)
        others = [column for column in range(2 * BATCH) if column not in (row, positive)]
        loss = loss + torch.logsumexp(similarity[row, [positive, *others]], 0) - similarity[row, positive]
    loss = loss / (2 * BATCH)
    loss.backward()
    return loss

torch.manual_seed(1)
views = torch.randn(2, BATCH, 1, 24, 24, 24, dtype=torch.float64)
views[1] = 0.7 * views[0] + 2 * views[1] + 0.5  # the two views have other statistics
recipe = Recipe(method="simclr", model="test_resnet_3d", manifest="", output="", views=way, precision="float64",
                batch_size=BATCH // world, temperature=TEMPERATURE)
torch.manual_seed(2)
method = SimCLRMethod(recipe, encoder())
network, rank = method.network.double(), 0
start = {name: value.clone() for name, value in network.state_dict().items()}
if world > 1:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    network = DistributedDataParallel(synchronise_batch_norm(network, torch.device("cpu")))
mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
for step in range(2):  # a second one: the reducer of DDP and the running statistics go on
    network.zero_grad()
    found = method.backward(network, Batch(views[:, mine], [0] * BATCH), torch.Generator(), mine)
loss = torch.tensor(found["loss"], dtype=torch.float64)
if world > 1:
    dist.all_reduce(loss)
    network = network.module
    dist.destroy_process_group()

torch.manual_seed(2)
plain = SimCLR(encoder(), recipe.projection_dim).double()
plain.load_state_dict(start)
for step in range(2):
    plain.zero_grad()
    wanted = released_step(plain, *views)
assert abs(loss.item() / world - wanted.item()) < 1e-6 * wanted.item(), (loss, wanted)  # logged as float
largest = max(parameter.grad.norm() for parameter in plain.parameters())
for (name, ours), theirs in zip(network.named_parameters(), plain.parameters(), strict=True):
    error = (ours.grad - theirs.grad).norm() / max(theirs.grad.norm(), 1e-4 * largest)  # a bias before a norm has none
    assert error < 1e-9, (name, error)
for (name, ours), theirs in zip(network.named_buffers(), plain.buffers(), strict=True):
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), (name, ours, theirs)
print("same")
"""


@pytest.mark.parametrize("way", ["separate", "joint"])
@pytest.mark.parametrize("world", [1, 2])
def test_gradient_and_statistics_of_a_step_are_those_of_the_released_loop(world, way, tmp_path):
    assert _run(tmp_path, world, way).stdout.count("same") == world


def test_ways_to_pass_the_views_differ(tmp_path):
    """So that the test above tells them apart: here the loop passes both views at once, and ours one by one."""
    swapped = STEP.replace('if way == "joint"', 'if way == "separate"')
    assert "AssertionError" in _run(tmp_path, 1, "separate", code=swapped, fails=True).stderr


def _run(folder, world, way, code=STEP, fails=False):
    script = folder / "step.py"
    script.write_text(code)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(world), way], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done
