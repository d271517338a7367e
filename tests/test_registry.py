"""Names → constructors and cfgs: what is listed, what is known, what is suggested, and how others register theirs."""

from __future__ import annotations

import pytest

import brainfm
from brainfm import ModelNameError, PretrainedCfg, registry

RESNETS = ["resnet18_3d", "simclr_resnet18_3d", "simclr_resnet50_3d", "test_resnet_3d"]
VITS = ["mae_vit_base_3d", "mae_vit_large_3d", "mae_vit_tiny_3d", "test_vit_3d", "vit_tiny_3d"]
TRAINED = ["simclr_resnet18_3d.kaczmarek2025", "test_resnet_3d.phantoms", "test_vit_3d.phantoms"]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """A registry of the models above, so that neither another model nor what a test registers changes another test."""
    for table, copy in (("_entrypoints", lambda entrypoint: entrypoint), ("_cfgs", dict)):
        known = getattr(registry, table)
        monkeypatch.setattr(registry, table, {name: copy(known[name]) for name in RESNETS + VITS})


def constructor(name="lab_encoder", module="lab"):
    """A new function of that name, as a third party's module would define it."""

    def build(**kwargs):
        return kwargs

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    return build


# --- Listing --------------------------------------------------------------------------------------


def test_all_models_are_listed_in_order():
    assert brainfm.list_models() == sorted(RESNETS + VITS)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*resnet*", RESNETS),
        ("vit_*", ["vit_tiny_3d"]),
        ("vit_tiny_3d", ["vit_tiny_3d"]),
        ("simclr_resnet??_3d", ["simclr_resnet18_3d", "simclr_resnet50_3d"]),
        (["*resnet18*", "test_*"], ["resnet18_3d", "simclr_resnet18_3d", "test_resnet_3d", "test_vit_3d"]),
        (["*resnet*", "simclr*"], RESNETS),
        ("swin*", []),
        ("resnet", []),
        ("*RESNET*", []),
    ],
)
def test_a_wildcard_lists_the_names_it_matches(pattern, names):
    assert brainfm.list_models(pattern) == names


def test_only_models_with_weights_are_listed_as_pretrained_with_their_tags():
    assert brainfm.list_models(pretrained=True) == brainfm.list_pretrained() == TRAINED


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("test_*", TRAINED[1:]),
        ("*.kaczmarek2025", TRAINED[:1]),
        ("simclr_resnet18_3d", TRAINED[:1]),
        (["*.phantoms", "simclr*"], TRAINED),
        ("mae*", []),
    ],
)
def test_a_wildcard_matches_pretrained_names_with_or_without_their_tag(pattern, names):
    assert brainfm.list_pretrained(pattern) == brainfm.list_models(pattern, pretrained=True) == names


@pytest.mark.parametrize(("module", "names"), [("resnet", RESNETS), ("vit", VITS), ("swin", [])])
def test_models_are_listed_by_module(module, names):
    assert brainfm.list_models(module=module) == names


def test_module_wildcard_and_pretrained_go_together():
    assert brainfm.list_models("test*", module="vit", pretrained=True) == ["test_vit_3d.phantoms"]


# --- Looking up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("vit_tiny_3d", True),
        ("simclr_resnet18_3d.kaczmarek2025", True),
        ("simclr_resnet18_3d.other", False),
        ("vit_tiny_3d.kaczmarek2025", False),
        ("kaczmarek2025", False),
        ("resnet18", False),
        ("", False),
        ("simclr_resnet18_3d.", False),
    ],
)
def test_is_model_knows_names_with_and_without_tags(name, known):
    assert brainfm.is_model(name) is known


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_resnet_3d.phantoms"])
def test_the_constructor_is_found_with_and_without_a_tag(name):
    assert brainfm.model_entrypoint(name).__name__ == "test_resnet_3d"


def test_the_default_cfg_is_the_first_tags():
    assert brainfm.get_pretrained_cfg("simclr_resnet18_3d").tag == "kaczmarek2025"
    assert brainfm.get_pretrained_cfg("vit_tiny_3d").tag == ""


@pytest.mark.parametrize("name", sorted(RESNETS + VITS))
def test_a_cfg_knows_its_own_name(name):
    cfg = brainfm.get_pretrained_cfg(name)
    assert cfg.architecture == name
    assert brainfm.get_pretrained_cfg(cfg.name) == cfg


