"""Models that are run in awkward ways: draw by draw, in batches, with parameters, saved."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import SEEDS, columns_of, compare, gaussian, grid, judge, normal, quadrature
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf

GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(400, 3, generator=GENERATOR)
Y = 0.5 + X @ torch.tensor([1.0, -0.5, 0.2]) + 0.7 * torch.randn(400, generator=GENERATOR)
MANY = 1.5 + 2.0 * torch.randn(20_000, generator=GENERATOR)
TIMES = torch.linspace(-1, 1, 20_000)
SOME = torch.tensor([1.0, 2.0, 0.0, 3.0, 0.0])
SEEN = torch.tensor([True, True, False, True, False])


def branch():
    z = pyro.sample("z", dist.Normal(0.5, 1.0))
    loc = z if z > 0 else -0.2 * z
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))


def two_branches():
    z = pyro.sample("z", dist.Normal(1.0, 5.0))
    loc = z if z > 0 else -z
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(4.0))


def rows(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def coefficients(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", 400, subsample=x):
        mean = (x * b.unsqueeze(-2)).sum(-1) + a
        pyro.sample("y", dist.Normal(mean, 0.7), obs=y)


def subsampled():
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(MANY), subsample_size=100) as index:
        pyro.sample("y", dist.Normal(a + b * TIMES[index], 2.0), obs=MANY[index])


def masked():
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 5):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=SOME, obs_mask=SEEN)


def with_scale():
    tau = pyro.param("tau", torch.tensor(2.0), constraint=constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 5):
        z = pyro.sample("z", dist.Normal(loc, tau))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor([1.0, 2.0, -1.5, 3.0, 0.2]))


def of_coefficients():
    design = torch.cat([torch.ones(400, 1), X], 1)
    return gaussian(torch.zeros(4), 4 * torch.eye(4), design, torch.full((400,), 0.7), Y)


def of_rows(y):
    design, noise = torch.ones(len(y), 1), torch.ones(len(y))
    return gaussian(torch.zeros(1), torch.full((1, 1), 100.0), design, noise, y)


def of_many():
    """By the sums that 20,000 rows come to: a marginal covariance of them all is too large."""
    x, y = torch.stack([torch.ones(20_000), TIMES], 1).double(), MANY.double()
    precision = torch.eye(2).double() / 4 + x.T @ x / 4
    mean = torch.linalg.solve(precision, x.T @ y / 4)
    at = normal(y, x @ mean, 2).sum() + normal(mean, 0, 2).sum()  # evidence = joint / posterior
    found = dist.MultivariateNormal(mean, precision_matrix=precision)
    return (at - found.log_prob(mean)).item(), mean, found.variance.sqrt()


def of_hierarchy(tau, seen, y):
    """Of the mean, what hangs on it, and what is not seen of the data, if anything is."""
    ones = torch.ones(5, 6)
    ones[:, 1:] = torch.eye(5)
    root = torch.cat([torch.eye(1, 6), ones])  # of loc and z by independent standard numbers
    root = root * torch.tensor([2.0] + 5 * [tau])
    extra = torch.cat([torch.zeros(5, 1), torch.eye(5)], 1) @ root
    if not seen.all():  # loc, z, and a y of its own for each row
        root = torch.cat([torch.cat([root, extra]), torch.cat([0 * ones.T, 0.5 * torch.eye(5)])], 1)
    covariance = root @ root.T
    design = torch.eye(5, len(root)).roll(1, 1)[seen]
    return gaussian(torch.zeros(len(root)), covariance, design, torch.full((len(y),), 0.5), y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model cannot run at many draws")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_branch(seed):
    def log_density(z):
        return normal(z, 0.5, 1) + normal(1, torch.where(z > 0, z, -0.2 * z), 0.5)

    judge(branch, quadrature(log_density, [grid(-8, 8, 8001)]), seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model cannot run at many draws")
@pytest.mark.parametrize("seed", SEEDS)
def test_two_modes_on_two_branches(seed):
    def log_density(z):
        return normal(z, 1, 5) + normal(4, z.abs(), 0.5)

    judge(two_branches, quadrature(log_density, [grid(-12, 12, 8001)]), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_two_guides_of_one_model(seed):
    torch.manual_seed(seed)
    data = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-4.0, -5.0])]
    guides = [pf.AutoFlow(rows) for _ in data]
    for guide, y in zip(guides, data, strict=True):
        pf.fit_guide(rows, guide, y, progress=False)
    for guide, y in zip(guides, data, strict=True):
        found = pf.report(rows, guide, y)
        compare(f"two guides {seed}", found, of_rows(y), columns_of(guide))
        assert found.good


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batched", [True, False], ids=["batches", "all_rows"])
def test_coefficients_from_the_left(batched, seed):
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(X, Y), batch_size=50, shuffle=True) if batched else None
    judge(coefficients, of_coefficients(), seed, X, Y, batches=loader)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_many_rows_in_subsamples(seed):
    judge(subsampled, of_many(), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_missing_values_behind_a_latent(seed):
    judge(masked, of_hierarchy(1.0, SEEN, SOME[SEEN]), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exact_guide(seed):
    y = torch.tensor([1.0, 2.0, 3.0])
    evidence, mean, sd = of_rows(y)

    def guide(y):
        pyro.sample("loc", dist.Normal(mean.float()[0], sd.float()[0]))

    torch.manual_seed(seed)
    found = pf.report(rows, guide, y, num_samples=4000)
    compare(f"exact {seed}", found, (evidence, mean, sd), lambda draws: draws["loc"][:, None])
    assert found.good


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_trained_parameter_saved_and_loaded(seed, tmp_path):
    y = torch.tensor([1.0, 2.0, -1.5, 3.0, 0.2])

    def truth():
        return of_hierarchy(pyro.param("tau").item(), torch.ones(5).bool(), y)

    guide, found = judge(with_scale, truth, seed)
    tau = pyro.param("tau").item()
    pf.save(guide, tmp_path / "guide")
    pyro.clear_param_store()
    again = pf.load(tmp_path / "guide", model=with_scale)
    assert pyro.param("tau").item() == tau
    compare(f"loaded {seed}", pf.report(with_scale, again), truth(), columns_of(again))
    torch.manual_seed(seed)
    before = pf.report(with_scale, guide).khat
    torch.manual_seed(seed)
    assert pf.report(with_scale, again).khat == pytest.approx(before, abs=1e-3)
    assert found.trusted or before > 0.7
