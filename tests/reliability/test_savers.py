"""Several who save into one folder at once: none raises, and one whole model is there."""

import os
import sys
import threading
import time

import pytest
import torch

import pyroflows as pf

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
ROUNDS = [
    pytest.param(5, id="5 rounds"),
    pytest.param(200, id="200 rounds", marks=pytest.mark.slow),
]
X = torch.zeros(3, 2)


def flows_of_several_kinds(count):
    """Different flows: their tensors have other names, shapes and dtypes."""
    made = [
        pf.maf(2, layers=1, hidden=(8,)),
        pf.nice(2, layers=2, hidden=(16,)).double(),
        pf.nsf(2, layers=1, hidden=(8,), bins=4),
        pf.realnvp(2, layers=3, hidden=(8,)),
    ]
    return [made[i % len(made)] for i in range(count)]


def score(flow):
    with torch.no_grad():
        dtype = next(flow.parameters()).dtype
        return flow().log_prob(X.to(dtype)).double().tolist()


def save_apart(flow, folder, times):
    """Save in a process of its own; what it raised goes to stderr, its status says so."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in range(times):
                pf.save(flow, folder)
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    return child


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("savers", [2, 4])
def test_processes_that_save_at_once_leave_one_whole_model(savers, rounds, tmp_path):
    flows = flows_of_several_kinds(savers)
    known = [score(flow) for flow in flows]
    pf.save(flows[0], tmp_path)
    for _ in range(rounds):
        children = [save_apart(flow, tmp_path, 3) for flow in flows]
        running = dict.fromkeys(children)
        while running:
            assert score(pf.load(tmp_path)) in known  # while they write
            for child in list(running):
                if os.waitpid(child, os.WNOHANG)[0]:
                    del running[child]
        assert score(pf.load(tmp_path)) in known
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_a_saver_that_fails_says_so(tmp_path):
    """The test above would see an exception of a child."""
    (tmp_path / "file").write_text("")
    child = save_apart(pf.maf(2, layers=1, hidden=(8,)), tmp_path / "file", 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize(
    "rounds",
    [pytest.param(3, id="3 rounds"), pytest.param(100, id="100 rounds", marks=pytest.mark.slow)],
)
def test_threads_that_save_at_once_leave_one_whole_model(rounds, tmp_path):
    flows = [pf.load(pf.save(flow, tmp_path)) for flow in flows_of_several_kinds(8)]
    known = [score(flow) for flow in flows]
    for _ in range(rounds):
        errors = []

        def run(flow, errors=errors):
            try:
                pf.save(flow, tmp_path)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(flow,)) for flow in flows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert score(pf.load(tmp_path)) in known


def test_the_last_save_is_what_loads(tmp_path):
    """A saver waits for another one, and then replaces what that wrote."""
    from pyroflows._files.atomic import locked

    first, last = flows_of_several_kinds(2)
    pf.save(first, tmp_path)
    thread = threading.Thread(target=pf.save, args=(last, tmp_path))
    with locked(tmp_path):
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        assert score(pf.load(tmp_path)) == score(first)  # readers wait for nobody
    thread.join()
    assert score(pf.load(tmp_path)) == score(last)


def test_a_folder_in_use_says_so_to_who_will_not_wait(tmp_path):
    from pyroflows._files.atomic import locked

    message = "another process or thread"
    with locked(tmp_path), pytest.raises(TimeoutError, match=message), locked(tmp_path, wait=False):
        pass


def test_a_folder_that_cannot_be_locked_is_locked_by_a_file_in_it(tmp_path, monkeypatch):
    import fcntl

    from pyroflows._files.atomic import LOCK, locked

    def refuse(descriptor, operation):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(9, "Bad file descriptor")  # as some network drives answer
        return original(descriptor, operation)

    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(TimeoutError), locked(tmp_path, wait=False):
            pass
