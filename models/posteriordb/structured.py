"""Maps, years, growth and decay: fields, processes, trends. Each model is one draw's."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from port import from_zero
from priors import flat, flat_positive
from regressions import Data
from torch import Tensor


def bym2(data: Data) -> None:
    """Accidents on the way to school in 1,921 districts of New York (Morris et al. 2019).

    Effects theta are independent; phi differs little between neighbours and sums to nearly zero.
    """
    y, size = data["y"], len(data["y"])
    zero = y.new_zeros(())
    beta0 = pyro.sample("beta0", dist.Normal(zero, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(zero + 1))
    rho = pyro.sample("rho", dist.Beta(zero + 0.5, zero + 0.5))
    phi = pyro.sample("phi", flat(y, size))
    steps = phi[..., data["node1"]] - phi[..., data["node2"]]
    pyro.factor("neighbours", -steps.square().sum(dim=-1) / 2)
    pyro.factor("sum", dist.Normal(zero, 0.001 * size).log_prob(phi.sum(dim=-1)))
    with pyro.plate("districts", size):
        theta = pyro.sample("theta", dist.Normal(zero, 1.0))
        effect = (1 - rho).sqrt() * theta + (rho / data["scaling_factor"]).sqrt() * phi
        log_rate = data["E"].log() + beta0 + sigma * effect
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def changepoints(d: Data) -> Data:
    """Which changes of the trend have come at each time."""
    return {**d, "A": (d["t"][:, None] >= d["t_change"]).to(d["t"])}


def prophet(data: Data) -> None:
    """Downloads of RStan: a broken line, and seasons (Taylor & Letham 2018)."""
    y, t, changed = data["y"], data["t"], data["A"]
    zero = y.new_zeros(())
    k, m = (pyro.sample(name, dist.Normal(zero, 5.0)) for name in ("k", "m"))
    with pyro.plate("changes", changed.shape[1]):
        delta = pyro.sample("delta", dist.Laplace(zero, data["tau"]))
    sigma = pyro.sample("sigma_obs", dist.HalfNormal(zero + 0.5))
    with pyro.plate("seasons", len(data["sigmas"])):
        beta = pyro.sample("beta", dist.Normal(zero, data["sigmas"]))
    trend = (k + changed @ delta) * t + m - changed @ (data["t_change"] * delta)
    times, added = (data["X"] @ (beta * data[key]) for key in ("s_m", "s_a"))
    with pyro.plate("days", len(y)):
        pyro.sample("y", dist.Normal(trend * (1 + times) + added, sigma), obs=y)


def loss_curves(data: Data) -> None:
    """Losses of ten cohorts of insurances grow along one Weibull curve."""
    loss = data["loss"]
    zero = loss.new_zeros(())
    omega, theta = (pyro.sample(name, dist.LogNormal(zero, 0.5)) for name in ("omega", "theta"))
    mu = pyro.sample("mu_LR", dist.Normal(zero, 0.5))
    sd = pyro.sample("sd_LR", dist.LogNormal(zero, 0.5))
    with pyro.plate("cohorts", len(data["premium"])):
        ratio = pyro.sample("LR", dist.LogNormal(mu, sd))
    noise = pyro.sample("loss_sd", dist.LogNormal(zero, 0.7))
    grown = -(-((data["t_value"] / theta) ** omega)).expm1()
    cohort = data["cohort_id"]
    mean = (ratio * data["premium"])[cohort] * grown[data["t_idx"]]
    with pyro.plate("losses", len(loss)):
        pyro.sample("loss", dist.Normal(mean, noise * data["premium"][cohort]), obs=loss)


def soil_incubation(data: Data) -> None:
    """Carbon that leaves soil: two pools feed each other, C' = M C, solved by its eigenvalues."""
    seen, total = data["eCO2mean"], data["totalC_t0"]
    zero = seen.new_zeros(())
    gamma = pyro.sample("gamma", dist.Beta(zero + 10, zero + 1))
    k1, k2, alpha21, alpha12 = (
        pyro.sample(name, dist.HalfNormal(zero + 1)) for name in ("k1", "k2", "alpha21", "alpha12")
    )
    sigma = pyro.sample("sigma", dist.HalfCauchy(zero + 1))
    middle, half = -(k1 + k2) / 2, (k1 - k2) / 2
    root = (half.square() + alpha12 * alpha21 * k1 * k2).sqrt()
    t = data["ts"] - data["t0"]
    slow, fast = ((middle + root) * t).exp(), ((middle - root) * t).exp()
    first, second = gamma * total, (1 - gamma) * total
    # sum of (M - middle) C(0) over both pools
    slope = first * (alpha21 * k1 - half) + second * (alpha12 * k2 + half)
    left = (slow + fast) / 2 * total + (slow - fast) / (2 * root) * slope
    with pyro.plate("times", len(seen)):
        pyro.sample("eCO2mean", dist.Normal(total - left, sigma), obs=seen)


