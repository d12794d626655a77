"""Numbers at the edges of floating point: the ladders in full, integers, and flows that break."""

import functools

import pytest
import torch

import pyroflows as pf
from pyroflows import flows, testing
from pyroflows.testing.cases import is_unbounded
from pyroflows.testing.edges import sizes_of
from pyroflows.transforms import Chain

EXAMPLES = {name: example.make for name, example in flows.examples().items()}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
GAINS = {"untrained": 0.0, "usual": 0.5, "five times": 2.5}


def turned(make):
    """The flow whose transform is the inverse: its outermost layers are what others begin with."""
    flow = make()
    return pf.Flow(flow.transform.inv, shape=flow.event_shape, context=flow.context_shape)


UNBOUNDED = {name: make for name, make in EXAMPLES.items() if is_unbounded(make().support)}
FLOWS = EXAMPLES | {
    f"{name}.inv": functools.partial(turned, make) for name, make in UNBOUNDED.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOWS)
def test_no_number_breaks_a_density_or_its_gradient(name, dtype, gain):
    size = GAINS[gain] if is_unbounded(FLOWS[name]().support) else min(GAINS[gain], 1.0)
    ladder = {"gain": size, "sizes": sizes_of(DTYPES[dtype], steps=20)}
    testing.check_far_rows(FLOWS[name], DTYPES[dtype], **ladder)
    testing.check_far_gradients(FLOWS[name], DTYPES[dtype], **ladder)


def test_a_number_beyond_the_limits_is_scored_as_if_it_stood_there():
    flow = pf.maf(2, layers=1, hidden=(8,))
    pf.initialize(flow, 1e15 + 1e14 * torch.randn(100, 2))
    far = flow.log_prob(torch.tensor([[1e16, 1e15], [torch.inf, 1e15], [3.4e38, 1e15]]))
    assert far[0] > -1e4  # data of any size are no wild ones
    assert far[1] == far[2] < -1e18
    assert flow.log_prob(torch.full((1, 2), torch.inf)) == -torch.inf


@pytest.mark.parametrize("layer", [pf.transforms.ActNorm, pf.transforms.Whiten])
def test_limits_are_counted_in_the_units_of_the_data(layer):
    flow = pf.Flow(Chain([pf.transforms.LULinear(2), layer(2)]), shape=2)
    rows = 1e15 + 1e14 * torch.randn(100, 2)
    if layer is pf.transforms.ActNorm:
        pf.initialize(flow, rows)
    else:
        flow.transform[-1].set(torch.full((2,), 1e15), 1e14 * torch.eye(2))
    assert (flow.log_prob(rows) > -100).all()
    assert not flow.log_prob(torch.full((2,), torch.finfo(torch.float32).max)).isnan()


INTEGERS = {
    "maf": lambda: pf.quantized(pf.maf(3, layers=1, hidden=(8,)), bins=4),
    "maf_conditional": lambda: pf.quantized(pf.maf(3, 2, layers=1, hidden=(8,)), bins=4),
    "glow_class": lambda: pf.quantized(
        pf.glow((1, 4, 4), 2, levels=1, steps=1, channels=4), bins=4, dequantizer="variational"
    ),
    "image": lambda: pf.quantized(
        pf.multiscale_realnvp((1, 2, 2), (1, 2, 2), levels=1, steps=1, channels=4), bins=4
    ),
    "pixels": lambda: pf.pixelcnn((1, 3, 3), bins=4, channels=4, layers=2, mixture=2),
    "pixels_class": lambda: pf.pixelcnn((1, 3, 3), 2, bins=4, channels=4, layers=2, mixture=2),
    "pixels_categorical": lambda: pf.pixelcnn(
        (1, 3, 3), 2, bins=4, channels=4, layers=2, mixture="categorical"
    ),
}


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("name", INTEGERS)
def test_no_context_breaks_a_model_of_integers(name, gain):
    model = INTEGERS[name]()
    testing.randomize(model, GAINS[gain])
    x = torch.zeros(4, *model.event_shape)
    x[1] = 3
    context = None
    if model.context_shape:
        context = torch.randn(4, *model.context_shape)
        context[2], context[3] = torch.finfo(torch.float32).max, -torch.inf
        context.requires_grad_()
    seed = {} if name.startswith("pixels") else {"seed": 0}
    scores = model.log_prob(x, context, **seed)
    assert not scores.isnan().any()
    assert (scores < torch.inf).all()
    found = torch.autograd.grad(
        scores[scores.isfinite()].sum(),
        [*model.parameters(), *([] if context is None else [context])],
        allow_unused=True,
    )
    assert all(g is None or g.isfinite().all() for g in found)
    for wild in (torch.inf, torch.nan, -1.0, 3.4e38):
        x[0] = wild
        with pytest.raises(ValueError, match="value"):
            model.log_prob(x, context, **seed)


class Unlimited(Chain):
    """Takes every number as it is."""

    def within_limits(self, y):
        return y


class SeesTheLargest(Chain):
    """Scales by what the batch holds."""

    def inverse_and_log_det(self, y, context=None):
        largest = y.abs().max().clamp(min=10).log()
        return super().inverse_and_log_det(y * 10 / largest.exp(), context)


def broken(chain):
    inner = pf.maf(2, layers=1, hidden=(8,)).transform.parts[:-1]
    return lambda: pf.Flow(chain(inner), shape=2)


@pytest.mark.parametrize(
    ("law", "chain", "message"),
    [
        ("far_rows", Unlimited, "log_prob is nan for one of the rows"),
        ("far_rows", SeesTheLargest, "log_prob beside wild rows: off by"),
        ("far_gradients", Unlimited, "gradient in 'data' with wild rows: .* are not finite"),
    ],
)
def test_the_laws_find_a_flow_that_breaks(law, chain, message):
    testing.LAWS[law](broken(Chain), torch.float32)
    with pytest.raises(AssertionError, match=message):
        testing.LAWS[law](broken(chain), torch.float32)


class Offset(Chain):
    """Goes a long way and back."""

    def inverse_and_log_det(self, y, context=None):
        return super().inverse_and_log_det(y + 1e6 - 1e6, context)


def test_rounding_is_told_from_a_formula_that_loses_digits():
    testing.check_rounding(broken(Chain))
    with pytest.raises(AssertionError, match="round trips from the base: .* of 100 rows lose more"):
        testing.check_rounding(broken(Offset))


def test_a_density_says_where_rounding_spoils_it():
    torch.manual_seed(0)
    flow = pf.maf(3, layers=4, hidden=(16,))
    x = torch.randn(200, 3)
    assert (flow.rounding(x) < 1e-4).all()
    testing.randomize(flow, 5.0)
    x = flow.sample((200,))
    exact = flow.double().log_prob(x.double())
    assert (flow.rounding(x.double()) == 0).all()
    flow.float()
    off = (flow.log_prob(x) - exact).abs()
    torch.testing.assert_close(flow.rounding(x), off.double(), rtol=1e-3, atol=1e-3)
    assert off.median() > 1


def test_rounding_takes_a_context_and_wild_rows():
    flow = pf.maf(2, 3, layers=1, hidden=(8,))
    x = torch.tensor([[0.0, 1.0], [torch.inf, -torch.inf]])
    found = flow.rounding(x, torch.randn(2, 3))
    assert found[0] < 1e-4
    assert not found.isnan().any()
