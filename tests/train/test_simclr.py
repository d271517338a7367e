"""One step of SimCLR against the released loop, written out in float64."""

from __future__ import annotations

import pytest
import released_step
from forked_ranks import run_ranks


@pytest.mark.parametrize("way", ["separate", "joint"])
def test_gradient_and_statistics_of_a_step_are_those_of_the_released_loop(way):
    released_step.compare(1, way)


@pytest.mark.slow
def test_gradient_and_statistics_of_a_step_of_two_processes_are_those_of_the_released_loop():
    done = run_ranks(2, released_step.__file__)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"same {way}") for way in ("separate", "joint")] == [2, 2]


def test_ways_to_pass_the_views_differ():
    """So that the test above tells them apart: here the loop passes both views at once, and ours one by one."""
    with pytest.raises(AssertionError):
        released_step.compare(1, "separate", "joint")
