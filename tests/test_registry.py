"""Names → constructors and cfgs: what is listed, what is known, what is suggested, and how others register theirs."""

from __future__ import annotations

import pytest
import torch

import brainfm
from brainfm import ModelNameError, PretrainedCfg, WeightsError, registry
from brainfm.models import ResNet
from brainfm.weights import save_state
from brainfm.zoo.cards import read_card

RESNETS = ["resnet18_3d", "simclr_resnet18_3d", "simclr_resnet50_3d", "test_resnet_3d"]
VITS = ["mae_vit_base_3d", "mae_vit_large_3d", "mae_vit_tiny_3d", "test_vit_3d", "vit_tiny_3d"]
TRAINED = ["simclr_resnet18_3d.kaczmarek2025", "test_resnet_3d.phantoms", "test_vit_3d.phantoms"]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """A registry of the models above, so that neither another model nor what a test registers changes another test."""
    zoo = registry._zoo()
    monkeypatch.setattr(registry, "_zoo", lambda: {name: zoo[name] for name in RESNETS + VITS})
    monkeypatch.setattr(registry, "_registered", {})


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


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_name_of_a_network_of_this_package_is_refused(name):
    """A card that asks for it would get another network."""
    with pytest.raises(ValueError, match=f"'{name}' is a network of this package"):
        brainfm.register_model(constructor(name))
    assert registry.network(name).__module__.startswith("brainfm.models")


def test_what_a_third_party_registers_is_listed_as_its_cfg_says(small_spec):
    build = constructor()
    build.__doc__ = "My encoder, 8-d.\n\nMore of it."
    cfg = PretrainedCfg(file="w.pt", input_spec=small_spec, num_features=8, licence="MIT", facts="third-party")
    brainfm.register_model(cfgs={"v1": cfg})(build)
    assert registry.listing("lab_encoder").to_dict() == {
        "name": "lab_encoder.v1",
        "title": "My encoder, 8-d.",
        "num_features": 8,
        "modality": "T1w",
        "channels": ["T1w"],
        "space": "MNI152NLin2009cSym",
        "contract": None,
        "ssl_method": None,
        "licence": "MIT",
        "gated": False,
        "redistribute": True,
        "accept": False,
        "source": "w.pt",
        "facts": "third-party",
    }


def test_an_unknown_name_is_not_listed():
    with pytest.raises(ModelNameError, match="did you mean"):
        registry.listing("test_resnet")


# --- Registering a card ---------------------------------------------------------------------------

CARD = """
publication: {title: My lab's encoder}
licence: {weights: CC-BY-4.0}
inputs: {box: {orientation: RAS, operations: [{op: ZScore, region: nonzero}], output_shape: [1, 16, 16, 16]}}
models:
  my_resnet:
    title: A small ResNet, 32-d
    network: resnet
    args: {layers: [1, 1, 1, 1], widths: [4, 8, 16, 32]}
    input: box
    num_features: 32
    weights:
      v1: {source: {file: my.safetensors}, facts: seen}
      v2: {source: {hub: lab/my_resnet, revision: 0123abc}}
  my_bare_resnet: {network: resnet, args: {widths: [2, 4, 8, 16]}, num_features: 16}
"""


@pytest.fixture
def lab(tmp_path):
    """A card in a file, with the weights that it names beside it; and the model that they are of."""
    torch.manual_seed(0)
    model = ResNet(layers=(1, 1, 1, 1), widths=(4, 8, 16, 32)).eval()
    save_state(model.state_dict(), tmp_path / "my.safetensors")
    (tmp_path / "lab.yaml").write_text(CARD)
    return tmp_path / "lab.yaml", model


