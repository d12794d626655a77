"""Logistic regressions: wells, votes, dogs, genes."""

from transcribed.numerics import (
    Array,
    Values,
    bernoulli_logit,
    expit,
    inv_gamma,
    lkj_corr_cholesky,
    normal,
    np,
    stan,
    student_t,
)


def _glm(p: Values, y: Array, *columns: Array) -> Array:
    x = np.stack(columns, axis=1)
    return bernoulli_logit(y, p["alpha"] + x @ p["beta"])


@stan("nes_logit_model")
def nes_logit(p: Values, d: Values) -> Array:
    """Votes."""
    return _glm(p, d["vote"], d["income"])


@stan("wells_dist")
def wells_dist(p: Values, d: Values) -> Array:
    """In meters."""
    return bernoulli_logit(d["switched"], p["beta"][0] + p["beta"][1] * d["dist"])


@stan("wells_dist100_model")
def wells_dist100(p: Values, d: Values) -> Array:
    """In 100 m."""
    return _glm(p, d["switched"], d["dist"] / 100)


@stan("wells_dist100ars_model")
def wells_dist100ars(p: Values, d: Values) -> Array:
    """With arsenic."""
    return _glm(p, d["switched"], d["dist"] / 100, d["arsenic"])


@stan("wells_interaction_model")
def wells_interaction(p: Values, d: Values) -> Array:
    """With their product."""
    dist100 = d["dist"] / 100
    return _glm(p, d["switched"], dist100, d["arsenic"], dist100 * d["arsenic"])


@stan("wells_dae_model")
def wells_dae(p: Values, d: Values) -> Array:
    """With education."""
    return _glm(p, d["switched"], d["dist"] / 100, d["arsenic"], d["educ"] / 4)


def _centered(d: Values) -> tuple[Array, Array, Array]:
    c_dist100 = (d["dist"] - np.mean(d["dist"])) / 100
    c_arsenic = d["arsenic"] - np.mean(d["arsenic"])
    return c_dist100, c_arsenic, c_dist100 * c_arsenic


@stan("wells_interaction_c_model")
def wells_interaction_c(p: Values, d: Values) -> Array:
    """Centred."""
    return _glm(p, d["switched"], *_centered(d))


@stan("wells_dae_c_model")
def wells_dae_c(p: Values, d: Values) -> Array:
    """Centred, with education."""
    return _glm(p, d["switched"], *_centered(d), d["educ"] / 4)


@stan("wells_daae_c_model")
def wells_daae_c(p: Values, d: Values) -> Array:
    """Centred, with associations and education."""
    return _glm(p, d["switched"], *_centered(d), d["assoc"], d["educ"] / 4)


@stan("wells_dae_inter_model")
def wells_dae_inter(p: Values, d: Values) -> Array:
    """All centred, with all products."""
    dist, arsenic, both = _centered(d)
    educ = (d["educ"] - np.mean(d["educ"])) / 4
    columns = (dist, arsenic, educ, both, dist * educ, arsenic * educ)
    return _glm(p, d["switched"], *columns)


def _counts(y: Array) -> tuple[Array, Array]:
    """Shocks and avoidances before each trial, trial by trial."""
    shock, avoid = [0 * y[:, 0]], [0 * y[:, 0]]
    for t in range(1, y.shape[1]):
        shock.append(shock[-1] + y[:, t - 1])
        avoid.append(avoid[-1] + 1 - y[:, t - 1])
    return np.stack(shock, axis=1), np.stack(avoid, axis=1)


@stan("dogs")
def dogs(p: Values, d: Values) -> Array:
    """Linear."""
    shock, avoid = _counts(d["y"])
    logit = p["beta"][0] + p["beta"][1] * avoid + p["beta"][2] * shock
    return normal(p["beta"], 0, 100) + bernoulli_logit(d["y"], logit)


@stan("dogs_log")
def dogs_log(p: Values, d: Values) -> Array:
    """Without an intercept."""
    shock, avoid = _counts(d["y"])
    return bernoulli_logit(d["y"], p["beta"][0] * avoid + p["beta"][1] * shock)


def _products(y: Array, a: Array, b: Array) -> Array:
    """Shocks with probability a^shocks b^avoidances; the first is sure."""
    shock, avoid = (count[:, 1:] for count in _counts(y))
    probability = a**shock * b**avoid
    return np.sum(np.where(y[:, 1:] == 1, np.log(probability), np.log1p(-probability)))


@stan("dogs_hierarchical")
def dogs_hierarchical(p: Values, d: Values) -> Array:
    """Log-linear."""
    return _products(d["y"], p["a"], p["b"])


@stan("dogs_nonhierarchical")
def dogs_nonhierarchical(p: Values, d: Values) -> Array:
    """Log-linear, each dog its own."""
    mu, factor = p["mu_logit_ab"], p["L_logit_ab"]
    logit_ab = mu[None, :] + p["z"] @ (np.diag(p["sigma_logit_ab"]) @ factor)
    a, b = expit(logit_ab[:, 0]), expit(logit_ab[:, 1])
    prior = np.sum(-mu - 2 * np.log1p(np.exp(-mu))) + normal(p["sigma_logit_ab"], 0, 1)
    prior = prior + lkj_corr_cholesky(factor, 2) + normal(p["z"], 0, 1)
    return prior + _products(d["y"], a[:, None], b[:, None])


@stan("logistic_regression_rhs")
def regularized_horseshoe(p: Values, d: Values) -> Array:
    """Genes."""
    tau, lam, c = p["tau"], p["lambda"], d["slab_scale"] * np.sqrt(p["caux"])
    lambda_tilde = np.sqrt(c**2 * lam**2 / (c**2 + tau**2 * lam**2))
    prior = normal(p["z"], 0, 1) + student_t(lam, d["nu_local"], 1)
    prior = prior + student_t(tau, d["nu_global"], 2 * d["scale_global"])
    prior = prior + inv_gamma(p["caux"], 0.5 * d["slab_df"], 0.5 * d["slab_df"])
    prior = prior + normal(p["beta0"], 0, d["scale_icept"])
    beta = p["z"] * lambda_tilde * tau
    return prior + bernoulli_logit(d["y"], p["beta0"] + d["x"] @ beta)
