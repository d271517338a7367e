"""Fuzzing needs hypothesis, see fuzzing.py."""

import logging

import pytest

pytest.importorskip("hypothesis")
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it has a word on every field
