"""Downloads from a URL: faults that pass, faults that do not, and what is left behind."""

from __future__ import annotations

import contextlib

import pytest
from file_server import break_off, kept, overlaid

from brainfm import WeightsError, WeightsNotFoundError
from brainfm.weights import find_weights


def test_url_that_is_not_there_is_refused_and_nothing_is_kept(server, cfg, tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"\b404\b"):
        find_weights(overlaid(cfg, url=f"{server.url}/gone.tar"), tmp_path)
    assert kept(tmp_path) == []


def test_refused_connection_says_what_to_do_by_hand(cfg, tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightsNotFoundError, match="checkpoint_path=") as refusal:
        find_weights(cfg, tmp_path)
    assert f"curl -LO {cfg.url} " in str(refusal.value)
    assert f"put the file at {tmp_path}" in str(refusal.value)


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_dropped_connection_is_taken_up_again(knows_ranges, server, cfg, tmp_path):
    server.drops, server.knows_ranges = 1, knows_ranges
    path = find_weights(cfg, tmp_path)  # the hash is checked
    assert kept(tmp_path) == [path.name]
    assert [bool(wanted) for _, wanted in server.requests] == [False, True]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_interrupted_download_goes_on_at_the_next_call(knows_ranges, server, cfg, released, tmp_path, monkeypatch):
    server.knows_ranges = knows_ranges
    size = break_off(server, cfg, tmp_path, monkeypatch).stat().st_size
    assert 0 < size < len(released)
    path = find_weights(cfg, tmp_path)
    assert server.requests == [("/releases/v1/simclr.tar", f"bytes={size}-")]
    assert kept(tmp_path) == [path.name]


def test_complete_leftover_does_not_stay_in_the_way(server, cfg, released, tmp_path, monkeypatch):
    break_off(server, cfg, tmp_path, monkeypatch).write_bytes(released)
    path = find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [path.name]


def test_leftover_longer_than_the_file_does_not_stay_in_the_way(server, cfg, released, tmp_path, monkeypatch):
    break_off(server, cfg, tmp_path, monkeypatch).write_bytes(released + b"and more")
    with contextlib.suppress(WeightsError):  # the first call may refuse it
        find_weights(cfg, tmp_path)
    path = find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [path.name]


def test_leftover_of_another_file_does_not_stay_in_the_way(server, cfg, released, tmp_path, monkeypatch):
    partial = break_off(server, cfg, tmp_path, monkeypatch)
    partial.write_bytes(bytes(partial.stat().st_size))
    with pytest.raises(WeightsError, match="sha256"):
        find_weights(cfg, tmp_path)
    path = find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [path.name]
