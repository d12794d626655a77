"""Posteriors of several modes: each is found, has a flow and its share, and none is missed."""

import copy
import math
import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam

import pyroflows as pf
from pyroflows.distributions.mixture import MixtureFlow
from pyroflows.infer.modes import missed_mass, weigh
from pyroflows.infer.start import best_gaussians

SMALL = {"layers": 1, "hidden": (8,)}
QUICK = {"max_steps": 100, "particles": 32, "progress": False}


def two():
    z = pyro.sample("z", dist.Normal(1.0, 5.0))
    pyro.sample("y", dist.Normal(z.abs(), 0.5), obs=torch.tensor(4.0))


def two_draw_by_draw():
    z = pyro.sample("z", dist.Normal(1.0, 5.0))
    loc = z if z > 0 else -z
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(4.0))


def evidence_of_two(left=True, right=True):
    """Over both half-lines, or one."""
    z = torch.linspace(-15, 15, 30_001, dtype=torch.float64)
    log_p = dist.Normal(1.0, 5.0).log_prob(z) + dist.Normal(z.abs(), 0.5).log_prob(z.new_tensor(4))
    log_p = log_p[(left & (z < 0)) | (right & (z > 0))]
    return (log_p.logsumexp(0) + math.log(30 / 30_000)).item()


def many():
    z = pyro.sample("z", dist.Normal(torch.zeros(10), 2.0).to_event(1))
    y = torch.tensor([2.0, 2.5, 3.0])
    pyro.sample("y", dist.Normal(z[:3].abs(), 0.4).to_event(1), obs=y)


def labels(data):
    with pyro.plate("groups", 2):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(data)):
        group = pyro.sample("group", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(mean[group], 1.0), obs=data)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(x.square() / 3, 0.3))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("p", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def centred():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def heavy():
    z = pyro.sample("z", dist.Cauchy(0.0, 10.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.StudentT(2.0, z, 1.0), obs=torch.tensor([-1.0, 1.0]))


def flat():
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(z.abs(), 0.5), obs=torch.tensor(4.0))


DATA = torch.cat([torch.linspace(-4, -2, 10), torch.linspace(2, 4, 15)])


@pytest.mark.parametrize(
    ("model", "args", "modes"),
    [
        pytest.param(two, (), 2, id="signs"),
        pytest.param(two_draw_by_draw, (), 2, id="draw_by_draw"),
        pytest.param(many, (), 8, id="eight_in_ten_dimensions"),
        pytest.param(labels, (DATA,), 2, id="labels"),
        pytest.param(flat, (), 2, id="flat_prior"),
        pytest.param(banana, (), 1, id="banana"),
        pytest.param(funnel, (), 1, id="funnel"),
        pytest.param(centred, (), 1, id="centred_hierarchy"),
        pytest.param(heavy, (), 1, id="heavy_tails"),
    ],
)
def test_modes_are_counted(model, args, modes):
    assert pf.AutoFlow(model, **SMALL).setup(*args).modes == modes


def test_the_same_modes_are_found_each_time_and_the_generator_stays():
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        starts.append(pf.AutoFlow(two, **SMALL).setup().flow.log_weights)
    assert torch.equal(*starts)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    guide = pf.AutoFlow(two, **SMALL)
    history = pf.fit_guide(two, guide, **QUICK)
    return guide, history


def test_evidence_and_shares_are_right(fitted):
    found = pf.report(two, fitted[0])
    assert found.trusted, found
    assert found.evidence == pytest.approx(evidence_of_two(), abs=0.02)
    assert found.elbo == pytest.approx(evidence_of_two(), abs=0.02)
    share = math.exp(evidence_of_two(left=False) - evidence_of_two())
    assert (found.draws["z"] > 0).double().mean().item() == pytest.approx(share, abs=0.01)


def test_the_history_is_of_the_mixtures_elbo(fitted):
    assert fitted[1].score == pytest.approx(evidence_of_two(), abs=0.05)


def test_draws_are_in_all_modes_under_pyro_too(fitted):
    drawn = Predictive(two, guide=fitted[0], num_samples=50)()["z"]
    assert 0.2 < (drawn > 0).double().mean() < 0.95
    assert fitted[0].quantiles([0.05, 0.95])["z"].sign().tolist() == [-1.0, 1.0]


def test_trains_under_pyros_elbo(fitted):
    guide = copy.deepcopy(fitted[0])
    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True)
    before = [p.detach().clone() for p in guide.parameters()]
    losses = [SVI(two, guide, pyro.optim.Adam({"lr": 1e-4}), elbo).step() for _ in range(3)]
    assert losses == pytest.approx([-evidence_of_two()] * 3, abs=0.1)
    assert any(not torch.equal(p, q) for p, q in zip(before, guide.parameters(), strict=True))


