"""Memory that is used again."""

from __future__ import annotations

import threading

import torch

from brainfm.models.fast.scratch import scratch


def test_who_asks_again_gets_the_same_memory_and_another_number_another():
    like = torch.empty(0)
    first, second = scratch(0, like, 3, 4), scratch(0, like, 2, 5)
    assert (first.shape, second.shape) == ((3, 4), (2, 5))
    assert first.data_ptr() == second.data_ptr() != scratch(1, like, 3, 4).data_ptr()


def test_it_grows_and_changes_its_type():
    small = scratch(0, torch.empty(0), 2)
    assert scratch(0, torch.empty(0), 10 * len(small), 1000).shape == (20, 1000)
    assert scratch(0, torch.empty(0, dtype=torch.float64), 2).dtype == torch.float64


def test_what_inference_mode_asked_for_can_be_written_to_outside_of_it():
    with torch.inference_mode():
        held = scratch(0, torch.empty(0), 1_000_003)
    again = scratch(0, torch.empty(0), 3)
    again += 1
    assert held.data_ptr() == again.data_ptr()


def test_threads_have_their_own():
    held = [scratch(0, torch.empty(0), 4).data_ptr()]
    thread = threading.Thread(target=lambda: held.append(scratch(0, torch.empty(0), 4).data_ptr()))
    thread.start()
    thread.join()
    assert len(set(held)) == 2
