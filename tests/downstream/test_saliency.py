"""Maps of where a prediction comes from: right against slow references, and in the right place of the given scan."""

from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations
from torch import nn

import brainfm
from brainfm import registry
from brainfm.contract import Readout, Window
from brainfm.downstream.saliency import SaliencyMap, grad_cam, occlusion
from brainfm.models.encoder import Encoder, stage
from brainfm.phantom import make_phantom

AXES = ["RAS", "LAS", "PIR", "SLA"]
LESION_MM, LESION_RADIUS_MM = (24.5, -41.5, 26.5), 14.0  # the middle of a box of 10×12×12 voxels
BOX = (slice(28, 36), slice(6, 12), slice(30, 36))  # of [z, y, x]: upper, posterior, right


class Looker(Encoder):
    """Its logit is 2 · (the mean of what `look` makes of the input) − 1."""

    pools = ("avg",)
    classifier_name = "fc"
    first_conv = "look"

    def __init__(self, spec: brainfm.InputSpec, look: nn.Module) -> None:
        super().__init__(1, len(spec.channels), None, 0.0)
        self.num_features = 1
        self.feature_info = [stage("look", 1, (1, 1, 1))]
        self.look = look
        self.fc = nn.Linear(1, 1)
        nn.init.constant_(self.fc.weight, 2.0)
        nn.init.constant_(self.fc.bias, -1.0)
        self.pretrained_cfg = brainfm.PretrainedCfg(input_spec=spec)

    def forward_features(self, x):
        return self.look(x)

    def pool(self, features):
        return features.mean(dim=(2, 3, 4))

    def forward_intermediates(self, x, indices=None, intermediates_only=False):
        raise NotImplementedError

    def set_grad_checkpointing(self, enable=True):
        self.grad_checkpointing = enable

    def group_matcher(self, coarse=False):
        return {}


class OneBox(nn.Module):
    """Nothing is seen but BOX, and of that the mean counts."""

    def __init__(self, shape) -> None:
        super().__init__()
        box = torch.zeros(shape)
        box[BOX] = 1
        self.register_buffer("box", box / box.mean())

    def forward(self, x):
        return x * self.box


class Second(nn.Module):
    """Of two channels, the square of the second."""

    def forward(self, x):
        return x[:, 1:].square()


class Pooled(Encoder):
    """Stages of a 3×3×3 convolution and a max-pool of 2, as SFCN's are: each cell is the brightest voxel it sees."""

    classifier_name = "head"
    first_conv = "stages.0.0"

    def __init__(self, stages=3, num_classes=0, in_chans=1, global_pool=None, drop_rate=0.0):
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.num_features = 1
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Conv3d(1, 1, 3, padding=1, bias=False), nn.MaxPool3d(2)) for _ in range(stages))
        )
        for conv, _ in self.stages:
            nn.init.constant_(conv.weight, 0.01)
            nn.init.constant_(conv.weight[..., 1, 1, 1], 1)
        # A pool looks at the middle of what it pools: of 8 voxels in all, at voxel 3.5.
        self.feature_info = [stage(f"stages.{n}", 1, (2 << n,) * 3, (((2 << n) - 1) / 2,) * 3) for n in range(stages)]
        self.reset_classifier(num_classes)


class Dark(nn.Module):
    """What is darker than one std below the brain's mean."""

    def forward(self, x):
        return (-1 - x).relu()


@pytest.fixture(scope="module")
def one_box(small_spec):
    return Looker(small_spec, OneBox(small_spec.output_shape[1:]))


@pytest.fixture(scope="module", params=["test_resnet_3d", "test_vit_3d"])
def classifier(request):
    torch.manual_seed(1)
    model = brainfm.create_model(request.param, pretrained=True, num_classes=3)
    nn.init.normal_(model.get_classifier().weight)
    return model


def tensor_of(model, scan):
    return brainfm.create_transform(model)(*scan)[None]


