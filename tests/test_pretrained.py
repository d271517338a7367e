"""Input contracts and cfgs as data: what is refused, what survives JSON, and what an overlay replaces."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import nibabel as nib
import numpy as np
import pytest

import brainfm
from brainfm import Cohort, Grid, InputSpec, PretrainedCfg, Score, registry
from brainfm.contract import CropBox, Standardize, Transpose, Volume, ZScore
from brainfm.zoo.cards import Keys

CFGS = [model.cfg(tag) for model in registry._zoo().values() for tag in model.tags]
every_cfg = pytest.mark.parametrize("cfg", CFGS, ids=lambda cfg: cfg.name)

FSL = Grid((182, 218, 182), (1.0, 1.0, 1.0), (90.0, -126.0, -72.0))
FULL = PretrainedCfg(
    architecture="simclr_resnet18_3d",
    tag="lab",
    hub_id="lab/encoder",
    hub_revision="0123abc",
    sha256="ab" * 32,
    input_spec=InputSpec(orientation="LAS", grid=FSL, operations=(CropBox((0, 0, 0), (9, 9, 9)), ZScore("mask"))),
    num_features=512,
    cohorts=(Cohort("IXI", 582, 582, ("H",)), Cohort("AIBL", 10, 20)),
    scores=(Score("age", "MAE, years", "linear probe", 5.9, 0.16),),
)


def through_json(data):
    return json.loads(json.dumps(data))


# --- Grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axcodes", ["RAS", "LAS", "PSR", "IRA"])
def test_a_grids_affine_points_along_the_codes_from_its_origin(axcodes):
    affine = Grid((4, 5, 6), (1.0, 2.0, 3.0), (-10.0, 20.0, -30.0)).affine(axcodes)
    assert "".join(nib.aff2axcodes(affine)) == axcodes
    np.testing.assert_array_equal(np.linalg.norm(affine[:3, :3], axis=0), [1, 2, 3])
    np.testing.assert_array_equal(affine[:, 3], [-10, 20, -30, 1])


def test_the_fsl_templates_last_voxel_lies_where_fsl_has_it():
    assert (FSL.affine("LAS") @ [181, 217, 181, 1]).tolist() == [-91.0, 91.0, 109.0, 1.0]


def test_the_published_grid_is_turbopreps(spec):
    expected = [[1, 0, 0, -96], [0, 1, 0, -132], [0, 0, 1, -78], [0, 0, 0, 1]]
    np.testing.assert_array_equal(spec.grid.affine(spec.orientation), expected)


# --- InputSpec ------------------------------------------------------------------------------------


def test_a_grid_without_an_orientation_is_refused():
    with pytest.raises(ValueError, match="orientation"):
        InputSpec(grid=FSL)


@pytest.mark.parametrize("orientation", ["RAX", "RRA", "RA", "ras"])
def test_an_orientation_that_is_none_is_refused(orientation):
    with pytest.raises(ValueError, match=orientation):
        InputSpec(orientation=orientation)


@pytest.mark.parametrize(
    "changes",
    [{"skull_strip": "yes"}, {"mask": "File"}, {"registration": "rigit"}, {"missing_channel": "zero"}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_word_that_is_not_among_a_fields_choices_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        InputSpec.from_dict(changes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"orientaton": "RAS"}, "InputSpec has no field orientaton; did you mean orientation"),
        ({"zzz": 1}, "it has representation, channels"),
        ({"orientation": "RAS", "grid": {"shape": [1, 1, 1], "spacings": [1, 1, 1]}}, "did you mean spacing"),
        ({"operations": [{"op": "Blur"}]}, "unknown operation 'Blur'"),
        ({"operations": [{"op": "ZScore", "sigma": 1}]}, "ZScore has no field sigma"),
    ],
)
def test_a_contract_with_an_unknown_name_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        InputSpec.from_dict(data)


def test_an_empty_contract_has_the_defaults():
    assert InputSpec.from_dict({}) == InputSpec()


@every_cfg
def test_every_registered_contract_survives_json(cfg):
    assert InputSpec.from_dict(through_json(cfg.input_spec.to_dict())) == cfg.input_spec


def test_a_contract_cannot_be_changed_in_place(spec):
    with pytest.raises(FrozenInstanceError):
        spec.orientation = "LAS"


def test_apply_runs_the_operations_in_their_order():
    volume = Volume(np.arange(8.0, dtype=np.float32).reshape(1, 2, 2, 2), None, np.eye(4))
    steps = (Standardize(1.0, 2.0), Transpose((2, 1, 0)), Standardize(3.0, 4.0))
    expected = ((volume.stored.transpose(0, 3, 2, 1) - 1) / 2 - 3) / 4
    np.testing.assert_array_equal(InputSpec(operations=steps).apply(volume).image, expected)


def test_with_operation_changes_only_the_operations_of_that_class(spec):
    changed = spec.with_operation(ZScore, method="one_pass")
    assert changed.operations[:2] == spec.operations[:2]
    assert changed.operations[2] == replace(spec.operations[2], method="one_pass")
    assert replace(changed, operations=spec.operations) == spec


def test_with_operation_refuses_a_class_that_is_not_there(spec):
    with pytest.raises(ValueError, match="no operation Standardize"):
        spec.with_operation(Standardize, mean=0.0)


def test_with_operation_refuses_a_parameter_that_is_not_there(spec):
    with pytest.raises((TypeError, ValueError), match="sigma"):
        spec.with_operation(ZScore, sigma=1.0)


def test_describe_tells_the_published_contract_in_plain_words(spec):
    assert brainfm.describe(spec).splitlines() == [
        "image        T1w, in the space of MNI152NLin2009cSym (rigid registration); brain only, skull removed",
        "prepared by  N4 → SynthStrip → rigid registration → SynthSeg mask → WhiteStripe (cancels in the z-score)",
        "axes         RAS",
        "grid         193×229×193 voxels of 1×1×1 mm, first voxel at RAS (-96, -132, -78) mm",
        "brain mask   from a file; else the non-zero voxels of the skull-stripped image",
        "step 1       put the axes in the order (2, 1, 0)",
        "step 2       crop the fixed box [10:160, 19:211, 1:193]",
        "step 3       z-score over the brain mask (population std, 1e-12 added to the variance), 0 elsewhere",
        "tensor       [1, 150, 192, 192] float32",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "axes         as stored"),
        ({"skull_strip": "forbidden"}, "image        T1w, in its own space; with skull"),
        (
            {"channels": ("T1w", "T2w"), "missing_channel": "zeros"},
            "channels     T1w, T2w; a missing one: filled with zeros",
        ),
        ({"mask": "nonzero"}, "brain mask   the non-zero voxels of the image"),
    ],
)
def test_describe_tells_what_a_contract_leaves_open(changes, line):
    assert line in brainfm.describe(InputSpec(**changes)).splitlines()


# --- PretrainedCfg --------------------------------------------------------------------------------


@every_cfg
def test_every_registered_cfg_survives_json_but_for_its_local_file(cfg):
    assert PretrainedCfg.from_dict(through_json(cfg.to_dict())) == replace(cfg, file=None)


def test_a_full_cfg_survives_json():
    assert PretrainedCfg.from_dict(through_json(FULL.to_dict())) == FULL


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"num_feature": 3}, "PretrainedCfg has no field num_feature; did you mean num_features"),
        ({"cohorts": [{"name": "IXI", "patient": 1}]}, "Cohort has no field patient; did you mean patients"),
        ({"scores": [{"tasks": "age"}]}, "Score has no field tasks; did you mean task"),
        ({"input_spec": {"grids": None}}, "InputSpec has no field grids; did you mean grid"),
    ],
)
def test_a_cfg_with_an_unknown_field_is_refused_with_the_nearest(data, message):
    with pytest.raises(ValueError, match=message):
        PretrainedCfg.from_dict(data)


@every_cfg
def test_every_registered_cfg_is_complete(cfg):
    assert cfg.input_spec is not None
    assert cfg.in_chans == len(cfg.input_spec.channels)
    assert cfg.input_spec.output_shape is None or cfg.input_spec.output_shape[0] == cfg.in_chans
    assert cfg.num_features > 0
    assert not cfg.has_weights or cfg.licence or cfg.terms  # where none is stated, it says so


@every_cfg
def test_shipped_weights_that_are_downloaded_are_pinned(cfg):
    assert not cfg.hub_id or (cfg.hub_revision and (cfg.sha256 or cfg.git_blob))
    assert not cfg.url or cfg.sha256 or cfg.git_blob or cfg.facts == "third-party"  # pinned when it is first fetched


def test_the_cohorts_of_the_published_weights_add_up_to_the_papers_totals():
    cohorts = brainfm.get_pretrained_cfg("simclr_resnet18_3d").cohorts
    assert (len(cohorts), sum(c.patients for c in cohorts), sum(c.scans for c in cohorts)) == (11, 18759, 44958)


@pytest.mark.parametrize(("tag", "name"), [("", "vit"), ("lab", "vit.lab")])
def test_the_full_name_holds_the_tag(tag, name):
    assert PretrainedCfg(architecture="vit", tag=tag).name == name


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"file": "/data/mine.safetensors"}, "/data/mine.safetensors"),
        ({"hub_id": "lab/encoder"}, "hf-hub:lab/encoder"),
        ({"hub_id": "lab/encoder", "hub_revision": "0123abc"}, "hf-hub:lab/encoder@0123abc"),
        ({"url": "https://example.org/w.pt"}, "https://example.org/w.pt"),
        ({"file": "a.pt", "hub_id": "lab/encoder", "url": "https://example.org/w.pt"}, "a.pt"),
        ({"hub_id": "lab/encoder", "url": "https://example.org/w.pt"}, "hf-hub:lab/encoder"),
    ],
)
def test_the_source_is_the_file_then_the_hub_then_the_url(source, words):
    cfg = PretrainedCfg(**source)
    assert cfg.has_weights
    assert cfg.source == words


def test_a_cfg_without_a_source_has_no_weights():
    assert not PretrainedCfg(hub_revision="0123abc", sha256="ab" * 32).has_weights
    assert PretrainedCfg().source == ""


def test_packaged_weights_are_said_to_be_in_this_package():
    assert brainfm.get_pretrained_cfg("test_resnet_3d").source == "in this package"


def test_a_users_own_assets_folder_is_not_taken_for_this_package(tmp_path):
    file = str(tmp_path / "assets" / "mine.safetensors")
    assert PretrainedCfg(file=file).source == file


# --- Overlay --------------------------------------------------------------------------------------


def test_an_overlay_replaces_its_fields_and_no_other():
    changed = FULL.overlay({"licence": "MIT", "num_classes": 2})
    assert changed == replace(FULL, licence="MIT", num_classes=2)
    assert FULL.licence is None


def test_an_overlay_with_an_unknown_field_suggests_the_nearest():
    with pytest.raises(ValueError, match="PretrainedCfg has no field sha265; did you mean sha256"):
        FULL.overlay({"sha265": None})


@pytest.mark.parametrize("source", [{"url": "https://example.org/w.pt"}, {"file": "w.pt"}, {"hub_id": "me/mine"}])
def test_a_new_source_clears_the_other_sources_and_the_hash(source):
    full = replace(FULL, url="https://lab.org/w.pt", file="old.pt", git_blob="cd" * 20)
    nothing = {"file": None, "hub_id": None, "hub_revision": None, "url": None, "sha256": None, "git_blob": None}
    assert full.overlay(source) == replace(full, **(nothing | source))


def test_a_new_source_keeps_the_hash_and_revision_given_with_it():
    changes = {"hub_id": "me/mine", "hub_revision": "fedc", "sha256": "cd" * 32}
    assert FULL.overlay(changes) == replace(FULL, **changes)


def test_switching_the_hash_off_keeps_the_source():
    assert FULL.overlay({"sha256": None}) == replace(FULL, sha256=None)


def test_a_file_may_be_a_path(tmp_path):
    assert FULL.overlay({"file": tmp_path / "w.pt"}).file == str(tmp_path / "w.pt")


def test_an_overlay_takes_a_contract_as_data(small_spec):
    assert FULL.overlay({"input_spec": through_json(small_spec.to_dict())}).input_spec == small_spec


def test_an_overlay_takes_cohorts_and_scores_as_data():
    data = through_json(FULL.to_dict())
    assert PretrainedCfg().overlay({"cohorts": data["cohorts"], "scores": data["scores"]}) == PretrainedCfg(
        cohorts=FULL.cohorts, scores=FULL.scores
    )


def test_an_overlay_takes_keys_as_data_and_a_new_source_keeps_them():
    keys = {"take": "net", "rename": {"^a": "b"}, "drop": ["head"]}
    cfg = FULL.overlay({"keys": keys}).overlay({"file": "w.pt"})
    assert cfg.keys == Keys(take="net", rename={"^a": "b"}, drop=("head",))


def test_the_source_of_another_cfg_comes_with_its_digest_and_names():
    other = PretrainedCfg(file="w.pt", git_blob="cd" * 20, keys=Keys(take="net"), container="a pickle", licence="MIT")
    changed = FULL.with_source_of(other)
    assert (changed.file, changed.hub_id, changed.sha256, changed.git_blob) == ("w.pt", None, None, "cd" * 20)
    assert (changed.keys, changed.container) == (other.keys, "a pickle")
    assert (changed.licence, changed.cohorts) == (FULL.licence, FULL.cohorts)
