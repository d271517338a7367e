"""NT-Xent against the released code's numbers, a naive loop in float64, and itself across processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks

from brainfm.train import NTXentLoss, nt_xent_loss
from brainfm.train.losses import (
    contrastive_metrics,
    distillation_loss,
    joined_mean,
    masked_l1_loss,
    target_losses,
    yaware_loss,
)


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


def naive_yaware(z_i, z_j, labels, sigma, temperature):
    """Equation 2 of Dufumier et al. 2021, view by view, over both views of all scans."""
    views, ages = [*z_i.detach().tolist(), *z_j.detach().tolist()], [*labels.tolist(), *labels.tolist()]

    def similarity(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)) / temperature

    def alike(k, n):
        if k % len(z_i) == n % len(z_i):
            return 1.0
        known = not math.isnan(ages[k]) and not math.isnan(ages[n])
        return math.exp(-((ages[k] - ages[n]) ** 2) / (2 * sigma**2)) if known else 0.0

    losses = []
    for k, view in enumerate(views):
        others = [n for n in range(len(views)) if n != k]
        every = sum(math.exp(similarity(view, views[n])) for n in others)
        weights = [alike(k, n) for n in others]
        logs = [math.log(math.exp(similarity(view, views[n])) / every) for n in others]
        losses.append(-sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("sigma", [0.5, 5.0, 100.0])
def test_yaware_loss_is_that_of_a_naive_loop_and_a_missing_label_is_like_itself_alone(sigma):
    z_i, z_j = (z.double() for z in projections(6, 5, 1))
    labels = torch.tensor([40.0, 42.5, 70.0, float("nan"), 40.0, float("nan")], dtype=torch.float64)
    loss = yaware_loss(z_i, z_j, labels, sigma, 0.3)
    assert loss.item() == pytest.approx(naive_yaware(z_i, z_j, labels, sigma, 0.3), rel=1e-12)


def test_yaware_loss_of_scans_that_are_not_alike_is_nt_xent():
    z_i, z_j = (z.double() for z in projections(6, 5, 1))
    for labels in (torch.arange(6.0) * 1000, torch.full((6,), float("nan"))):
        assert yaware_loss(z_i, z_j, labels, 1.0).item() == pytest.approx(nt_xent_loss(z_i, z_j).item(), rel=1e-12)
    alike = yaware_loss(z_i, z_j, torch.full((6,), 40.0), 5.0)
    assert alike.item() != pytest.approx(nt_xent_loss(z_i, z_j).item(), rel=1e-3)
    with pytest.raises(ValueError, match="6 labels"):
        yaware_loss(z_i, z_j, torch.zeros(5), 5.0)


def test_losses_of_targets_are_those_of_naive_loops_over_the_scans_that_have_them():
    draw = torch.Generator().manual_seed(0)
    outputs = [torch.randn(5, n, generator=draw, dtype=torch.float64, requires_grad=True) for n in (1, 1, 3, 1)]
    nan = float("nan")
    labels = torch.tensor(
        [[0.3, 1, 2, nan], [nan, 0, 1, nan], [-1.2, nan, nan, nan], [2.0, 1, 0, nan], [nan, nan, 2, nan]]
    ).double()
    kinds = ["regression", "binary", "multiclass", "regression"]
    losses = target_losses(outputs, labels, kinds)
    wanted = [[], [], []]
    for scan in range(5):
        row = labels[scan].tolist()
        number, logit, logits = (output[scan].tolist() for output in outputs[:3])
        if not math.isnan(row[0]):
            wanted[0].append((number[0] - row[0]) ** 2)
        if not math.isnan(row[1]):
            chance = 1 / (1 + math.exp(-logit[0]))
            wanted[1].append(-math.log(chance if row[1] else 1 - chance))
        if not math.isnan(row[2]):
            wanted[2].append(-math.log(math.exp(logits[int(row[2])]) / sum(map(math.exp, logits))))
    assert losses.tolist() == pytest.approx([*(sum(each) / len(each) for each in wanted), 0.0], rel=1e-12)
    losses.mean().backward()
    assert outputs[0].grad[:, 0].nonzero()[:, 0].tolist() == [0, 2, 3]
    assert not outputs[3].grad.any()


def test_masked_l1_is_the_mean_over_hidden_voxels_of_each_scan():
    draw = torch.Generator().manual_seed(0)
    volumes, prediction = torch.randn(2, 2, 2, 3, 4, 4, generator=draw, dtype=torch.float64)
    hidden = torch.rand(2, 1, 3, 4, 4, generator=draw) < torch.tensor([0.2, 0.8]).view(2, 1, 1, 1, 1)
    means = []
    for scan in range(2):
        places = hidden[scan, 0].nonzero().tolist()
        errors = [
            abs(volumes[scan, c, z, y, x].item() - prediction[scan, c, z, y, x].item())
            for z, y, x in places
            for c in (0, 1)
        ]
        means.append(sum(errors) / len(errors))
    assert masked_l1_loss(prediction, volumes, hidden).item() == pytest.approx(sum(means) / 2, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_distillation_loss_is_that_of_a_naive_loop(kind):
    student, teacher = (z.double() for z in projections(4, 6, 1))
    wanted = []
    for ours, theirs in zip(student.tolist(), (3 * teacher + 7).tolist(), strict=True):
        if kind == "cosine":
            dot = sum(a * b for a, b in zip(ours, theirs, strict=True))
            wanted.append(1 - dot / math.sqrt(sum(a * a for a in ours)) / math.sqrt(sum(b * b for b in theirs)))
            continue
        mean = sum(theirs) / 6
        std = math.sqrt(sum((b - mean) ** 2 for b in theirs) / 6 + 1e-5)
        apart = [abs(a - (b - mean) / std) for a, b in zip(ours, theirs, strict=True)]
        wanted.append(sum(d * d / 2 if d < 1 else d - 0.5 for d in apart) / 6)
    assert distillation_loss(student, 3 * teacher + 7, kind).item() == pytest.approx(sum(wanted) / 4, rel=1e-12)


def test_mean_of_what_nobody_knows_is_nought():
    assert joined_mean(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.bool)).tolist() == [0.0]


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
from brainfm.train import nt_xent_loss, yaware_loss

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(1)
x_i, x_j = torch.randn(2, 6, 6, dtype=torch.float64)
mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
found = {}
ages = torch.tensor([40.0, 43.0, float("nan"), 60.0, 61.0, 44.0])

def loss_of(name, z, labels, gradient="exact"):
    if name == "nt_xent":
        return nt_xent_loss(*z.chunk(2), gradient=gradient)
    return yaware_loss(*z.chunk(2), labels, 5.0, gradient=gradient)

for case in [(name, gradient) for name in ("nt_xent", "yaware") for gradient in ("exact", "upstream")]:
    ours = DistributedDataParallel(network())
    z = ours(torch.cat([x_i[mine], x_j[mine]]))
    loss = loss_of(case[0], z, ages[mine], case[1])
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    found[case] = mean.item() / world, [parameter.grad for parameter in ours.parameters()]
dist.destroy_process_group()  # the joined batch, alone
for (name, gradient), (mean, gradients) in found.items():
    alone = network()
    joined = loss_of(name, alone(torch.cat([x_i, x_j])), ages)
    joined.backward()
    assert abs(mean - joined.item()) < 1e-12, (name, gradient)
    scale = 1 if gradient == "exact" else world
    for grad, wanted in zip(gradients, alone.parameters(), strict=True):
        assert (grad * scale - wanted.grad).abs().max() < 1e-10 * wanted.grad.abs().max(), (gradient, grad, wanted.grad)
print("same")
"""


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradient_across_processes_is_that_of_the_joined_batch(world, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = run_ranks(world, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == world
