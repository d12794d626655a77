"""Effects of groups around a common mean: votes, birds, seeds, rats, hospitals, pilots.

Each model is one draw's; groups and rows are plates.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from priors import flat_positive
from regressions import Data
from torch import Tensor

# Votes

KINDS = {"a": "age", "b": "edu", "c": "age_edu", "d": "state", "e": "region_full"}


def election88_full(data: Data) -> None:
    """Votes for the Republican of 1988 by sex, race and five kinds of groups (Gelman & Hill)."""
    black, female, zero = data["black"], data["female"], data["black"].new_zeros(())
    beta = pyro.sample("beta", dist.Normal(black.new_zeros(5), 100.0).to_event(1))
    logit = beta[..., 0] + beta[..., 1] * black + beta[..., 2] * female
    logit = logit + beta[..., 4] * female * black + beta[..., 3] * data["v_prev_full"]
    for name, group in KINDS.items():
        sigma = pyro.sample(f"sigma_{name}", dist.Uniform(zero, 100.0))
        with pyro.plate(group, int(data[f"n_{group}"])):
            effect = pyro.sample(name, dist.Normal(zero, sigma))
        logit = logit + effect[..., data[group]]
    with pyro.plate("voters", len(black)):
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=data["y"])


# Counts of birds (Kery & Schaub 2012)


def glm_poisson(data: Data) -> None:
    """Counts of falcons: a cubic in the year, flat priors."""
    _observe_counts(data, _cubic(data))


def glmm_poisson(data: Data) -> None:
    """The same with an effect of each year.

    Stan declares beta2 up to 20, but gives it no density beyond 10.
    """
    trend = _cubic(data)
    zero = data["year"].new_zeros(())
    sigma = pyro.sample("sigma", dist.Uniform(zero, 5.0))
    with pyro.plate("effects", len(data["year"])):
        eps = pyro.sample("eps", dist.Normal(zero, sigma))
    _observe_counts(data, trend + eps)


def glm_binomial(data: Data) -> None:
    """Breeding success of eagles: a parabola in the year."""
    year = data["year"]
    alpha, beta1, beta2 = (
        pyro.sample(name, dist.Normal(year.new_zeros(()), 100.0))
        for name in ("alpha", "beta1", "beta2")
    )
    logit = alpha + beta1 * year + beta2 * year.square()
    with pyro.plate("years", len(year)):
        pyro.sample("C", dist.Binomial(data["N"], logits=logit), obs=data["C"])


def glmm1(data: Data) -> None:
    """Counts of tits at 235 sites: an effect of each site, the same in all years."""
    seen, zero = data["obs"], data["obs"].new_zeros(())
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(zero, 10.0))
    sd_alpha = pyro.sample("sd_alpha", dist.Uniform(zero, 5.0))
    with pyro.plate("sites", int(data["nsite"])):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sd_alpha))
    with pyro.plate("counts", len(seen)):
        pyro.sample("obs", dist.Poisson(alpha[..., data["obssite"]].exp()), obs=seen)


def _cubic(data: Data) -> Tensor:
    """Draw a cubic's coefficients, all flat in a box; its value in each year."""
    year = data["year"]
    bounds = {"alpha": 20.0, "beta1": 10.0, "beta2": 10.0, "beta3": 10.0}
    alpha, beta1, beta2, beta3 = (
        pyro.sample(name, dist.Uniform(year.new_tensor(-bound), bound))
        for name, bound in bounds.items()
    )
    return alpha + beta1 * year + beta2 * year.square() + beta3 * year**3


def _observe_counts(data: Data, log_rate: Tensor) -> None:
    with pyro.plate("years", len(data["C"])):
        pyro.sample("C", dist.Poisson(log_rate.exp()), obs=data["C"])


# Germination of seeds on 21 plates (Crowder 1978; BUGS examples, volume 1)


def seeds(data: Data) -> None:
    """Diffuse priors; the precision tau of the plates' effects is Gamma(0.001, 0.001)."""
    fixed = _factorial(data, 1e3)
    zero = data["x1"].new_zeros(())
    tau = pyro.sample("tau", dist.Gamma(zero + 1e-3, 1e-3))
    with pyro.plate("effects", len(data["x1"])):
        b = pyro.sample("b", dist.Normal(zero, tau.rsqrt()))
    _observe_germination(data, fixed + b)