def test_a_copy_a_pickle_and_a_folder_score_the_same(fitted, tmp_path):
    guide, z = fitted[0], torch.linspace(-6, 6, 7)[:, None]
    loaded = pf.load(pf.save(guide, tmp_path), model=two)
    fresh = pf.AutoFlow(two, **SMALL).setup()
    fresh.load_state_dict(guide.state_dict())
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), loaded, fresh):
        assert other.modes == 2
        assert torch.equal(other.flow.log_prob(z), guide.flow.log_prob(z))


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    settings = {**QUICK, "max_steps": 100}
    pf.fit_guide(two, pf.AutoFlow(two, **SMALL), checkpoint=tmp_path, **settings)
    pyro.clear_param_store()
    guide = pf.AutoFlow(two, **SMALL)
    at = pf.Checkpoint(tmp_path, resume=True)
    assert pf.fit_guide(two, guide, checkpoint=at, **settings).steps[-1] == 100
    assert pf.report(two, guide).evidence == pytest.approx(evidence_of_two(), abs=0.02)


def test_mini_batches_move_the_shares():
    def model(y):
        z = pyro.sample("z", dist.Normal(1.0, 5.0))
        with pyro.plate("rows", 4, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(z.abs(), 1.0), obs=y)

    guide = pf.AutoFlow(model, **SMALL).setup(torch.full((2,), 4.0))
    guide.flow.log_weights.copy_(torch.tensor([0.0, -3.0]))  # 95 % in one mode
    batches = [(torch.full((2,), 4.0),)] * 2
    pf.fit_guide(model, guide, batches=batches, **QUICK)
    share = guide.flow.log_shares.exp()[0].item()
    assert 0.5 < share < 0.85


def test_no_single_transform_is_named_in_a_sentence(fitted):
    with pytest.raises(ValueError, match="a mixture of 2 flows"):
        fitted[0].get_transform()
    reparam = NeuTraReparam(fitted[0])
    with pytest.raises(ValueError, match="a mixture of 2 flows"):
        poutine.reparam(two, config=lambda _: reparam)()


def test_chains_are_spread_over_the_modes(fitted):
    neutra = pf.NeuTra(two, fitted[0])
    with pytest.warns(UserWarning, match="2 modes, between which chains hardly move"):
        draws = neutra.run(num_samples=10, warmup_steps=10, num_chains=2, progress=False)
    assert draws["z"].sign().mean(1).tolist() in ([1.0, -1.0], [-1.0, 1.0])


def test_a_mode_that_is_missed_is_told_of():
    torch.manual_seed(0)
    guide = pf.AutoFlow(two, init="init", family="affine", **SMALL)
    pf.fit_guide(two, guide, **QUICK)
    assert guide.modes == 1
    found = pf.report(two, guide)
    assert not found.trusted
    place, lost = map(float, re.search(r"near z = (\S+) .* by (\S+) nats", found.verdict).groups())
    assert abs(place) == pytest.approx(4, abs=0.3)
    assert place * found.draws["z"].mean() < 0
    wanted = evidence_of_two() - evidence_of_two(left=place > 0, right=place < 0)
    assert lost == pytest.approx(wanted, abs=0.1)


def test_mass_is_looked_for_draw_by_draw_too():
    one_side = pf.AutoFlow(two, init="init", **SMALL).setup()
    one_side.whiten.set(torch.tensor([4.0]), torch.tensor([[0.5]]))
    log_p = one_side.log_density((), {}, two_draw_by_draw)
    missed = missed_mass(log_p, one_side.flow, evidence_of_two(left=False))
    assert missed.loc.item() == pytest.approx(-4, abs=0.3)
    assert missed.log_mass == pytest.approx(evidence_of_two(right=False), abs=0.1)


