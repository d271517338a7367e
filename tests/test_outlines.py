"""Outlines are told apart by who sees no colour."""

import numpy as np

from brainfm.picture import MASK_COLOUR, TEMPLATE_COLOUR, dashed, edge


def test_edge_is_the_border_of_the_mask_and_a_dashed_one_has_gaps():
    mask = np.zeros((40, 50), bool)
    mask[5:30, 10:40] = True
    line = edge(mask)
    assert line.sum() == 2 * (25 + 30) - 4
    assert not line[6:29, 11:39].any()
    assert (mask | line == mask).all()
    broken = dashed(line)
    assert 0.4 < broken.sum() / line.sum() < 0.6
    assert (line | broken == line).all()


def test_two_outlines_differ_in_greyscale_too():
    grey = [np.dot(colour, (0.299, 0.587, 0.114)) for colour in (MASK_COLOUR, TEMPLATE_COLOUR)]
    assert abs(grey[0] - grey[1]) > 40
