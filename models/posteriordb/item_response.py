"""Persons answer items: what each can and how hard each is. Each model is one draw's."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from port import from_zero
from regressions import Data
from torch import Tensor

# Two parameters an item


def irt_2pl(data: Data) -> None:
    """100 persons, 20 items; discriminations and difficulties around common means."""
    zero = data["y"].new_zeros(())
    sigma_theta = pyro.sample("sigma_theta", dist.HalfCauchy(zero + 2))
    with pyro.plate("abilities", int(data["J"])):
        theta = pyro.sample("theta", dist.Normal(zero, sigma_theta))
    sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(zero + 2))
    mu_b = pyro.sample("mu_b", dist.Normal(zero, 5.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfCauchy(zero + 2))
    with pyro.plate("parameters", int(data["I"])):
        a = pyro.sample("a", dist.LogNormal(zero, sigma_a))
        b = pyro.sample("b", dist.Normal(mu_b, sigma_b))
    logit = a[..., :, None] * (theta[..., None, :] - b[..., :, None])
    with pyro.plate("items", int(data["I"]), dim=-2), pyro.plate("persons", int(data["J"])):
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=data["y"])


def hier_2pl(data: Data) -> None:
    """600 persons, 32 items; an item's log-discrimination and difficulty are correlated."""
    zero = data["y"].new_zeros(())
    with pyro.plate("abilities", int(data["J"])):
        theta = pyro.sample("theta", dist.Normal(zero, zero + 1))
    mu = pyro.sample("mu", dist.Normal(zero.new_zeros(2), zero.new_tensor([1.0, 5.0])).to_event(1))
    tau = pyro.sample("tau", dist.Exponential(zero.new_full((2,), 0.1)).to_event(1))
    corr = pyro.sample("L_Omega", dist.LKJCholesky(2, zero + 4))
    with pyro.plate("items", int(data["I"])):
        xi1 = pyro.sample("xi1", dist.Normal(mu[..., 0], tau[..., 0]))
        first = (xi1 - mu[..., 0]) / tau[..., 0]
        mean = mu[..., 1] + tau[..., 1] * corr[..., 1, 0] * first
        xi2 = pyro.sample("xi2", dist.Normal(mean, tau[..., 1] * corr[..., 1, 1]))
    item, person = data["ii"], data["jj"]
    logit = xi1.exp()[..., item] * (theta[..., person] - xi2[..., item])
    with pyro.plate("answers", len(item)):
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=data["y"])


def lsat_answers(d: Data) -> Data:
    """Write out the answers of each student, which Stan's data give by pattern and its count."""
    counts = torch.diff(d["culm"], prepend=d["culm"].new_zeros(1)).long()
    return {"answers": d["response"].repeat_interleave(counts, dim=0)}


def lsat(data: Data) -> None:
    """1,000 students, five questions of one discrimination (Bock & Lieberman 1970)."""
    answers = data["answers"]
    zero = answers.new_zeros(())
    beta = pyro.sample("beta", dist.HalfNormal(zero + 100))
    with pyro.plate("difficulties", answers.shape[1]):
        alpha = pyro.sample("alpha", dist.Normal(zero, 100.0))
    with pyro.plate("abilities", len(answers)):
        theta = pyro.sample("theta", dist.Normal(zero, 1.0))
    logit = beta * theta[..., :, None] - alpha[..., None, :]
    with pyro.plate("students", len(answers), dim=-2), pyro.plate("items", answers.shape[1]):
        pyro.sample("r", dist.Bernoulli(logits=logit), obs=answers)


# With a regression of the abilities on what is known of the persons (Furr 2017)


def with_covariates(d: Data) -> Data:
    """Centre the covariates, and divide by twice their standard deviation.

    Stan's code means to divide a column of two values by their distance instead. But its condition,
    ``count + W[j, k] == min_w || W[j, k] == max_w``, counts no rows, so that it never does.
    """
    slopes = d["W"][:, 1:]
    slopes = slopes - slopes.mean(dim=0)
    deviation = (slopes.square().sum(dim=0) / (len(slopes) - 1)).sqrt()
    design = torch.cat([d["W"][:, :1], slopes / (2 * deviation)], dim=1)
    return {**from_zero("ii", "jj")(d), "design": design}