def stored_as(axes, image, mask, affine):
    """The same scan with the array axes pointing along `axes`, and a mask."""
    change = orientations.ornt_transform(nib.io_orientation(affine), orientations.axcodes2ornt(axes))
    moved = affine @ orientations.inv_ornt_aff(change, image.shape)
    return [
        nib.Nifti1Image(np.ascontiguousarray(orientations.apply_orientation(a, change)), moved) for a in (image, mask)
    ]


def centre_mm(values, affine):
    """The centre of mass in RAS mm."""
    weights = values.astype(np.float64) / values.sum(dtype=np.float64)
    return affine[:3, :3] @ [(weights * index).sum() for index in np.indices(values.shape)] + affine[:3, 3]


def box_centre_mm(spec):
    """Where the middle of BOX lies: the input is the contract's grid with the axes reversed."""
    z, y, x = ((s.start + s.stop - 1) / 2 for s in BOX)
    return spec.grid.affine("RAS") @ (x, y, z, 1)


# --- The right numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride", "fill"), [(24, None, 0.0), ((20, 40, 24), (10, 40, 24), 0.5), (33, 20, -1.0)]
)
def test_occlusion_is_the_mean_fall_over_all_boxes(classifier, small_sample, window, stride, fill):
    made = occlusion(classifier, *small_sample, target=2, window=window, stride=stride, fill=fill)
    x = tensor_of(classifier, small_sample)
    size = (window,) * 3 if isinstance(window, int) else window
    step = size if stride is None else (stride,) * 3 if isinstance(stride, int) else stride
    starts = [
        sorted({min(a, n - w) for a in range(0, n - w + s, s)}) for n, w, s in zip(x.shape[2:], size, step, strict=True)
    ]
    total, count = np.zeros(x.shape[2:]), np.zeros(x.shape[2:])
    with torch.no_grad():
        whole = classifier(x)[0, 2].item()
        for corner in itertools.product(*starts):
            box = tuple(slice(a, a + w) for a, w in zip(corner, size, strict=True))
            hidden = x.clone()
            hidden[0, 0][box] = fill
            total[box] += whole - classifier(hidden)[0, 2].item()
            count[box] += 1
    assert count.min() >= 1
    assert made.score == pytest.approx(whole, rel=1e-4)
    np.testing.assert_allclose(made.map, total / count, rtol=1e-3, atol=1e-4 * np.abs(total).max())


def test_boxes_with_nothing_to_hide_cost_no_forward_pass(classifier, small_sample, monkeypatch):
    passed = []
    monkeypatch.setattr(type(classifier), "forward", lambda self, x: passed.append(len(x)) or torch.zeros(len(x), 3))
    occlusion(classifier, *small_sample, window=8)
    x = tensor_of(classifier, small_sample)[0, 0]
    boxes = x.unfold(0, 8, 8).unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 512)
    assert len(passed) == 1 + int(boxes.any(dim=1).sum()) < len(boxes)


def test_grad_cam_of_a_last_stage_is_the_classifiers_weights(small_sample):
    """After it there is a mean and a linear layer: the gradient is the weight over the number of places."""
    torch.manual_seed(1)
    model = brainfm.create_model("test_resnet_3d", pretrained=True, num_classes=3)
    nn.init.normal_(model.fc.weight)
    made = grad_cam(model, *small_sample, target=1)
    with torch.no_grad():
        features = model.forward_features(tensor_of(model, small_sample))[0].double()
    cam = torch.einsum("cdhw,c->dhw", features, model.fc.weight[1].double()) / features[0].numel()
    assert_map(made, cam.detach(), [16.0 * np.arange(n) for n in cam.shape])