def kilpisjarvi(data: Data) -> None:
    """Summers in Lapland: a line in the year, priors from the data."""
    zero = data["y"].new_zeros(())
    alpha = pyro.sample("alpha", dist.Normal(data["pmualpha"], data["psalpha"]))
    beta = pyro.sample("beta", dist.Normal(data["pmubeta"], data["psbeta"]))
    sigma = pyro.sample("sigma", flat_positive(zero))
    with pyro.plate("years", len(data["y"])):
        pyro.sample("y", dist.Normal(alpha + beta * data["x"], sigma), obs=data["y"])


def dugongs(data: Data) -> None:
    """Lengths of sea cows by age approach alpha (Carlin & Gelfand 1991)."""
    length = data["Y"]
    zero = length.new_zeros(())
    alpha, beta = (pyro.sample(name, dist.Normal(zero, 1000.0)) for name in ("alpha", "beta"))
    lam = pyro.sample("lambda", dist.Uniform(zero + 0.5, 1.0))
    tau = pyro.sample("tau", dist.Gamma(zero + 1e-4, 1e-4))
    with pyro.plate("dugongs", len(length)):
        pyro.sample("Y", dist.Normal(alpha - beta * lam ** data["x"], tau.rsqrt()), obs=length)


def gp_regr(data: Data) -> None:
    """A Gaussian process seen with noise, whose variance is sigma."""
    x, y = data["x"], data["y"]
    zero = y.new_zeros(())
    rho = pyro.sample("rho", dist.Gamma(zero + 25, zero + 4))
    alpha = pyro.sample("alpha", dist.HalfNormal(zero + 2))
    sigma = pyro.sample("sigma", dist.HalfNormal(zero + 1))
    waves = alpha.square() * (-(((x[:, None] - x) / rho).square()) / 2).exp()
    root = torch.linalg.cholesky(waves + sigma * torch.eye(len(x)).to(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=root), obs=y)


def garch11(data: Data) -> None:
    """Volatility that feeds on itself; beta1 is bounded by 1 - alpha1, flat below."""
    y = data["y"]
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 1.0).mask(False))
    alpha0 = pyro.sample("alpha0", flat_positive(y))
    alpha1 = pyro.sample("alpha1", dist.Uniform(zero, 1.0))
    beta1 = pyro.sample("beta1", dist.Uniform(zero, 1 - alpha1).mask(False))
    variances = [data["sigma1"].square()]
    for before in y[:-1]:
        variances.append(alpha0 + alpha1 * (before - mu).square() + beta1 * variances[-1])
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(mu, torch.stack(variances).sqrt()), obs=y)


# Votes in 50 states, 11 elections (Trangucci 2017)

WAVES = {"region_long": 8.0, "state_long": 8.0, "region_short": 3.0, "state_short": 3.0}
HISTORY = from_zero("state_region_ind", "state_ind", "region_ind", "year_ind")


def hierarchical_gp(data: Data) -> None:
    """Effects of years, states and regions, and Gaussian processes of states and regions."""
    y, years = data["y"], int(data["N_years"])
    zero = y.new_zeros(())
    states, regions = int(data["N_states"]), int(data["N_regions"])
    shapes = {
        "GP_region_std": (years, regions),
        "GP_state_std": (years, states),
        "year_std": (int(data["N_years_obs"]),),
        "state_std": (states,),
        "region_std": (regions,),
    }
    std = {
        name: pyro.sample(name, dist.Normal(y.new_zeros(shape), 1.0).to_event(len(shape)))
        for name, shape in shapes.items()
    }
    mu = pyro.sample("mu", dist.Normal(zero + 0.5, 0.5))
    total = pyro.sample("tot_var", dist.Gamma(zero + 3, zero + 3))
    share = pyro.sample("prop_var", dist.Dirichlet(y.new_full((17,), 2.0)))
    sigma = (17 * total * share).sqrt()
    lengths = {
        name: pyro.sample(f"length_GP_{name}", dist.Weibull(zero + scale, zero + 30))
        for name, scale in WAVES.items()
    }
    region, state, year = data["region_ind"], data["state_ind"], data["year_ind"]
    of_region = _root(years, sigma[[12, 14]], lengths, "region") @ std["GP_region_std"]
    of_state = _root(years, sigma[[13, 15]], lengths, "state") @ std["GP_state_std"]
    by_state = sigma[2:12][data["state_region_ind"]] * std["state_std"]
    mean = mu + (sigma[0] * std["year_std"])[year] + by_state[state]
    mean = mean + (sigma[1] * std["region_std"])[region]
    mean = mean + of_region[year, region] + of_state[year, state]
    with pyro.plate("votes", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma[16]), obs=y)


def _root(years: int, sigma: Tensor, lengths: Data, of: str) -> Tensor:
    """The Cholesky factor of the covariance of years, long waves plus short ones."""
    t = torch.arange(years, dtype=sigma.dtype)
    squared = (t[:, None] - t).square()
    covariance = 1e-6 * torch.eye(years, dtype=sigma.dtype)
    for scale, kind in zip(sigma, ("long", "short"), strict=True):
        length = lengths[f"{of}_{kind}"]
        covariance = covariance + scale.square() * (-squared / (2 * length.square())).exp()
    return torch.linalg.cholesky(covariance)
