# %% [markdown]
# # A flow as a guide, and when to distrust it
#
# Can an inverse autoregressive flow stand in for MCMC on a real posterior, and how would I know
# when it cannot?
#
# A *guide* $q(\theta)$ is a density that we train to be like the posterior $p(\theta \mid y)$. It
# must draw fast, and it must score its own draws fast. An inverse autoregressive flow (IAF, Kingma
# et al. 2016, arXiv:1606.04934) does both in one pass.

# %%
import logging
import math
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.infer.reparam import LocScaleReparam

import pyroflows as pf

warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing")  # its news, on import
logging.getLogger("pyro").setLevel(logging.WARNING)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
pyro.set_rng_seed(0)

# %% [markdown]
# ## The posterior
#
# Eight schools coached their pupils for a test (Rubin 1981). School $j$ reports an effect $y_j$ and
# its standard error $\sigma_j$, in points of the test. The schools are alike, but not equal:
#
# $$\mu \sim N(0, 5), \quad \tau \sim C^+(5), \quad \theta_j \sim N(\mu, \tau), \quad
# y_j \sim N(\theta_j, \sigma_j).$$
#
# Ten unknowns, and a hard shape: where $\tau$ is small, all $\theta_j$ are squeezed to $\mu$. It is
# a *funnel*.
#
# Here we can know the truth. Given $\tau$ everything is Gaussian, so $\theta$ and $\mu$ integrate
# out by hand, and what is left is one integral over $\log\tau$, done on a grid.

# %%
effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 18.0, 1.0, 12.0])
error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(error: torch.Tensor, effect: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=effect)


log_tau = torch.linspace(-12, 8, 20_001, dtype=torch.float64)
tau, y, s2 = log_tau.exp(), effect.double()[:, None], error.double()[:, None] ** 2
precision = (1 / (s2 + tau**2)).sum(0) + 1 / 25  # of mu, given tau
mu = (y / (s2 + tau**2)).sum(0) / precision
log_p = dist.Normal(0.0, (s2 + tau**2).sqrt()).log_prob(y).sum(0)
log_p += (precision * mu**2 - (25 * precision).log()) / 2
log_p += dist.HalfCauchy(5.0).log_prob(tau) + log_tau  # d tau = tau d log tau
step = (log_tau[1] - log_tau[0]).item()
evidence = (log_p.logsumexp(0) + math.log(step)).item()
weight = log_p.softmax(0)
theta = (y / s2 + mu / tau**2) / (1 / s2 + 1 / tau**2)
exact = {"mu": weight @ mu, "tau": weight @ tau, "theta": theta @ weight}
print(f"log evidence {evidence:.3f} nats, E mu {exact['mu']:.2f}, E tau {exact['tau']:.2f} points")

# %% [markdown]
# ## Train it with Pyro's SVI
#
# `pf.AutoFlow` is a Pyro autoguide: it stacks all latent sites in $\mathbb R^{10}$ and puts an IAF
# over them. So Pyro's own `SVI` trains it. The ELBO is $\log p(y) - KL(q \,\|\, p)$: it can rise to
# the log evidence and no further, and what is missing is the divergence in nats.

# %%
guide = pf.AutoFlow(schools)
elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
svi = SVI(schools, guide, pyro.optim.ClippedAdam({"lr": 3e-3}), elbo)
by_svi = torch.tensor([-svi.step(error, effect) for _ in range(20 if SMOKE else 200)])
print(f"mean ELBO of the last steps: {by_svi[-100:].mean():.2f} nats")

# %% [markdown]
# ## Or in one call
#
# `pf.fit_guide` goes on from there. It takes 128 particles a step, uses a gradient whose noise
# vanishes as the guide becomes exact (the *path* gradient), lowers the step size when the ELBO is
# flat, stops by itself, and averages the last weights. It takes any guide: beside the IAF we train
# Pyro's mean-field `AutoNormal`, ten independent Gaussians (by longer steps, as it starts further
# off). The picture has the exact log evidence as a dashed line: its distance is what each guide
# gets wrong, in nats.

