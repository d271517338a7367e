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
    scans = iter((n, prepared(torch.zeros(1, 2, 2, 2))) for n in range(40))
    sizes = [len(numbers) for numbers, _ in Batches(scans, "auto", torch.device("cuda"))]
    assert sizes[:2] == [1, size]
    assert sum(sizes) == 40


def prepared(tensor):
    return PreparedScan("a scan", tensor, None, np.eye(4))


def test_grown_batch_holds_fewer_of_larger_scans(monkeypatch):
    monkeypatch.setattr(Batches, "_scans_that_fit", lambda self: 8)
    shapes = [(1, 2, 2, 2)] * 9 + [(1, 2, 2, 8)] * 5 + [(1, 1, 1, 1)] * 16 + [(1, 16, 16, 16)] * 2
    scans = iter((n, prepared(torch.zeros(shape))) for n, shape in enumerate(shapes))
    sizes = [len(numbers) for numbers, _ in Batches(scans, "auto", torch.device("cuda"))]
    assert sizes == [1, 8, 2, 2, 1, 16, 1, 1]
