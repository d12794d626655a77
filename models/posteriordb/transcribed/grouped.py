"""Groups around a common mean: votes, birds, seeds, rats, hospitals, pilots."""

from transcribed.numerics import (
    Array,
    Values,
    bernoulli_logit,
    binomial_logit,
    cauchy,
    gamma,
    inv_gamma,
    normal,
    np,
    poisson_log,
    stan,
)


@stan("election88_full")
def election88_full(p: Values, d: Values) -> Array:
    """Votes of 1988."""
    beta, black, female = p["beta"], d["black"], d["female"]
    y_hat = beta[0] + beta[1] * black + beta[2] * female + beta[4] * female * black
    y_hat = y_hat + beta[3] * d["v_prev_full"] + p["a"][d["age"] - 1] + p["b"][d["edu"] - 1]
    y_hat = y_hat + p["c"][d["age_edu"] - 1] + p["d"][d["state"] - 1]
    y_hat = y_hat + p["e"][d["region_full"] - 1]
    prior = sum(normal(p[name], 0, p[f"sigma_{name}"]) for name in "abcde")
    return prior + normal(beta, 0, 100) + bernoulli_logit(d["y"], y_hat)


def _trend(p: Values, year: Array) -> Array:
    return p["alpha"] + p["beta1"] * year + p["beta2"] * year**2 + p["beta3"] * year**3


@stan("GLM_Poisson_model")
def glm_poisson(p: Values, d: Values) -> Array:
    """Flat in a box."""
    return poisson_log(d["C"], _trend(p, d["year"]))


@stan("GLMM_Poisson_model")
def glmm_poisson(p: Values, d: Values) -> Array:
    """Effects of years."""
    log_lambda = _trend(p, d["year"]) + p["eps"]
    return poisson_log(d["C"], log_lambda) + normal(p["eps"], 0, p["sigma"])


@stan("GLM_Binomial_model")
def glm_binomial(p: Values, d: Values) -> Array:
    """A parabola."""
    logit = p["alpha"] + p["beta1"] * d["year"] + p["beta2"] * d["year"] ** 2
    prior = sum(normal(p[name], 0, 100) for name in ("alpha", "beta1", "beta2"))
    return prior + binomial_logit(d["C"], d["N"], logit)


@stan("GLMM1_model")
def glmm1(p: Values, d: Values) -> Array:
    """Effects of sites."""
    prior = normal(p["alpha"], p["mu_alpha"], p["sd_alpha"]) + normal(p["mu_alpha"], 0, 10)
    return prior + poisson_log(d["obs"], p["alpha"][d["obssite"] - 1])


def _germinated(p: Values, d: Values, effects: Array, scale: float) -> Array:
    x1, x2 = d["x1"], d["x2"]
    names = ("alpha0", "alpha1", "alpha2", "alpha12")
    prior = sum(normal(p[name], 0, scale) for name in names)
    logit = p["alpha0"] + p["alpha1"] * x1 + p["alpha2"] * x2 + p["alpha12"] * x1 * x2 + effects
    return prior + binomial_logit(d["n"], d["N"], logit)


@stan("seeds_model")
def seeds(p: Values, d: Values) -> Array:
    """A precision under a diffuse gamma."""
    sigma = 1 / np.sqrt(p["tau"])
    prior = gamma(p["tau"], 1e-3, 1e-3) + normal(p["b"], 0, sigma)
    return prior + _germinated(p, d, p["b"], 1e3)


@stan("seeds_stanified_model")
def seeds_stanified(p: Values, d: Values) -> Array:
    """A half-Cauchy deviation."""
    prior = cauchy(p["sigma"], 1) + normal(p["b"], 0, p["sigma"])
    return prior + _germinated(p, d, p["b"], 1.0)


@stan("seeds_centered_model")
def seeds_centered(p: Values, d: Values) -> Array:
    """Effects without their mean."""
    prior = cauchy(p["sigma"], 1) + normal(p["c"], 0, p["sigma"])
    return prior + _germinated(p, d, p["c"] - np.mean(p["c"]), 1.0)


@stan("rats_model")
def rats(p: Values, d: Values) -> Array:
    """A line a rat."""
    rat = d["rat"] - 1
    prior = normal(p["mu_alpha"], 0, 100) + normal(p["mu_beta"], 0, 100)
    prior = prior + normal(p["alpha"], p["mu_alpha"], p["sigma_alpha"])
    prior = prior + normal(p["beta"], p["mu_beta"], p["sigma_beta"])
    mean = p["alpha"][rat] + p["beta"][rat] * (d["x"] - d["xbar"])
    return prior + normal(d["y"], mean, p["sigma_y"])


@stan("surgical_model")
def surgical(p: Values, d: Values) -> Array:
    """Deaths in hospitals."""
    prior = normal(p["mu"], 0, 1000) + inv_gamma(p["sigmasq"], 0.001, 0.001)
    prior = prior + normal(p["b"], p["mu"], np.sqrt(p["sigmasq"]))
    return prior + binomial_logit(d["r"], d["n"], p["b"])


@stan("pilots")
def pilots(p: Values, d: Values) -> Array:
    """Recoveries of pilots."""
    y_hat = p["a"][d["group_id"] - 1] + p["b"][d["scenario_id"] - 1]
    prior = normal(p["mu_a"], 0, 1) + normal(p["a"], 10 * p["mu_a"], p["sigma_a"])
    prior = prior + normal(p["mu_b"], 0, 1) + normal(p["b"], 10 * p["mu_b"], p["sigma_b"])
    return prior + normal(d["y"], y_hat, p["sigma_y"])