@pytest.mark.parametrize("look_up", [brainfm.get_pretrained_cfg, brainfm.model_entrypoint])
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("simclr_resnet18", "simclr_resnet18_3d"),
        ("mae_vit_small_3d", "mae_vit_tiny_3d"),
        ("resnet_18_3d.phantoms", "resnet18_3d"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(look_up, name, nearest):
    with pytest.raises(ModelNameError, match=rf"unknown model '{name}'; did you mean .*\b{nearest}\b"):
        look_up(name)


def test_a_name_near_to_none_points_to_the_list():
    with pytest.raises(ModelNameError, match="list_models"):
        brainfm.get_pretrained_cfg("qqqqqq")


@pytest.mark.parametrize(
    ("name", "known"),
    [("simclr_resnet18_3d.v2", "known: simclr_resnet18_3d.kaczmarek2025"), ("vit_tiny_3d.v2", "known: none")],
)
def test_an_unknown_tag_names_the_known_ones(name, known):
    with pytest.raises(ModelNameError, match=f"'v2'; {known}"):
        brainfm.get_pretrained_cfg(name)


def test_a_wrong_name_is_a_value_error():
    with pytest.raises(ValueError, match="unknown model"):
        brainfm.model_entrypoint("qqqqqq")


# --- Registering ----------------------------------------------------------------------------------


def test_a_third_party_model_registers_with_the_bare_decorator():
    build = constructor()
    assert brainfm.register_model(build) is build
    assert brainfm.model_entrypoint("lab_encoder") is build
    assert brainfm.get_pretrained_cfg("lab_encoder") == PretrainedCfg(architecture="lab_encoder")
    assert brainfm.list_models("lab*", module="lab") == ["lab_encoder"]
    assert brainfm.list_pretrained("lab*") == []


def test_a_third_party_model_registers_with_its_cfgs(small_spec):
    cfgs = {"small": PretrainedCfg(file="s.safetensors", input_spec=small_spec), "big": PretrainedCfg(hub_id="lab/big")}
    build = constructor()
    assert brainfm.register_model(cfgs=cfgs)(build) is build
    assert brainfm.list_pretrained("lab*") == ["lab_encoder.big", "lab_encoder.small"]
    assert brainfm.get_pretrained_cfg("lab_encoder").tag == "small"
    assert brainfm.get_pretrained_cfg("lab_encoder.big").name == "lab_encoder.big"
    assert brainfm.get_pretrained_cfg("lab_encoder").input_spec == small_spec
    assert brainfm.create_transform("lab_encoder").spec == small_spec


def test_the_decorator_called_without_cfgs_registers_too():
    brainfm.register_model()(constructor())
    assert brainfm.is_model("lab_encoder")


def test_a_tag_may_hold_dots():
    brainfm.register_model(cfgs={"v1.0": PretrainedCfg(file="w.pt")})(constructor())
    assert brainfm.get_pretrained_cfg("lab_encoder.v1.0").tag == "v1.0"


def test_registering_leaves_the_cfgs_given_as_they_were():
    cfg = PretrainedCfg(file="w.pt")
    cfgs = {"one": cfg}
    brainfm.register_model(cfgs=cfgs)(constructor())
    assert cfgs == {"one": cfg}
    assert cfg.architecture == ""


@pytest.mark.parametrize(("name", "module"), [("vit_tiny_3d", "lab"), ("lab_encoder", "another.lab")])
def test_a_taken_name_is_refused_and_says_by_whom(name, module):
    brainfm.register_model(constructor())
    before = brainfm.model_entrypoint(name)
    with pytest.raises(ValueError, match=f"'{name}' is already registered, by {before.__module__}"):
        brainfm.register_model(constructor(name, module))
    assert brainfm.model_entrypoint(name) is before


def test_the_same_constructor_registers_again_when_its_module_is_reloaded():
    brainfm.register_model(cfgs={"v1": PretrainedCfg(file="1.pt")})(constructor())
    again = brainfm.register_model(cfgs={"v2": PretrainedCfg(file="2.pt")})(constructor())
    assert brainfm.model_entrypoint("lab_encoder") is again
    assert brainfm.list_pretrained("lab*") == ["lab_encoder.v2"]


@pytest.mark.parametrize("name", ["lab.encoder", "lab-encoder", "<lambda>", "hf-hub:lab", "hirnnetz_ä"])
def test_a_name_with_other_characters_is_refused(name):
    with pytest.raises(ValueError, match="letters, digits and '_'"):
        brainfm.register_model(constructor(name))
    assert name not in brainfm.list_models()
