"""Many rows go in pieces where there is no graph: the same numbers, in less memory."""

import itertools

import pyro.distributions as dist
import pytest
import torch
from torch import Size, nn

import pyroflows as pf
from pyroflows._pyro.validation import validates_args
from pyroflows.distributions import flow_distribution
from pyroflows.distributions.pieces import pieces, rows_at_once
from pyroflows.testing.cases import contexts, inside, prepared, randn, require_close
from pyroflows.transforms import Chain

EXAMPLES = pf.flows.examples()
MOST = 20  # rows in a piece, in these tests
F64 = torch.float64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(flow_distribution, "rows_at_once", lambda *_: MOST)


def watched(flow, monkeypatch):
    """How many rows each later pass through a flow's transform takes."""
    rows = []

    def counting(run):
        def counted(value, context=None):
            found = run(value, context)
            rows.append(found[1].numel())
            return found

        return counted

    for name in ("forward_and_log_det", "inverse_and_log_det"):
        run = getattr(flow.transform, name)
        monkeypatch.setattr(flow.transform, name, counting(run), raising=False)
    return rows


def require_pieces(rows, total):
    assert max(rows) <= MOST
    assert sum(rows) == total
    rows.clear()


@pytest.mark.parametrize("name", EXAMPLES)
def test_pieces_score_and_draw_as_the_whole_does(name, monkeypatch):
    """Under one distribution, a batch of them, and draws of a batch; within rounding."""
    flow = prepared(EXAMPLES[name].make, F64)
    rows = watched(flow, monkeypatch)
    for sample, batch in itertools.product([(25,), (3, 2)], [(), (11,), (2, 1, 5)]):
        context = contexts(flow.context_shape, batch, F64)
        law = flow(context) if context is not None else flow().expand(Size(batch))
        x = inside(flow.support, flow.event_shape, (*sample, *batch), F64, 3)
        torch.manual_seed(0)
        drawn, log_prob = (t.detach() for t in law.rsample_and_log_prob(sample))
        scored = law.log_prob(x).detach()
        rows.clear()
        with torch.no_grad():
            require_close(law.log_prob(x), scored, 1e-9, "scores in pieces")
            require_pieces(rows, scored.numel())
            torch.manual_seed(0)
            for now, whole in zip(law.rsample_and_log_prob(sample), (drawn, log_prob), strict=True):
                require_close(now, whole, 1e-9, "draws in pieces")
            require_pieces(rows, scored.numel())


@pytest.mark.parametrize("given", [(), (1,), (30,), (4, 1), (4, 30), (1, 30)], ids=str)
@pytest.mark.parametrize("shape", [(30,), (4, 30), (1,), (3, 4, 1)], ids=str)
def test_values_and_contexts_broadcast_in_pieces(given, shape, monkeypatch):
    flow = prepared(EXAMPLES["nsf_conditional"].make, F64)
    rows = watched(flow, monkeypatch)
    context, x = contexts(flow.context_shape, given, F64), randn((*shape, 3), F64, 1)
    expected = flow.log_prob(x, context).detach()
    rows.clear()
    with torch.no_grad():
        require_close(flow.log_prob(x, context), expected, 1e-9, "scores in pieces")
    require_pieces(rows, expected.numel())


class BatchOfBases(nn.Module):
    """Normal bases, a location each."""

    def forward(self):
        return dist.Normal(randn((30, 3), F64, 7), torch.ones(3, dtype=F64)).to_event(1)


def bound_to_many_contexts():
    layer = prepared(EXAMPLES["maf_conditional"].make, F64).transform
    return pf.Flow(Chain([layer.condition(randn((30, 2), F64, 1))]), shape=3)


@pytest.mark.parametrize("kind", ["bases", "contexts"])
def test_a_batch_inside_a_flow_is_not_torn_apart(kind):
    flow = bound_to_many_contexts()
    if kind == "bases":
        flow = pf.Flow(prepared(EXAMPLES["maf"].make, F64).transform, BatchOfBases(), shape=3)
    x = randn((2, 30, 3), F64, 2)
    expected = flow.double().log_prob(x).detach()
    with torch.no_grad():
        require_close(flow.log_prob(x), expected, 1e-9, "scores")


def test_a_graph_and_torch_func_see_all_rows(monkeypatch):
    flow = prepared(EXAMPLES["realnvp"].make, F64)
    x = randn((40, 3), F64, 1)
    rows = watched(flow, monkeypatch)
    flow.log_prob(x)
    with torch.no_grad():
        torch.func.vmap(flow.log_prob)(x[None])
    assert rows == [40] * 2


@torch.no_grad()
def test_a_compiler_sees_all_rows():
    flow = prepared(EXAMPLES["realnvp"].make, F64)
    x, graphs = randn((40, 3), F64, 1), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    validates = validates_args()
    compiled = torch.compile(flow.log_prob, backend=backend)  # the first one changes that
    require_close(compiled(x), flow.log_prob(x), 1e-9, "compiled scores")
    torch.distributions.Distribution.set_default_validate_args(validates)
    assert graphs
    assert not any("new_empty" in graph.code for graph in graphs)


@torch.no_grad()
def test_draws_are_remembered_over_all_pieces(monkeypatch):
    flow = prepared(EXAMPLES["iaf"].make, F64)
    law = flow()
    x, log_prob = law.rsample_and_log_prob((50,))
    rows = watched(flow, monkeypatch)
    assert torch.equal(law.log_prob(x), log_prob)
    assert torch.equal(law.expand((4, 50)).log_prob(x), log_prob.expand(4, 50))
    assert rows == []


@pytest.mark.parametrize("batch", [(20,), (3, 5), (5, 3), (100, 2), (2, 100), (4, 1, 9), (9, 9, 9)])
@pytest.mark.parametrize("most", [1, 7, 20, 10_000])
def test_pieces_cover_a_batch_once(batch, most):
    times = torch.zeros(batch)
    for piece in pieces(batch, most):
        times[piece] += 1
        assert 0 < times[piece].numel() <= most
    assert (times == 1).all()


def test_pieces_grow_with_no_event():
    """A row at least, and at most so many numbers."""
    assert rows_at_once(Size([6]), CPU) == 8000
    assert rows_at_once(Size([3, 32, 32]), CPU) == 41
    assert rows_at_once(Size([3, 4096, 4096]), CPU) == 1
    assert rows_at_once(Size([6]), torch.device("cuda")) > 100_000
