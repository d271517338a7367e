"""An input contract as data: what it refuses to hold, its round trip, its description; how features are read out."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import nibabel as nib
import numpy as np
import pytest
import yaml
from published_contracts import SFCN, SWINBRAIN_PRETRAINING

import brainfm
from brainfm import Grid, InputSpec, Readout, Window
from brainfm.contract import DivideByMean, MinMax, ZScore

GRID = Grid((4, 5, 6), (1.0, 2.0, 3.0), (10.0, -20.0, 30.0))


@pytest.mark.parametrize(
    ("shape", "spacing", "message"),
    [
        ((48000, 48, 40), (4.0, 4.0, 4.0), "is 192000×192×160 mm large, and a scanner sees half a metre"),
        ((193, 229, 193), (1.0, 10.0, 1.0), "is 193×2290×193 mm large"),
        ((193, 229, 193), (1.0, 0.0, 1.0), "must be above 0"),
        ((1024, 1024, 1024), (0.5, 0.5, 0.5), "together at most"),
    ],
)
def test_grid_that_no_scan_of_a_head_can_be_on_is_refused(shape, spacing, message):
    with pytest.raises(ValueError, match=message):
        Grid(shape=shape, spacing=spacing, origin=(0.0, 0.0, 0.0))


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAL", "AIR"])
def test_affine_of_a_grid_points_where_its_orientation_says(axcodes):
    affine = GRID.affine(axcodes)
    assert "".join(nib.aff2axcodes(affine)) == axcodes
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), GRID.spacing)
    np.testing.assert_array_equal(affine @ [0, 0, 0, 1], [*GRID.origin, 1])


# --- What no contract can hold --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": GRID}, "a grid needs the orientation of its axes"),
        ({"orientation": "RAX"}, "axis codes"),
        ({"space": "BrainIAC head template"}, r"whether it is in the space 'BrainIAC head template'.*give.*grid"),
        ({"space": "scanner", "registration": "rigid"}, "whether it is in the space 'scanner'"),
        ({"registration": "affine"}, "registration is 'affine', and no space is named"),
        ({"channels": ()}, "channels are different names"),
        ({"channels": ("T1w", "FLAIR", "t1w")}, "channels are different names"),
        ({"intensity_range": (1, 0)}, "must rise"),
        ({"intensity_range": (0, float("nan"))}, "intensity_range"),
        ({"intensities": "normalised"}, "'raw' or 'standardised' or 'any'"),
        ({"missing_channel": "zero"}, "'refuse' or 'zeros'"),
        ({"skull_strip": "optional"}, "'required' or 'forbidden' or 'any'"),
        ({"operations": ("ZScore",)}, "operations"),
        ({"output_shape": (160, 192, 160)}, "output_shape"),
    ],
)
def test_what_cannot_be_held_against_a_scan_is_refused_when_the_contract_is_made(given, message):
    with pytest.raises(ValueError, match=message):
        InputSpec(**given)


@pytest.mark.parametrize("space", ["MNI152", "MNI152NLin6Asym", "MNI152NLin2009cSym"])
def test_mni152_needs_no_grid(space):
    assert InputSpec(space=space, registration="affine").in_mni152


def test_other_spaces_are_taken_with_their_grid():
    spec = InputSpec(space="BrainIAC head template", orientation="LAS", grid=GRID, registration="rigid")
    assert not spec.in_mni152


# --- As data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("spec", [InputSpec(), SFCN, SWINBRAIN_PRETRAINING], ids=["default", "sfcn", "swinbrain"])
def test_contract_goes_to_yaml_and_back(spec, sparse):
    assert InputSpec.from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict(sparse=sparse)))) == spec


def test_sparse_contract_holds_only_what_differs_from_the_default():
    assert InputSpec(intensities="raw").to_dict(sparse=True) == {"intensities": "raw"}


def test_contract_of_a_card_names_every_field():
    full = json.loads(json.dumps(SFCN.to_dict()))
    assert set(full) == {item.name for item in fields(InputSpec)}
    assert full["operations"][0] == {"op": "DivideByMean", "region": "all"}


def test_with_operation_changes_the_operations_of_one_kind():
    spec = InputSpec(operations=(ZScore("mask"), MinMax(), ZScore("all")))
    assert spec.with_operation(ZScore, ddof=1).operations == (ZScore("mask", ddof=1), MinMax(), ZScore("all", ddof=1))
    with pytest.raises(ValueError, match="no operation DivideByMean"):
        spec.with_operation(DivideByMean, region="mask")


# --- In words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"intensities": "raw"}, "intensities  as the scanner gave them, none shifted below 0"),
        ({"intensities": "standardised"}, "intensities  shifted about 0, as by a z-score"),
        ({"intensity_range": (0, 255)}, "intensities  from 0 to 255"),
        (
            {"intensities": "raw", "intensity_range": (0, 1.5)},
            "intensities  as the scanner gave them, none shifted below 0; from 0 to 1.5",
        ),
        ({"channels": ("T1w", "FLAIR")}, "channels     T1w, FLAIR; a missing one: refuse the scan"),
        (
            {"channels": ("T1w", "FLAIR"), "missing_channel": "zeros"},
            "channels     T1w, FLAIR; a missing one: filled with zeros",
        ),
        ({"operations": (ZScore(),)}, "step 1       z-score over the whole array (population std)"),
        ({"skull_strip": "forbidden"}, "image        T1w, in its own space; with skull"),
    ],
)
def test_description_says_each_field_that_acts(changes, line):
    assert line in brainfm.describe(replace(InputSpec(), **changes)).splitlines()


def test_description_of_any_intensities_says_nothing_of_them():
    assert "intensities" not in brainfm.describe(InputSpec())


# --- Readout --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "readout",
    [Readout(), Readout("token"), Readout("brain", Window((96, 96, 96), 0.25, "brain", -1.0))],
    ids=["default", "token", "window"],
)
def test_readout_goes_to_json_and_back(readout):
    assert Readout.from_dict(json.loads(json.dumps(readout.to_dict()))) == readout


@pytest.mark.parametrize(
    ("readout", "words"),
    [
        (Readout("avg"), "average over the last feature map"),
        (Readout("token"), "the class token"),
        (Readout(), "the encoder's own pooling"),
        (
            Readout("brain", Window((96, 96, 64), 0.5)),
            "average over the brain's cells of the last feature map, in windows of 96×96×64 voxels that overlap by "
            "50%, averaged each alike",
        ),
        (
            Readout("avg", Window((9, 9, 9), 0.0, "brain")),
            "average over the last feature map, in windows of 9×9×9 voxels that overlap by 0%, averaged by the brain "
            "voxels in each",
        ),
    ],
)
def test_readout_says_in_words_what_it_does(readout, words):
    assert str(readout) == words


@pytest.mark.parametrize("changes", [{"shape": (0, 9, 9)}, {"overlap": 1.0}, {"overlap": -0.1}, {"average": "median"}])
def test_window_that_cannot_slide_is_refused(changes):
    with pytest.raises(ValueError, match=r"a window has|average is 'median'"):
        Window(**({"shape": (9, 9, 9)} | changes))
