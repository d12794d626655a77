"""Maps, years, growth and decay."""

from transcribed.numerics import (
    Array,
    Values,
    beta,
    cauchy,
    expm,
    gamma,
    lognormal,
    normal,
    np,
    poisson_log,
    stan,
)


@stan("bym2_offset_only")
def bym2(p: Values, d: Values) -> Array:
    """Neighbours."""
    phi, rho, size = p["phi"], p["rho"], int(d["N"])
    convolved = np.sqrt(1 - rho) * p["theta"] + np.sqrt(rho / d["scaling_factor"]) * phi
    target = poisson_log(d["y"], np.log(d["E"]) + p["beta0"] + convolved * p["sigma"])
    target = target - 0.5 * np.sum((phi[d["node1"] - 1] - phi[d["node2"] - 1]) ** 2)
    target = target + normal(p["beta0"], 0, 1) + normal(p["theta"], 0, 1)
    target = target + normal(p["sigma"], 0, 1) + beta(rho, 0.5, 0.5)
    return target + normal(np.sum(phi), 0, 0.001 * size)


@stan("prophet")
def prophet(p: Values, d: Values) -> Array:
    """A linear trend."""
    if int(d["trend_indicator"]):
        raise NotImplementedError("the logistic trend")
    changes = (d["t"][:, None] >= d["t_change"][None, :]) * 1.0
    rate = p["k"] + changes @ p["delta"]
    trend = rate * d["t"] + (p["m"] + changes @ (-d["t_change"] * p["delta"]))
    mean = trend * (1 + d["X"] @ (p["beta"] * d["s_m"])) + d["X"] @ (p["beta"] * d["s_a"])
    prior = normal(p["k"], 0, 5) + normal(p["m"], 0, 5) - np.sum(np.abs(p["delta"])) / d["tau"]
    prior = prior + normal(p["sigma_obs"], 0, 0.5) + normal(p["beta"], 0, d["sigmas"])
    return prior + normal(d["y"], mean, p["sigma_obs"])


@stan("losscurve_sislob")
def loss_curves(p: Values, d: Values) -> Array:
    """Weibull growth."""
    if int(d["growthmodel_id"]) != 1:
        raise NotImplementedError("log-logistic growth")
    cohort = d["cohort_id"] - 1
    growth = 1 - np.exp(-((d["t_value"] / p["theta"]) ** p["omega"]))
    mean = p["LR"][cohort] * d["premium"][cohort] * growth[d["t_idx"] - 1]
    prior = normal(p["mu_LR"], 0, 0.5) + lognormal(p["sd_LR"], 0, 0.5)
    prior = prior + lognormal(p["LR"], p["mu_LR"], p["sd_LR"]) + lognormal(p["loss_sd"], 0, 0.7)
    prior = prior + lognormal(p["omega"], 0, 0.5) + lognormal(p["theta"], 0, 0.5)
    return prior + normal(d["loss"], mean, (p["loss_sd"] * d["premium"])[cohort])


@stan("soil_incubation")
def soil_incubation(p: Values, d: Values) -> Array:
    """Two pools, by a matrix's exponential."""
    k1, k2 = p["k1"], p["k2"]
    rows = [np.stack([-k1, p["alpha12"] * k2]), np.stack([p["alpha21"] * k1, -k2])]
    matrix, total = np.stack(rows), d["totalC_t0"]
    first = np.stack([p["gamma"] * total, (1 - p["gamma"]) * total])
    left = np.stack([np.sum(expm(matrix * (t - d["t0"])) @ first) for t in d["ts"]])
    prior = beta(p["gamma"], 10, 1) + cauchy(p["sigma"], 1)
    prior = prior + sum(normal(p[name], 0, 1) for name in ("k1", "k2", "alpha21", "alpha12"))
    return prior + normal(d["eCO2mean"], total - left, p["sigma"])


@stan("garch11")
def garch11(p: Values, d: Values) -> Array:
    """Year after year."""
    sigma = [d["sigma1"] * np.ones(())]
    for before in d["y"][:-1]:
        shock = p["alpha1"] * (before - p["mu"]) ** 2
        sigma.append(np.sqrt(p["alpha0"] + shock + p["beta1"] * sigma[-1] ** 2))
    return normal(d["y"], p["mu"], np.stack(sigma))


def _waves(long: Array, short: Array, lengths: tuple[Array, Array], years: int) -> Array:
    t = np.arange(years) * 1.0
    squared = (t[:, None] - t[None, :]) ** 2
    parts = zip((long, short), lengths, strict=True)
    covariance = sum(s * np.exp(-squared / (2 * length**2)) for s, length in parts)
    return np.linalg.cholesky(covariance + 1e-6 * np.eye(years))


@stan("hierarchical_gp")
def hierarchical_gp(p: Values, d: Values) -> Array:
    """Votes of states."""
    variances, years = 17 * p["prop_var"] * p["tot_var"], int(d["N_years"])
    sigma_state = np.sqrt(variances[2:12])
    lengths = {
        of: (p[f"length_GP_{of}_long"], p[f"length_GP_{of}_short"]) for of in ("region", "state")
    }
    region_root = _waves(variances[12], variances[14], lengths["region"], years)
    state_root = _waves(variances[13], variances[15], lengths["state"], years)
    gp_region, gp_state = region_root @ p["GP_region_std"], state_root @ p["GP_state_std"]
    year, state, region = d["year_ind"] - 1, d["state_ind"] - 1, d["region_ind"] - 1
    state_re = sigma_state[d["state_region_ind"] - 1] * p["state_std"]
    mean = p["mu"] + np.sqrt(variances[0]) * p["year_std"][year] + state_re[state]
    mean = mean + np.sqrt(variances[1]) * p["region_std"][region]
    mean = mean + gp_region[year, region] + gp_state[year, state]
    target = normal(d["y"], mean, np.sqrt(variances[16]))
    names = ("GP_region_std", "GP_state_std", "year_std", "state_std", "region_std")
    target = target + sum(normal(p[name], 0, 1) for name in names)
    target = target + normal(p["mu"], 0.5, 0.5) + gamma(p["tot_var"], 3, 3)
    target = target + np.sum(np.log(p["prop_var"]))
    for long, short in lengths.values():
        for length, scale in ((long, 8), (short, 3)):
            target = target + 29 * np.log(length) - (length / scale) ** 30
    return target