@pytest.mark.parametrize("model", [funnel, banana, heavy], ids=lambda m: m.__name__)
def test_no_mass_is_missed_where_the_guide_is_the_posterior(model):
    guide = pf.AutoFlow(model, **SMALL).setup()
    log_p = guide.log_density((), {})

    class Exact(torch.nn.Module):
        def sample(self, shape):
            return guide.flow.sample(shape)

        def log_prob(self, z):
            return log_p(z) - 3.0

    assert missed_mass(log_p, Exact(), 3.0) is None


def test_flows_that_overlap_share_what_both_cover():
    guide = pf.AutoFlow(two, **SMALL).setup()
    one, other = guide.flow.components
    twice = MixtureFlow([one, copy.deepcopy(one), other], torch.zeros(3))
    weigh(twice, guide.log_density((), {}))
    weigh(guide.flow, guide.log_density((), {}))
    shares, wanted = twice.log_shares.exp(), guide.flow.log_shares.exp()
    assert (shares[0] + shares[1]).item() == pytest.approx(wanted[0].item(), abs=0.05)
    assert twice.log_weights.logsumexp(0).item() == pytest.approx(evidence_of_two(), abs=0.1)


def test_a_mixture_is_a_density_and_draws_by_it():
    flow = pf.AutoFlow(two, **SMALL).setup().flow
    z = torch.linspace(-12, 14, 10_001)[:, None]
    density = flow.log_prob(z).exp()
    assert torch.trapezoid(density, z[:, 0]).item() == pytest.approx(1, abs=1e-3)
    right = torch.trapezoid(density * (z[:, 0] > 0), z[:, 0]).item()
    assert (flow.sample((1000,)) > 0).double().mean().item() == pytest.approx(right, abs=0.002)
    q = flow().expand([3])
    assert q.sample((5,)).shape == (5, 3, 1)
    assert q.log_prob(q.sample((5,))).shape == (5, 3)


def test_float32_and_float64():
    def double():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
        pyro.sample("y", dist.Normal(z.abs(), 0.5), obs=torch.tensor(4.0, dtype=torch.float64))

    guide = pf.AutoFlow(double, **SMALL).setup()
    assert guide.modes == 2
    assert guide.sample_posterior(3)["z"].dtype == torch.float64
    assert guide.flow.dtype == torch.float64


def test_other_rows_of_a_subsample_are_no_mass_that_was_missed():
    y = 1.0 + torch.randn(400, generator=torch.Generator().manual_seed(0))

    def model(y, part):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 400, subsample_size=part) as index:
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    guide = pf.AutoFlow(model, **SMALL).setup(y, 400)
    for seed in range(4):
        torch.manual_seed(seed)
        assert not pf.report(model, guide, y, 8, num_samples=500).missed


def gaussian():
    pyro.sample("z", dist.Normal(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 3.0])).to_event(1))


@pytest.mark.parametrize(
    ("model", "args", "ascents"),
    [
        pytest.param(gaussian, (), 1, id="gaussian"),
        pytest.param(two, (), 2, id="signs"),
        pytest.param(labels, (DATA,), 2, id="labels"),
    ],
)
def test_one_ascent_to_each_mode_is_judged_by_draws(model, args, ascents, monkeypatch):
    judged = []

    def watched(log_p, points):
        judged.append(len(points))
        return best_gaussians(log_p, points)

    monkeypatch.setattr("pyroflows.infer.modes.best_gaussians", watched)
    guide = pf.AutoFlow(model, **SMALL).setup(*args)
    assert guide.modes <= ascents <= sum(judged) <= ascents + 1


def test_where_the_best_gaussian_is_before_the_end_all_ascents_are_judged(monkeypatch):
    judged = []

    def watched(log_p, points):
        judged.append(len(points))
        return best_gaussians(log_p, points)

    monkeypatch.setattr("pyroflows.infer.modes.best_gaussians", watched)
    pf.AutoFlow(funnel, **SMALL).setup()
    assert judged[:2] == [1, 23]