# %%
options = {"max_steps": 20 if SMOKE else 700, "progress": False}
history = pf.fit_guide(schools, guide, error, effect, **options)
mean_field = AutoNormal(schools)
history_mean_field = pf.fit_guide(schools, mean_field, error, effect, lr=0.05, **options)
for name, h in {"IAF": history, "mean field": history_mean_field}.items():
    print(f"{name:11} ELBO {h.score:.2f} nats, so KL {evidence - h.score:.2f} nats")

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.plot(by_svi, lw=0.6, color="C0", alpha=0.5, label="IAF under SVI")
ax.plot([len(by_svi) + s for s in history.steps], history.train, "C0.-", label="IAF, fit_guide")
ax.plot(history_mean_field.steps, history_mean_field.train, "C1.-", label="mean field, fit_guide")
ax.axhline(evidence, color="k", ls="--", lw=1, label="log evidence, exact")
ax.set(ylim=(-37, -30.5), xlabel="step", ylabel="ELBO, nats", title="How close each guide comes")
ax.legend(loc="lower right", ncols=2, fontsize=8)

# %% [markdown]
# ## Beside NUTS
#
# NUTS needs help with a funnel (that is [the next tutorial](07_flow_priors_and_neutra.ipynb)): we
# write the model *non-centred*, $\theta_j = \mu + \tau\,\epsilon_j$ with $\epsilon_j \sim N(0, 1)$,
# by Pyro's `LocScaleReparam`. The guides above got the hard, centred form.

# %%
noncentred = pyro.poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)})
mcmc = MCMC(
    NUTS(noncentred),
    num_samples=10 if SMOKE else 300,
    warmup_steps=5 if SMOKE else 100,
    disable_progbar=True,
)
mcmc.run(error, effect)
nuts = mcmc.get_samples()
nuts["theta"] = nuts["mu"][:, None] + nuts["tau"][:, None] * nuts["theta_decentered"]

# %% [markdown]
# A picture of the funnel: the effect of the first school against $\log\tau$. In the last panel
# stands the density of $\log\tau$, with the exact one as a line.

# %%
guides = {"mean field": mean_field, "IAF": guide}
reports = {name: pf.report(schools, g, error, effect) for name, g in guides.items()}
draws = {"NUTS": nuts, **{name: report.draws for name, report in reports.items()}}
colours = {"NUTS": "0.45", "mean field": "C1", "IAF": "C0"}
fig, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained")
for ax, (name, drawn) in zip(axes, draws.items(), strict=False):
    height = drawn["tau"].log()
    ax.scatter(drawn["theta"][:1000, 0], height[:1000], s=3, color=colours[name])
    ax.set(title=name, xlim=(-20, 40), ylim=(-4, 4), xlabel=r"$\theta_1$, points")
    axes[3].hist(height, 40, range=(-4, 4), density=True, histtype="step", color=colours[name])
axes[3].set(title=r"density of $\log\tau$", xlim=(-4, 4), xlabel=r"$\log\tau$")
axes[3].plot(log_tau, weight / step, "k--", lw=1)
axes[0].set_ylabel(r"$\log\tau$")

# %% [markdown]
# ## How good is it, without the truth?
#
# Weigh each draw by $w = p(\theta, y) / q(\theta)$. A perfect guide has equal weights. The heavier
# their tail, the less they can be relied on: $\hat k$ is the tail's shape, and with $\hat k$ below
# its threshold (about 0.7) the weighted draws can be used (Vehtari et al. 2024, arXiv:1507.02646;
# for guides Yao et al. 2018, arXiv:1802.02538). `pf.report` says it in words.

# %%
for name, report in reports.items():
    print(f"--- {name}\n{report}\n")

# %% [markdown]
# Read both numbers. The mean field is bad twice: $\hat k$ is above the threshold, and its 10,000
# draws are worth a hundred or fewer (ESS). Most of the IAF's draws count in full, and its $\hat k$
# lies about the threshold, a little above or below from one training to the next: its few heavy
# weights come from the thin end of the funnel, which the map reaches badly. $\hat k$ is a slope. On
# logarithmic axes the largest weights fall as rank$^{-k}$, and the picture shows what the slope
# does not: how much weight is there.

# %%
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, report in reports.items():
    each = report.weighted.log_weight.double().softmax(0).sort(descending=True).values
    rank = torch.arange(1, len(each) + 1)
    label = rf"{name}, $\hat k$ = {report.khat:.2f}"
    ax.loglog(rank, each * len(each), color=colours[name], label=label)
ax.axhline(1, color="k", ls="--", lw=1, label="a perfect guide")
ax.set(xlabel="rank", ylabel="weight, of the mean", ylim=(1e-3, 1e4), title="Sorted weights")
ax.legend()

