"""Flows under stress: weights and rows out of range, many threads."""

import copy
import threading

import pytest
import torch

from pyroflows import flows
from pyroflows.testing.cases import is_unbounded

pytestmark = pytest.mark.slow
EXAMPLES = flows.examples()


def built(name):
    """A flow in float32 and contexts for so many rows."""
    torch.manual_seed(0)
    flow = EXAMPLES[name].make().float().eval()

    def contexts(rows):
        return torch.randn(rows, *flow.context_shape) if flow.context_shape else None

    return flow, contexts


def larger(flow, factor):
    """The flow with fan-in scaled random weights, so many times the usual size."""
    with torch.no_grad():
        for parameter in flow.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.add_(factor * 0.2 * torch.randn_like(parameter) / fan_in**0.5)
    return flow


def rows_of(flow, contexts, count):
    return flow.sample(() if contexts is not None else (count,), contexts)


@pytest.mark.parametrize("name", EXAMPLES)
def test_large_weights_and_rows_stay_finite(name):
    """Finite or minus infinity, never NaN, and single wild rows leave all others as they were."""
    flow, contexts = built(name)
    # Where data are bounded the exponential of a moderate number overflows.
    larger(flow, 5 if is_unbounded(flow.support) else 1)
    context = contexts(64)
    with torch.no_grad():
        x = rows_of(flow, context, 64)
        good = x.isfinite().flatten(1).all(dim=1)
        assert good.float().mean() > 0.9
        x = torch.where(good.reshape(-1, *[1] * (x.dim() - 1)), x, x[good][:1])
        alone = flow.log_prob(x, context)
        assert alone.isfinite().float().mean() > 0.9
        for size in (1e2, 1e4, 1e6):
            wild = x.clone()
            wild[::8] = size * torch.sign(torch.randn_like(wild[::8]))
            inside = flow.support.check(wild)
            wild = torch.where(inside.reshape(-1, *[1] * (x.dim() - 1)), wild, x)
            scores = flow(context, validate_args=False).log_prob(wild)
            assert not scores.isnan().any()
            others = torch.ones(64, dtype=torch.bool)
            others[::8] = False
            torch.testing.assert_close(scores[others], alone[others], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", EXAMPLES)
def test_four_threads_share_a_flow(name):
    """Each thread gets the scores that it would get alone, draws and their densities that agree."""
    flow, contexts = built(name)
    context = contexts(32)
    work = []
    for seed in range(4):
        torch.manual_seed(seed)
        x = rows_of(flow, context, 32).detach()
        work.append((x, flow.log_prob(x, context).detach()))
    twin = copy.deepcopy(flow)
    problems = []

    def run(x, expected):
        try:
            for _ in range(25):
                torch.testing.assert_close(flow.log_prob(x, context).detach(), expected)
                shape = () if context is not None else (32,)
                drawn, log_prob = flow.rsample_and_log_prob(shape, context)
                other = twin.log_prob(drawn.detach(), context)
                torch.testing.assert_close(log_prob, other, rtol=1e-3, atol=1e-2)
                distribution = flow(context)
                drawn = distribution.rsample(shape)
                other = twin.log_prob(drawn.detach(), context)
                torch.testing.assert_close(
                    distribution.log_prob(drawn), other, rtol=1e-3, atol=1e-2
                )
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=item) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    assert not problems, problems[0]
