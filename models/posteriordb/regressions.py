"""Linear regressions with Gaussian noise, on a rotated outcome.

With the design X = QR, the density of y ~ Normal(X beta, sigma) depends on y through Q'y, which is
Normal(R beta, sigma), and through the residual sum of squares s, for which s / sigma^2 is
chi-squared with N - K degrees of freedom. The models observe these two, which is the same
likelihood but for a constant; one evaluation costs K^2 operations, however many rows there are.

A function named as Stan's model makes that data (``design``, ``outcome``, ``residual``,
``freedom``) from Stan's; a few models differ in their priors.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from priors import Restricted, flat, flat_positive, positive
from torch import Tensor

Data = dict[str, Tensor]


# What all have in common


def rotated(outcome: Tensor, design: Tensor) -> Data:
    """Reduce a regression to its sufficient statistics.

    Args:
        outcome: ``(rows,)``.
        design: ``(rows, coefficients)``.

    Returns:
        ``outcome`` Q'y and ``design`` R, ``residual`` |y - QQ'y|^2 and its degrees of ``freedom``.
    """
    q, r = torch.linalg.qr(design)
    inside = q.T @ outcome
    return {
        "outcome": inside,
        "design": r,
        "residual": (outcome - q @ inside).square().sum(),
        "freedom": design.new_tensor(design.shape[0] - design.shape[1]),
    }


def with_intercept(outcome: Tensor, *columns: Tensor) -> Data:
    """The rotated regression on a constant and the given columns, each ``(rows,)``."""
    return rotated(outcome, torch.stack([torch.ones_like(outcome), *columns], dim=-1))


def observe(data: Data, beta: Tensor, sigma: Tensor) -> None:
    """The likelihood of coefficients ``(*batch, K)`` and noise ``(*batch,)``."""
    mean = beta @ data["design"].T
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=data["outcome"])
    rest = dist.Gamma(data["freedom"] / 2, 0.5 / sigma.square())
    pyro.sample("residual", rest, obs=data["residual"])


# Models


def flat_regression(data: Data) -> None:
    """Flat priors on the coefficients and on sigma > 0."""
    beta = pyro.sample("beta", flat(data["outcome"], data["design"].shape[-1]))
    sigma = pyro.sample("sigma", flat_positive(data["outcome"]))
    observe(data, beta, sigma)


def half_cauchy_regression(data: Data) -> None:
    """Flat priors on the coefficients, a half-Cauchy of scale 2.5 on sigma."""
    beta = pyro.sample("beta", flat(data["outcome"], data["design"].shape[-1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(data["outcome"].new_tensor(2.5)))
    observe(data, beta, sigma)


def normal_regression(data: Data) -> None:
    """Normal priors of scale 10 on the coefficients and, halved, on sigma."""
    zeros = torch.zeros_like(data["outcome"])
    beta = pyro.sample("beta", dist.Normal(zeros, 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(zeros.new_tensor(10.0)))
    observe(data, beta, sigma)


def brms_regression(data: Data) -> None:
    """The priors that brms sets: standard normal slopes, Student-t intercept and sigma."""
    zeros = torch.zeros_like(data["outcome"])
    b = pyro.sample("b", dist.Normal(zeros[1:], 1.0).to_event(1))
    center = dist.StudentT(zeros.new_tensor(3.0), 8.0, 10.0)
    intercept = pyro.sample("Intercept", center)
    scale = dist.StudentT(zeros.new_tensor(3.0), 0.0, 10.0)
    sigma = pyro.sample("sigma", Restricted(scale, positive))
    observe(data, torch.cat([intercept[..., None], b], dim=-1), sigma)


# Designs: earnings of American adults (Gelman & Hill 2007)


def earn_height(d: Data) -> Data:
    """Earnings on height."""
    return with_intercept(d["earn"], d["height"])


def log10earn_height(d: Data) -> Data:
    """Earnings, log 10, on height."""
    return with_intercept(d["earn"].log10(), d["height"])


def logearn_height(d: Data) -> Data:
    """Log earnings on height."""
    return with_intercept(d["earn"].log(), d["height"])


def logearn_height_male(d: Data) -> Data:
    """Log earnings on height and sex."""
    return with_intercept(d["earn"].log(), d["height"], d["male"])


def logearn_logheight_male(d: Data) -> Data:
    """Log earnings on log height and sex."""
    return with_intercept(d["earn"].log(), d["height"].log(), d["male"])


def logearn_interaction(d: Data) -> Data:
    """Log earnings on height, sex and their product."""
    return with_intercept(d["earn"].log(), d["height"], d["male"], d["height"] * d["male"])


def logearn_interaction_z(d: Data) -> Data:
    """The same with the height in standard deviations from its mean."""
    height = (d["height"] - d["height"].mean()) / d["height"].std()
    return with_intercept(d["earn"].log(), height, d["male"], height * d["male"])


# Children's test scores and their mothers (Gelman & Hill 2007)


def kidscore_momhs(d: Data) -> Data:
    """Score on the mother's schooling."""
    return with_intercept(d["kid_score"], d["mom_hs"])


