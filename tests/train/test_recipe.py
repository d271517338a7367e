"""Recipes: the published numbers, overrides, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import brainfm
from brainfm import RecipeError
from brainfm.train.method import METHODS
from brainfm.train.optim import LARS, learning_rate, make_optimiser
from brainfm.train.recipe import RECIPES, MethodName, Recipe, load_recipe, methods_of, recipe_from_dict


def test_published_runs_are_those_of_the_paper():
    simclr, mae = load_recipe("simclr_resnet18_3d"), load_recipe("mae_vit_tiny_3d")
    assert (simclr.epochs, simclr.batch_size, simclr.temperature, simclr.optimiser) == (150, 6, 0.5, "adam")
    assert (simclr.lr, simclr.schedule, simclr.weight_decay, simclr.projection_dim) == (3e-4, "constant", 0, 64)
    assert simclr.augmentation.crop_min == (30, 40, 40)
    assert (mae.optimiser, mae.betas, mae.lr, mae.scale_lr) == ("adamw", (0.9, 0.95), 1.5e-4, True)
    assert (mae.warmup_epochs, mae.weight_decay, mae.mask_ratio, mae.norm_pix_loss) == (40, 0.05, 0.75, False)
    assert (mae.augmentation.rotate, mae.augmentation.contrast, mae.augmentation.flip) == (0, 0, 0.5)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_names_a_model_and_the_source_of_each_number(path):
    recipe = load_recipe(path.stem)
    assert brainfm.is_model(recipe.model)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    head, *rest = path.read_text().splitlines()
    assert head.startswith("#")
    for line in (line for line in rest if not line.startswith("#")):
        assert re.search(r"# (paper|code|mae|ours)\b", line), line


def test_what_the_paper_does_not_say_is_not_said_to_be_its_own():
    """It names no optimiser, rate, schedule, temperature or SyncBN: they are the code's (REFERENCE of both)."""
    lines = (RECIPES / "simclr_resnet18_3d.yaml").read_text().splitlines()
    for key in ("optimiser", "lr", "schedule", "temperature", "weight_decay", "sync_bn", "views"):
        (line,) = (line for line in lines if line.startswith(f"{key}:"))
        assert "# code" in line
        assert "paper" not in line
    assert load_recipe("simclr_resnet18_3d").views == "separate"


@pytest.mark.parametrize("size", ["base", "large"])
def test_larger_vits_are_trained_as_the_papers_tiny_one(size):
    tiny, larger = load_recipe("mae_vit_tiny_3d").to_dict(), load_recipe(f"mae_vit_{size}_3d").to_dict()
    odd = {key for key in tiny if tiny[key] != larger[key]}
    assert odd == {"model", "precision"} | ({"grad_checkpointing"} if size == "large" else set())
    assert brainfm.get_pretrained_cfg(f"mae_vit_{size}_3d").recipe == f"mae_vit_{size}_3d"


def test_mae_decays_all_but_biases_and_vectors_as_timm_does():
    recipe = load_recipe("test_vit_3d")
    network = METHODS["mae"](recipe, brainfm.create_model("test_vit_3d")).network
    decayed = {
        id(p)
        for group in make_optimiser(recipe, network).param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    wanted = {
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1 and not name.endswith(".bias")
    }
    assert {name for name, parameter in network.named_parameters() if id(parameter) in decayed} == wanted
    assert {"cls_token", "mask_token"} <= wanted


def test_overrides_are_yaml_and_reach_groups():
    recipe = load_recipe(
        "simclr_resnet18_3d",
        ["lr=3e-3", "batch_size=12", "input_size=[40,48,48]", "augmentation.gamma=[0.8,1.2]", "cache=null", "tf32=no"],
    )
    assert (recipe.lr, recipe.batch_size, recipe.input_size) == (3e-3, 12, (40, 48, 48))
    assert (recipe.augmentation.gamma, recipe.augmentation.flip) == ((0.8, 1.2), 0.5)
    assert (recipe.cache, recipe.tf32) == (None, False)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("bath_size=3", "did you mean batch_size"),
        ("max_bad_share=0.1", "called max_bad_fraction now"),
        ("augmentation.flop=0.5", r"did you mean augmentation\.flip"),
        ("epochs=many", "epochs is 'many', and must be int"),
        ("epochs=0", "at least 1"),
        ("epochs=1.5", "must be int"),
        ("lr=-1", "lr is -1"),
        ("lr=.nan", "lr is nan"),
        ("temperature=0", "temperature"),
        ("augmentation.flip=2", "probability"),
        ("augmentation=3", "augmentation is a group"),
        ("epochs.flip=3", "epochs is 150, and no group"),
        ("method=byol", "'simclr' or 'mae'"),
        ("mask_ratio=1", "between 0 and 1"),
        ("mask_ratio=0.8", "mask_ratio is of mae and simmim, not of simclr; leave it out"),
        ("picture_every=5", "picture_every is of mae, not of simclr"),
        ("targets=age", "targets is of supervised and yaware, not of simclr"),
        ("teacher=test_resnet_3d", "teacher is of distill, not of simclr"),
        ("method=supervised", "targets=age,sex"),
        ("method=yaware", "name its column, targets=age"),
        ("method=distill", "teacher=MODEL"),
        ("batch_chunk=9", "between 1 and batch_size"),
        ("batch_size=1", "at least 2"),
        ("warmup_epochs=151", "more than all"),
        ("precision=fp16", "'float32' or 'bfloat16' or 'float64'"),
        ("input_size=[40,48]", "input_size"),
        ("epochs", "not key=value"),
        ("epochs=[", "not YAML"),
        ("resume=maybe", "must be bool"),
    ],
)
def test_override_that_cannot_be_is_refused_with_the_reason(override, reason):
    with pytest.raises(RecipeError, match=reason):
        load_recipe("simclr_resnet18_3d", [override])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["method=mae"], "name a recipe, or give method=… and model=…; model is not there"),
        ([], "method and model is not there"),
        (["method=mae", "model=test_vit_3d", "batch_chunk=2"], "batch_chunk is of simclr and yaware, not of mae"),
        (["method=yaware", "model=test_vit_3d", "targets=age,sex"], "one number"),
        (["method=yaware", "model=test_vit_3d", "targets=age", "batch_size=1"], "at least 2"),
        (["method=supervised", "model=test_vit_3d", "targets=age,age"], "each column once"),
        (["method=supervised", "model=test_vit_3d", "targets=age", "kinds.sex=binary"], "'sex', which is none"),
        (["method=supervised", "model=test_vit_3d", "targets=age", "kinds.age=number"], "'regression'"),
        (["method=simmim", "model=test_vit_3d", "kernel_sigma=0"], "above 0"),
    ],
)
def test_fields_without_a_recipe_are_refused_as_those_of_one(fields, reason):
    with pytest.raises(RecipeError, match=reason):
        load_recipe("", fields)


