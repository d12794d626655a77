"""Families say what they are: by name, by their inverse's first order, in a saved folder."""

from dataclasses import dataclass

import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.flows import LinearRationalSpline
from pyroflows.saving.values import decode, encode
from pyroflows.transforms import Additive, Affine, Family, RationalQuadraticSpline
from pyroflows.transforms.families import families, family_from

FLOAT64 = torch.float64


@dataclass(frozen=True)
class Soft(Family):
    """y = x + size * softplus-like bend: increasing, and no inverse in the same family."""

    size: float = 1.0
    params = 1

    def forward(self, x, theta):
        t = self.size * theta[..., 0].tanh() / 2
        y = x + t * x.tanh()
        return y, (1 + t * (1 - x.tanh().square())).log()

    def inverse(self, y, theta):
        x = y
        for _ in range(60):
            x = y - (self.forward(x, theta)[0] - x)
        return x, -self.forward(x, theta)[1]


EACH = {name: kind() for name, kind in families().items()} | {"own": Soft()}


@pytest.mark.parametrize("family", EACH.values(), ids=EACH)
def test_first_order_inverse_has_an_error_of_second_order(family):
    generator = torch.Generator().manual_seed(0)
    z = torch.linspace(-4, 4, 400, dtype=FLOAT64)
    direction = torch.randn(400, family.params, generator=generator, dtype=FLOAT64)
    errors = []
    for size in (1e-2, 1e-3):
        theta = size * direction
        about = family.forward(z, family.first_order_inverse(theta))[0]
        errors.append((about - family.inverse(z, theta)[0]).abs().mean().item())
    assert errors[1] <= errors[0] / 50


@pytest.mark.parametrize("family", EACH.values(), ids=EACH)
def test_gaussian_stays_gaussian_where_the_family_says_so(family):
    """A family that keeps Gaussians is affine in x, and no other is."""
    theta = torch.full((3, family.params), 0.7, dtype=FLOAT64)
    theta[:, ::2] *= -1
    a, b, c = family.forward(torch.tensor([-1.0, 0.5, 2.0], dtype=FLOAT64), theta)[0]
    assert family.keeps_gaussian == bool(((b - a) - (c - b)).abs() < 1e-9)


def test_names_find_families_and_their_sizes():
    assert family_from("affine") == Affine()
    assert family_from("affine", bound=2.0, bins=None) == Affine(bound=2.0)
    assert family_from("spline", bins=4) == RationalQuadraticSpline(bins=4)
    assert family_from(Soft(2.0), bound=None) == Soft(2.0)
    assert "" not in families()


class OnInterval(Additive):
    support = constraints.unit_interval


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("afine", {}, "family: expected one of 'additive', 'affine', .*, or a Family, got 'afine'"),
        (Affine, {}, "family: expected one of .*, or a Family, got <class"),
        (3, {}, "or a Family, got 3"),
        ("additive", {"bound": 2.0}, "bound: expected None, got 2.0; the family 'additive' has no"),
        ("affine", {"bound": -1.0}, "bound: expected a positive number"),
        (Affine(), {"bound": 2.0}, "bound: expected None beside a family that has its own, Affine"),
        (OnInterval(), {}, "family: expected one on all real numbers, got OnInterval.* on Interv"),
    ],
)
def test_a_family_that_will_not_do(family, sizes, message):
    with pytest.raises(ValueError, match=message):
        family_from(family, **sizes)


@pytest.mark.parametrize("family", EACH.values(), ids=EACH)
def test_a_family_is_written_and_read(family):
    assert decode(encode(family, "family"), "family") == family


def test_ours_is_written_by_name_and_read_by_the_class_of_older_folders():
    assert encode(Affine(2.0), "f") == {"family": "affine", "arguments": {"bound": 2.0}}
    old = {"family": "RationalQuadraticSpline", "arguments": {"bins": 4, "bound": 3.0}}
    assert decode(old, "f") == RationalQuadraticSpline(4, 3.0)


def test_one_of_your_own_says_where_it_comes_from():
    written = encode(Soft(2.0), "f")
    assert written["family"] == f"{__name__}:Soft"
    with pytest.raises(ValueError, match="f: the family 'some_flows:Soft' is not defined; import"):
        decode({**written, "family": "some_flows:Soft"}, "f")
    with pytest.raises(ValueError, match="f: expected one of .*, got 'soft'"):
        decode({**written, "family": "soft"}, "f")


