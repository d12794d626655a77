"""Captures of animals, and rates."""

from transcribed.numerics import (
    Array,
    Values,
    beta,
    binomial_logit,
    cauchy,
    gammaln,
    logsumexp,
    normal,
    np,
    stan,
)


def _logit(p: Array) -> Array:
    return np.log(p) - np.log1p(-p)


def _bernoulli(y: Array, logit: Array) -> Array:
    """For each row, summed over its occasions."""
    return np.sum(y * logit - np.logaddexp(0.0, logit), axis=1)


def _animals(omega: Array, of_row: Array, seen: Array) -> Array:
    """Rows that were seen, and rows that may not be there."""
    there = np.log(omega) + of_row
    return np.sum(np.where(seen, there, np.logaddexp(there, np.log(1 - omega))))


def _caught(p: Values, d: Values, logit: Array) -> Array:
    y = d["y"]
    return _animals(p["omega"], _bernoulli(y, logit), np.sum(y, axis=1) > 0)


@stan("M0_model")
def m0(p: Values, d: Values) -> Array:
    """One probability; counts are binomial."""
    s, p_caught = np.sum(d["y"], axis=1), p["p"]
    of_row = s * np.log(p_caught) + (d["T"] - s) * np.log(1 - p_caught)
    return _animals(p["omega"], of_row, s > 0)


@stan("Mt_model")
def mt(p: Values, d: Values) -> Array:
    """By occasion."""
    return _caught(p, d, np.broadcast_to(_logit(p["p"]), d["y"].shape))


@stan("Mb_model")
def mb(p: Values, d: Values) -> Array:
    """After a catch."""
    y = d["y"]
    later = (1 - y[:, :-1]) * p["p"] + y[:, :-1] * p["c"]
    p_eff = np.concatenate([np.ones_like(later[:, :1]) * p["p"], later], axis=1)
    of_row = np.sum(y * np.log(p_eff) + (1 - y) * np.log(1 - p_eff), axis=1)
    return _animals(p["omega"], of_row, np.sum(y, axis=1) > 0)


@stan("Mh_model")
def mh(p: Values, d: Values) -> Array:
    """By individual."""
    y, eps = d["y"], _logit(p["mean_p"]) + p["sigma"] * p["eps_raw"]
    of_row = y * eps - d["T"] * np.logaddexp(0.0, eps)
    choose = gammaln(d["T"] + 1.0) - gammaln(y + 1.0) - gammaln(d["T"] - y + 1.0)
    return normal(p["eps_raw"], 0, 1) + _animals(p["omega"], of_row + choose, y > 0)


@stan("Mth_model")
def mth(p: Values, d: Values) -> Array:
    """By occasion and individual."""
    eps = p["sigma"] * p["eps_raw"]
    logit = _logit(p["mean_p"])[None, :] + eps[:, None]
    return normal(p["eps_raw"], 0, 1) + _caught(p, d, logit)


@stan("Mtbh_model")
def mtbh(p: Values, d: Values) -> Array:
    """By occasion, individual and catch."""
    eps, y = p["sigma"] * p["eps_raw"], d["y"]
    alpha = _logit(p["mean_p"])
    first = alpha[0] + eps[:, None]
    later = alpha[None, 1:] + eps[:, None] + p["gamma"] * y[:, :-1]
    logit = np.concatenate([first, later], axis=1)
    return normal(p["gamma"], 0, 10) + normal(p["eps_raw"], 0, 1) + _caught(p, d, logit)


@stan("multi_occupancy")
def multi_occupancy(p: Values, d: Values) -> Array:
    """Species at sites."""
    x, k, n, s, sigma, rho = d["X"], d["K"], int(d["n"]), int(d["S"]), p["sigma_uv"], p["rho_uv"]
    prior = sum(cauchy(p[name], 2.5) for name in ("alpha", "beta", "sigma_uv"))
    prior = prior + beta((rho + 1) / 2, 2, 2) + beta(p["Omega"], 2, 2)
    off = sigma[0] * sigma[1] * rho
    covariance = np.stack([np.stack([sigma[0] ** 2, off]), np.stack([off, sigma[1] ** 2])])
    uv = np.stack([p["uv1"], p["uv2"]])
    prior = prior - 0.5 * np.sum(uv * np.linalg.solve(covariance, uv))
    prior = prior - 0.5 * s * np.log(np.linalg.det(covariance))
    psi, theta = p["uv1"] + p["alpha"], p["uv2"] + p["beta"]
    log_psi, log_not_psi = -np.logaddexp(0.0, -psi), -np.logaddexp(0.0, psi)
    observed = log_psi[:n, None] + x * theta[:n, None] - k * np.logaddexp(0.0, theta[:n, None])
    never = log_psi - k * np.logaddexp(0.0, theta)
    unobserved = np.logaddexp(never, log_not_psi)
    target = n * np.log(p["Omega"]) + np.sum(np.where(x > 0, observed, unobserved[:n, None]))
    available = np.log(p["Omega"]) + d["J"] * unobserved[n:]
    return prior + target + np.sum(np.logaddexp(np.log(1 - p["Omega"]), available))


@stan("Rate_1_model", "Rate_4_model")
def rate_1(p: Values, d: Values) -> Array:
    """Uniform priors add nothing."""
    free = p.get("thetaprior", p["theta"])
    return beta(free, 1, 1) + binomial_logit(d["k"], d["n"], _logit(p["theta"]))


@stan("Rate_2_model")
def rate_2(p: Values, d: Values) -> Array:
    """Two rates."""
    first = binomial_logit(d["k1"], d["n1"], _logit(p["theta1"]))
    return first + binomial_logit(d["k2"], d["n2"], _logit(p["theta2"]))


@stan("Rate_3_model", "Rate_5_model")
def rate_3(p: Values, d: Values) -> Array:
    """A common rate."""
    first = binomial_logit(d["k1"], d["n1"], _logit(p["theta"]))
    return first + binomial_logit(d["k2"], d["n2"], _logit(p["theta"]))


@stan("Survey_model")
def survey(p: Values, d: Values) -> Array:
    """Any number of surveys."""
    k, theta = np.asarray(d["k"]), p["theta"]
    parts = []
    for n in range(max(int(count) for count in d["k"]), int(d["nmax"]) + 1):
        choose = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
        parts.append(np.sum(choose + k * np.log(theta) + (n - k) * np.log(1 - theta)))
    return logsumexp(np.stack(parts))
