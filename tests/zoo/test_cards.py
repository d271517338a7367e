"""Cards: every one in this package holds together, and one that is not a card is refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import brainfm
from brainfm import WeightsError, registry
from brainfm.contract import InputSpec, Readout
from brainfm.models import Encoder
from brainfm.pretrained import card_of, cfg_of
from brainfm.zoo.cards import (
    COHORTS,
    Card,
    Keys,
    ModelCard,
    WeightsCard,
    WeightsSource,
    cohort_names,
    read_card,
    zoo_cards,
)

every_card = pytest.mark.parametrize(
    "card", [read_card(path) for path in zoo_cards()], ids=[p.stem for p in zoo_cards()]
)
MODELS = [(card, name) for card in map(read_card, zoo_cards()) for name in card.models]
every_model = pytest.mark.parametrize(("card", "name"), MODELS, ids=[name for _, name in MODELS])


def through_json(data):
    return json.loads(json.dumps(data))


# --- The cards of this package --------------------------------------------------------------------


def test_cards_are_found_and_the_cohorts_are_none_of_them():
    assert {"neuro_simclr.yaml", "phantoms.yaml"} <= {path.name for path in zoo_cards()}
    assert COHORTS.is_file()
    assert COHORTS not in zoo_cards()


def test_no_two_cards_have_a_model_of_one_name():
    assert len({name for _, name in MODELS}) == len(MODELS)
    assert {name for _, name in MODELS} == set(registry._zoo())


@every_card
@pytest.mark.parametrize("sparse", [False, True])
def test_card_survives_plain_data(sparse, card):
    assert Card.from_dict(through_json(card.to_dict(sparse=sparse))) == card


@every_card
def test_every_contract_of_a_card_is_one_and_is_some_models(card):
    for data in card.inputs.values():
        assert InputSpec.from_dict(through_json(InputSpec.from_dict(data).to_dict())) == InputSpec.from_dict(data)
    assert {model.input for model in card.models.values()} - {None} == set(card.inputs)


@every_card
def test_what_a_card_says_of_whom_to_thank_and_ask_is_said(card):
    assert card.publication.title
    if any(w.source.seed is None for model in card.models.values() for w in model.weights.values()):
        assert card.cohorts or all(w.cohorts for model in card.models.values() for w in model.weights.values())
        assert card.licence.weights or card.licence.terms


@every_model
def test_readout_of_a_model_is_one_of_its_networks(card, name):
    readout = Readout.from_dict(card.models[name].readout)
    with torch.device("meta"):
        model = brainfm.create_model(name)
    assert readout.pool in (None, "brain", *model.pools)
    assert readout.pool in (None, "brain", model.global_pool)


@every_model
def test_model_builds_with_the_width_and_the_channels_that_its_card_says(card, name):
    said = card.models[name]
    with torch.device("meta"):
        model = brainfm.create_model(name)
    assert isinstance(model, Encoder)
    assert (model.num_features, model.in_chans) == (said.num_features, said.in_chans)
    assert model.pretrained_cfg == cfg_of(card, name)
    if said.input is not None:
        assert model.pretrained_cfg.input_spec.tensor_channels == said.in_chans


@every_model
def test_weights_that_are_fetched_are_known_by_a_digest_or_so_marked_and_those_in_this_package_are_there(card, name):
    for weights in card.models[name].weights.values():
        source = weights.source
        assert source.words
        assert weights.digest or weights.facts == "third-party" or not (source.url or source.hub)
        assert source.revision or not source.hub
        assert source.file is None or source.words == "in this package"


@every_model
def test_what_is_listed_of_a_model_is_what_its_cfg_says(card, name):
    for tag in card.models[name].weights or [""]:
        full = f"{name}.{tag}" if tag else name
        cfg, listing = brainfm.get_pretrained_cfg(full), registry.listing(full)
        spec = cfg.input_spec
        assert (listing.name, listing.title) == (cfg.name, card.models[name].title)
        assert (listing.modality, listing.channels, listing.space) == (spec.representation, spec.channels, spec.space)
        for field in ("num_features", "ssl_method", "licence", "gated", "redistribute", "source", "facts"):
            assert getattr(listing, field) == getattr(cfg, field), field


@every_model
def test_cfg_goes_to_a_card_of_one_model_and_back(card, name):
    model = card.models[name]
    cfg = cfg_of(card, name)
    again = Card.from_dict(through_json(card_of(cfg, model.network, model.args).to_dict(sparse=True)))
    beside = replace(cfg.with_source_of(brainfm.PretrainedCfg()), file=cfg.hub_filename)
    digest = {"sha256": cfg.sha256, "git_blob": cfg.git_blob}
    assert cfg_of(again, name) == replace(beside, **digest)
    assert again.models[name].args == model.args


# --- A card of one's own --------------------------------------------------------------------------

CARD = """
publication: {title: My lab's encoder}
inputs:
  box: {orientation: RAS, operations: [{op: ZScore, region: nonzero, eps: 1e-12}], output_shape: [1, 32, 32, 32]}
models:
  my_resnet:
    network: resnet
    args: {layers: [1, 1, 1, 1], widths: [8, 16, 32, 64]}
    input: box
    num_features: 64
    weights:
      v1: {source: {file: weights/my.safetensors}}
"""


def write(folder, text):
    path = folder / "lab.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_of_a_card_is_relative_to_it_and_to_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    file = read_card(write(tmp_path, CARD)).models["my_resnet"].weights["v1"].source.file
    assert file == str(tmp_path / "weights" / "my.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = CARD.replace("weights/my", "~/my")
    assert read_card(write(tmp_path, text)).models["my_resnet"].weights["v1"].source.file == str(
        tmp_path / "home" / "my.safetensors"
    )
    text = CARD.replace("weights/my", "/data/my")
    assert read_card(write(tmp_path, text)).models["my_resnet"].weights["v1"].source.file == "/data/my.safetensors"


def test_numbers_of_a_card_are_numbers_however_they_are_written(tmp_path):
    spec = cfg_of(read_card(write(tmp_path, CARD)), "my_resnet").input_spec
    assert spec.operations[0].eps == 1e-12


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Card is made of named fields, not of None"),
        ("models", "Card is made of named fields, not of 'models'"),
        ("{models: [}", "not YAML"),
        ("\xff\xfe", "not YAML|named fields"),
        ("modls: {}", r"Card has no field modls; did you mean models\?"),
        (
            CARD.replace("num_features", "num_feature"),
            r"ModelCard has no field num_feature; did you mean num_features\?",
        ),
        (CARD.replace("title", "titel"), r"Publication has no field titel; did you mean title\?"),
        (CARD.replace("file:", "fil:"), r"WeightsSource has no field fil; did you mean file\?"),
        (CARD.replace("source:", "sorce:"), r"WeightsCard has no field sorce; did you mean source\?"),
        (CARD.replace("network: resnet", "title: x"), "ModelCard lacks network"),
        (CARD.replace("input: box", "input: bax"), "my_resnet: its input 'bax' is none of the card's: box"),
        (CARD.replace("64\n", "sixty\n"), "num_features is 'sixty', and must be int"),
        (CARD.replace("num_features: 64", "num_features: 0"), "num_features is 0"),
        (CARD.replace("num_features: 64", "num_features: 64\n    in_chans: 0"), "in_chans 0"),
        (CARD.replace("my.safetensors}", "my.safetensors}, facts: heard"), "facts is 'heard', and must be 'seen' or"),
        (CARD.replace("my.safetensors}", "my.safetensors}, keys: {drop: ['(']}"), r"no regular expression: '\('"),
        (
            CARD.replace("file: weights/my.safetensors", "page: drive"),
            "page is 'drive', and must be the address of one",
        ),
        ("[" * 50_000, "not YAML"),
    ],
)
def test_file_that_is_no_card_is_refused_by_name_in_one_line(text, reason, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(WeightsError, match=reason) as refusal:
        read_card(path)
    assert str(refusal.value).startswith(f"{path}: not a card (")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_card_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.yaml: not a card .*No such file"):
        read_card(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(WeightsError, match=r"bytes\.yaml: not a card"):
        read_card(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    "digest",
    ["", "abc", "0" * 64, f"sha256:{'0' * 63}", f"sha256:{'g' * 64}", f"git-blob:{'0' * 64}", f"md5:{'0' * 32}"],
)
def test_digest_that_is_none_is_refused(digest):
    with pytest.raises(ValueError, match=f"digest is '{digest}', and must be sha256: and 64 hex digits, or git-blob"):
        WeightsCard(digest=digest)


@pytest.mark.parametrize("digest", [None, f"sha256:{'aB' * 32}", "sha256:7615ae03", f"git-blob:{'aB' * 20}"])
def test_digest_becomes_that_of_the_cfg(digest):
    model = ModelCard("resnet", num_features=8, weights={"v1": WeightsCard(digest=digest)})
    cfg = cfg_of(Card(models={"m": model}), "m")
    assert [cfg.sha256, cfg.git_blob] == {
        None: [None, None],
        f"sha256:{'aB' * 32}": ["aB" * 32, None],
        "sha256:7615ae03": ["7615ae03", None],
        f"git-blob:{'aB' * 20}": [None, "aB" * 20],
    }[digest]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (WeightsSource(), ""),
        (WeightsSource(file="/data/my.pt", hub="lab/a", url="https://b"), "/data/my.pt"),
        (WeightsSource(hub="lab/a", url="https://b"), "hf-hub:lab/a"),
        (WeightsSource(hub="lab/a", revision="0123"), "hf-hub:lab/a@0123"),
        (WeightsSource(url="https://b"), "https://b"),
        (WeightsSource(page="https://c"), "https://c"),
        (WeightsSource(seed=0), "drawn by seed 0"),
    ],
)
def test_source_is_said_in_words(source, words):
    assert source.words == words


def test_weights_of_one_model_may_have_cohorts_and_notes_of_their_own(tmp_path):
    text = CARD.replace("publication:", "cohorts: [{name: A, patients: 1, scans: 2}]\npublication:")
    text = text.replace("num_features: 64", "num_features: 64\n    notes: of the model")
    text += "      v2: {notes: of v2, cohorts: [{name: B, patients: 3, scans: 4}]}\n"
    card = read_card(write(tmp_path, text))
    said = [
        (cfg.notes, [cohort.name for cohort in cfg.cohorts])
        for cfg in (cfg_of(card, "my_resnet", t) for t in ("v1", "v2"))
    ]
    assert said == [("of the model", ["A"]), ("of v2", ["B"])]


def test_model_without_weights_has_neither_their_cohorts_nor_their_licence(tmp_path):
    text = CARD.replace(
        "publication:", "licence: {code: MIT, weights: X, gated: true, redistribute: false}\npublication:"
    )
    text = text[: text.index("    weights:")]
    text = text.replace("publication:", "cohorts: [{name: A, patients: 1, scans: 2}]\npublication:")
    cfg = cfg_of(read_card(write(tmp_path, text)), "my_resnet")
    assert (cfg.cohorts, cfg.licence, cfg.code_licence, cfg.facts) == ((), None, "MIT", "seen")
    assert (cfg.gated, cfg.redistribute) == (False, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda card: card.inputs["box"].update(orientaton="RAS"), "InputSpec has no field orientaton"),
        (lambda card: card.inputs["box"].update(operations=({"op": "Blur"},)), "unknown operation 'Blur'"),
        (lambda card: card.models["my_resnet"].readout.update(pol="avg"), "Readout has no field pol"),
        (lambda card: card.models["my_resnet"].readout.update(window={"shape": (0, 1, 1)}), "at least one voxel"),
    ],
)
def test_contract_or_readout_of_a_card_that_is_none_is_refused_when_it_is_asked_for(change, reason, tmp_path):
    card = read_card(write(tmp_path, CARD))
    change(card)
    with pytest.raises(WeightsError, match=f"the card of my_resnet: .*{reason}"):
        cfg_of(card, "my_resnet")


def test_cfg_with_keys_can_be_hashed_and_compared():
    one, other = (brainfm.PretrainedCfg(keys=Keys(rename={"a": new})) for new in "bc")
    assert len({one, other, replace(one)}) == 2


# --- Cohorts --------------------------------------------------------------------------------------


def test_cohorts_are_named_with_what_each_name_is():
    names = cohort_names()
    assert names.names["ADNI"]["a selection of ADNI's patients"] == ("TADPOLE",)
    assert "SLIM" in names.names_if_asked["CoRR"]["CoRR's site SWU 4"]
    assert names.folders_of_others == ("corr",)


def test_every_name_of_a_cohort_is_of_one_that_some_weights_were_pretrained_on():
    known = {cohort.name for card, _ in MODELS for cohort in card.cohorts}
    names = cohort_names()
    assert {*names.names, *names.names_if_asked} <= known
    assert all(isinstance(name, str) for known in names.names.values() for all_ in known.values() for name in all_)


# --- What waits for nothing -----------------------------------------------------------------------

IMPORTED = """
import sys
{code}
print(" ".join(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"torch", "monai", "numpy", "nibabel"}})))
"""
COMMAND = """
from brainfm.cli.main import main
try:
    main({arguments!r})