def test_grad_cam_of_a_vit_is_that_of_its_patch_tokens(small_sample):
    """In float64, the gradient of a channel's mean by finite differences of what follows the last block's norm1."""
    torch.manual_seed(1)
    model = brainfm.create_model("test_vit_3d", pretrained=True, num_classes=3)
    nn.init.normal_(model.head.weight)
    made = grad_cam(model, *small_sample, target=1)
    model = model.double()
    block = model.blocks[3]
    seen = []
    block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(tensor_of(model, small_sample).double())
        tokens = block.norm1(seen[0])
        shifts = torch.zeros(96, *tokens.shape[1:], dtype=torch.float64)
        shifts[range(96), 1:, range(96)] = 1e-5

        def scores(normed):
            x = seen[0] + block.attn(normed)
            return model.forward_head(model.norm(x + block.mlp(block.norm2(x))))[:, 1]

        weights = (scores(tokens + shifts) - scores(tokens - shifts)) / 2e-5 / 180
        cam = (tokens[0, 1:] @ weights).reshape(5, 6, 6)
    assert_map(made, cam, [8 * np.arange(n) + 3.5 for n in cam.shape])


def assert_map(made, cam, centres):
    """The map is what is above 0 of `cam`, whose voxels have their centres at these voxels of the input."""
    places = [np.interp(np.arange(n), at, np.arange(len(at))) for n, at in zip(made.map.shape, centres, strict=True)]
    expected = trilinear(cam.clamp(min=0).numpy(), places)
    assert expected.max() > 0
    np.testing.assert_allclose(made.map, expected, rtol=1e-3, atol=1e-4 * expected.max())


def trilinear(values, places):
    for axis, where in enumerate(places):
        low = np.minimum(where.astype(int), values.shape[axis] - 2)
        share = (where - low).reshape([-1 if a == axis else 1 for a in range(3)])
        values = np.take(values, low, axis) * (1 - share) + np.take(values, low + 1, axis) * share
    return values


@pytest.mark.parametrize(("layer", "step"), [("layer4.0", 16), ("layer2.0", 4), ("layer3.0.conv1", 8)])
def test_grad_cam_of_a_resnet_is_monais(small_sample, layer, step):
    from monai.visualize import GradCAM

    torch.manual_seed(1)
    model = brainfm.create_model("test_resnet_3d", pretrained=True, num_classes=2)
    nn.init.normal_(model.fc.weight)
    theirs = GradCAM(copy.deepcopy(model), layer).compute_map(tensor_of(model, small_sample), class_idx=1)
    ours = grad_cam(model, *small_sample, target=1, layer=layer).map[::step, ::step, ::step]
    assert theirs.max() > 0
    torch.testing.assert_close(torch.from_numpy(ours.copy()), theirs[0, 0].detach(), rtol=1e-3, atol=1e-6)


def test_features_are_put_where_they_look():
    """What a feature of the last stage depends on is centred on voxel 16·i of the input, not on 16·i + 7.5."""
    torch.manual_seed(0)
    model = brainfm.create_model("test_resnet_3d")  # not trained: kernels lean to no side
    x = torch.randn(1, 1, 80, 96, 96, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.forward_features(x)[0, :, 2, 2, 3].sum(), x)
    centre = centre_mm(gradient[0, 0].abs().numpy(), np.eye(4))
    np.testing.assert_allclose(centre, (32, 32, 48), atol=2.0)


