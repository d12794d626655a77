"""Models whose reference parameters are functions of standard normal latent variables."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from regressions import Data
from torch import Tensor

JITTER = 1e-10  # Stan's model adds it to the covariance's diagonal


def eight_schools_noncentered(data: Data) -> None:
    """Effects of coaching in eight schools (Rubin 1981): theta = mu + tau theta_trans."""
    y = data["y"]
    theta_trans = pyro.sample("theta_trans", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    theta = mu[..., None] + tau[..., None] * theta_trans
    theta = pyro.deterministic("theta", theta, event_dim=1)
    pyro.sample("y", dist.Normal(theta, data["sigma"]).to_event(1), obs=y)


def theta_trans(draws: Data, data: Data) -> Data:
    """The sites of ``eight_schools_noncentered`` from draws of theta, mu and tau."""
    mu, tau = draws["mu"], draws["tau"]
    return {
        "theta_trans": (draws["theta"] - mu[..., None]) / tau[..., None],
        "mu": mu,
        "tau": tau,
    }


def gp_pois_regr(data: Data) -> None:
    """Counts whose log-rate f is a Gaussian process: f = L f_tilde, LL' its covariance."""
    x, k = data["x"], data["k"]
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), x.new_tensor(4.0)))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    f_tilde = pyro.sample("f_tilde", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    f = (_cholesky(x, rho, alpha) @ f_tilde[..., None]).squeeze(-1)
    f = pyro.deterministic("f", f, event_dim=1)
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def f_tilde(draws: Data, data: Data) -> Data:
    """The sites of ``gp_pois_regr`` from draws of rho, alpha and f."""
    rho, alpha = draws["rho"], draws["alpha"]
    factor = _cholesky(data["x"], rho, alpha)
    tilde = torch.linalg.solve_triangular(factor, draws["f"][..., None], upper=False)
    return {"rho": rho, "alpha": alpha, "f_tilde": tilde.squeeze(-1)}


def _cholesky(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    """Of alpha^2 exp(-(x - x')^2 / 2 rho^2) plus jitter, ``(*batch, N, N)``."""
    distance = (x[:, None] - x) / rho[..., None, None]
    covariance = alpha.square()[..., None, None] * (-distance.square() / 2).exp()
    jitter = JITTER * torch.eye(len(x), dtype=x.dtype, device=x.device)
    return torch.linalg.cholesky(covariance + jitter)
