"""How features become the one vector of a scan: what loops in float64 give, alone, by `embed` and by `verify`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import brainfm
from brainfm import ScanError
from brainfm.contract import InputSpec, Readout, Window
from brainfm.models.encoder import Encoder, stage
from brainfm.readout import Reader, windows

STEP, OFFSET = 2, 0.5  # of the toy's cells


class Toy(Encoder):
    """Cells of 2×2×2 voxels, each by itself, with a nonlinearity: the mean of windows is not that of the volume."""

    classifier_name = "head"
    first_conv = "body.0"
    pools = ("avg", "first")

    def __init__(self, in_chans=1, global_pool=None):
        super().__init__(0, in_chans, global_pool, 0.0)
        self.body = nn.Sequential(nn.Conv3d(in_chans, 5, STEP, stride=STEP), nn.ReLU())
        self.num_features, self.feature_info = 5, [stage("body", 5, (STEP,) * 3, (OFFSET,) * 3)]
        self.reset_classifier(0)

    def pool(self, features):
        return features.mean(dim=(2, 3, 4)) if self.global_pool == "avg" else features[:, :, 0, 0, 0]


def toy(readout: Readout | None = None, **arguments) -> Toy:
    torch.manual_seed(0)
    model = Toy(**arguments).eval()
    spec = InputSpec(representation="any contrast", channels=("any",), mask="file")
    model.pretrained_cfg = brainfm.PretrainedCfg(input_spec=spec, readout=readout or Readout())
    return model


def cells_of(model: Toy, x: np.ndarray) -> np.ndarray:
    """The map of a volume [C, D, H, W] by a loop over cells, [5, d, h, w] in float64."""
    weight, bias = (p.detach().double().numpy() for p in (model.body[0].weight, model.body[0].bias))
    shape = [n // STEP for n in x.shape[1:]]
    found = np.zeros((5, *shape))
    for cell in np.ndindex(*shape):
        box = tuple(slice(STEP * n, STEP * n + STEP) for n in cell)
        found[(slice(None), *cell)] = np.maximum(0, np.tensordot(weight, x[(slice(None), *box)], axes=4) + bias)
    return found


def brain_cells(brain: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Whether the voxel nearest to a cell's centre is brain; of two as near, the even one."""
    inside = np.zeros(shape, dtype=bool)
    for cell in np.ndindex(*shape):
        inside[cell] = brain[tuple(round(STEP * n + OFFSET) for n in cell)]
    return inside


