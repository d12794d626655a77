"""Models of many latent numbers, on data of known make."""

import pyro
import pyro.distributions as dist
import torch


def grouped_data(groups, rows, seed=0, slopes=0.3):
    """Group of each row, a covariate and what was seen, rows in no order."""
    generator = torch.Generator().manual_seed(seed)
    intercept = 1 + 0.7 * torch.randn(groups, generator=generator)
    slope = -0.5 + slopes * torch.randn(groups, generator=generator)
    order = torch.randperm(groups * rows, generator=generator)
    group = torch.arange(groups).repeat_interleave(rows)[order]
    x = torch.randn(groups * rows, generator=generator)
    noise = torch.randn(groups * rows, generator=generator)
    return group, x, intercept[group] + slope[group] * x + 0.8 * noise


def grouped(group, x, y, groups):
    """Intercepts and slopes of groups, without plates."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    a = pyro.sample("a", dist.Normal(mean[0], scale[0]).expand([groups]).to_event(1))
    b = pyro.sample("b", dist.Normal(mean[1], scale[1]).expand([groups]).to_event(1))
    pyro.sample("y", dist.Normal(a[group] + b[group] * x, noise).to_event(1), obs=y)


def persons(y):
    """Two-parameter logistic items answered by persons."""
    people, items = y.shape
    with pyro.plate("items", items):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("people", people):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("answering", people, dim=-2), pyro.plate("answered", items, dim=-1):
        logits = a * (ability[:, None] - b)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def answers(people, items, seed=0):
    """Answers of such persons."""
    generator = torch.Generator().manual_seed(seed)
    ability = torch.randn(people, 1, generator=generator)
    a = (0.3 * torch.randn(items, generator=generator)).exp()
    b = torch.randn(items, generator=generator)
    chance = torch.sigmoid(a * (ability - b))
    return (torch.rand(people, items, generator=generator) < chance).float()


def nested(group, y, groups, districts):
    """Groups within districts, both with plates."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("districts", districts):
        u = pyro.sample("u", dist.Normal(mean, scale[0]))
    with pyro.plate("groups", groups):
        v = pyro.sample("v", dist.Normal(u[torch.arange(groups) % districts], scale[1]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(v[group], scale[2]), obs=y)


def vectors(group, x, y, groups):
    """Correlated vectors of intercept and slope."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    tril = pyro.sample("tril", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", groups):
        b = pyro.sample("b", dist.MultivariateNormal(mean, scale_tril=scale[:, None] * tril))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group, 0] + b[group, 1] * x, 0.8), obs=y)


def crossed(y):
    """Rows and columns with effects of their own, each seen with each other."""
    rows, columns = y.shape
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    r = pyro.sample("r", dist.Normal(0.0, scale[0]).expand([rows]).to_event(1))
    c = pyro.sample("c", dist.Normal(0.0, scale[1]).expand([columns]).to_event(1))
    pyro.sample("y", dist.Normal(r[:, None] + c, 1.0).to_event(2), obs=y)


def walk(y):
    """Steps of a random walk: each is in all that come after it."""
    scale = pyro.sample("scale", dist.LogNormal(-2.0, 1.0))
    step = pyro.sample("step", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal((scale * step).cumsum(0), 1.0).to_event(1), obs=y)