@pytest.mark.parametrize("method", ["occlusion", "grad_cam"])
def test_a_probe_is_explained_as_a_classifier_with_its_weights(classifier, small_sample, method):
    explain = {"occlusion": lambda *a, **k: occlusion(*a, window=(40, 24, 48), **k), "grad_cam": grad_cam}[method]
    encoder = copy.deepcopy(classifier)
    encoder.reset_classifier(0)
    weights, bias = (p.detach().numpy() for p in classifier.get_classifier().parameters())
    head = explain(classifier, *small_sample, target=2)
    probe = explain(encoder, *small_sample, direction=weights, target=2)
    one = explain(encoder, *small_sample, direction=weights[2].tolist())
    np.testing.assert_allclose(probe.map, head.map, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(one.map, probe.map)
    assert probe.score == pytest.approx(head.score - bias[2], rel=1e-4)


# --- The right place ------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "layer"), [(3, None), (4, None), (3, "stages.2.0"), (3, "stages.1")])
@pytest.mark.parametrize("centre", [(13, 21, 29), (21, 28, 13)])
def test_grad_cam_of_a_pooled_network_peaks_within_half_a_cell_of_a_bright_blob(
    small_spec, small_sample, monkeypatch, stages, layer, centre
):
    monkeypatch.setattr(registry, "_registered", dict(registry._models()))
    spec = replace(small_spec, representation="any contrast", channels=("any contrast",))  # a blob is no T1w brain

    @brainfm.register_model(cfgs={"bright": brainfm.PretrainedCfg(input_spec=spec)})
    def pooled_3d(**kwargs):
        return Pooled(stages, **kwargs)

    image, mask = (nib.load(path) for path in small_sample)
    voxels = image.get_fdata(dtype=np.float32)
    distance = np.linalg.norm(np.moveaxis(np.indices(voxels.shape), 0, -1) - centre[::-1], axis=-1)
    blob = np.where(distance < 2, np.float32(20 * voxels.max()), voxels)
    scan = nib.Nifti1Image(blob, image.affine), mask
    made = grad_cam(brainfm.create_model("pooled_3d"), *scan, direction=np.ones(1), layer=layer)
    cell = {"stages.2.0": 4, "stages.1": 4}.get(layer, 2**stages)  # the convolution comes before the stage's own pool
    peak = np.argwhere(made.map >= made.map.max() * (1 - 1e-5))  # beyond the outermost cells' centres all are as high
    assert np.abs(peak - centre).max(axis=1).min() <= cell / 2


def test_map_of_a_scan_of_several_channels_lies_on_the_voxels_of_the_first(tmp_path):
    spec = brainfm.InputSpec(representation="any contrast", channels=("before", "after"))
    affine = np.diag((-2.0, 2.0, 3.0, 1.0))
    before, after = np.random.default_rng(0).random((2, 8, 10, 12), dtype=np.float32)
    after[5, 2, 7] = 9
    scan = {"after": nib.Nifti1Image(after, affine), "before": nib.Nifti1Image(before, affine)}
    for made in (grad_cam(Looker(spec, Second()), scan), occlusion(Looker(spec, Second()), scan, window=1)):
        made.save(tmp_path / "why.nii.gz")
        saved = nib.load(tmp_path / "why.nii.gz")
        np.testing.assert_allclose(saved.affine, affine)
        values = saved.get_fdata()
        assert np.unravel_index(values.argmax(), values.shape) == (5, 2, 7)


@pytest.mark.parametrize("axes", AXES)
def test_maps_lie_where_the_model_looks_however_the_scan_is_stored(one_box, small_sample, small_spec, axes, tmp_path):
    image, mask = (nib.load(path) for path in small_sample)
    turned = stored_as(axes, image.get_fdata(dtype=np.float32), np.asarray(mask.dataobj), image.affine)
    paths = [tmp_path / "t1.nii.gz", tmp_path / "brain.nii.gz"]
    for volume, path in zip(turned, paths, strict=True):
        volume.to_filename(path)
    for name, made in {
        "occlusion": occlusion(one_box, *paths, window=(4, 6, 6)),
        "cam": grad_cam(one_box, *paths),
    }.items():
        made.save(tmp_path / f"{name}.nii.gz")
        saved = nib.load(tmp_path / f"{name}.nii.gz")
        assert saved.shape == turned[0].shape
        np.testing.assert_allclose(saved.affine, turned[0].affine)
        assert "".join(nib.aff2axcodes(saved.affine)) == axes
        values = np.abs(saved.get_fdata())
        voxels = np.argwhere(values > 0) @ saved.affine[:3, :3].T + saved.affine[:3, 3]
        distance = np.abs(voxels - box_centre_mm(small_spec)[:3]).max(axis=0)
        np.testing.assert_allclose(distance, (10, 10, 14))  # the outermost of 6, 6 and 8 voxels of 4 mm


def test_occlusion_gives_each_box_its_own_share(one_box, small_sample):
    """Hiding a box takes exactly 2 · (the sum of what is seen there) / (the seen voxels) from the logit."""
    x = tensor_of(one_box, small_sample)
    made = occlusion(one_box, *small_sample, window=(4, 6, 6))
    seen = (2 * x * one_box.look.box)[0, 0].numpy() / x.numel()
    blocks = seen.reshape(10, 4, 8, 6, 8, 6).sum(axis=(1, 3, 5))
    assert np.abs(blocks).max() > 0
    np.testing.assert_allclose(made.map, np.kron(blocks, np.ones((4, 6, 6))), atol=1e-6)
    assert made.score == pytest.approx(seen.sum() - 1, abs=1e-5)


def test_a_crop_is_undone_by_zeros(spec, sample):
    """The published contract crops 193×229×193 to 150×192×192; the map goes back to where it was cut from."""
    image = nib.load(sample[0])
    volume = spec.apply(brainfm.load_scan(*sample, spec=spec))
    values = np.random.default_rng(0).random(volume.shape, dtype=np.float32)
    made = SaliencyMap(values, volume.affine, image.shape, image.affine, 0.0, "occlusion").on_scan()
    expected = np.zeros(image.shape, np.float32)
    expected[1:193, 19:211, 10:160] = values.T
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_maps_go_back_to_a_finer_grid(one_box, sample, small_spec):
    """A 1 mm file before a 4 mm model: the map lies in the same place, interpolated."""
    made = grad_cam(one_box, *sample)
    image = nib.load(sample[0])
    assert made.on_scan().shape == image.shape
    assert made.map.max() > 0
    np.testing.assert_allclose(centre_mm(made.on_scan(), image.affine), centre_mm(made.map, made.affine), atol=0.1)


def test_a_lesion_is_found(small_spec, tmp_path):
    """A model that sees what is dark, and a dark ball in a phantom stored as PIL: both maps have it where it is."""
    phantom = make_phantom(3, spacing=4.0)
    points = np.indices(phantom.image.shape).reshape(3, -1).T @ phantom.affine[:3, :3].T + phantom.affine[:3, 3]
    ball = (np.linalg.norm(points - LESION_MM, axis=1) < LESION_RADIUS_MM).reshape(phantom.image.shape)
    assert phantom.mask[ball].all()
    wounded = np.where(ball, phantom.image[phantom.mask > 0].min(), phantom.image)
    healthy, hurt = (stored_as("PIL", image, phantom.mask, phantom.affine) for image in (phantom.image, wounded))
    model = Looker(small_spec, Dark())
    peaks = []
    for scan in (healthy, hurt):
        occlusion(model, *scan, window=(10, 12, 12)).save(tmp_path / "why.nii.gz")
        saved = nib.load(tmp_path / "why.nii.gz")
        values = saved.get_fdata()
        box = np.argwhere(values == values.max()) @ saved.affine[:3, :3].T + saved.affine[:3, 3]
        peaks.append((box.min(axis=0) + box.max(axis=0)) / 2)
    np.testing.assert_allclose(peaks[1], LESION_MM)
    assert np.abs(peaks[0] - LESION_MM).max() > 10
    cams = [grad_cam(model, *scan).on_scan() for scan in (healthy, hurt)]
    np.testing.assert_allclose(centre_mm((cams[1] - cams[0]).clip(0), hurt[0].affine), LESION_MM, atol=1)


# --- What is left behind --------------------------------------------------------------------------


@pytest.mark.parametrize("explain", [lambda *a: occlusion(*a, window=(40, 48, 48)), grad_cam])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_is_left_as_it_was(small_sample, explain, frozen):
    model = brainfm.create_model("test_resnet_3d", pretrained=True, num_classes=1)
    if frozen:
        model.freeze()
    model.train()
    model.layer1.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.set_grad_checkpointing()

    def state():
        return (
            {name: (m.training, len(m._forward_hooks), len(m._backward_hooks)) for name, m in model.named_modules()},
            {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
            model.grad_checkpointing,
        )

    before, tensors = state(), {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (explain(model, *small_sample) for _ in range(2))
    assert state() == before
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    assert (model.fc.weight.grad == 1).all()
    np.testing.assert_array_equal(first.map, second.map)
    np.testing.assert_array_equal(first.map, explain(model.eval(), *small_sample).map)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "no classifier"),
        ({"direction": np.ones(7)}, r"direction must be \[128\]"),
        ({"direction": np.ones((2, 128)), "target": 2}, "target must be 0 to 1"),
        ({"direction": np.ones(128), "target": -1}, "target must be 0 to 0"),
        ({"direction": np.ones(128), "window": 49}, "does not fit"),
        ({"direction": np.ones(128), "window": 8, "stride": 9}, "does not fit"),
    ],
)
def test_occlusion_refuses_what_cannot_be(small_model, small_sample, arguments, words):
    with pytest.raises(ValueError, match=words):
        occlusion(small_model, *small_sample, **({"window": 16} | arguments))


