"""Batches grow to what the memory of a GPU holds; test_embed.py sees, from file to table, that each has one shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfm.batches import Batches, PreparedScan


@pytest.mark.parametrize(("free", "cached", "size"), [(10, 0, 8), (10, 5, 12), (0.5, 0, 1), (1000, 0, 16)])
def test_batch_grows_to_what_the_gpu_holds_after_the_first_scan(monkeypatch, free, cached, size):
    gigabyte = 2**30
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * gigabyte)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * gigabyte)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: (2 + cached) * gigabyte)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * gigabyte), 0))
    sizes = sizes_of([(1, 2, 2, 2)] * 40)
    assert sizes[:2] == [1, size]
    assert sum(sizes) == 40


def sizes_of(shapes):
    batches = Batches("auto", torch.device("cuda"))
    scans = (PreparedScan("a scan", torch.zeros(shape), None, np.eye(4)) for shape in shapes)
    full = [len(batch) for n, scan in enumerate(scans) for batch in batches.add(n, scan)]
    return full + [len(batch) for batch in batches.rest()]


def test_grown_batch_holds_fewer_of_larger_scans(monkeypatch):
    monkeypatch.setattr(Batches, "_scans_that_fit", lambda self: 8)
    shapes = [(1, 2, 2, 2)] * 9 + [(1, 2, 2, 8)] * 5 + [(1, 1, 1, 1)] * 16 + [(1, 16, 16, 16)] * 2
    assert sizes_of(shapes) == [1, 8, 2, 2, 1, 16, 1, 1]
