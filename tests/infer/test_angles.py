"""Posteriors of angles, against quadrature and closed forms: by guides, weights and chains."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam, ProjectedNormalReparam

import pyroflows as pf

PI = math.pi
ABOUT_SEAM = torch.tensor([3.0, -3.0, 3.1, -3.1, 2.9])


class OneAngle:
    """A von Mises prior, and von Mises data about a multiple of the angle."""

    def __init__(self, prior=(0.0, 0.1), data=(), strength=4.0, multiple=1):
        self.prior, self.strength, self.multiple = prior, strength, multiple
        self.data = torch.as_tensor(data)

    def __call__(self):
        z = pyro.sample("z", dist.VonMises(*map(torch.tensor, self.prior)))
        if len(self.data):
            with pyro.plate("rows", len(self.data)):
                pyro.sample("y", dist.VonMises(self.multiple * z, self.strength), obs=self.data)

    def exact(self):
        """Mean vector and log evidence, by the rule of equal steps, exact on a circle."""
        z = torch.arange(-PI, PI, 2 * PI / 4000, dtype=torch.float64)
        log_p = dist.VonMises(*(torch.tensor(v).double() for v in self.prior)).log_prob(z)
        strength = torch.tensor(self.strength).double()
        for y in self.data.double():
            log_p = log_p + dist.VonMises(self.multiple * z, strength).log_prob(y)
        evidence = log_p.logsumexp(0) + math.log(2 * PI / 4000)
        return vector(z, log_p.softmax(0)), evidence.item()


def vector(z, weights=None):
    """The mean of unit vectors: its length is the resultant, its direction the mean."""
    z = z.double()
    weights = torch.full_like(z, 1 / len(z)) if weights is None else weights
    return torch.stack([(weights * z.cos()).sum(0), (weights * z.sin()).sum(0)])


MODELS = {
    "middle": OneAngle((0.5, 2.0), [0.1, -0.2, 0.3]),
    "seam": OneAngle((0.0, 0.5), ABOUT_SEAM),
    "diffuse": OneAngle((1.0, 0.1)),
    "spread at the seam": OneAngle((PI, 1.0)),
    "sharp at the seam": OneAngle((0.0, 1.0), [PI - 0.01], 1e4),
    "two opposite modes": OneAngle((0.3, 0.05), [0.2, 0.1, 0.0, -0.1], 8.0, 2),
    "three modes": OneAngle((0.3, 0.05), [0.2, 0.1, 0.0, -0.1], 8.0, 3),
}
MODES = {"two opposite modes": 2, "three modes": 3}


def fitted(model, *args, **kwargs):
    guide = pf.AutoFlow(model, **kwargs)
    pf.fit_guide(model, guide, *args, progress=False)
    return guide


def check(model, guide, modes=1):
    mean, evidence = model.exact()
    found = pf.report(model, guide, num_samples=20_000)
    assert guide.modes == modes
    assert found.good, found
    assert found.evidence == pytest.approx(evidence, abs=0.02)
    assert found.elbo <= evidence + 4 * found.elbo_error + 1e-3
    z = found.draws["z"]
    assert (z >= -PI).all()
    assert (z < PI).all()
    weighted = vector(z, found.log_weights.exp())
    torch.testing.assert_close(weighted, mean, atol=0.02, rtol=0)
    torch.testing.assert_close(vector(z), mean, atol=0.02, rtol=0)
    if mean.norm() > 0.3:  # else there is hardly a direction
        off = (found.means()["z"] - torch.atan2(mean[1], mean[0])).cos()
        assert off.item() == pytest.approx(1, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_one_angle_is_right(name, seed):
    torch.manual_seed(seed)
    check(MODELS[name], fitted(MODELS[name]), MODES.get(name, 1))


@pytest.fixture(scope="module")
def seam():
    """A trained guide of a posterior about the seam."""
    torch.manual_seed(0)
    return fitted(MODELS["seam"], layers=1)


def test_a_posterior_about_the_seam_is_right_and_said_to_be(seam):
    check(MODELS["seam"], seam)


def test_it_is_the_conjugate_one(seam):
    model = MODELS["seam"]
    means, strengths = torch.cat([torch.zeros(1), model.data]), torch.tensor([0.5] + [4.0] * 5)
    total = torch.stack([(strengths * means.cos()).sum(), (strengths * means.sin()).sum()])
    exact = dist.VonMises(torch.atan2(total[1], total[0]), total.norm())
    found = pf.importance_weights(model, seam, num_samples=2000)
    theirs = exact.log_prob(found.draws["z"]) + model.exact()[1]
    torch.testing.assert_close(found.log_p, theirs, atol=1e-4, rtol=0)


def test_the_seam_of_the_chart_is_opposite_to_the_posterior(seam):
    center = seam.learned.sites[0].support.center
    assert abs(center.item()) == pytest.approx(PI, abs=0.1)


def test_a_guide_from_a_given_start_has_it_in_the_middle():
    guide = pf.AutoFlow(MODELS["spread at the seam"], init="init").setup()
    assert guide.learned.sites[0].support.center.abs().item() == pytest.approx(PI, abs=1e-5)
    assert guide.whiten.loc.abs().item() < 1e-5


def test_the_shift_of_a_guide_that_is_off_is_the_way_over_the_seam():
    model = MODELS["seam"]
    guide = pf.AutoFlow(
        model, init="init", init_loc_fn=lambda _: torch.tensor(-3.0), init_scale=0.4, layers=1
    )
    found = pf.report(model, guide, num_samples=20_000)
    mean = model.exact()[0]
    away = torch.atan2(mean[1], mean[0]) + 3.0 - 2 * PI
    spread = (-2 * mean.norm().log()).sqrt()
    assert found.shift["z"].item() == pytest.approx((away / spread).item(), abs=0.1)


def test_angles_do_not_keep_other_sites_from_being_drawn_from_their_prior():
    def model():
        z = pyro.sample("z", dist.VonMises(torch.ones(2), 5.0).to_event(1))
        pyro.sample("x", dist.Uniform(z.cos().sum(), z.cos().sum() + 1))

    guide = pf.AutoFlow(model, init="init").setup()
    draws = guide.log_density((), {}).prior_draws(500, torch.zeros(3))
    ran = guide.log_density((), {}).run(draws)
    assert draws.shape == (500, 3)
    assert draws[:, :2].abs().amax(0).gt(3.0).all()
    assert draws[:, :2].abs().max() <= PI
    share = ran.values["x"] - ran.values["z"].cos().sum(-1)
    assert share.std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_chains_are_right(seam):
    neutra = pf.NeuTra(MODELS["seam"], seam, chains=32)
    z = neutra.run(num_samples=100, warmup_steps=100, progress=False)["z"]
    torch.testing.assert_close(vector(z.flatten()), MODELS["seam"].exact()[0], atol=0.02, rtol=0)
    assert neutra.r_hat()["z"] < 1.05


def test_pyros_elbo_is_that_of_the_weights(seam):
    elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    found = pf.report(MODELS["seam"], seam)
    assert -elbo.loss(MODELS["seam"], seam) == pytest.approx(found.elbo, abs=0.02)


def test_pyros_svi_trains_it():
    model = MODELS["seam"]
    guide = pf.AutoFlow(model, init="init", layers=1, init_loc_fn=lambda site: torch.tensor(2.5))
    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    losses = [svi.step() for _ in range(200)]
    assert sum(losses[-20:]) / 20 == pytest.approx(-model.exact()[1], abs=0.05)


def test_pyros_predictive_draws_by_it(seam):
    drawn = Predictive(MODELS["seam"], guide=seam, num_samples=2000, parallel=True)()
    mean = MODELS["seam"].exact()[0]
    torch.testing.assert_close(vector(drawn["z"].flatten()), mean, atol=0.03, rtol=0)


def test_a_saved_guide_draws_the_same(seam, tmp_path):
    pf.save(seam, tmp_path)
    for model in (MODELS["seam"], None):
        pyro.clear_param_store()
        again = pf.load(tmp_path, model=model)
        assert again.angles == ("z",)
        torch.manual_seed(0)
        z = again.sample_posterior(100)["z"]
        torch.manual_seed(0)
        torch.testing.assert_close(z, seam.sample_posterior(100)["z"])


def test_arviz_has_the_joint_density_of_its_draws(seam):
    model = MODELS["seam"]
    data = pf.to_arviz(model, seam, num_samples=50)
    z = torch.as_tensor(data["posterior"]["z"].values[0])
    log_p = [
        poutine.trace(poutine.condition(model, {"z": v})).get_trace().log_prob_sum() for v in z
    ]
    lp = torch.as_tensor(data["sample_stats"]["lp"].values[0])
    torch.testing.assert_close(lp, torch.stack(log_p))


def test_one_call_prints_the_direction_and_the_spread_about_it():
    model = OneAngle((0.0, 0.5), ABOUT_SEAM)
    found = pf.sample_posterior(model, guide=pf.AutoFlow(model, layers=1), progress=False)
    assert found.trusted
    _, mean, spread = str(found).splitlines()[1].split()
    assert abs(float(mean)) == pytest.approx(PI, abs=0.1)
    assert float(spread) == pytest.approx(0.23, abs=0.03)


def test_pyros_reparametrisation_by_the_guide_is_refused_in_words(seam):
    reparam = NeuTraReparam(seam)
    with pytest.raises(ValueError, match=r"'z' is an angle.*pf.NeuTra"):
        poutine.trace(poutine.reparam(MODELS["seam"], lambda _: reparam)).get_trace()


def test_an_amortised_angle_is_refused_in_words():
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("y", dist.VonMises(z, 1.0), obs=y[:, 0])

    guide = pf.AutoAmortizedFlow(model, torch.nn.Linear(1, 4))
    with pytest.raises(ValueError, match=r"'z' is an angle.*ProjectedNormal"):
        guide.setup(torch.zeros(5, 1))


def skewed():
    base = dist.VonMises(torch.zeros(1), 1.0).to_event(1)
    pyro.sample("z", dist.SineSkewed(base, torch.tensor([0.8])))


def bivariate():
    parts = dict(phi_loc=3.0, psi_loc=0.0, phi_concentration=2.0, psi_concentration=1.0)
    pyro.sample(
        "z",
        dist.SineBivariateVonMises(
            **{key: torch.tensor(value) for key, value in parts.items()},
            correlation=torch.tensor(0.8),
        ),
    )


def mixed():
    parts = dist.VonMises(torch.tensor([0.0, PI]), 8.0)
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts))


def hidden_by_masks():
    pyro.sample("z", dist.VonMises(torch.zeros(2), 1.0).to_event(1).mask(False))
    pyro.factor("z_prior", torch.tensor(-2 * math.log(2 * PI)))


@pytest.mark.slow
@pytest.mark.parametrize("model", [skewed, bivariate, mixed, hidden_by_masks])
def test_priors_of_angles_have_mass_one(model):
    found = pf.report(model, fitted(model), num_samples=20_000)
    assert found.trusted, found
    assert found.evidence == pytest.approx(0, abs=0.02)


def many(y):
    mean = pyro.sample("mean", dist.VonMises(0.0, 0.1))
    strength = pyro.sample("strength", dist.HalfNormal(5.0))
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.VonMises(mean, strength))
        pyro.sample("y", dist.VonMises(z.unsqueeze(-1), 4.0).expand(y.shape).to_event(1), obs=y)


def exact_of_many(y):
    """The evidence, and mean vectors of the mean and of each angle, on a grid of three numbers."""
    circle = torch.arange(-PI, PI, 2 * PI / 120, dtype=torch.float64)
    strength = torch.linspace(0.01, 25, 400, dtype=torch.float64)
    log_prior = dist.HalfNormal(torch.tensor(5.0).double()).log_prob(strength)[:, None]
    log_prior = log_prior + dist.VonMises(0.0, torch.tensor(0.1).double()).log_prob(circle)
    log_z = dist.VonMises(circle[:, None], strength[:, None, None]).log_prob(circle)
    likelihood = dist.VonMises(circle, torch.tensor(4.0).double())
    log_y = torch.stack([likelihood.log_prob(row[:, None]).sum(0) for row in y.double()])
    each = log_z + log_y[:, None, None]  # (groups, strength, mean, z)
    cell = math.log(2 * PI / 120)
    log_post = log_prior + (each.logsumexp(-1) + cell).sum(0)
    weights = log_post.flatten().softmax(0).reshape(log_post.shape)
    of_z = (weights[..., None] * each.softmax(-1)).sum((1, 2))
    evidence = log_post.logsumexp((0, 1)) + cell + (strength[1] - strength[0]).log()
    points = torch.stack([circle.cos(), circle.sin()])
    return evidence.item(), points @ weights.sum(0), points @ of_z.mT


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_hierarchy_of_angles_is_right(seed):
    torch.manual_seed(seed)
    centers = torch.tensor([3.0, 2.6, -2.9, -3.1, 2.2])[:, None]
    y = dist.VonMises(centers.expand(5, 4), 4.0).sample()
    evidence, mean, of_z = exact_of_many(y)
    found = pf.report(many, fitted(many, y), y, num_samples=20_000)
    assert not found.missed
    assert found.evidence == pytest.approx(evidence, abs=0.02)
    weights = found.log_weights.exp()
    torch.testing.assert_close(vector(found.draws["mean"], weights), mean, atol=0.02, rtol=0)
    z = vector(found.draws["z"], weights[:, None])
    torch.testing.assert_close(z, of_z, atol=0.02, rtol=0)


@pytest.mark.slow
def test_the_advice_for_a_sphere_is_right():
    strength = torch.tensor([0.0, 3.0, 0.0])

    @poutine.reparam(config={"z": ProjectedNormalReparam()})
    def model():
        z = pyro.sample("z", dist.ProjectedNormal(torch.zeros(3)))
        pyro.factor("prior", dist.VonMises3D(strength).log_prob(z) + math.log(4 * PI))

    found = pf.report(model, fitted(model), num_samples=20_000)
    assert found.trusted, found
    assert found.evidence == pytest.approx(0, abs=0.02)
    x = found.draws["z_normal"].double()
    z = x / x.norm(dim=-1, keepdim=True)
    mean = (found.log_weights.exp()[:, None] * z).sum(0)
    along = 1 / math.tanh(3.0) - 1 / 3.0
    torch.testing.assert_close(mean, torch.tensor([0.0, along, 0.0]).double(), atol=0.02, rtol=0)


def test_quantiles_are_measured_from_the_mean_direction_on(seam):
    low, middle, high = seam.quantiles([0.05, 0.5, 0.95])["z"]
    assert middle.abs().item() == pytest.approx(PI, abs=0.1)
    assert (high - low).item() == pytest.approx(2 * 1.645 * 0.23, abs=0.05)
    assert seam.median()["z"].abs().item() == pytest.approx(PI, abs=0.1)
