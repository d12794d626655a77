"""Item-response models."""

from transcribed.numerics import (
    Array,
    Values,
    bernoulli_logit,
    cauchy,
    lkj_corr_cholesky,
    lognormal,
    logsumexp,
    normal,
    np,
    stan,
    student_t,
)


@stan("irt_2pl")
def irt_2pl(p: Values, d: Values) -> Array:
    """Two parameters an item."""
    prior = cauchy(p["sigma_theta"], 2) + normal(p["theta"], 0, p["sigma_theta"])
    prior = prior + cauchy(p["sigma_a"], 2) + lognormal(p["a"], 0, p["sigma_a"])
    prior = prior + normal(p["mu_b"], 0, 5) + cauchy(p["sigma_b"], 2)
    prior = prior + normal(p["b"], p["mu_b"], p["sigma_b"])
    logit = p["a"][:, None] * (p["theta"][None, :] - p["b"][:, None])
    return prior + bernoulli_logit(d["y"], logit)


@stan("hier_2pl")
def hier_2pl(p: Values, d: Values) -> Array:
    """Correlated parameters."""
    ii, jj, tau = d["ii"] - 1, d["jj"] - 1, p["tau"]
    scale = np.diag(tau) @ p["L_Omega"]
    xi = np.stack([p["xi1"], p["xi2"]])
    white = np.linalg.inv(scale) @ (xi - p["mu"][:, None])
    target = -0.5 * np.sum(white**2) - d["I"] * np.sum(np.log(np.diagonal(scale)))
    target = target + normal(p["theta"], 0, 1) + lkj_corr_cholesky(p["L_Omega"], 4)
    target = target + normal(p["mu"][0], 0, 1) + normal(p["mu"][1], 0, 5) - 0.1 * np.sum(tau)
    alpha, beta = np.exp(p["xi1"]), p["xi2"]
    return target + bernoulli_logit(d["y"], alpha[ii] * (p["theta"][jj] - beta[ii]))


@stan("lsat_model")
def lsat(p: Values, d: Values) -> Array:
    """Students by pattern."""
    ends = [int(end) for end in d["culm"]]
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    answers = np.repeat(d["response"], np.asarray(counts), axis=0, **_length(counts))
    prior = normal(p["alpha"], 0, 100) + normal(p["theta"], 0, 1) + normal(p["beta"], 0, 100)
    logit = p["beta"] * p["theta"][:, None] - p["alpha"][None, :]
    return prior + bernoulli_logit(answers, logit)


def _length(counts: list[int]) -> dict[str, int]:
    return {"total_repeat_length": sum(counts)} if np.__name__ == "jax.numpy" else {}


def _adjusted(w: Array) -> Array:
    """Stan's ``obtain_adjustments``, with its precedence of operators."""
    columns = [w[:, 0]]
    for k in range(1, w.shape[1]):
        column = w[:, k]
        low, high, count = column.min(), column.max(), 0
        for value in column:
            count = int((count + value == low) or (value == high))
        scale = high - low if count == len(column) else 2 * column.std(ddof=1)
        columns.append((column - column.mean()) / scale)
    return np.stack(columns, axis=1)


def _regression(p: Values, d: Values) -> Array:
    """What the three latent regressions have in common."""
    mean = _adjusted(d["W"]) @ p["lambda_adj"]
    prior = lognormal(p["alpha"], 1, 1) + student_t(p["lambda_adj"], 3, 1)
    return prior + normal(p["theta"], mean, 1)


def _closed(free: Array) -> Array:
    return np.concatenate([free, -np.sum(free)[None]])


@stan("2pl_latent_reg_irt")
def two_parameters(p: Values, d: Values) -> Array:
    """Right or wrong."""
    ii, jj, beta = d["ii"] - 1, d["jj"] - 1, _closed(p["beta_free"])
    logit = p["alpha"][ii] * p["theta"][jj] - beta[ii]
    return _regression(p, d) + normal(beta, 0, 3) + bernoulli_logit(d["y"], logit)


@stan("grsm_latent_reg_irt")
def rating_scale(p: Values, d: Values) -> Array:
    """Common steps."""
    ii, jj, y = d["ii"] - 1, d["jj"] - 1, d["y"]
    beta, kappa = _closed(p["beta_free"]), _closed(p["kappa_free"])
    ability = p["theta"][jj] * p["alpha"][ii] - beta[ii]
    logits = [np.zeros_like(ability)]
    for k in range(int(y.max())):
        logits.append(logits[-1] + ability - kappa[k])
    logits = np.stack(logits)
    taken = np.sum(logits * (np.arange(len(logits))[:, None] == y[None]))
    target = normal(beta, 0, 3) + normal(kappa, 0, 3) + taken
    return _regression(p, d) + target - np.sum(logsumexp(logits, axis=0))


@stan("gpcm_latent_reg_irt")
def partial_credit(p: Values, d: Values) -> Array:
    """Steps of each item, item by item."""
    ii, jj, y, beta = d["ii"] - 1, d["jj"] - 1, d["y"], _closed(p["beta_free"])
    target, pos = _regression(p, d) + normal(beta, 0, 3), 0
    for i in range(int(d["I"])):
        rows = [n for n in range(len(y)) if ii[n] == i]
        answers, persons = y[rows], jj[rows]
        ability = p["theta"][persons] * p["alpha"][i]
        most = int(max(y[n] for n in rows))
        logits = [np.zeros_like(ability)]
        for k in range(most):
            logits.append(logits[-1] + ability - beta[pos + k])
        logits, pos = np.stack(logits), pos + most
        taken = np.sum(logits * (np.arange(most + 1)[:, None] == answers[None]))
        target = target + taken - np.sum(logsumexp(logits, axis=0))
    return target