def vector_of(model: Toy, x: np.ndarray, brain: np.ndarray, readout: Readout) -> np.ndarray:
    """A readout by loops, in float64."""
    if readout.window is None:
        cells = cells_of(model, x)
        if readout.pool == "brain":
            return cells[:, brain_cells(brain, cells.shape[1:])].mean(axis=1)
        return cells.mean(axis=(1, 2, 3)) if model.global_pool == "avg" else cells[:, 0, 0, 0]
    window = readout.window
    longer = [(0, max(0, width - n)) for n, width in zip(x.shape[1:], window.shape, strict=True)]
    x, brain = np.pad(x, [(0, 0), *longer], constant_values=window.pad), np.pad(brain, longer)
    starts = []
    for n, width in zip(x.shape[1:], window.shape, strict=True):
        step = max(1, int(width * (1 - window.overlap)))
        starts.append([])
        at = 0
        while at + width < n:
            starts[-1].append(at)
            at += step
        starts[-1].append(n - width)  # the last is moved inwards to fit
    total, weights = np.zeros(5), 0.0
    for corner in itertools.product(*starts):
        box = tuple(slice(at, at + width) for at, width in zip(corner, window.shape, strict=True))
        seen = brain[box]
        by_brain = readout.pool == "brain" or window.average == "brain"
        if by_brain and not seen.any():
            continue
        if readout.pool == "brain" and not brain_cells(seen, [n // STEP for n in window.shape]).any():
            continue
        weight = seen.sum() if window.average == "brain" else 1
        total += weight * vector_of(model, x[(slice(None), *box)], seen, Readout(readout.pool))
        weights += weight
    return total / weights


def volumes(*shape: int, count: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    draws = np.random.default_rng(0)
    x = draws.standard_normal((count, 1, *shape)).astype(np.float32)
    masks = [draws.random(shape) < 0.2 for _ in range(count)]
    for mask in masks:
        mask[shape[0] // 2 :] &= False  # so that some windows hold no brain
        mask[0, 0, 0] = True
    return x, masks


READOUTS = {
    "all": Readout("avg"),
    "brain": Readout("brain"),
    "windows": Readout("avg", Window((4, 6, 4))),
    "windows that do not overlap": Readout("avg", Window((4, 4, 4), overlap=0.0)),
    "windows that overlap much": Readout("avg", Window((8, 8, 8), overlap=0.8)),
    "windows by brain": Readout("avg", Window((4, 6, 4), average="brain")),
    "brain in windows": Readout("brain", Window((4, 6, 4))),
    "brain in windows by brain": Readout("brain", Window((6, 4, 4), overlap=0.25, average="brain")),
    "windows that are longer than the volume": Readout("avg", Window((14, 6, 20), average="brain", pad=-1.5)),
}


@pytest.mark.parametrize("name", READOUTS)
@pytest.mark.parametrize("shape", [(10, 12, 8), (9, 11, 8)])
@pytest.mark.parametrize("optimized", [False, True])
def test_vectors_of_a_batch_are_those_of_a_loop(name, shape, optimized):
    model = toy(READOUTS[name])
    x, masks = volumes(*shape)
    wanted = [
        vector_of(model, one.astype(np.float64), mask, READOUTS[name]) for one, mask in zip(x, masks, strict=True)
    ]
    reader = Reader(brainfm.optimize(model) if optimized else model)
    found = reader(torch.from_numpy(x), masks)
    assert found.vectors.dtype == torch.float32
    np.testing.assert_allclose(found.vectors.numpy(), wanted, rtol=1e-5, atol=1e-6)
    for n in range(len(x)):  # scans of a batch do not mix
        alone = reader(torch.from_numpy(x[n : n + 1]), masks[n : n + 1]).vectors[0]
        np.testing.assert_allclose(alone.numpy(), found.vectors[n].numpy(), rtol=1e-5, atol=1e-6)


def test_readouts_differ():
    x, masks = volumes(10, 12, 8)
    found = [Reader(toy(readout))(torch.from_numpy(x), masks).vectors for readout in READOUTS.values()]
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other, rtol=1e-3)


def test_pooling_is_that_which_the_model_was_set_to():
    model = toy(Readout("avg"))
    x, masks = volumes(8, 8, 8)
    model.reset_classifier(0, global_pool="first")
    assert model.pretrained_cfg.readout == Readout("first")
    wanted = [vector_of(model, one, mask, Readout()) for one, mask in zip(x, masks, strict=True)]
    found = Reader(model)(torch.from_numpy(x)).vectors.numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    window = Readout("first", Window((4, 4, 4)))
    wanted = [vector_of(model, one, mask, window) for one, mask in zip(x, masks, strict=True)]
    found = Reader(model, window)(torch.from_numpy(x)).vectors.numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_pooling_that_is_asked_for_when_a_model_is_created_takes_the_place_of_the_cards():
    model = brainfm.create_model("test_vit_3d", global_pool="avg")
    assert model.pretrained_cfg.readout == Readout("avg")
    x = torch.randn(1, 1, 40, 48, 48)
    with torch.inference_mode():
        wanted = model.dense(x).mean(dim=(2, 3, 4))
    torch.testing.assert_close(Reader(model)(x).vectors, wanted)


def test_other_pooling_than_the_models_is_refused():
    with pytest.raises(ValueError, match="'first', and the model is set to 'avg'"):
        Reader(toy(), Readout("first"))


@pytest.mark.parametrize("name", [name for name, readout in READOUTS.items() if "brain" in str(readout)])
def test_scan_without_a_mask_is_refused_where_the_brain_is_averaged_over(name):
    reader = Reader(toy(READOUTS[name]))
    x, masks = volumes(10, 12, 8)
    for given in (None, [masks[0], None, masks[2]]):
        with pytest.raises(ScanError, match="no brain mask"):
            reader(torch.from_numpy(x), given)
    with pytest.raises(ScanError, match="brain"):
        reader(torch.from_numpy(x), [np.zeros_like(mask) for mask in masks])


def test_contract_that_takes_no_mask_is_refused_at_once():
    model = toy(Readout("brain"))
    spec = replace(model.pretrained_cfg.input_spec, mask="none")
    model.pretrained_cfg = model.pretrained_cfg.overlay({"input_spec": spec})
    with pytest.raises(ValueError, match="takes no brain mask"):
        Reader(model)


@pytest.mark.parametrize("dense", [False, True])
def test_module_that_is_no_encoder_gives_its_own_vectors_in_windows_but_no_map(dense):
    module = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten())
    x, masks = volumes(8, 8, 8)
    window = Readout(window=Window((4, 8, 8), overlap=0.5, average="brain"))
    if dense:
        with pytest.raises(ValueError, match="Sequential has no dense features"):
            Reader(module, window, dense=True)
        return
    found = Reader(module, window)(torch.from_numpy(x), masks).vectors
    for one, mask, vector in zip(x, masks, found, strict=True):
        weights = [mask[at : at + 4].sum() for at in (0, 2, 4)]
        means = [one[0, at : at + 4].mean() for at in (0, 2, 4)]
        assert vector.item() == pytest.approx(np.average(means, weights=weights), rel=1e-4)
    with pytest.raises(ValueError, match="no dense features"):
        Reader(module, Readout("brain"))


@pytest.mark.parametrize("width", range(1, 12))
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("multiple", [1, 4])
def test_windows_cover_every_voxel_and_stay_inside(width, overlap, multiple):
    size = 11
    seen = np.zeros(size, dtype=int)
    boxes = [box[0] for box in windows((size, width, width), Window((width,) * 3, overlap), (multiple, 1, 1))]
    for box in boxes:
        assert (box.start >= 0, box.stop <= size, box.stop - box.start) == (True, True, width)
        seen[box] += 1
    assert len({box.start for box in boxes}) == len(boxes)
    assert all(box.start % multiple == 0 for box in boxes[:-1])
    if multiple <= width:
        assert seen.min() >= 1


# --- By `embed` and `verify` ----------------------------------------------------------------------


@pytest.mark.parametrize("name", READOUTS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_embed_reads_out_as_the_cfg_says(name, batch_size, tmp_path):
    """Of files whose axes are flipped: mask and voxels are turned together."""
    model = toy(READOUTS[name])
    spec = replace(model.pretrained_cfg.input_spec, orientation="RAS")
    model.pretrained_cfg = model.pretrained_cfg.overlay({"input_spec": spec})
    x, masks = volumes(10, 12, 8)
    affine = np.array([[-2.0, 0, 0, 31], [0, 2, 0, -7], [0, 0, -2, 5], [0, 0, 0, 1]])
    scans = []
    for n, (one, mask) in enumerate(zip(x[:, 0] + 5, masks, strict=True)):
        for kind, values in (("image", one), ("mask", mask.astype(np.uint8))):
            nib.Nifti1Image(values[::-1, :, ::-1], affine).to_filename(tmp_path / f"{kind}{n}.nii")
        scans.append((tmp_path / f"image{n}.nii", tmp_path / f"mask{n}.nii"))
    table = brainfm.embed(scans, model, batch_size=batch_size)
    assert not table.errors
    wanted = [vector_of(model, one + 5.0, mask, READOUTS[name]) for one, mask in zip(x, masks, strict=True)]
    np.testing.assert_allclose(table.vectors, wanted, rtol=1e-5)
    assert table.origin.readout == (READOUTS[name].to_dict() | {"pool": READOUTS[name].pool or "avg"})


@pytest.mark.parametrize("readout", [Readout("brain"), Readout("token", Window((24, 24, 24), 0.25, "brain"))])
def test_model_that_is_saved_with_a_readout_verifies_by_it(readout, tmp_path):
    model = brainfm.create_model("test_vit_3d", pretrained=True, dynamic_img_size=True)  # a window is smaller
    plain = brainfm.embed([(brainfm.assets.SAMPLE_SCAN, brainfm.assets.SAMPLE_MASK)], model).vectors
    model.pretrained_cfg = model.pretrained_cfg.overlay({"readout": readout})
    brainfm.save_for_hub(model, tmp_path / "model")
    again = brainfm.create_model(f"local-dir:{tmp_path / 'model'}")
    assert again.pretrained_cfg.readout.window == readout.window
    table = brainfm.embed([(brainfm.assets.SAMPLE_SCAN, brainfm.assets.SAMPLE_MASK)], again)
    assert np.linalg.norm(table.vectors - plain) > 0.01 * np.linalg.norm(plain)  # another vector, by which it verifies
    checks = brainfm.verify(f"local-dir:{tmp_path / 'model'}", ["float32", "bfloat16"])
    assert [check.ok for check in checks] == [True, True, True]


class Switches(nn.Module):
    """Gives how a GPU would multiply in its forward: in convolutions, in products of matrices."""

    def forward(self, x):
        now = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return torch.tensor(now, dtype=torch.float32).expand(len(x), 2)


@pytest.mark.parametrize("dtype", ["auto", "float32", "tf32", "bfloat16"])
def test_float32_is_multiplied_whole_on_a_gpu_unless_tf32_is_asked_for(dtype):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    found = Reader(brainfm.optimize(Switches(), dtype))(torch.zeros(1, 1, 4, 4, 4)).vectors
    assert found[0].tolist() == [dtype == "tf32"] * 2
    assert Reader(Switches())(torch.zeros(1, 1, 4, 4, 4)).vectors[0].tolist() == [0, 0]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
