"""OpenMind's Primus-M against outputs of its authors' own code."""

from __future__ import annotations

import pytest
import torch
from upstream import check_array, check_tensor, contracts, drawn, error, vectors

import brainfm

NAME = "openmind_primusm"
SIZE = {"img_size": (64, 64, 64)}


def saved(state, file, prefix=""):
    """A file as nnssl writes it, with the decoder's tensors beside those of the encoder."""
    decoder = {"up_projection.weight": torch.ones(4), "decoder.blocks.0.norm1.weight": torch.ones(4)}
    inside = {prefix + key: value for key, value in state.items()} | (
        {} if prefix else decoder | {"mask_token": torch.ones(4)}
    )
    torch.save({"network_weights": inside, "optimizer_state": None, "current_epoch": 9, "_best_ema": 0.5}, file)
    return file


def first_blocks(keys, depth):
    return {k: s for k, s in keys.items() if not k.startswith("eva.blocks.") or int(k.split(".")[2]) < depth}


def test_network_has_as_many_numbers_as_the_authors_encoder():
    keys = vectors(NAME)["keys"]
    with torch.device("meta"):
        model = brainfm.create_model(NAME, **SIZE)
    assert len(model.state_dict()) == len(keys) == 373
    shapes = sorted(tuple(value.shape) for value in model.state_dict().values())
    assert shapes == sorted(map(tuple, keys.values()))


@pytest.mark.parametrize("prefix", ["", "encoder."], ids=["MAE", "SimCLR"])
def test_authors_container_loads_strictly(prefix, tmp_path, recipe_state):
    numbers = vectors(NAME)
    state = recipe_state(first_blocks(numbers["keys"], 1), numbers["salt"])
    model = brainfm.create_model(NAME, depth=1, checkpoint_path=saved(state, tmp_path / "one.pth", prefix), **SIZE)
    assert torch.equal(model.pos_embed, state["eva.pos_embed"])
    assert torch.equal(model.blocks[0].gamma_2, state["eva.blocks.0.gamma_2"])
    assert torch.equal(model.norm.bias, state["eva.norm.bias"])
    assert ("decoder" in model.weights_report.dropped) == (not prefix)


def test_order_of_tokens_says_which_patch_gets_which_position():
    x = torch.zeros(1, 1, 16, 24, 32)
    x[..., 8:16, 0:8, 16:24] = 1  # the patch (1, 0, 2) of a grid of 2×3×4
    place = {(0, 1, 2): (1 * 3 + 0) * 4 + 2, (1, 0, 2): (0 * 2 + 1) * 4 + 2, (2, 1, 0): (2 * 3 + 0) * 2 + 1}
    for order, wanted in place.items():
        model = brainfm.create_model(NAME, depth=1, img_size=(16, 24, 32), token_order=order)
        with torch.inference_mode():
            tokens = model._begin(x)
            change = (tokens - model._begin(torch.zeros_like(x))).abs().sum(dim=-1)[0]
            assert change.nonzero().flatten().tolist() == [wanted]
            cells = model._as_map(tokens, x.shape[2:])
        assert list(cells.shape) == [1, 864, 2, 3, 4]
        assert torch.equal(cells[0, :, 1, 0, 2], tokens[0, wanted])


@pytest.mark.parametrize(
    ("wrong", "reason"), [({"token_order": (0, 1, 1)}, "token_order"), ({"num_heads": 5}, "heads")]
)
def test_arguments_that_make_no_network_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        brainfm.create_model(NAME, depth=1, **SIZE, **wrong)


def test_another_size_than_the_positions_are_of_is_refused():
    with pytest.raises(ValueError, match=r"takes volumes of \(64, 64, 64\)"):
        brainfm.create_model(NAME, depth=1, **SIZE)(torch.zeros(1, 1, 64, 64, 72))


@pytest.mark.slow
def test_map_and_embedding_are_the_authors_and_those_of_the_other_order_are_not(tmp_path, recipe_state):
    numbers = vectors(NAME)
    file = saved(recipe_state(numbers["keys"], numbers["salt"]), tmp_path / numbers["file"])
    model = brainfm.create_model(NAME, checkpoint_path=file, **SIZE)
    file.unlink()
    x = drawn(numbers)
    with torch.inference_mode():
        tokens = model.forward_features(x)
        check_array(model._as_map(tokens, x.shape[2:]), numbers["feature_map"])
        assert error(model.pool(tokens), numbers["embedding"]) < 1e-5
        model.token_order = (0, 1, 2)
        other = model(x)[0]
    assert error(other[:64], numbers["wrong_order"]["embedding_first64"]) < 1e-5
    assert error(other, numbers["embedding"]) > 0.1


def test_tensor_of_the_packaged_scan_is_nnssls(sample):
    spec = brainfm.get_pretrained_cfg(NAME).input_spec
    image = spec.apply(brainfm.load_scan(sample[0], spec=spec)).image
    check_tensor(image, contracts()["nnssl"]["tensor"])
