"""Millions of rows, in memory that does not grow with them; flows in processes of all kinds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
as_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="memory is read as on Linux",
)


def output_of(script, *arguments):
    """What a script of this folder prints, in a process of its own."""
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800).stdout


def peaks(*arguments):
    """MiB beyond the rows and their results, by flow."""
    found = output_of("memory.py", *map(str, arguments))
    print(found)
    return {line.split()[0]: float(line.split()[4]) for line in found.splitlines()}


@as_linux
def test_rows_are_scored_in_little_memory():
    """All at once these took 240 MiB."""
    assert peaks("log_prob", 150_000, "maf(6)")["maf(6)"] < 60


@as_linux
@pytest.mark.slow
def test_five_million_rows_are_scored_in_little_memory():
    assert peaks("log_prob", 5_000_000, "maf(6)")["maf(6)"] < 300


@as_linux
@pytest.mark.slow
def test_a_spline_flow_draws_a_million_in_twenty_seconds_of_one_core():
    line = output_of("memory.py", "sample", "1000000", "nsf(6)")
    print(line)
    assert float(line.split()[-2]) < 20


@as_linux
@pytest.mark.slow
@pytest.mark.parametrize("what", ["log_prob", "sample"])
def test_every_flow_takes_many_rows_in_little_memory(what):
    """A draw takes what it is made of too, as large as itself, and its score."""
    found = peaks(what, 500_000)
    assert len(found) > 25
    assert max(found.values()) < 100, found


@pytest.mark.parametrize(
    ("method", "threads"),
    [
        pytest.param("fork", 1, marks=pytest.mark.slow),
        ("fork", 2),
        pytest.param("spawn", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_flow_that_was_used_goes_on_in_a_process_begun_then(method, threads):
    here, there = map(float, output_of("processes.py", method, str(threads)).split())
    assert abs(here - there) < 1e-4