def two_parameters(data: Data) -> None:
    """Right and wrong answers."""
    alpha, theta = _persons(data)
    beta = _summing_to_zero("beta", data, int(data["I"]))
    item, person = data["ii"], data["jj"]
    logit = alpha[..., item] * theta[..., person] - beta[..., item]
    with pyro.plate("answers", len(item)):
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=data["y"])


def rating_scale(data: Data) -> None:
    """Grades 0 .. m; an item's steps are its difficulty plus those common to all."""
    alpha, theta = _persons(data)
    beta = _summing_to_zero("beta", data, int(data["I"]))
    kappa = _summing_to_zero("kappa", data, int(data["y"].max()))
    item, person = data["ii"], data["jj"]
    ability = alpha[..., item] * theta[..., person] - beta[..., item]
    _observe_grades(data, ability[..., None] - kappa[..., None, :])


def with_steps(d: Data) -> Data:
    """Where each item's steps stand in beta, and which of them it has."""
    d = with_covariates(d)
    item, grade = d["ii"], d["y"].long()
    most = torch.stack([grade[item == i].max() for i in range(int(d["I"]))])
    step = torch.arange(int(most.max()))
    exists = step < most[:, None]
    place = (most.cumsum(0) - most)[:, None] + step
    return {**d, "place": place.where(exists, 0), "exists": exists}


def partial_credit(data: Data) -> None:
    """Grades 0 .. m_i; each item has steps of its own."""
    alpha, theta = _persons(data)
    exists = data["exists"]
    beta = _summing_to_zero("beta", data, int(exists.sum()))
    item, person = data["ii"], data["jj"]
    ability = alpha[..., item] * theta[..., person]
    steps = ability[..., None] - beta[..., data["place"][item]]
    _observe_grades(data, steps, ~exists[item])


def _persons(data: Data) -> tuple[Tensor, Tensor]:
    """Draw the discriminations, and the abilities around their regression."""
    design = data["design"]
    zero = design.new_zeros(())
    with pyro.plate("discriminations", int(data["I"])):
        alpha = pyro.sample("alpha", dist.LogNormal(zero + 1, 1.0))
    with pyro.plate("covariates", design.shape[1]):
        slopes = pyro.sample("lambda_adj", dist.StudentT(zero + 3, 0.0, 1.0))
    mean = (design @ slopes[..., None]).squeeze(-1)
    with pyro.plate("persons", len(design)):
        return alpha, pyro.sample("theta", dist.Normal(mean, 1.0))


def _summing_to_zero(name: str, data: Data, size: int) -> Tensor:
    """Draw all but the last of numbers of sum zero, each of which is Normal(0, 3)."""
    zero = data["design"].new_zeros(())
    with pyro.plate(f"{name}_steps", size - 1):
        free = pyro.sample(f"{name}_free", dist.Normal(zero, 3.0))
    last = -free.sum(dim=-1, keepdim=True)
    pyro.factor(f"{name}_last", dist.Normal(zero, 3.0).log_prob(last[..., 0]))
    return torch.cat([free, last], dim=-1)


def _observe_grades(data: Data, steps: Tensor, absent: Tensor | None = None) -> None:
    """Grade k has the logit that the first k steps ``(rows, m)`` sum to; absent steps are none."""
    sums = steps.cumsum(dim=-1)
    if absent is not None:
        sums = sums.masked_fill(absent, -torch.inf)
    logits = torch.cat([torch.zeros_like(sums[..., :1]), sums], dim=-1)
    with pyro.plate("answers", len(data["y"])):
        pyro.sample("y", dist.Categorical(logits=logits), obs=data["y"])
