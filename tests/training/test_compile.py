"""``torch.compile``: no break in the graph, the same numbers, and training under it."""

import copy
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.testing import randomize
from pyroflows.training.compiled import compiled_transforms, prepare_compiler

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)
# What torch's own compiler does: it calls what torch deprecates, and looks at gradients after a
# break in the graph.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings(
        "ignore:.*torch._prims_common.check.*:FutureWarning",
        "ignore::DeprecationWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    ),
]
SIZES = {"layers": 2, "hidden": (8, 8)}
FLOWS = {
    "nice": lambda: pf.nice(3, **SIZES),
    "realnvp": lambda: pf.realnvp(3, **SIZES),
    "maf": lambda: pf.maf(3, **SIZES),
    "maf_conditional": lambda: pf.maf(3, 2, **SIZES),
    "maf_positive": lambda: pf.maf(3, **SIZES, support=torch.distributions.constraints.positive),
    "maf_blocks": lambda: pf.maf(3, layers=1, hidden=(512, 512)),
    "iaf": lambda: pf.iaf(3, **SIZES),
    "nsf": lambda: pf.nsf(3, **SIZES),
    "nsf_autoregressive": lambda: pf.nsf(3, **SIZES, scheme="autoregressive"),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    prepare_compiler(torch.device("meta"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def given(flow):
    x = torch.rand(5, 3) + 0.1
    return x, torch.randn(5, 2) if flow.context_shape else None


def slow(flow, direction):
    return flow.fast not in (direction, "both")


@pytest.mark.parametrize("name", FLOWS)
def test_scoring_has_no_break(name):
    flow = FLOWS[name]()
    randomize(flow)
    x, c = given(flow)
    compiled = torch.compile(
        lambda x: flow(c, validate_args=False).log_prob(x), fullgraph=True, backend="aot_eager"
    )
    if slow(flow, "log_prob"):  # its gradient breaks the graph, its value does not
        flow.requires_grad_(False)
        torch.testing.assert_close(compiled(x), flow.log_prob(x, c))
        return
    results = []
    for score in (compiled, lambda x: flow.log_prob(x, c)):
        value = score(x)
        results.append([value, *torch.autograd.grad(value.sum(), list(flow.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_drawing_has_no_break(name):
    flow = FLOWS[name]()
    randomize(flow)
    _, c = given(flow)
    flow.requires_grad_(not slow(flow, "sample"))
    shape = () if flow.context_shape else (5,)
    x, log_q = torch.compile(
        lambda: flow.rsample_and_log_prob(shape, c), fullgraph=True, backend="aot_eager"
    )()
    torch.testing.assert_close(flow.log_prob(x, c), log_q, rtol=1e-3, atol=1e-4)
    if not slow(flow, "sample"):
        (x.sum() + log_q.sum()).backward()


def test_gradients_through_the_slow_direction_are_right():
    flow = FLOWS["iaf"]()
    randomize(flow)
    x, _ = given(flow)
    score = torch.compile(lambda x: flow.log_prob(x).sum(), backend="aot_eager")
    parameters = list(flow.parameters())
    for a, b in zip(
        torch.autograd.grad(score(x), parameters),
        torch.autograd.grad(flow.log_prob(x).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_fit_compiles():
    x = torch.randn(300, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    histories = []
    for compile in (False, True):
        torch.manual_seed(0)
        flow = pf.maf(2, layers=1, hidden=(8,))
        histories.append(
            pf.fit(flow, x, max_epochs=2, dropout=0.0, compile=compile, progress=False)
        )
        assert flow.sample((3,)).shape == (3, 2)
    assert histories[0].val == pytest.approx(histories[1].val, rel=1e-3)


@needs_compiler
def test_fit_guide_compiles():
    def model():
        with pyro.plate("sites", 2):
            pyro.sample("z", dist.Normal(3.0, 0.5))

    guide = pf.AutoFlow(model, layers=1, hidden=(8,))
    pf.fit_guide(model, guide, max_steps=300, compile=True, progress=False)
    assert guide.median()["z"].mean().item() == pytest.approx(3.0, abs=0.3)
    assert "forward_and_log_det" not in guide.flow.transform.__dict__


@pytest.fixture
def compiled_calls(monkeypatch):
    """The names of the methods called through what ``torch.compile`` gave."""
    calls = []

    def compile(function=None, **options):
        def run(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    return calls


@needs_compiler
def test_fit_guide_draws_through_what_was_compiled(compiled_calls):
    def model():
        with pyro.plate("sites", 2):
            pyro.sample("z", dist.Normal(3.0, 0.5))

    guide = pf.AutoFlow(model, layers=1, hidden=(8,))
    pf.fit_guide(model, guide, max_steps=5, compile=True, progress=False)
    assert compiled_calls.count("forward_with_state") >= 5


def test_all_ways_through_a_flow_are_compiled_and_none_of_a_detached_view(compiled_calls):
    flow = pf.iaf(3, layers=1, hidden=(8,))
    randomize(flow)
    with compiled_transforms([flow]):
        x = flow.rsample((4,))
        flow.sample((4,))
        flow.log_prob(x.detach().clone())
        assert compiled_calls == [
            "forward_with_state",
            "forward_and_log_det",
            "inverse_and_log_det",
        ]
        foreign = torch.randn(4, 3, requires_grad=True)
        flow().path_log_prob(foreign).sum().backward()
        copy.deepcopy(flow).log_prob(foreign)
        assert len(compiled_calls) == 3
    assert foreign.grad is not None
    assert all(p.grad is None for p in flow.parameters())
    assert "forward_with_state" not in flow.transform.__dict__


@needs_compiler
def test_distill_compiles():
    teacher = pf.maf(2, layers=1, hidden=(8,))
    randomize(teacher, gain=0.3)
    student = pf.student_of(teacher)
    history = pf.distill(teacher, student, max_steps=150, compile=True, progress=False)
    assert history.curves["reverse KL"][history.best] < 0.2


def test_compile_asks_for_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    flow = pf.maf(2, layers=1, hidden=(8,))
    with pytest.raises(ValueError, match="compile: expected a C\\+\\+ compiler"):
        pf.fit(flow, torch.randn(50, 2), compile=True, progress=False)
