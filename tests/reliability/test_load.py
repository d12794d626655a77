"""Millions of rows: memory that does not grow with them."""

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = Path(__file__).with_name("memory.py")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peaks of memory are read as on Linux",
)


def peaks(*arguments):
    """MiB beyond the rows and their results, by flow, in a process of its own."""
    command = [sys.executable, str(MEMORY), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800).stdout
    print(found)
    return {line.split()[0]: float(line.split()[4]) for line in found.splitlines()}


def test_rows_are_scored_in_little_memory():
    """All at once these took 240 MiB."""
    assert peaks("log_prob", 150_000, "maf(6)")["maf(6)"] < 60


@pytest.mark.slow
def test_five_million_rows_are_scored_in_little_memory():
    assert peaks("log_prob", 5_000_000, "maf(6)")["maf(6)"] < 300


@pytest.mark.slow
@pytest.mark.parametrize("what", ["log_prob", "sample"])
def test_every_flow_takes_many_rows_in_little_memory(what):
    """A draw takes what it is made of too, as large as itself, and its score."""
    found = peaks(what, 500_000)
    assert len(found) > 25
    assert max(found.values()) < 100, found
