"""The ViTs: names of facebookresearch/mae, positions and attention against slow references, and loading."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import brainfm
from brainfm.assets import ASSETS
from brainfm.models import VisionTransformer
from brainfm.models.vit import Attention, Block, DropPath, interpolate_positions, sincos_positions

PATCH = (2, 3, 4)
SIZE = (4, 9, 16)  # 2×3×4 patches


def small_vit(size=SIZE, **kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(24, 2, 3, img_size=size, patch_size=PATCH, **kwargs).eval()


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return module


# --- Names and sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads"),
    [("mae_vit_tiny_3d", 192, 12, 3), ("mae_vit_base_3d", 768, 12, 12), ("mae_vit_large_3d", 1024, 24, 16)],
)
def test_parameters_have_the_names_and_shapes_of_facebookresearch_mae(name, dim, depth, heads):
    with torch.device("meta"):
        model = brainfm.create_model(name)
    wanted = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + 6 * 12 * 12, dim),
        "patch_embed.proj.weight": (dim, 1, 25, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    block = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim),
        "mlp.fc1.bias": (4 * dim,),
        "mlp.fc2.weight": (dim, 4 * dim),
        "mlp.fc2.bias": (dim,),
    }
    for number in range(depth):
        wanted |= {f"blocks.{number}.{key}": shape for key, shape in block.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == wanted
    assert model.blocks[0].attn.num_heads == heads
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_positions_are_fixed_and_everything_else_learns():
    model = small_vit()
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_initial_weights_follow_the_mae_recipe():
    torch.manual_seed(0)
    model = VisionTransformer(96, 1, 3, img_size=(16, 16, 16), patch_size=(8, 8, 8), num_classes=2)
    patch, qkv = model.patch_embed.proj.weight.flatten(1), model.blocks[0].attn.qkv
    for weight in (patch, qkv.weight):
        bound = math.sqrt(6 / sum(weight.shape))  # Xavier, uniform
        assert 0.95 * bound < weight.abs().max() <= bound
    assert qkv.bias.abs().max() == 0
    assert 0.01 < model.cls_token.std() < 0.03


# --- Positions --------------------------------------------------------------------------------------


def naive_positions(dim: int, grid: tuple[int, int, int]) -> np.ndarray:
    half = dim // 6
    rows = [[0.0] * dim]
    for z in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                row = []
                for position in (z, y, x):
                    angles = [position * 10000 ** (-i / half) for i in range(half)]
                    row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
                rows.append(row + [0.0] * (dim - len(row)))
    return np.array(rows)


@pytest.mark.parametrize("dim", [24, 26, 29, 96])
@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 5, 2)])
def test_sincos_positions_equal_a_triple_loop(dim, grid):
    found = sincos_positions(dim, grid)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), naive_positions(dim, grid), rtol=0, atol=1e-7)
    assert found[0, 0].abs().max() == 0
    assert found[0, :, 6 * (dim // 6) :].abs().sum() == 0


@pytest.mark.parametrize("name", ["mae_vit_tiny_3d", "test_vit_3d"])
def test_registered_models_start_with_these_positions(name):
    model = brainfm.create_model(name)
    np.testing.assert_allclose(model.pos_embed[0].numpy(), naive_positions(model.num_features, model.grid), atol=1e-6)


def test_another_input_size_gives_what_a_model_built_for_it_gives():
    model, other_size = randomise(small_vit(dynamic_img_size=True)), (8, 6, 12)
    model.pos_embed.data.copy_(sincos_positions(24, (2, 3, 4)))
    built = small_vit(other_size)
    built.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"}, strict=False)
    x = torch.randn(2, 1, *other_size)
    with torch.inference_mode():
        assert torch.equal(model(x), built(x))
        assert torch.equal(model.forward_features(x), built.forward_features(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_fixed_positions_are_known_as_such_in_any_type(dtype):
    model = small_vit().to(dtype)
    assert torch.equal(model.positions((4, 2, 3)), sincos_positions(24, (4, 2, 3)).to(dtype))


def test_learned_positions_are_interpolated_for_another_input_size():
    model = small_vit(dynamic_img_size=True)
    model.pos_embed.data += 0.1 * torch.randn(model.pos_embed.shape)
    built = small_vit((8, 6, 12))
    built.load_state_dict(model.state_dict() | {"pos_embed": built.pos_embed})
    built.pos_embed.data.copy_(interpolate_positions(model.pos_embed.data, (2, 3, 4), (4, 2, 3)))
    x = torch.randn(2, 1, 8, 6, 12)
    with torch.inference_mode():
        assert torch.equal(model(x), built(x))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_interpolation_is_linear_along_each_axis_and_keeps_the_cls_row(axis):
    old, new = (3, 4, 5), (6, 7, 4)
    ramp = np.random.default_rng(0).random(old[axis])
    shape = [1, 1, 1]
    shape[axis] = -1
    volume = np.broadcast_to(ramp.reshape(shape), old)
    positions = torch.tensor(np.concatenate([[9.0], volume.ravel()]), dtype=torch.float32)[None, :, None]
    centres = (np.arange(new[axis]) + 0.5) * old[axis] / new[axis] - 0.5
    wanted = np.broadcast_to(np.interp(centres, np.arange(old[axis]), ramp).reshape(shape), new)
    found = interpolate_positions(positions, old, new)[0, :, 0].numpy()
    assert found[0] == 9
    np.testing.assert_allclose(found[1:].reshape(new), wanted, rtol=1e-6, atol=1e-6)


# --- Tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 0, 0), (0, 2, 1), (1, 2, 3)])
def test_a_marked_patch_moves_its_own_token(place):
    model = small_vit()
    for block in model.blocks:  # only the residual paths: tokens do not mix
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    empty = torch.zeros(1, 1, *SIZE)
    marked = empty.clone()
    z, y, x = (slice(n * size, (n + 1) * size) for n, size in zip(place, PATCH, strict=True))
    marked[0, 0, z, y, x] = 1
    token = 1 + (place[0] * 3 + place[1]) * 4 + place[2]
    with torch.inference_mode():
        (before, [*_, map_before]), (after, [*_, map_after]) = map(model.forward_intermediates, (empty, marked))
    assert (before != after).any(dim=2)[0].nonzero().tolist() == [[token]]
    assert (map_before != map_after).any(dim=1)[0].nonzero().tolist() == [list(place)]


def test_pooling_reads_the_cls_token_or_the_mean_of_the_patches_after_the_norm():
    x = torch.randn(2, 1, *SIZE)
    token, mean = randomise(small_vit()), randomise(small_vit(global_pool="avg"))
    with torch.inference_mode():
        tokens = token.forward_features(x)
        assert tokens.shape == (2, 1 + 2 * 3 * 4, 24)
        assert torch.equal(token(x), tokens[:, 0])
        assert torch.equal(mean(x), tokens[:, 1:].mean(dim=1))
        mean.reset_classifier(0, global_pool="token")
        assert torch.equal(mean(x), tokens[:, 0])


def test_fc_norm_pools_before_the_norm_and_has_its_own_as_mae_does():
    """`models_vit.py` written out: blocks, the mean of the patch tokens, `fc_norm`; no norm before."""
    model = randomise(small_vit(global_pool="fc_norm"))
    x = torch.randn(2, 1, *SIZE)
    tokens = model.patch_embed(x)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    mean = tokens[:, 1:].mean(dim=1)
    wanted = torch.nn.functional.layer_norm(mean, (24,), model.fc_norm.weight, model.fc_norm.bias, eps=1e-6)
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model.forward_features(x), tokens)


def test_fc_norm_begins_new_comes_and_goes_and_keeps_the_names_of_the_others():
    model = randomise(small_vit())
    names, x = set(model.state_dict()), torch.randn(1, 1, *SIZE)
    with torch.no_grad():
        before = model(x)
    model.reset_classifier(0, "fc_norm")
    assert set(model.state_dict()) - names == {"fc_norm.weight", "fc_norm.bias"}
    assert torch.equal(model.fc_norm.weight.detach(), torch.ones(24))
    assert not model.norm.weight.requires_grad  # it is not used, and DistributedDataParallel refuses what is not
    model.reset_classifier(0, "token")
    assert set(model.state_dict()) == names
    assert model.norm.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_fc_norm_loads_from_a_pretraining_a_fine_tuning_of_mae_and_its_own_folder(mae_checkpoint, tmp_path):
    torch.save(mae_checkpoint, tmp_path / "pretrained.pth")
    model = brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "pretrained.pth", global_pool="fc_norm")
    assert torch.equal(model.fc_norm.bias.detach(), torch.zeros(96))
    randomise(model.fc_norm)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("norm.")}
    torch.save({"model": state}, tmp_path / "finetuned.pth")
    again = brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "finetuned.pth", global_pool="fc_norm")
    brainfm.save_for_hub(model, tmp_path / "folder")
    own = brainfm.create_model(f"local-dir:{tmp_path / 'folder'}")
    x = torch.randn(1, 1, 40, 48, 48)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert torch.equal(own(x), model(x))
    assert own.global_pool == "fc_norm"
    with pytest.raises(brainfm.WeightsError, match="fc_norm"):
        brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "finetuned.pth")


def test_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="do not divide"):
        small_vit((4, 9, 15))
    with pytest.raises(ValueError, match="do not divide"):
        small_vit(dynamic_img_size=True)(torch.zeros(1, 1, 4, 8, 16))


def test_volume_on_another_grid_is_refused_with_the_ways_to_take_it():
    model = brainfm.create_model("test_vit_3d", pretrained=True)
    for forward in (model, model.forward_features, model.forward_intermediates, model.dense):
        with pytest.raises(ValueError, match=r"takes volumes of \(40, 48, 48\) voxels, not \(20, 24, 24\).*img_size"):
            forward(torch.zeros(1, 1, 20, 24, 24))


# --- Stochastic depth -------------------------------------------------------------------------------


def test_drop_path_leaves_out_branches_of_some_samples_in_training_only():
    model = brainfm.create_model("test_vit_3d", pretrained=True, drop_path_rate=0.9)
    plain = brainfm.create_model("test_vit_3d", pretrained=True)
    rates = [block.drop_path.rate for block in model.blocks]
    assert (rates[0], rates[-1], rates) == (0, 0.9, sorted(rates))
    x = torch.randn(1, 1, 40, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        torch.manual_seed(0)
        assert len({tuple(z.tolist()) for z in model.train()(x.expand(6, -1, -1, -1, -1))}) > 1


def test_what_drop_path_keeps_has_the_same_mean():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == dropped[:, :1, :1]).all()  # a sample's branch as a whole
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_drop_path_rate_is_refused(rate):
    with pytest.raises(ValueError, match="drop_path_rate"):
        small_vit(drop_path_rate=rate)


# --- Blocks -----------------------------------------------------------------------------------------


def naive_attention(layer: Attention, x: np.ndarray) -> np.ndarray:
    """A loop over volumes, heads and queries, in float64."""
    parameters = {key: value.detach().numpy() for key, value in layer.named_parameters()}
    batch, tokens, dim = x.shape
    width = dim // layer.num_heads
    out = np.zeros_like(x)
    for b in range(batch):
        q, k, v = np.split(x[b] @ parameters["qkv.weight"].T + parameters["qkv.bias"], 3, axis=1)
        for head in range(layer.num_heads):
            own = slice(head * width, (head + 1) * width)
            for token in range(tokens):
                scores = np.exp(k[:, own] @ q[token, own] / math.sqrt(width))
                out[b, token, own] = scores @ v[:, own] / scores.sum()
    return out @ parameters["proj.weight"].T + parameters["proj.bias"]


def naive_norm(layer: torch.nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def test_attention_equals_a_softmax_written_out():
    layer = randomise(Attention(24, 3)).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    np.testing.assert_allclose(layer(x).detach().numpy(), naive_attention(layer, x.numpy()), rtol=1e-10, atol=1e-12)


def test_block_is_pre_norm_attention_then_pre_norm_mlp_with_the_exact_gelu():
    block = randomise(Block(24, 3)).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    found = block(x).detach().numpy()
    mlp = {key: value.detach().numpy() for key, value in block.mlp.named_parameters()}

    h = x.numpy() + naive_attention(block.attn, naive_norm(block.norm1, x.numpy()))
    hidden = naive_norm(block.norm2, h) @ mlp["fc1.weight"].T + mlp["fc1.bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    np.testing.assert_allclose(found, h + hidden @ mlp["fc2.weight"].T + mlp["fc2.bias"], rtol=1e-9, atol=1e-11)


# --- Loading ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_vit_state() -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in load_file(ASSETS / "test_vit_3d.safetensors").items()}


@pytest.fixture(scope="module")
def mae_checkpoint() -> dict:
    """What facebookresearch/mae writes in pretraining: encoder and decoder under "model", and more beside it."""
    torch.manual_seed(3)
    state = brainfm.create_model("test_vit_3d").state_dict()
    state |= {
        "mask_token": torch.randn(1, 1, 16),
        "decoder_pos_embed": torch.randn(1, 181, 16),
        "decoder_embed.weight": torch.randn(16, 96),
        "decoder_blocks.0.norm1.weight": torch.randn(16),
        "decoder_norm.weight": torch.randn(16),
        "decoder_pred.bias": torch.randn(512),
    }
    return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 149, "scaler": {"scale": 1.0}}


def test_mae_checkpoint_loads_without_its_decoder(mae_checkpoint, tmp_path):
    torch.save(mae_checkpoint, tmp_path / "checkpoint-149.pth")
    model = brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "checkpoint-149.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(value, mae_checkpoint["model"][key]), key
    decoder = {"mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}
    assert set(model.weights_report.dropped) == decoder | {"optimizer", "epoch", "scaler"}


def test_mae_checkpoint_may_hold_the_arguments_of_its_run(mae_checkpoint, tmp_path):
    arguments = argparse.Namespace(model="mae_vit_tiny", blr=1.5e-4, output_dir="./output_dir")  # as util/misc.py does
    torch.save(mae_checkpoint | {"args": arguments}, tmp_path / "checkpoint-149.pth")
    model = brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "checkpoint-149.pth")
    assert torch.equal(model.cls_token, mae_checkpoint["model"]["cls_token"])


def test_deeper_checkpoint_is_refused(small_vit_state, tmp_path):
    save_file(small_vit_state | {"blocks.4.norm1.weight": torch.zeros(96)}, tmp_path / "deeper.safetensors")
    with pytest.raises(brainfm.WeightsError, match=r"1 unexpected: blocks\.4\.norm1\.weight"):
        brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "deeper.safetensors")


OTHER_SIZE, OTHER_GRID = (48, 32, 56), (6, 4, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_stored_for_another_size_gets_fixed_positions_computed_anew(small_vit_state, dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in small_vit_state.items()}
    save_file(state, tmp_path / "model.safetensors")
    model = brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "model.safetensors", img_size=OTHER_SIZE)
    assert torch.equal(model.pos_embed, sincos_positions(96, OTHER_GRID))
    assert torch.equal(model.norm.weight, state["norm.weight"].float())


def test_checkpoint_stored_for_another_size_gets_learned_positions_interpolated(small_vit_state, tmp_path):
    learned = small_vit_state["pos_embed"] + torch.rand(1, 181, 96, generator=torch.Generator().manual_seed(0))
    save_file(small_vit_state | {"pos_embed": learned}, tmp_path / "learned.safetensors")
    model = brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "learned.safetensors", img_size=OTHER_SIZE)
    assert torch.equal(model.pos_embed.data, interpolate_positions(learned, (5, 6, 6), OTHER_GRID))


def test_published_model_built_for_another_size_equals_the_published_one_fed_that_size():
    published = brainfm.create_model("test_vit_3d", pretrained=True, dynamic_img_size=True)
    built = brainfm.create_model("test_vit_3d", pretrained=True, img_size=OTHER_SIZE)
    x = torch.randn(1, 1, *OTHER_SIZE)
    with torch.inference_mode():
        assert torch.equal(published(x), built(x))


def test_checkpoint_with_positions_of_an_unknown_grid_is_refused(small_vit_state, tmp_path):
    save_file(small_vit_state | {"pos_embed": torch.zeros(1, 65, 96)}, tmp_path / "other.safetensors")
    with pytest.raises(brainfm.WeightsError, match=r"1 of another shape: pos_embed \[1, 65, 96\] for \[1, 181, 96\]"):
        brainfm.create_model("test_vit_3d", checkpoint_path=tmp_path / "other.safetensors")


def test_weights_for_another_patch_are_refused_as_such():
    with pytest.raises(brainfm.WeightsError, match=r"patch_embed\.proj\.weight"):
        brainfm.create_model("test_vit_3d", pretrained=True, patch_size=(16, 16, 16), img_size=(48, 48, 48))