class Forgetful(Additive):
    def __init__(self, size):
        pass


def test_one_whose_arguments_cannot_be_told_is_not_written():
    with pytest.raises(ValueError, match="f: cannot tell the arguments of Forgetful.*dataclass"):
        encode(Forgetful(3), "f")
    assert pf.transforms.Family.name == ""


NAMED = {
    "maf": lambda **a: pf.maf(3, layers=2, hidden=(8,), **a),
    "iaf": lambda **a: pf.iaf(3, layers=2, hidden=(8,), **a),
    "realnvp": lambda **a: pf.realnvp(3, layers=2, hidden=(8,), **a),
    "nsf": lambda **a: pf.nsf(3, layers=2, hidden=(8,), scheme="autoregressive", **a),
}


@pytest.mark.parametrize("family", EACH.values(), ids=EACH)
@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_every_builder_takes_every_family_and_saves_it(make, family, tmp_path):
    flow = make(family=family)
    pf.testing.randomize(flow)
    kinds = {layer.family for layer in flow.modules() if hasattr(layer, "family")}
    assert kinds == {family}
    again = pf.load(pf.save(flow, tmp_path))
    x = flow.sample((5,))
    assert torch.equal(again.log_prob(x), flow.eval().log_prob(x))


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_a_name_is_the_family_it_names(make):
    for name, family in families().items():
        torch.manual_seed(0)
        by_name = make(family=name)
        torch.manual_seed(0)
        assert repr(by_name) == repr(make(family=family()))
    with pytest.raises(ValueError, match="family: expected one of .*'spline', or a Family, got"):
        make(family="spliine")


def test_bounds_are_those_of_the_family_by_name():
    assert "bound=1.6" in repr(pf.maf(2, layers=1))
    assert "bound=5.0" in repr(pf.maf(2, layers=1, family="spline"))
    assert "bins=8, bound=5.0" in repr(pf.nsf(2, layers=1))
    by_name = pf.nsf(2, layers=1, bound=2.0, family=LinearRationalSpline.name)
    assert "bins=8, bound=2.0" in repr(by_name)
    with pytest.raises(ValueError, match="bins: expected None, got 4; the family 'affine' has"):
        pf.nsf(2, bins=4, family="affine")


def test_a_linear_rational_spline_is_fitted():
    x = torch.randn(400, 2).exp()
    flow = pf.nsf(2, family="linear_rational_spline", layers=2, hidden=(16,))
    before = flow.log_prob(x).mean()
    pf.fit(flow, x, max_epochs=5, progress=False, seed=0)
    assert flow.log_prob(x).mean() > before + 0.5


def test_a_flow_says_its_dtype_and_its_parts():
    flow = pf.maf(2, layers=1, hidden=(8,))
    assert (flow.dtype, flow.device) == (torch.float32, torch.device("cpu"))
    assert flow.double().dtype == FLOAT64
    assert pf.quantized(flow, bins=4).dtype == FLOAT64
    assert flow.to("meta").device == torch.device("meta")
    assert [type(part).__name__ for part in flow.parts] == ["Inverse", "Inverse", "Standardize"]
    alone = pf.Flow(pf.transforms.Permute([1, 0]), shape=2)
    assert alone.parts == [alone.transform]


@pytest.mark.parametrize("size", [0.0, 1.0, 100.0, 1e4])
def test_a_splines_bins_are_shares_by_softmax(size):
    spline = RationalQuadraticSpline(bins=5, bound=2.0, min_bin=0.1)
    raw = (size * torch.randn(50, 5, dtype=torch.float64)).requires_grad_()
    shares = torch.softmax(raw, dim=-1)
    widths = 4.0 * (0.1 / 5 + 0.9 * shares)
    found = spline.knots(raw).diff()
    torch.testing.assert_close(found, widths, rtol=1e-12, atol=1e-12)
    weights = torch.randn(50, 5, dtype=torch.float64)
    (got,), (expected,) = (
        torch.autograd.grad((weights * value).sum(), raw) for value in (found, widths)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
