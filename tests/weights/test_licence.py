"""Licences that ask something are said and accepted once; what may not be passed on is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

import brainfm
from brainfm import LicenceError, WeightsError, WeightsNotFoundError
from brainfm.cli import main
from brainfm.zoo.cards import read_card, zoo_cards


@pytest.fixture
def asking(cfg):
    return replace(
        cfg, licence="CC-BY-NC-4.0", accept=True, terms="no commercial use", repository="https://lab.org/code"
    )


def create(cfg, tmp_path, **kwargs):
    return brainfm.create_model("test_resnet_3d", pretrained=True, pretrained_cfg=cfg, cache_dir=tmp_path, **kwargs)


def test_licence_is_said_accepted_once_and_kept(asking, server, tmp_path, caplog):
    words = r"CC-BY-NC-4\.0: no commercial use; read it \(https://lab\.org/code\).*accept_licence=True"
    with pytest.raises(LicenceError, match=words):
        create(asking, tmp_path)
    assert not server.requests  # nothing was fetched
    create(asking, tmp_path, accept_licence=True)
    assert "licence of the weights accepted: CC-BY-NC-4.0" in caplog.text
    kept = json.loads((tmp_path / "licences.json").read_text())
    assert kept["test_resnet_3d.released"].keys() == {"licence", "terms", "date"}
    create(asking, tmp_path)  # once is enough
    with pytest.raises(LicenceError):  # but not for other terms
        create(replace(asking, terms="and no publication"), tmp_path)


def test_licence_is_accepted_by_a_variable_that_names_the_model(asking, tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINFM_ACCEPT_LICENCE", "another, test_resnet_3d")
    create(asking, tmp_path)
    monkeypatch.setenv("BRAINFM_ACCEPT_LICENCE", "another")
    create(asking, tmp_path)
    with pytest.raises(LicenceError):
        create(asking, tmp_path / "other")


def test_own_file_asks_nothing(asking, small_model, tmp_path):
    path = tmp_path / "own.safetensors"
    brainfm.weights.save_state(small_model.state_dict(), path)
    brainfm.create_model("test_resnet_3d", pretrained_cfg=asking, checkpoint_path=path)


def test_what_may_not_be_passed_on_is_not_pushed_converted_or_exported_to_share(asking, hub, tmp_path, monkeypatch):
    closed = replace(asking, redistribute=False)
    model = create(closed, tmp_path / "cache", accept_licence=True)
    with pytest.raises(LicenceError, match=r"not uploaded: the licence of .* does not let them be passed on"):
        brainfm.push_to_hub(model, "lab/model")
    monkeypatch.setattr("brainfm.names.resolve", lambda *_, **__: type("R", (), {"cfg": closed}))
    for command in (
        ["convert", "x.pt", str(tmp_path / "folder"), "--model", "test_resnet_3d", "--share"],
        ["export", "test_resnet_3d", "-o", str(tmp_path / "m.pt2"), "--share"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "not written: the licence of the weights" in result.output
    assert not (tmp_path / "folder").exists()
    assert not (tmp_path / "m.pt2").exists()


def test_file_without_a_published_digest_is_held_to_the_one_seen_first(cfg, server, tmp_path, caplog):
    unknown = replace(cfg, sha256=None)
    create(unknown, tmp_path)
    assert f"its sha256 is {cfg.sha256}" in caplog.text
    (converted,) = tmp_path.glob("*/model.safetensors")
    converted.unlink()
    create(unknown, tmp_path)  # the same file again
    converted.unlink()
    server.files["/releases/v1/simclr.tar"] = server.files["/releases/v1/simclr.tar"] + b"\0" * 10240
    with pytest.raises(WeightsError, match=rf"was {cfg.sha256} when it was first fetched: another file is there now"):
        create(unknown, tmp_path)


def test_weights_that_people_take_from_a_page_are_named_and_not_fetched(cfg, server, tmp_path):
    by_hand = replace(cfg, url=None, page="https://drive.google.com/drive/abc", hub_filename="DenseNet121.pth")
    words = r"get DenseNet121\.pth at https://drive\.google\.com/drive/abc, then .*brainfm convert FILE"
    with pytest.raises(WeightsNotFoundError, match=words):
        create(by_hand, tmp_path)
    assert not server.requests


def test_every_card_whose_licence_bites_says_so():
    """Not stated, not for commerce, for research only, or gated: it is to be accepted."""
    for card in map(read_card, zoo_cards()):
        licence = card.licence.weights or ""
        bites = not licence or "-NC" in licence or "research" in licence.lower() or card.licence.gated
        if any(weights.source.words for model in card.models.values() for weights in model.weights.values()):
            assert card.licence.accept or not bites, card.publication.title