def embed(model):
    with torch.inference_mode():
        return model(torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_card_registers_its_models_with_weights_beside_it(as_text, lab, monkeypatch):
    path, model = lab
    monkeypatch.chdir("/")
    assert brainfm.register_card(str(path) if as_text else path) == ["my_resnet", "my_bare_resnet"]
    assert brainfm.list_models("my_*") == ["my_bare_resnet", "my_resnet"]
    assert brainfm.list_models("my_*", module="resnet") == ["my_bare_resnet", "my_resnet"]
    assert brainfm.list_pretrained("my_*") == ["my_resnet.v1", "my_resnet.v2"]
    again = brainfm.create_model("my_resnet", pretrained=True)
    assert torch.equal(embed(again), embed(model))
    assert again.weights_report.source == str(path.parent / "my.safetensors")
    assert brainfm.create_transform("my_resnet").spec == again.pretrained_cfg.input_spec
    assert (again.pretrained_cfg.licence, again.pretrained_cfg.title) == ("CC-BY-4.0", "My lab's encoder")
    assert brainfm.get_pretrained_cfg("my_resnet.v2").source == "hf-hub:lab/my_resnet@0123abc"
    assert brainfm.model_entrypoint("my_resnet").__doc__ == "A small ResNet, 32-d"
    assert brainfm.create_model("my_bare_resnet", layers=(1, 1, 1, 1)).num_features == 16


def test_a_card_registers_as_an_object_too(lab):
    path, model = lab
    brainfm.register_card(read_card(path))
    assert torch.equal(embed(brainfm.create_model("my_resnet.v1", pretrained=True)), embed(model))


def test_a_network_of_a_card_may_be_a_constructor_that_is_registered(lab):
    path, _ = lab
    build = constructor("lab_network", "lab.networks")
    brainfm.register_model(build)
    path.write_text(CARD.replace("network: resnet", "network: lab_network"))
    brainfm.register_card(path)
    assert brainfm.list_models("my_*", module="networks") == ["my_bare_resnet", "my_resnet"]
    assert brainfm.model_entrypoint("my_bare_resnet")(in_chans=2) == {"widths": (2, 4, 8, 16), "in_chans": 2}
    assert registry.network_of("my_bare_resnet") == ("lab_network", {"widths": (2, 4, 8, 16)})
    assert registry.network_of("lab_network") == ("lab_network", {})


def test_a_card_with_a_network_that_is_not_here_is_refused_with_those_that_are(lab):
    path, _ = lab
    brainfm.register_model(constructor("lab_network"))
    path.write_text(CARD.replace("network: resnet,", "network: resnt,"))
    with pytest.raises(ModelNameError, match=r"there is no network 'resnt'; known: .*lab_network, .*resnet"):
        brainfm.register_card(path)
    assert not brainfm.is_model("my_resnet")


def test_a_models_name_is_no_network(lab):
    with pytest.raises(ModelNameError, match="there is no network 'test_resnet_3d'"):
        registry.network("test_resnet_3d")
    assert not registry.has_network("test_resnet_3d")
    assert not registry.has_network("encoder")


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (("my_bare_resnet:", "vit_tiny_3d:"), ValueError, "'vit_tiny_3d' is already registered, by brainfm.models.vit"),
        (("my_bare_resnet:", "lab_encoder:"), ValueError, "'lab_encoder' is already registered, by lab"),
        (("my_bare_resnet:", "my-resnet:"), ValueError, "letters, digits and '_'"),
        (("[{op: ZScore", "[{op: Blur"), WeightsError, "the card of my_resnet: unknown operation 'Blur'"),
        (("num_features: 32", "num_feature: 32"), WeightsError, "lab.yaml: not a card .*did you mean num_features"),
        (("facts: seen", "digest: 0"), WeightsError, "lab.yaml: not a card .*digest is 0"),
    ],
)
def test_a_card_that_cannot_be_is_refused_whole(change, error, reason, lab):
    path, _ = lab
    brainfm.register_model(constructor())
    path.write_text(CARD.replace(*change))
    with pytest.raises(error, match=reason):
        brainfm.register_card(path)
    assert brainfm.list_models("my*") == []


def test_a_file_that_is_registered_again_is_read_again(lab, tmp_path):
    path, _ = lab
    brainfm.register_card(path)
    path.write_text(CARD.replace("A small ResNet", "A changed ResNet"))
    brainfm.register_card(path)
    assert registry.listing("my_resnet").title == "A changed ResNet, 32-d"
    (tmp_path / "other.yaml").write_text(CARD)
    with pytest.raises(ValueError, match="'my_resnet' is already registered"):
        brainfm.register_card(tmp_path / "other.yaml")