def kidscore_momiq(d: Data) -> Data:
    """Score on the mother's IQ."""
    return with_intercept(d["kid_score"], d["mom_iq"])


def kidscore_momhsiq(d: Data) -> Data:
    """Score on the mother's schooling and IQ."""
    return with_intercept(d["kid_score"], d["mom_hs"], d["mom_iq"])


def kidscore_mom_work(d: Data) -> Data:
    """Score on whether the mother worked, in four classes."""
    classes = [(d["mom_work"] == group).to(d["kid_score"]) for group in (2, 3, 4)]
    return with_intercept(d["kid_score"], *classes)


def kidscore_interaction(d: Data) -> Data:
    """Score on the mother's schooling, IQ and their product."""
    return _interaction(d["kid_score"], d["mom_hs"], d["mom_iq"])


def kidscore_interaction_c(d: Data) -> Data:
    """Predictors centred at their means."""
    hs, iq = d["mom_hs"], d["mom_iq"]
    return _interaction(d["kid_score"], hs - hs.mean(), iq - iq.mean())


def kidscore_interaction_c2(d: Data) -> Data:
    """Predictors centred at reference points."""
    return _interaction(d["kid_score"], d["mom_hs"] - 0.5, d["mom_iq"] - 100.0)


def kidscore_interaction_z(d: Data) -> Data:
    """Predictors centred at their means, in units of two standard deviations."""
    hs, iq = ((x - x.mean()) / (2 * x.std()) for x in (d["mom_hs"], d["mom_iq"]))
    return _interaction(d["kid_score"], hs, iq)


def _interaction(outcome: Tensor, first: Tensor, second: Tensor) -> Data:
    return with_intercept(outcome, first, second, first * second)


# Yield of mesquite bushes (Gelman & Hill 2007)

BUSH = ("diam1", "diam2", "canopy_height", "total_height", "density")


def mesquite(d: Data) -> Data:
    """Leaf weight on all measurements."""
    return with_intercept(d["weight"], *(d[key] for key in BUSH), d["group"])


def logmesquite(d: Data) -> Data:
    """Log leaf weight on the logarithms of all measurements."""
    return with_intercept(d["weight"].log(), *(d[key].log() for key in BUSH), d["group"])


def logmesquite_logvolume(d: Data) -> Data:
    """Log leaf weight on the canopy's log volume."""
    volume, _, _ = _canopy(d)
    return with_intercept(d["weight"].log(), volume)


def logmesquite_logva(d: Data) -> Data:
    """Log leaf weight on the canopy's log volume, log area and the group."""
    volume, area, _ = _canopy(d)
    return with_intercept(d["weight"].log(), volume, area, d["group"])


def logmesquite_logvas(d: Data) -> Data:
    """Log leaf weight on the canopy's log volume, area, shape and more."""
    rest = (d["total_height"].log(), d["density"].log(), d["group"])
    return with_intercept(d["weight"].log(), *_canopy(d), *rest)


def logmesquite_logvash(d: Data) -> Data:
    """Log leaf weight on the canopy's log volume, area, shape, on the height and the group."""
    return with_intercept(d["weight"].log(), *_canopy(d), d["total_height"].log(), d["group"])


def _canopy(d: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the canopy's volume, area and shape."""
    first, second = d["diam1"].log(), d["diam2"].log()
    return first + second + d["canopy_height"].log(), first + second, first - second


# Others


def nes(d: Data) -> Data:
    """Party identification in the National Election Study; age in four classes."""
    ages = [(d["age_discrete"] == group).to(d["partyid7"]) for group in (2, 3, 4)]
    first = (d["real_ideo"], d["race_adj"])
    return with_intercept(d["partyid7"], *first, *ages, d["educ1"], d["gender"], d["income"])


def blr(d: Data) -> Data:
    """A design with strongly correlated columns, without an intercept."""
    return rotated(d["y"], d["X"])


def sesame(d: Data) -> Data:
    """Whether children watched Sesame Street, by whether they were encouraged to."""
    return with_intercept(d["watched"], d["encouraged"])


def diamonds(d: Data) -> Data:
    """Prices of diamonds; all columns but the constant first one are centred."""
    slopes = d["X"][:, 1:]
    return with_intercept(d["Y"], *(slopes - slopes.mean(dim=0)).unbind(dim=-1))