except SystemExit as error:
    assert not error.code, error.code
"""


def imported_by(code: str) -> set[str]:
    """Which of the heavy packages code imports, in a process of its own."""
    command = [sys.executable, "-c", IMPORTED.format(code=code)]
    environment = os.environ | {"BRAINFM_HUB_ORG": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_what_is_imported_is_seen():
    assert imported_by("import numpy") == {"numpy"}


@pytest.mark.parametrize(
    "code",
    [
        "import brainfm",
        "import brainfm; brainfm.list_models(); brainfm.list_pretrained()",
        "from brainfm.zoo.cards import *; [read_card(path) for path in zoo_cards()]; cohort_names()",
        "from brainfm.registry import list_models, listing; [listing(name) for name in list_models()]",
        COMMAND.format(arguments=["--help"]),
        COMMAND.format(arguments=["list"]),
        COMMAND.format(arguments=["list", "*resnet*", "--pretrained"]),
        COMMAND.format(arguments=["embed", "--help"]),
    ],
    ids=["import", "list_models", "cards", "listings", "--help", "list", "list --pretrained", "embed --help"],
)
def test_cards_lists_and_help_import_neither_torch_nor_monai_nor_numpy(code):
    assert imported_by(code) == set()


@pytest.mark.parametrize(
    "arguments",
    [["info", "simclr_resnet18_3d"], ["info", "test_vit_3d"], ["info", "simclr_resnet18_3d", "--overlap", "ADNI"]],
    ids=" ".join,
)
def test_info_imports_neither_torch_nor_monai(arguments):
    assert not imported_by(COMMAND.format(arguments=arguments)) & {"torch", "monai"}