# %% [markdown]
# ## What weights can mend
#
# `report.means()` are means of the weighted draws, `report.resample(n)` draws by the weights.
# Against the exact means, in points: the IAF has them with and without weights, and the weights
# cannot bring the mean field home. (NUTS is exact in the limit; its 300 correlated draws leave it
# some tenths of a point off.)

# %%
print(f"{'':24}{'mu':>8}{'tau':>8}{'theta_1':>9}")
rows = {"exact": exact, "NUTS": {k: nuts[k].mean(0) for k in exact}}
for name, report in reports.items():
    rows[name] = {k: v.mean(0) for k, v in report.draws.items()}
    rows[f"{name}, weighted"] = report.means()
for name, mean in rows.items():
    print(f"{name:24}{mean['mu']:8.2f}{mean['tau']:8.2f}{mean['theta'][0]:9.2f}")

# %% [markdown]
# ## On to ArviZ
#
# `pf.to_arviz` hands over draws, log-likelihoods and predictions, with the plates as dimensions.
# Draws of a guide are independent, so $\hat R$ and autocorrelation have nothing to say:
# `kind="stats"` leaves them out. With `resample=True` the draws would be taken by their weights.

# %%
import arviz as az

names = {"school": list("ABCDEFGH")}
data = pf.to_arviz(schools, guide, error, effect, coords=names)
some = {"coords": {"school": ["A", "C"]}, "var_names": ["mu", "tau", "theta"]}
az.plot_pair(data, **some)
az.summary(data, kind="stats")

# %% [markdown]
# ## When to distrust
#
# $\hat k$ judges the guide *where it draws*. It cannot see what was never visited. We measure the
# square of a number: $z \sim N(0, 2)$, $y \sim N(z^2, 0.2)$, $y = 4$. The posterior has two equal
# modes, near $-2$ and $2$, and a trained guide may sit in either.

# %%


def square(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(z**2, 0.2), obs=y)


four = torch.tensor(4.0)
grid = torch.linspace(-5, 5, 10_001)
log_joint = dist.Normal(0.0, 2.0).log_prob(grid) + dist.Normal(grid**2, 0.2).log_prob(four)
truth = (log_joint.logsumexp(0) + math.log(10 / 10_000)).item()
found = {}
for start in (-2.0, 2.0):
    at = init_to_value(values={"z": torch.tensor(start)})
    side = pf.AutoFlow(square, init="init", init_loc_fn=at)
    pf.fit_guide(square, side, four, **{**options, "max_steps": 20 if SMOKE else 300})
    found[start] = pf.report(square, side, four)
    print(f"start {start:+}: k-hat {found[start].khat:.2f}, evidence {found[start].evidence:.3f}")
both = math.log(sum(math.exp(report.evidence) for report in found.values()))
print(f"both together {both:.3f}, exact {truth:.3f} nats\n{found[2.0].verdict}")

# %% [markdown]
# The weights of each guide are content, and each is wrong by half: its evidence is short by
# $\log 2 = 0.69$ nats. So `pf.report` looks further than the guide draws: it climbs from other
# points, and the verdict names the mode that is missing. `pf.AutoFlow(square)`, without these
# starts, finds both modes and is a mixture of two flows. In the picture each guide fits its own
# mode, with twice the height.

# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(grid, (log_joint - truth).exp(), "k--", lw=1, label="posterior, exact")
for start, report in found.items():
    label = f"guide from {start:+.0f}"
    ax.hist(report.draws["z"], 200, range=(-3, 3), density=True, alpha=0.5, label=label)
ax.set(xlabel="$z$", ylabel="density", title="Each guide is sure, and has half of it", xlim=(-3, 3))
ax.legend(loc="upper center")

# %% [markdown]
# So distrust a guide
#
# - whose $\hat k$ is above its threshold: train longer, make the flow larger, write the model
#   otherwise, or run `pf.NeuTra`;
# - that you started once: start from several places (`init_loc_fn`), and see if the evidence agrees
#   *and* the draws overlap;
# - in many dimensions: with hundreds of unknowns $\hat k$ is rarely good, though each marginal is;
# - whose predictions do not look like the data, however good the guide: then it is the model.
#
# ## What to read next
#
# - [Flows as priors, and NeuTra](07_flow_priors_and_neutra.ipynb): NUTS through a flow corrects a
#   guide that weights cannot.
# - [Write your own flow](11_write_your_own.ipynb), and use it as a guide.
# - `models/horseshoe_logistic.py` and `models/stochastic_volatility.py`: larger posteriors.