def seeds_stanified(data: Data) -> None:
    """Narrower priors; the effects' deviation is half-Cauchy."""
    fixed = _factorial(data, 1.0)
    _observe_germination(data, fixed + _plate_effects(data, "b"))


def seeds_centered(data: Data) -> None:
    """The same, with the effects' own mean taken off."""
    fixed = _factorial(data, 1.0)
    c = _plate_effects(data, "c")
    _observe_germination(data, fixed + c - c.mean(dim=-1, keepdim=True))


def _factorial(data: Data, scale: float) -> Tensor:
    """Draw the coefficients of seed type, root extract and both; the logit of each plate."""
    zero = data["x1"].new_zeros(())
    alpha0, alpha1, alpha2, alpha12 = (
        pyro.sample(name, dist.Normal(zero, scale))
        for name in ("alpha0", "alpha1", "alpha2", "alpha12")
    )
    x1, x2 = data["x1"], data["x2"]
    return alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2


def _plate_effects(data: Data, name: str) -> Tensor:
    zero = data["x1"].new_zeros(())
    sigma = pyro.sample("sigma", dist.HalfCauchy(zero + 1))
    with pyro.plate("effects", len(data["x1"])):
        return pyro.sample(name, dist.Normal(zero, sigma))


def _observe_germination(data: Data, logit: Tensor) -> None:
    with pyro.plate("plates", len(data["n"])):
        pyro.sample("n", dist.Binomial(data["N"], logits=logit), obs=data["n"])


# Others


def eight_schools_centered(data: Data) -> None:
    """Effects of coaching (Rubin 1981): a funnel; the posterior of the model not centred."""
    y = data["y"]
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, data["sigma"]), obs=y)


def rats(data: Data) -> None:
    """Weights of 30 young rats, a line each (Gelfand et al. 1990); flat scales."""
    y = data["y"]
    zero = y.new_zeros(())
    lines = {}
    for name in ("alpha", "beta"):
        mu = pyro.sample(f"mu_{name}", dist.Normal(zero, 100.0))
        sigma = pyro.sample(f"sigma_{name}", flat_positive(y))
        with pyro.plate(f"rats_{name}", int(data["N"])):
            lines[name] = pyro.sample(name, dist.Normal(mu, sigma))
    sigma_y = pyro.sample("sigma_y", flat_positive(y))
    intercept, slope = (lines[name][..., data["rat"]] for name in ("alpha", "beta"))
    with pyro.plate("weighings", len(y)):
        mean = intercept + slope * (data["x"] - data["xbar"])
        pyro.sample("y", dist.Normal(mean, sigma_y), obs=y)


def surgical(data: Data) -> None:
    """Deaths after heart surgery on babies in 12 hospitals (BUGS examples, volume 1)."""
    zero = data["r"].new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 1000.0))
    sigmasq = pyro.sample("sigmasq", dist.InverseGamma(zero + 0.001, zero + 0.001))
    with pyro.plate("hospitals", len(data["r"])):
        b = pyro.sample("b", dist.Normal(mu, sigmasq.sqrt()))
        pyro.sample("r", dist.Binomial(data["n"], logits=b), obs=data["r"])


def pilots(data: Data) -> None:
    """Pilots' recoveries by training group and scenario (Gelman & Hill 2007)."""
    zero = data["y"].new_zeros(())
    mean = zero
    for name, group in (("a", "group"), ("b", "scenario")):
        mu = pyro.sample(f"mu_{name}", dist.Normal(zero, 1.0))
        sigma = pyro.sample(f"sigma_{name}", dist.Uniform(zero, 100.0))
        with pyro.plate(group, int(data[f"n_{group}s"])):
            effect = pyro.sample(name, dist.Normal(10 * mu, sigma))
        mean = mean + effect[..., data[f"{group}_id"]]
    sigma_y = pyro.sample("sigma_y", dist.Uniform(zero, 100.0))
    with pyro.plate("flights", len(data["y"])):
        pyro.sample("y", dist.Normal(mean, sigma_y), obs=data["y"])
