"""Radon in the houses of American counties (Gelman & Hill 2007): log radon on the floor measured.

Each model is one draw's; houses and counties are plates. The posteriors of Minnesota have 919
houses in 85 counties, those of all states 12,573 houses in 386. Where a model takes ``centered``,
Stan has it twice: with county effects as they are, or as standard normal ones, scaled and shifted.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from regressions import Data
from torch import Tensor


def pooled(data: Data) -> None:
    """One intercept, one slope."""
    zero = data["log_radon"].new_zeros(())
    alpha = pyro.sample("alpha", dist.Normal(zero, 10.0))
    beta = pyro.sample("beta", dist.Normal(zero, 10.0))
    _observe(data, alpha + beta * data["floor_measure"])


def county_intercept(data: Data) -> None:
    """An intercept for each county, without a common mean."""
    zero = data["log_radon"].new_zeros(())
    with pyro.plate("county", int(data["J"])):
        alpha = pyro.sample("alpha", dist.Normal(zero, 10.0))
    beta = pyro.sample("beta", dist.Normal(zero, 10.0))
    _observe(data, alpha[..., data["county_idx"]] + beta * data["floor_measure"])


def partially_pooled(data: Data, centered: bool) -> None:
    """A mean for each county around a common one; the floor is left out."""
    alpha = _varying(data, "alpha", centered)
    _observe(data, alpha[..., data["county_idx"]])


def variable_intercept(data: Data, centered: bool) -> None:
    """County intercepts around a common mean, one slope."""
    alpha = _varying(data, "alpha", centered)
    beta = pyro.sample("beta", dist.Normal(data["log_radon"].new_zeros(()), 10.0))
    _observe(data, alpha[..., data["county_idx"]] + beta * data["floor_measure"])


def variable_slope(data: Data, centered: bool) -> None:
    """One intercept, county slopes around a common mean."""
    alpha = pyro.sample("alpha", dist.Normal(data["log_radon"].new_zeros(()), 10.0))
    beta = _varying(data, "beta", centered)
    _observe(data, alpha + beta[..., data["county_idx"]] * data["floor_measure"])


def variable_intercept_slope(data: Data, centered: bool) -> None:
    """County intercepts and county slopes, each around a common mean."""
    county = data["county_idx"]
    alpha, beta = (_varying(data, name, centered) for name in ("alpha", "beta"))
    _observe(data, alpha[..., county] + beta[..., county] * data["floor_measure"])


def hierarchical_intercept(data: Data, centered: bool) -> None:
    """County intercepts around a common mean; slopes on the county's uranium and on the floor."""
    alpha = _varying(data, "alpha", centered)
    beta = pyro.sample("beta", dist.Normal(data["log_radon"].new_zeros(2), 10.0).to_event(1))
    of_county = alpha[..., data["county_idx"]] + beta[..., 0] * data["log_uppm"]
    _observe(data, of_county + beta[..., 1] * data["floor_measure"])


def radon_county(data: Data) -> None:
    """County means under flat scales up to 100, in another copy of the data."""
    zero = data["y"].new_zeros(())
    mu_a = pyro.sample("mu_a", dist.Normal(zero, 1.0))
    sigma_a = pyro.sample("sigma_a", dist.Uniform(zero, 100.0))
    sigma_y = pyro.sample("sigma_y", dist.Uniform(zero, 100.0))
    with pyro.plate("counties", int(data["J"])):
        a = pyro.sample("a", dist.Normal(mu_a, sigma_a))
    with pyro.plate("houses", len(data["y"])):
        pyro.sample("y", dist.Normal(a[..., data["county"]], sigma_y), obs=data["y"])


def _varying(data: Data, name: str, centered: bool) -> Tensor:
    """County effects around ``mu_name`` with deviation ``sigma_name``."""
    zero = data["log_radon"].new_zeros(())
    mu = pyro.sample(f"mu_{name}", dist.Normal(zero, 10.0))
    sigma = pyro.sample(f"sigma_{name}", dist.HalfNormal(zero + 1))
    with pyro.plate(f"county_{name}", int(data["J"])):
        if centered:
            return pyro.sample(name, dist.Normal(mu, sigma))
        raw = pyro.sample(f"{name}_raw", dist.Normal(zero, 1.0))
        return pyro.deterministic(name, mu + sigma * raw)


def _observe(data: Data, mean: Tensor) -> None:
    seen = data["log_radon"]
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(seen.new_ones(())))
    with pyro.plate("house", len(seen)):
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=seen)
