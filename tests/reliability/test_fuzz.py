"""A sample of ``fuzz.py``: damaged files are refused in words, or read as before."""

import random

import pytest
from fuzz import ERROR, KINDS, Tally


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_as_before(kind):
    count = 12 if kind == "checkpoints" else 60
    tally = KINDS[kind](count, random.Random(1), Tally(kind))
    assert tally.defects == []
    assert tally.counts[ERROR] > count / 5
    assert tally.seconds < 20
