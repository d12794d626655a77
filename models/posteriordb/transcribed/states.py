"""Mixtures and chains of hidden states."""

from transcribed.numerics import Array, Values, beta, logsumexp, normal, np, scan, stan


def _normals(y: Array, mean: Array, sd: Array) -> Array:
    """Log-densities one by one."""
    return -0.5 * ((y - mean) / sd) ** 2 - np.log(sd)


def _mixed(y: Array, log_weights: Array, mu: Array, sigma: Array) -> Array:
    terms = log_weights[None, :] + _normals(y[:, None], mu[None, :], sigma[None, :])
    return np.sum(logsumexp(terms, axis=1))


def _two(theta: Array) -> Array:
    return np.log(np.stack([theta, 1 - theta]))


@stan("normal_mixture")
def normal_mixture(p: Values, d: Values) -> Array:
    """Known scale."""
    return normal(p["mu"], 0, 10) + _mixed(d["y"], _two(p["theta"]), p["mu"], np.ones(2))


@stan("low_dim_gauss_mix_collapse")
def low_dim_gauss_mix_collapse(p: Values, d: Values) -> Array:
    """No order."""
    prior = normal(p["sigma"], 0, 2) + normal(p["mu"], 0, 2) + beta(p["theta"], 5, 5)
    return prior + _mixed(d["y"], _two(p["theta"]), p["mu"], p["sigma"])


@stan("normal_mixture_k")
def normal_mixture_k(p: Values, d: Values) -> Array:
    """Five."""
    return normal(p["mu"], 0, 10) + _mixed(d["y"], np.log(p["theta"]), p["mu"], p["sigma"])


@stan("hmm_gaussian")
def hmm_gaussian(p: Values, d: Values) -> Array:
    """The forward algorithm."""
    emitted = _normals(d["y"][:, None], p["mu"][None, :], p["sigma"][None, :])

    def step(alpha: Array, row: Array) -> Array:
        return logsumexp(alpha[:, None] + np.log(p["A"]), axis=0) + row

    return logsumexp(scan(step, np.log(p["pi1"]) + emitted[0], emitted[1:]))


@stan("iohmm_reg")
def iohmm_reg(p: Values, d: Values) -> Array:
    """The forward algorithm; the weight of a step is that of the state it leaves."""
    u, states = np.asarray(d["u"]), int(d["K"])
    emitted = _normals(d["y"][:, None], u @ p["b"].T, p["sigma"][None, :])
    raw = u @ p["w"].T
    rows = np.concatenate([raw - logsumexp(raw, axis=1)[:, None], emitted], axis=1)

    def step(alpha: Array, row: Array) -> Array:
        return logsumexp(alpha + row[:states]) + row[states:]

    last = scan(step, np.log(p["pi1"]) + emitted[0], rows[1:])
    prior = normal(p["w"], 0, 5) + normal(p["b"], 0, 5) + normal(p["sigma"], 0, 3)
    return prior + logsumexp(last)
