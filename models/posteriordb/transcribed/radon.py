"""The radon models."""

from transcribed.numerics import Array, Values, normal, stan


def _observed(p: Values, d: Values, mean: Array) -> Array:
    return normal(p["sigma_y"], 0, 1) + normal(d["log_radon"], mean, p["sigma_y"])


def _county(d: Values) -> Array:
    return d["county_idx"] - 1


def _effects(p: Values, name: str) -> tuple[Array, Array]:
    """County effects and the log-density of all that they bring."""
    mu, sigma = p[f"mu_{name}"], p[f"sigma_{name}"]
    hyper = normal(sigma, 0, 1) + normal(mu, 0, 10)
    if f"{name}_raw" in p:
        raw = p[f"{name}_raw"]
        return mu + sigma * raw, hyper + normal(raw, 0, 1)
    return p[name], hyper + normal(p[name], mu, sigma)


@stan("radon_pooled")
def pooled(p: Values, d: Values) -> Array:
    """One line."""
    prior = normal(p["alpha"], 0, 10) + normal(p["beta"], 0, 10)
    return prior + _observed(p, d, p["alpha"] + p["beta"] * d["floor_measure"])


@stan("radon_county_intercept")
def county_intercept(p: Values, d: Values) -> Array:
    """An intercept a county."""
    prior = normal(p["alpha"], 0, 10) + normal(p["beta"], 0, 10)
    return prior + _observed(p, d, p["alpha"][_county(d)] + p["beta"] * d["floor_measure"])


@stan("radon_partially_pooled_centered", "radon_partially_pooled_noncentered")
def partially_pooled(p: Values, d: Values) -> Array:
    """A mean a county."""
    alpha, prior = _effects(p, "alpha")
    return prior + _observed(p, d, alpha[_county(d)])


@stan("radon_variable_intercept_centered", "radon_variable_intercept_noncentered")
def variable_intercept(p: Values, d: Values) -> Array:
    """An intercept a county, one slope."""
    alpha, prior = _effects(p, "alpha")
    mean = alpha[_county(d)] + d["floor_measure"] * p["beta"]
    return prior + normal(p["beta"], 0, 10) + _observed(p, d, mean)


@stan("radon_variable_slope_centered", "radon_variable_slope_noncentered")
def variable_slope(p: Values, d: Values) -> Array:
    """A slope a county, one intercept."""
    beta, prior = _effects(p, "beta")
    mean = p["alpha"] + d["floor_measure"] * beta[_county(d)]
    return prior + normal(p["alpha"], 0, 10) + _observed(p, d, mean)


@stan("radon_variable_intercept_slope_centered", "radon_variable_intercept_slope_noncentered")
def variable_intercept_slope(p: Values, d: Values) -> Array:
    """A line a county."""
    alpha, prior = _effects(p, "alpha")
    beta, more = _effects(p, "beta")
    mean = alpha[_county(d)] + d["floor_measure"] * beta[_county(d)]
    return prior + more + _observed(p, d, mean)


@stan("radon_hierarchical_intercept_centered", "radon_hierarchical_intercept_noncentered")
def hierarchical_intercept(p: Values, d: Values) -> Array:
    """A county's intercept with its uranium."""
    alpha, prior = _effects(p, "alpha")
    muj = alpha[_county(d)] + d["log_uppm"] * p["beta"][0]
    mean = muj + d["floor_measure"] * p["beta"][1]
    return prior + normal(p["beta"], 0, 10) + _observed(p, d, mean)


@stan("radon_county")
def radon_county(p: Values, d: Values) -> Array:
    """Means a county, flat scales."""
    y_hat = p["a"][d["county"] - 1]
    prior = normal(p["mu_a"], 0, 1) + normal(p["a"], p["mu_a"], p["sigma_a"])
    return prior + normal(d["y"], y_hat, p["sigma_y"])
