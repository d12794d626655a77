"""Arrays and log-densities for the transcriptions: in JAX, or in NumPy where JAX is absent.

NUTS needs gradients, so JAX; a comparison of values does not. The log-densities are written out
from their formulas, so that a comparison with Pyro compares with something else than Pyro.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import jax
    import jax.numpy as np
    from jax.scipy.linalg import expm
    from jax.scipy.special import expit, gammaln, logsumexp

    jax.config.update("jax_enable_x64", True)
except ImportError:
    import numpy as np
    from scipy.linalg import expm
    from scipy.special import expit, gammaln

    jax = None

    def logsumexp(x: Any, axis: int | None = None) -> Any:
        """Of a few terms, without the checks that make SciPy's slow in a loop."""
        return np.logaddexp.reduce(x, axis=axis)


Array = Any
Values = dict[str, Array]
LOG_DENSITIES: dict[str, Callable[[Values, Values], Array]] = {}

__all__ = ["expit", "expm", "gammaln", "logsumexp", "np"]


def stan(*names: str) -> Callable:
    """Register a function of parameters and data as the log-density of Stan models so named."""

    def registered(log_density: Callable[[Values, Values], Array]) -> Callable:
        LOG_DENSITIES.update(dict.fromkeys(names, log_density))
        return log_density

    return registered


def scan(step: Callable[[Array, Array], Array], first: Array, rows: Array) -> Array:
    """Carry a state through rows; the last state."""
    if jax is not None:
        return jax.lax.scan(lambda state, row: (step(state, row), None), first, rows)[0]
    for row in rows:
        first = step(first, row)
    return first


def normal(x: Array, mean: Array, sd: Array) -> Array:
    """Sum over all elements, as everywhere here, constants left out."""
    z = (x - mean) / sd
    return np.sum(-0.5 * z * z - np.log(sd) * np.ones_like(z))


def cauchy(x: Array, scale: Array) -> Array:
    """Around zero."""
    return np.sum(-np.log1p((x / scale) ** 2))


def student_t(x: Array, df: Array, scale: Array) -> Array:
    """Around zero."""
    return np.sum(-0.5 * (df + 1) * np.log1p((x / scale) ** 2 / df))


def lognormal(x: Array, mean: Array, sd: Array) -> Array:
    """Of positive numbers."""
    return normal(np.log(x), mean, sd) - np.sum(np.log(x))


def gamma(x: Array, shape: Array, rate: Array) -> Array:
    """Of positive numbers."""
    return np.sum((shape - 1) * np.log(x) - rate * x)


def inv_gamma(x: Array, shape: Array, scale: Array) -> Array:
    """Of positive numbers."""
    return np.sum(-(shape + 1) * np.log(x) - scale / x)


def beta(x: Array, a: Array, b: Array) -> Array:
    """Of numbers between 0 and 1."""
    return np.sum((a - 1) * np.log(x) + (b - 1) * np.log1p(-x))


def binomial_logit(k: Array, n: Array, logit: Array) -> Array:
    """Successes k of n."""
    return np.sum(k * logit - n * np.logaddexp(0.0, logit))


def bernoulli_logit(y: Array, logit: Array) -> Array:
    """Of zeros and ones."""
    return binomial_logit(y, 1, logit)


def poisson_log(k: Array, log_rate: Array) -> Array:
    """Of counts."""
    return np.sum(k * log_rate - np.exp(log_rate))


def lkj_corr_cholesky(factor: Array, eta: float) -> Array:
    """Of a K x K Cholesky factor of a correlation matrix."""
    order = factor.shape[0]
    powers = order - np.arange(2, order + 1) + 2 * eta - 2
    return np.sum(powers * np.log(np.diagonal(factor)[1:]))
