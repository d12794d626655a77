"""Every law on every example flow, and on flows put together by hand."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows import testing
from pyroflows.flows import examples
from pyroflows.nets import MADE, MLP
from pyroflows.transforms import (
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    Chain,
    Coupling,
    LULinear,
    Permute,
    RationalQuadraticSpline,
)

EXAMPLES = examples()


class LearnedBase(nn.Module):
    """A normal base whose location and scale are trained."""

    def __init__(self, features):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def affine_layer(features, context=0):
    return Autoregressive(MADE(features, 2, hidden=(16,), context=context), Affine())


def with_actnorm():
    layers = [ActNorm(3), affine_layer(3), LULinear(3), ActNorm(3)]
    return pf.Flow(Chain(layers).inv, shape=3)


def with_learned_base():
    return pf.Flow(Chain([affine_layer(2), LULinear(2)]), LearnedBase(2), shape=2)


def with_heavy_tails():
    base = dist.StudentT(torch.full((2,), 4.0), torch.zeros(2), torch.ones(2)).to_event(1)
    return pf.Flow(affine_layer(2).inv, base, shape=2)


def with_nested_inverses():
    spline = RationalQuadraticSpline(bins=4)
    coupling = Coupling(
        MLP(1, 2 * spline.params, hidden=(16,), context=2),
        spline,
        torch.tensor([True, False, False]),
    )
    inner = Chain([Permute([2, 0, 1]), coupling]).inv
    chain = Chain([inner, affine_layer(3, 2).inv, LULinear(3).inv]).inv
    return pf.Flow(Chain([chain, Chain([])]), shape=3, context=2)


def with_more_than_one_batch_dimension_of_context():
    net = MLP(1, 1, hidden=(8,), context=1, activation="tanh")
    mask = torch.tensor([False, True])
    return pf.Flow(Chain([Coupling(net, Additive(), mask), LULinear(2)]), shape=2, context=(1,))


HAND_MADE = {
    "actnorm": (with_actnorm, "log_prob"),
    "learned_base": (with_learned_base, "sample"),
    "heavy_tails": (with_heavy_tails, "log_prob"),
    "nested_inverses": (with_nested_inverses, "sample"),
    "context_shape": (with_more_than_one_batch_dimension_of_context, "both"),
}
FLOWS = {name: (example.make, example.fast) for name, example in EXAMPLES.items()} | HAND_MADE
NAMES = {torch.float64: "float64", torch.float32: "float32"}


def cases():
    for name, (make, _) in FLOWS.items():
        for law in testing.LAWS:
            for dtype, laws in (
                (torch.float64, testing.FLOAT64_LAWS),
                (torch.float32, testing.FLOAT32_LAWS),
            ):
                if law in laws:
                    marks = pytest.mark.integration if law in testing.SLOW_LAWS else ()
                    case = f"{name}-{law}-{NAMES[dtype]}"
                    yield pytest.param(law, make, dtype, id=case, marks=marks)


@pytest.mark.parametrize(("law", "make", "dtype"), list(cases()))
def test_law(law, make, dtype):
    testing.LAWS[law](make, dtype)


@pytest.mark.parametrize("name", list(FLOWS))
def test_declared_direction(name):
    make, fast = FLOWS[name]
    assert make().fast == fast


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maf", "iaf", "realnvp", "nsf"])
def test_a_million_rows(name):
    testing.check_many_rows(EXAMPLES[name].make, torch.float32, rows=1_000_000)


@pytest.mark.parametrize("name", list(FLOWS))
def test_same_arguments_give_the_same_architecture(name):
    make, _ = FLOWS[name]
    one, other = make().state_dict(), make().state_dict()
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    for key, value in one.items():
        if not value.is_floating_point():
            assert torch.equal(value, other[key]), key


def test_check_flow_takes_a_factory_or_a_flow():
    flow = pf.maf(2, layers=1, hidden=(8,))
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    testing.check_flow(flow, fast="log_prob", laws=["round_trip", "state", "large_weights"])
    testing.check_flow(lambda: pf.nice(2, layers=2, hidden=(8,)), laws=["log_det"])
    for key, value in flow.state_dict().items():
        assert torch.equal(value, before[key])


def test_check_flow_leaves_a_flow_that_its_factory_returns_again_and_again():
    flow = pf.maf(2, layers=1, hidden=(8,))
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    testing.check_flow(lambda: flow, laws=["repr", "state", "every_feature_moves", "large_weights"])
    testing.check_density_integrates_to_one(lambda: flow)
    for key, value in flow.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])


def one_layer_frozen():
    flow = pf.nice(2, layers=2, hidden=(8,))
    flow.transform[0].requires_grad_(False)
    return flow


LITTLE_TO_TRAIN = {
    "no parameters": lambda: pf.Flow(pf.transforms.Permute([1, 0]), shape=(2,)),
    "one layer frozen": one_layer_frozen,
    "all frozen": lambda: pf.nice(2, layers=2, hidden=(8,)).requires_grad_(False),
}


@pytest.mark.parametrize("name", LITTLE_TO_TRAIN)
def test_flows_with_little_to_train_keep_the_laws(name):
    moves = {"every_feature_moves"} if name == "no parameters" else set()  # it does copy
    testing.check_flow(LITTLE_TO_TRAIN[name], laws=sorted(testing.LAWS.keys() - moves - {"nuts"}))


def test_check_flow_names_the_law_that_is_broken():
    with pytest.raises(AssertionError, match="fast: expected 'both', got 'sample'"):
        testing.check_flow(pf.iaf(2, layers=1, hidden=(8,)), fast="both", laws=[])
    with pytest.raises(ValueError, match="make_flow: expected a flow .*got FlowDistribution"):
        testing.check_flow(pf.iaf(2, layers=1, hidden=(8,))())
    with pytest.raises(ValueError, match="laws: expected names from"):
        testing.check_flow(pf.iaf(2, layers=1, hidden=(8,)), laws=["no_such_law"])
    with pytest.raises(AssertionError, match="every_feature_moves, torch.float64: data feature 0"):
        testing.check_flow(pf.nice(2, layers=1, hidden=(8,)), laws=["every_feature_moves"])


def test_check_flow_finds_a_copy_that_a_fitted_flow_scales():
    flow = pf.nice(2, layers=1, hidden=(8,))
    flow.transform[1].log_scale.data.fill_(0.3)
    pf.initialize(flow, 5 + 2 * torch.randn(100, 2))
    with pytest.raises(AssertionError, match="every_feature_moves, torch.float64: data feature 0"):
        testing.check_flow(flow, laws=["every_feature_moves"])
    assert flow.transform[-1].loc.min() > 3  # the flow that was given is left as it was


class Faulty(pf.FlowTransform):
    """Scales by two; each test breaks one thing."""

    def forward_and_log_det(self, x, context=None):
        return 2 * x, x.new_full(x.shape[:-1], x.shape[-1]) * torch.tensor(2.0, dtype=x.dtype).log()

    def inverse_and_log_det(self, y, context=None):
        return y / 2, y.new_full(y.shape[:-1], -y.shape[-1]) * torch.tensor(
            2.0, dtype=y.dtype
        ).log()


def test_check_transform_accepts_what_is_right():
    testing.check_transform(Faulty(), 3)
    testing.check_transform(affine_layer(3, 2), 3, context=2)
    testing.check_transform(pf.transforms.ToSupport(torch.distributions.constraints.simplex, 3), 2)
    positive = pf.transforms.ToSupport(torch.distributions.constraints.positive, 3)
    testing.check_transform(positive.inv, 3)


class WrongInverse(Faulty):
    def inverse_and_log_det(self, y, context=None):
        return y / 2 + 1e-6, super().inverse_and_log_det(y)[1]


class WrongSign(Faulty):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x)
        return y, -log_det

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y)
        return x, -log_det


class NoBatch(Faulty):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x)
        return y, log_det.sum()


class CutGraph(Faulty):
    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y)
        return x.detach(), log_det


class UnusedParameter(Faulty):
    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(2))
        self.used = nn.Parameter(torch.zeros(3))

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x)
        return y + self.used, log_det

    def inverse_and_log_det(self, y, context=None):
        return super().inverse_and_log_det(y - self.used)


class WrongClaim(Faulty):
    volume_preserving = True


class MovesWhatItKeeps(Coupling):
    """A shear of a feature that is said to be kept, by the one that is moved."""

    def __init__(self):
        super().__init__(MLP(2, 2, hidden=(32,)), Affine(), torch.tensor([True, True, False]))

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return torch.cat([y[..., :1] + 0.1 * y[..., 2:], y[..., 1:]], dim=-1), log_det

    def inverse_and_log_det(self, y, context=None):
        y = torch.cat([y[..., :1] - 0.1 * y[..., 2:], y[..., 1:]], dim=-1)
        return super().inverse_and_log_det(y, context)


class LooksAhead(Autoregressive):
    """Reads its input in the other order than its network."""

    def __init__(self):
        super().__init__(MADE(3, 2, hidden=(32,)), Affine())

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x.flip(-1), context)
        return y.flip(-1), log_det

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y.flip(-1), context)
        return x.flip(-1), log_det


class SeesOtherRows(Faulty):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x)
        return y + self._offset(x), log_det

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y)
        return x, log_det

    @staticmethod
    def _offset(x):
        return x.numel() * 1e-6 * (x.dim() == 2 and x.shape[0] == 4)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (WrongInverse(), "inverse.forward.x.. is not x"),
        (WrongSign(), "log-determinant of forward against the Jacobian's"),
        (NoBatch(), "log-determinant of forward, batch .*: expected shape"),
        (CutGraph(), "log-determinant of inverse against the Jacobian's"),
        (UnusedParameter(), "parameter 'idle' gets no gradient in forward"),
        (WrongClaim(), "declared volume-preserving"),
        (MovesWhatItKeeps(), r"\d entries of the Jacobian should be zero"),
        (LooksAhead(), r"\d entries of the Jacobian should be zero"),
        (SeesOtherRows(), "a batch, row by row"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, pf.FlowTransform) else "",
)
def test_check_transform_refuses_what_is_wrong(transform, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_transform(transform, 3)


def random_iaf(context=0):
    flow = pf.iaf(3, context, layers=2, hidden=(16,)).double()
    testing.randomize(flow, gain=0.5)
    return flow


@pytest.mark.parametrize("context", [0, 2])
def test_many_rows_are_the_draws_of_one_pass(context):
    flow, given = random_iaf(context), torch.randn(2).double() if context else None
    torch.manual_seed(0)
    in_pieces = flow.sample((5001,), given)
    torch.manual_seed(0)
    at_once, log_prob = flow.rsample_and_log_prob((5001,), given)
    torch.testing.assert_close(in_pieces, at_once)
    with torch.no_grad():
        torch.manual_seed(0)
        x, scored = flow.rsample_and_log_prob((5001,), given)
    torch.testing.assert_close(x, at_once)
    torch.testing.assert_close(scored, log_prob)


def test_many_rows_are_remembered_too(monkeypatch):
    law = random_iaf()()
    with torch.no_grad():
        x, log_prob = law.rsample_and_log_prob((5001,))
        torch.testing.assert_close(law.path_log_prob(x), log_prob)
        monkeypatch.setattr(type(law.transforms[0]), "inverse_and_log_det", None)
        assert torch.equal(law.log_prob(x), log_prob)


def test_rows_of_contexts_are_never_torn_apart():
    flow, given = random_iaf(2), torch.randn(2500, 2).double()
    with torch.no_grad():
        x, log_prob = flow.rsample_and_log_prob((), given)
        torch.testing.assert_close(flow.log_prob(x.clone(), given), log_prob)


@pytest.mark.parametrize(
    ("context", "came"),
    [
        (3, "int"),
        (np.zeros((5, 2)), "ndarray"),
        (torch.zeros(5, 3), r"a tensor of shape \(5, 3\)"),
        (torch.tensor(0.0), r"a tensor of shape \(\)"),
        (None, "None"),
    ],
)
def test_a_flow_says_what_context_it_takes(context, came):
    message = rf"context: this flow needs one of shape \(\*batch, 2\), got {came}"
    with pytest.raises(ValueError, match=message):
        pf.iaf(1, context=2, layers=1, hidden=(8,))(context)


def test_a_flow_says_that_it_takes_no_context_and_scores_tensors_alone():
    flow = pf.iaf(1, layers=1, hidden=(8,))
    with pytest.raises(
        ValueError, match=r"context: this flow takes none, got int; .*sample\(shape"
    ):
        flow(3)
    with pytest.raises(ValueError, match="must be a Tensor"):
        flow.log_prob(np.zeros((5, 1)))
