"""Shards of a list: which scans each has, and what names one."""

from __future__ import annotations

import pytest

from brainfm.errors import BrainfmError
from brainfm.shards import Shard


def test_shards_are_equal_parts_that_hold_everything_once():
    numbers = [Shard.of(f"{n}/3").numbers(10) for n in (1, 2, 3)]
    assert sorted(n for part in numbers for n in part) == list(range(10))
    assert {len(part) for part in numbers} == {3, 4}
    assert str(Shard.of(" 2 / 3 ")) == "2/3"


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/3", "a/b", "1/3/5", "1.0/3", "", "1/99999999999"])
def test_shard_that_is_none_is_refused(text):
    with pytest.raises(BrainfmError, match="from 1/8 to 8/8"):
        Shard.of(text)


@pytest.mark.parametrize(
    ("variables", "shard"),
    [
        ({}, None),
        ({"ID": "3"}, None),
        ({"ID": "0", "COUNT": "8", "MIN": "0"}, "1/8"),
        ({"ID": "8", "COUNT": "8", "MIN": "1"}, "8/8"),
        ({"ID": "110", "COUNT": "3", "MIN": "100", "STEP": "10"}, "2/3"),
        ({"ID": "2", "COUNT": "8"}, "3/8"),
    ],
)
def test_task_of_a_slurm_array_is_a_shard(variables, shard, monkeypatch):
    for name in ("ID", "COUNT", "MIN", "STEP"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
        if name in variables:
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", variables[name])
    found = Shard.of_slurm()
    assert (None if found is None else str(found)) == shard


def test_slurm_may_be_named(monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with pytest.raises(BrainfmError, match="this is no task of a Slurm array"):
        Shard.of("slurm")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert str(Shard.of("slurm")) == "2/4"


def test_slurm_array_that_makes_no_sense_is_named(monkeypatch):
    for name, value in {"ID": "9", "COUNT": "3", "MIN": "0"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(BrainfmError, match="SLURM_ARRAY_TASK_ID=9"):
        Shard.of_slurm()