def test_method_and_model_are_a_recipe_and_targets_text_or_a_list():
    given = ["method=supervised", "model=test_vit_3d", "epochs=3"]
    text, listed = (load_recipe("", [*given, f"targets={one}"]) for one in ("age, sex", "[age,sex]"))
    assert text == listed == recipe_from_dict(text.to_dict())
    assert (text.targets, text.epochs, text.lr) == (("age", "sex"), 3, 3e-4)


def test_every_field_of_some_methods_names_known_ones_and_what_is_by_default_is_readable_by_all():
    """Recipes and checkpoints of before list all fields, whatever the method."""
    named = {name for item in fields(Recipe) for name in methods_of(item)}
    assert named == set(METHODS) == set(get_args(MethodName))
    needs = {"supervised": ["targets=age"], "yaware": ["targets=age"], "distill": ["teacher=test_resnet_3d"]}
    for name in METHODS:
        whole = load_recipe("", [f"method={name}", "model=test_vit_3d", *needs.get(name, [])])
        assert recipe_from_dict(whole.to_dict()) == whole


def test_unknown_recipe_names_the_nearest_and_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'simclr_resnet18_3d'"):
        load_recipe("simclr_resnet18")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="key: value"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "half.yaml").write_text("method: simclr\n")
    with pytest.raises(RecipeError, match="model"):
        load_recipe(tmp_path / "half.yaml")
    (tmp_path / "old.yaml").write_text("method: simclr\nmodel: test_resnet_3d\nmax_bad_share: 0.1\n")
    with pytest.raises(RecipeError, match=r"old\.yaml: max_bad_share is called max_bad_fraction now"):
        load_recipe(tmp_path / "old.yaml")


def test_schedule_rises_then_falls_to_zero():
    recipe = load_recipe("mae_vit_tiny_3d")
    rates = [learning_rate(recipe, step, 10, 128) for step in range(1501)]
    peak = 1.5e-4 * 128 / 256
    assert rates[0] == 0
    assert rates[200] == pytest.approx(peak / 2)
    assert rates[400] == pytest.approx(peak)
    assert rates[950] == pytest.approx(peak / 2)
    assert rates[1500] == pytest.approx(0, abs=1e-12)


def test_weight_decay_spares_biases_norms_and_tokens():
    recipe = load_recipe("mae_vit_tiny_3d")
    model = brainfm.create_model("test_vit_3d")
    decayed, others = make_optimiser(recipe, model).param_groups
    assert decayed["weight_decay"] == 0.05
    assert others["weight_decay"] == 0
    spared = {id(parameter) for parameter in others["params"]}
    assert id(model.cls_token) in spared
    assert id(model.blocks[0].norm1.weight) in spared
    assert id(model.blocks[0].mlp.fc1.weight) not in spared
    assert id(model.pos_embed) not in spared | {id(parameter) for parameter in decayed["params"]}


def test_lars_scales_each_matrix_to_its_size():
    import torch

    weight, bias = torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.ones(2))
    optimiser = LARS([{"params": [weight, bias]}], lr=1.0, momentum=0.9)
    for _ in range(2):
        weight.grad, bias.grad = torch.full((2, 2), 100.0), torch.full((2,), 0.5)
        optimiser.step()
    # Trust 1e-3 · ‖w‖ / ‖g‖ makes the step 1e-3 · 3 whatever the gradient's size; momentum adds 0.9 of it.
    first = 3 * (1 - 1e-3)
    velocity = 0.9 * 3e-3 + 1e-3 * first
    assert weight[0, 0].item() == pytest.approx(first - velocity, rel=1e-6)
    assert bias[0].item() == pytest.approx(1 - 0.5 - 0.95)


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_packaged_weights_say_the_recipe_they_were_made_by_and_come_with_its_log(name):
    cfg = brainfm.get_pretrained_cfg(name)
    recipe = load_recipe(cfg.recipe)
    assert (recipe.model, METHODS[recipe.method].name) == (name, cfg.ssl_method)
    assert "phantoms" in cfg.notes
    lines = [json.loads(line) for line in Path(cfg.file).with_suffix(".log.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == recipe.epochs
    assert lines[-1]["step"] == len(lines) == recipe.epochs * (600 // recipe.batch_size)
    ends = lines[:12], lines[-12:]
    first, last = ({key: np.mean([line[key] for line in part]) for key in lines[0]} for part in ends)
    assert last["loss"] < 0.7 * first["loss"]
    assert last.get("top1", 1) > 0.5  # by chance 0.01
