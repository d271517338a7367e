"""One step of SimCLR held against the released loop, written out in float64; a script where it is run by ranks.

The released main.py and nt_xent.py, without their GPUs: an encoder pass a view, a matrix of cosine similarities, and
the cross entropy of each row's positive against its negatives. `joint` is the one difference of the other way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import brainfm
from brainfm.train.data import Batch
from brainfm.train.distributed import synchronise_batch_norm
from brainfm.train.recipe import Recipe
from brainfm.train.simclr import SimCLR, SimCLRMethod

BATCH, TEMPERATURE = 4, 0.5


def encoder():
    torch.manual_seed(0)
    model = brainfm.create_model("test_resnet_3d", widths=[4, 4, 8, 8]).double().train()
    with torch.no_grad():  # norms that are not the identity
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def released_step(network, way, x_i, x_j):
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


def compare(world, way, released_way=None):
    """Hold our step in one way against the released one in the same, or another; of one process or of all of them."""
    torch.manual_seed(1)
    views = torch.randn(2, BATCH, 1, 16, 16, 16, dtype=torch.float64)
    views[1] = 0.7 * views[0] + 2 * views[1] + 0.5  # the two views have other statistics
    recipe = Recipe(
        method="simclr",
        model="test_resnet_3d",
        manifest="",
        output="",
        views=way,
        precision="float64",
        batch_size=BATCH // world,
        temperature=TEMPERATURE,
    )
    torch.manual_seed(2)
    method = SimCLRMethod(recipe, encoder())
    network, rank = method.network.double(), 0
    start = {name: value.clone() for name, value in network.state_dict().items()}
    if world > 1:
        rank = dist.get_rank()
        network = DistributedDataParallel(synchronise_batch_norm(network, torch.device("cpu")))
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for _ in range(2):  # a second one: the reducer of DDP and the running statistics go on
        network.zero_grad()
        found = method.backward(network, Batch(views[:, mine], [0] * BATCH), torch.Generator(), mine)
    loss = torch.tensor(found["loss"], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(loss)
        network = network.module

    torch.manual_seed(2)
    plain = SimCLR(encoder(), recipe.projection_dim).double()
    plain.load_state_dict(start)
    for _ in range(2):
        plain.zero_grad()
        wanted = released_step(plain, released_way or way, *views)
    assert abs(loss.item() / world - wanted.item()) < 1e-6 * wanted.item(), (loss, wanted)  # logged as float
    largest = max(parameter.grad.norm() for parameter in plain.parameters())
    for (name, ours), theirs in zip(network.named_parameters(), plain.parameters(), strict=True):
        # a bias before a norm has no gradient
        error = (ours.grad - theirs.grad).norm() / max(theirs.grad.norm(), 1e-4 * largest)
        assert error < 1e-9, (name, error)
    for (name, ours), theirs in zip(network.named_buffers(), plain.buffers(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), (name, ours, theirs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in ("separate", "joint"):
        compare(dist.get_world_size(), way)
        print(f"same {way}")  # in one piece: another process writes to the same pipe
    dist.destroy_process_group()
