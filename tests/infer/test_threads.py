"""Models in several threads: one at a time, and refused where that would take long."""

import contextlib
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows._pyro import threads

SMALL = {"layers": 1, "hidden": (8,)}


def model(scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, scale))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.5, 1.0, 1.5]))


def rows_model(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 0])


class Encoder(nn.Linear):
    """Of a row."""

    def __init__(self):
        super().__init__(1, 2)


X = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))


def joint(guide):
    return guide.log_density((), {})(torch.zeros(1))


CALLS = {
    "fit_guide": lambda guide: pf.fit_guide(model, guide, max_steps=3, progress=False),
    "NeuTra.run": lambda guide: pf.NeuTra(model, guide).run(
        num_samples=4, warmup_steps=2, progress=False
    ),
    "importance_weights": lambda guide: pf.report(model, guide, num_samples=20),
    "to_arviz": lambda guide: pf.to_arviz(model, guide, num_samples=20),
    "AutoFlow.setup": lambda _: pf.AutoFlow(model, **SMALL).setup(),
    "FlowGuide.sample_posterior": lambda guide: guide.median(),
    "LogDensity.run": joint,
    "Guide.__call__": lambda guide: guide(),
    "AutoAmortizedFlow.setup": lambda _: pf.AutoAmortizedFlow(rows_model, Encoder(), **SMALL).setup(
        X
    ),
}


@contextlib.contextmanager
def in_another_thread(mark, name="fit_guide"):
    """A call there that has not ended yet."""
    begun, may_end = threading.Event(), threading.Event()

    @mark
    def call():
        begun.set()
        may_end.wait(60)

    call.__qualname__ = name
    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(60)
    try:
        yield may_end
    finally:
        may_end.set()
        thread.join(60)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_refused_while_another_thread_trains(name):
    guide = pf.AutoFlow(model, **SMALL).setup()
    message = f"{name}: another thread is in .*call, and Pyro's handlers .* are one for the process"
    with in_another_thread(threads.runs_models_long), pytest.raises(RuntimeError, match=message):
        CALLS[name](guide)
    CALLS[name](guide)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_while_another_thread_looks(name):
    guide = pf.AutoFlow(model, **SMALL).setup()
    done = []
    thread = threading.Thread(target=lambda: done.append(CALLS[name](guide)))
    with in_another_thread(threads.runs_models):
        thread.start()
        thread.join(0.3)
        assert not done
        assert thread.is_alive()
    thread.join(60)
    assert len(done) == 1


def test_threads_that_train_at_once_are_right_or_refused():
    """Each guide is of its own model, or its thread was told."""
    found, refused = {}, []

    def run(place):
        def own():
            pyro.sample(f"z{place}", dist.Normal(3.0 * place, 0.5))

        guide = pf.AutoFlow(own, **SMALL)
        try:
            pf.fit_guide(own, guide, max_steps=100, progress=False)
            found[place] = guide.median()[f"z{place}"].item()
        except RuntimeError as error:
            refused.append(str(error))

    at_once = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join(120)
    assert found
    assert len(found) + len(refused) == 4
    assert all("another thread is in" in message for message in refused)
    assert all(abs(value - 3.0 * place) < 0.2 for place, value in found.items())
    assert not pyro.poutine.runtime._PYRO_STACK


def test_threads_fit_and_distil_densities_at_once():
    """They run no model."""
    problems, better = [], []

    def run(place):
        try:
            x = 3.0 * place + torch.randn(400, 2, generator=torch.Generator().manual_seed(place))
            flow = pf.maf(2, **SMALL)
            pf.fit(flow, x, max_epochs=5, progress=False)
            student = pf.student_of(flow)
            pf.distill(flow, student, max_steps=5, progress=False)
            with torch.no_grad():
                better.append(
                    flow.log_prob(x).mean() > -3.2 and student.sample((9,)).isfinite().all()
                )
        except Exception as error:
            problems.append(error)

    at_once = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join(120)
    assert not problems, problems[0]
    assert all(better)
    assert len(better) == 3