@pytest.mark.parametrize(
    ("layer", "words"),
    [("layer5", "its stages are act, layer1"), ("fc", "no feature map"), ("layer4.0.downsample.2", "has no layer")],
)
def test_grad_cam_refuses_a_layer_without_a_map(small_model, small_sample, layer, words):
    with pytest.raises(ValueError, match=words):
        grad_cam(small_model, *small_sample, direction=np.ones(128), layer=layer)


def test_grad_cam_refuses_tokens_that_do_not_count(small_sample):
    """After the last block only the CLS token is read: a map of the patches would be 0 and look like an answer."""
    vit = brainfm.create_model("test_vit_3d", pretrained=True)
    with pytest.raises(ValueError, match="norm1"):
        grad_cam(vit, *small_sample, direction=np.ones(96), layer="blocks.3")
    averaged = brainfm.create_model("test_vit_3d", pretrained=True, global_pool="avg")
    torch.manual_seed(0)
    assert grad_cam(averaged, *small_sample, direction=torch.randn(96).numpy(), layer="blocks.3").map.shape == (
        40,
        48,
        48,
    )


@pytest.mark.parametrize("readout", [Readout("brain"), Readout(window=Window((20, 24, 24)))])
def test_an_embedding_that_is_read_out_otherwise_is_refused(small_sample, readout):
    """Its direction is of the mean over windows, or over the brain, and not of what one forward pass gives."""
    model = brainfm.create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay={"readout": readout})
    for explain in (grad_cam, lambda *a, **k: occlusion(*a, window=24, **k)):
        with pytest.raises(ValueError, match="another than the one that would be explained"):
            explain(model, *small_sample, direction=np.ones(128))


def test_a_map_is_written_as_nifti_or_not_at_all(tmp_path, monkeypatch):
    made = SaliencyMap(np.ones((2, 3, 4), np.float32), np.eye(4), (2, 3, 4), np.eye(4), 0.0, "occlusion")
    with pytest.raises(brainfm.BrainfmError, match=r"\.nii or \.nii\.gz"):
        made.save(tmp_path / "map.png")
    made.save(tmp_path / "map.nii")
    np.testing.assert_array_equal(nib.load(tmp_path / "map.nii").get_fdata(), 1)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(brainfm.MissingExtraError, match="pip install scipy"):
        made.save(tmp_path / "other.nii")
    assert [path.name for path in tmp_path.iterdir()] == ["map.nii"]
