"""Linear regressions, curves, eight schools."""

from transcribed.numerics import Array, Values, cauchy, gamma, normal, np, stan


def _regression(p: Values, y: Array, *columns: Array) -> Array:
    mean = p["beta"][0]
    for k, column in enumerate(columns):
        mean = mean + p["beta"][k + 1] * column
    return normal(y, mean, p["sigma"])


@stan("nes")
def nes(p: Values, d: Values) -> Array:
    """Party identification."""
    ages = [(d["age_discrete"] == group) * 1.0 for group in (2, 3, 4)]
    rest = (d["educ1"], d["gender"], d["income"])
    return _regression(p, d["partyid7"], d["real_ideo"], d["race_adj"], *ages, *rest)


@stan("kidscore_mom_work")
def kidscore_mom_work(p: Values, d: Values) -> Array:
    """Four classes."""
    return _regression(p, d["kid_score"], *((d["mom_work"] == k) * 1.0 for k in (2, 3, 4)))


@stan("logearn_interaction_z")
def logearn_interaction_z(p: Values, d: Values) -> Array:
    """Standardized height."""
    z_height = (d["height"] - np.mean(d["height"])) / np.std(d["height"], ddof=1)
    return _regression(p, np.log(d["earn"]), z_height, d["male"], z_height * d["male"])


@stan("logmesquite_logvash")
def logmesquite_logvash(p: Values, d: Values) -> Array:
    """Volume, area, shape, height."""
    first, second = d["diam1"], d["diam2"]
    volume, area = np.log(first * second * d["canopy_height"]), np.log(first * second)
    columns = (volume, area, np.log(first / second), np.log(d["total_height"]), d["group"])
    return _regression(p, np.log(d["weight"]), *columns)


@stan("sesame_one_pred_a")
def sesame(p: Values, d: Values) -> Array:
    """Encouraged or not."""
    return _regression(p, d["watched"], d["encouraged"])


@stan("blr")
def blr(p: Values, d: Values) -> Array:
    """Normal priors."""
    prior = normal(p["beta"], 0, 10) + normal(p["sigma"], 0, 10)
    return prior + normal(d["y"], d["X"] @ p["beta"], p["sigma"])


@stan("kilpisjarvi")
def kilpisjarvi(p: Values, d: Values) -> Array:
    """Summers."""
    prior = normal(p["alpha"], d["pmualpha"], d["psalpha"])
    prior = prior + normal(p["beta"], d["pmubeta"], d["psbeta"])
    return prior + normal(d["y"], p["alpha"] + p["beta"] * d["x"], p["sigma"])


@stan("dugongs_model")
def dugongs(p: Values, d: Values) -> Array:
    """Lengths by age."""
    mean = p["alpha"] - p["beta"] * p["lambda"] ** d["x"]
    prior = normal(p["alpha"], 0, 1000) + normal(p["beta"], 0, 1000) + gamma(p["tau"], 1e-4, 1e-4)
    return prior + normal(d["Y"], mean, 1 / np.sqrt(p["tau"]))


@stan("gp_regr")
def gp_regr(p: Values, d: Values) -> Array:
    """A Gaussian process, by the covariance's inverse and determinant."""
    x, y = d["x"], d["y"]
    squared = (x[:, None] - x[None, :]) ** 2
    waves = p["alpha"] ** 2 * np.exp(-0.5 * squared / p["rho"] ** 2)
    covariance = waves + p["sigma"] * np.eye(len(x))
    prior = gamma(p["rho"], 25, 4) + normal(p["alpha"], 0, 2) + normal(p["sigma"], 0, 1)
    fit = -0.5 * y @ np.linalg.solve(covariance, y)
    return prior + fit - 0.5 * np.linalg.slogdet(covariance)[1]


@stan("eight_schools_centered")
def eight_schools_centered(p: Values, d: Values) -> Array:
    """A funnel."""
    prior = cauchy(p["tau"], 5) + normal(p["mu"], 0, 5) + normal(p["theta"], p["mu"], p["tau"])
    return prior + normal(d["y"], p["theta"], d["sigma"])
