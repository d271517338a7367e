"""NT-Xent against the released code's numbers, a naive loop in float64, and itself across processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks

from brainfm.train import NTXentLoss, nt_xent_loss
from brainfm.train.losses import contrastive_metrics


def projections(batch: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.RandomState(seed)
    return tuple(
        torch.from_numpy(draw.standard_normal((batch, dim)).astype(np.float32)).requires_grad_() for _ in range(2)
    )


def naive(z_i: torch.Tensor, z_j: torch.Tensor, temperature: float) -> float:
    """Equation 1 of the SimCLR paper, pair by pair."""
    views = [*z_i.detach().double().tolist(), *z_j.detach().double().tolist()]

    def similarity(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)) / temperature

    losses = []
    for k, view in enumerate(views):
        partner = (k + len(z_i)) % len(views)
        others = sum(math.exp(similarity(view, other)) for n, other in enumerate(views) if n != k)
        losses.append(-math.log(math.exp(similarity(view, views[partner])) / others))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("case", range(4))
def test_loss_and_gradient_are_those_of_the_released_code(case, parity):
    wanted = parity["nt_xent"][case]
    z_i, z_j = projections(wanted["batch"], wanted["dim"], (wanted["batch"] * 1000 + wanted["dim"]) ^ parity["salt"])
    loss = nt_xent_loss(z_i, z_j, wanted["temperature"])
    loss.backward()
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-5)
    assert z_i.grad.norm().item() == pytest.approx(wanted["grad_i_l2"], rel=1e-5)
    assert z_j.grad.norm().item() == pytest.approx(wanted["grad_j_l2"], rel=1e-5)
    assert z_i.grad[0, :4].tolist() == pytest.approx(wanted["grad_i_first"], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.5), (2, 0.1), (7, 0.5), (7, 2.0)])
def test_loss_is_that_of_a_naive_loop(batch, temperature):
    z_i, z_j = (z.double() for z in projections(batch, 5, 1))
    assert nt_xent_loss(z_i, z_j, temperature).item() == pytest.approx(naive(z_i, z_j, temperature), rel=1e-12)
    assert NTXentLoss(temperature)(z_i, z_j).item() == pytest.approx(naive(z_i, z_j, temperature), rel=1e-12)


def test_half_precision_projections_are_compared_in_float32():
    z_i, z_j = projections(6, 64, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent_loss(z_i.bfloat16(), z_j.bfloat16(), 0.05)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(nt_xent_loss(z_i.bfloat16().float(), z_j.bfloat16().float(), 0.05).item())


@pytest.mark.parametrize("shapes", [((4, 8), (3, 8)), ((4, 8), (4, 7)), ((4,), (4,)), ((4, 8, 1), (4, 8, 1))])
def test_projections_that_are_no_pairs_are_refused(shapes):
    with pytest.raises(ValueError, match="one shape"):
        nt_xent_loss(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        NTXentLoss(temperature)


def test_metrics_tell_pairs_that_agree_from_pairs_that_do_not():
    z_i, z_j = (z.detach() for z in projections(64, 16, 3))
    perfect, chance = contrastive_metrics(z_i, 2 * z_i), contrastive_metrics(z_i, z_j)
    assert perfect["top1"] == 1
    assert perfect["alignment"] == pytest.approx(0, abs=1e-6)
    assert chance["top1"] < 0.1
    assert chance["alignment"] == pytest.approx(2, abs=0.3)
    assert contrastive_metrics(torch.ones(8, 4), torch.ones(8, 4))["uniformity"] == pytest.approx(0, abs=1e-5)
    assert chance["uniformity"] < -2


RANKS = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from brainfm.train import nt_xent_loss

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(1)
x_i, x_j = torch.randn(2, 6, 6, dtype=torch.float64)
mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
found = {}
for gradient in ("exact", "upstream"):
    ours = DistributedDataParallel(network())
    z = ours(torch.cat([x_i[mine], x_j[mine]]))
    loss = nt_xent_loss(*z.chunk(2), gradient=gradient)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    found[gradient] = mean.item() / world, [parameter.grad for parameter in ours.parameters()]
dist.destroy_process_group()  # the joined batch, alone
alone = network()
joined = nt_xent_loss(*alone(torch.cat([x_i, x_j])).chunk(2))
joined.backward()
for gradient, (mean, gradients) in found.items():
    assert abs(mean - joined.item()) < 1e-12, gradient
    scale = 1 if gradient == "exact" else world
    for grad, wanted in zip(gradients, alone.parameters(), strict=True):
        assert (grad * scale - wanted.grad).abs().max() < 1e-10 * wanted.grad.abs().max(), (gradient, grad, wanted.grad)
print("same")
"""


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradient_across_processes_is_that_of_the_joined_batch(world, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = run_ranks(world, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == world
