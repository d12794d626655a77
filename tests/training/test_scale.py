"""Two processes train as one does: the same losses, the same flow in each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scale_worker import FLOWS, STEPS, answer

pytestmark = pytest.mark.integration
WORKER = Path(__file__).with_name("scale_worker.py")
ALONE = {"fabric": {"accelerator": "cpu", "devices": 1}}


def both(folder, *cases):
    """The answers of two processes under ``torchrun``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(WORKER), str(folder), *cases]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def check_as_alone(case, two, tolerance):
    alone = answer(case, ALONE, 0, None)
    first, second = (answers[case] for answers in two)
    assert first["state"] == second["state"]
    worst = {}
    for name in ("train", "val"):
        assert first[name] == second[name]
        assert len(first[name]) == len(alone[name]) > 0
        worst[name] = max(abs(a - b) for a, b in zip(first[name], alone[name], strict=True))
        assert worst[name] < tolerance, f"{case} {name}: {worst}"
    print(
        f"{case}: {len(alone['train'])} losses within {worst['train']:.1e} nats, "
        f"{worst['val']:.1e} held out; rows a second {alone['rows_a_second']:.0f} alone, "
        f"{first['rows_a_second']:.0f} with two processes"
    )


CASES = ("realnvp:float64", "uneven", "odd", "resume", "stream", "guide", "distill")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return both(tmp_path_factory.mktemp("two"), *CASES)


def test_two_processes_step_as_one(two):
    check_as_alone("realnvp:float64", two, 1e-9)


def test_rows_that_do_not_divide(two):
    # 70 rows to train on in batches of 32: each epoch ends with 3 in each process.
    check_as_alone("uneven", two, 1e-9)
    # 71: one counts twice.
    check_as_alone("odd", two, 0.1)


def test_both_go_on_from_one_checkpoint(two):
    first, second = (answers["resume"] for answers in two)
    assert first["same"]
    assert second["same"]
    assert first["state"] == second["state"]
    assert first["files"] == 2


def test_a_stream_is_shared(two):
    alone = answer("stream", ALONE, 0, None)
    first, second = (answers["stream"] for answers in two)
    assert first == {**second, "rows_a_second": first["rows_a_second"]}
    # The odd row out is left out, so losses differ a little.
    assert first["val"] == pytest.approx(alone["val"], abs=0.2)


def test_a_guide_draws_in_both(two):
    first, second = (answers["guide"] for answers in two)
    assert first["train"] == second["train"]
    assert first["state"] == second["state"]
    assert first["draw"] != second["draw"]
    assert abs(first["train"][-1]) < 0.5


def test_a_student_learns_in_both(two):
    first, second = (answers["distill"] for answers in two)
    assert first["val"] == second["val"]
    assert first["state"] == second["state"]
    assert first["val"][-1] > -0.2


@pytest.mark.slow
def test_all_flows_step_as_one(tmp_path):
    cases = [f"{name}:{dtype}" for name in FLOWS for dtype in ("float64", "float32")]
    answers = both(tmp_path, *cases)
    assert len(answers[0][cases[0]]["train"]) == STEPS
    for case in cases:
        check_as_alone(case, answers, 1e-9 if case.endswith("64") else 1e-4)
