"""Latent sites on awkward supports: matrices, simplices, ordered vectors, mixtures, bounds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import SEEDS, grid, judge, normal, quadrature
from torch.distributions import constraints

PAIRS = torch.tensor([[0.9, 0.2], [-1.4, -0.8], [0.3, 1.1], [2.0, 1.2], [-0.6, 0.1], [0.4, -1.0]])
TRIPLES = torch.tensor(
    [[0.9, 0.8, -0.3], [-1.4, -0.6, 0.2], [0.1, 0.5, 1.2], [1.1, 0.7, -1.5], [-0.8, -1.3, 0.4]]
)
COUNTS = torch.tensor([4.0, 0.0, 9.0, 1.0])
GRADES = torch.tensor([0, 0, 1, 1, 1, 1, 2, 0, 1, 2])
CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])


def precision():
    w = pyro.sample("w", dist.Wishart(torch.tensor(4.0), torch.eye(2)))
    with pyro.plate("rows", len(PAIRS)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=w), obs=PAIRS)


def correlation():
    tril = pyro.sample("tril", dist.LKJCholesky(2, 1.5))
    with pyro.plate("rows", len(PAIRS)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=PAIRS)


def correlations():
    tril = pyro.sample("tril", dist.LKJCholesky(3, 2.0))
    with pyro.plate("rows", len(TRIPLES)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=TRIPLES)


def multinomial():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 0.5, 2.0, 1.0])))
    pyro.sample("y", dist.Multinomial(14, p), obs=COUNTS)


def mixture():
    parts = dist.MultivariateNormal(CENTRES, torch.tensor([[0.6, 0.3], [0.3, 0.5]]))
    z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts))
    pyro.sample("y", dist.Normal(z.sum(), 1.5), obs=torch.tensor(0.0))


def ordered():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    cuts = pyro.sample(
        "cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform())
    )
    with pyro.plate("rows", len(GRADES)):
        pyro.sample("y", dist.OrderedLogistic(torch.zeros(len(GRADES)), cuts), obs=GRADES)


def trained_bound():
    top = pyro.param("top", torch.tensor(4.0), constraint=constraints.positive)
    z = pyro.sample("z", dist.Uniform(0.0, top))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.5, 2.5, 2.0]))


def log_normaliser(df, scale):
    """Of a Wishart distribution of 2 x 2 matrices."""
    return df * math.log(2) + df / 2 * scale.logdet() + torch.mvlgamma(df / 2, 2)


def wishart():
    """In closed form: conjugate."""
    y, n = PAIRS.double(), len(PAIRS)
    before, after = torch.tensor(4.0).double(), torch.tensor(4.0 + n).double()
    scale = torch.linalg.inv(torch.eye(2).double() + y.T @ y)
    evidence = log_normaliser(after, scale) - log_normaliser(before, torch.eye(2).double())
    variance = after * (scale.square() + scale.diagonal()[:, None] * scale.diagonal())
    row, column = torch.tril_indices(2, 2)
    sds = variance.sqrt()[row, column]
    return evidence.item() - n * math.log(2 * math.pi), (after * scale)[row, column], sds


def triangle(draws):
    row, column = torch.tril_indices(2, 2)
    return draws["w"][:, row, column]


def matrices(size, at):
    """Correlation matrices of the numbers below their diagonals."""
    row, column = torch.tril_indices(size, size, -1)
    r = torch.eye(size).double().expand(*at[0].shape, size, size).clone()
    for i, j, value in zip(row, column, at, strict=True):
        r[..., i, j] = r[..., j, i] = value
    return r


def lkj(size, eta, rows, grids):
    """By quadrature over the correlations, whose density is a power of the determinant."""
    rows = rows.double()

    def prior(*at):
        det = torch.linalg.det(matrices(size, at))
        # Positive definite: the leading minors are positive.
        inside = (det > 0) & (1 - at[0].square() > 0)
        return torch.where(inside, (eta - 1) * det.clamp(min=1e-300).log(), -math.inf)

    def joint(*at):
        log_p = prior(*at)
        r = matrices(size, at)
        safe = torch.where((log_p > -math.inf)[..., None, None], r, torch.eye(size).double())
        squares = torch.einsum("ni,...ij,nj->...", rows, torch.linalg.inv(safe), rows)
        log_norm = len(rows) * (torch.linalg.slogdet(safe)[1] + size * math.log(2 * math.pi))
        return log_p - 0.5 * (squares + log_norm)

    whole, _, _ = quadrature(prior, grids)
    evidence, means, sds = quadrature(joint, grids)
    return evidence - whole, means, sds


def below(draws):
    tril = draws["tril"]
    row, column = torch.tril_indices(tril.shape[-1], tril.shape[-1], -1)
    return (tril @ tril.mT)[:, row, column]


def conjugate():
    """In closed form: Dirichlet and multinomial."""
    prior = torch.tensor([1.0, 0.5, 2.0, 1.0]).double()
    found = dist.Dirichlet(prior + COUNTS.double())
    evidence = (
        (prior + COUNTS).lgamma().sum()
        - (prior + COUNTS).sum().lgamma()
        + prior.sum().lgamma()
        - prior.lgamma().sum()
        + math.lgamma(15)
        - (COUNTS.double() + 1).lgamma().sum()
    )
    return evidence.item(), found.mean, found.variance.sqrt()


def two_parts(a, b):
    z = torch.stack([a, b], dim=-1)
    covariance = torch.tensor([[0.6, 0.3], [0.3, 0.5]]).double()
    parts = [
        math.log(share) + dist.MultivariateNormal(centre.double(), covariance).log_prob(z)
        for share, centre in zip((0.3, 0.7), CENTRES, strict=True)
    ]
    return torch.logaddexp(*parts) + normal(0, a + b, 1.5)


def grades(u, v):
    """Over the base of the ordered numbers."""
    low, high = u, u + v.exp()
    shares = torch.stack([low.sigmoid(), high.sigmoid() - low.sigmoid(), (-high).sigmoid()])
    counts = GRADES.bincount().double()
    log_p = sum(n * share.clamp(min=1e-300).log() for n, share in zip(counts, shares, strict=True))
    return normal(u, 0, 1) + normal(v, 0, 1) + log_p


def below_top():
    """With the bound where training left it."""
    top = pyro.param("top").item()
    z = (torch.arange(4000).double() + 0.5) * (top / 4000)
    rows = torch.tensor([1.5, 2.5, 2.0])
    return quadrature(lambda z: sum(normal(y, z, 1) for y in rows.tolist()) - math.log(top), [z])


CASES = {
    precision: (wishart, triangle),
    correlation: (lambda: lkj(2, 1.5, PAIRS, [grid(-0.9999, 0.9999, 4001)]), below),
    correlations: (lambda: lkj(3, 2.0, TRIPLES, [grid(-0.995, 0.995, 121)] * 3), below),
    multinomial: (conjugate, None),
    mixture: (lambda: quadrature(two_parts, [grid(-7, 7, 601)] * 2), None),
    ordered: (
        lambda: quadrature(grades, [grid(-6, 6)] * 2, lambda u, v: (u, u + v.exp())),
        None,
    ),
    trained_bound: (below_top, None),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model cannot run at many draws")  # a multinomial's
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_right_or_distrusted(model, seed):
    truth, of = CASES[model]
    judge(model, truth, seed, of=of)
    if model is trained_bound:  # P(z < top) / top is largest where the posterior fills it
        assert abs(pyro.param("top").item() - best_top()) < 0.1


def best_top():
    """Where the evidence is largest, by a grid."""
    tops = grid(0.5, 8, 1501)
    scale = 3**-0.5
    inside = dist.Normal(2.0, scale).cdf(tops) - dist.Normal(2.0, scale).cdf(torch.zeros(()))
    return tops[(inside.log() - tops.log()).argmax()].item()
