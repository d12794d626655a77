# %% [markdown]
# # Flows and NUTS
#
# What does a flow do for NUTS?
#
# Two things. It can be the *prior*, learnt from data, that NUTS samples under. And it can be the
# *coordinates* that NUTS samples in: a map that turns a hard posterior into something like a round
# Gaussian. The second is called NeuTra (Hoffman et al. 2019, arXiv:1903.03704).

# %%
import logging
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import TransformReparam
from pyro.ops.stats import effective_sample_size

import pyroflows as pf

logging.getLogger("pyro").setLevel(logging.WARNING)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
pyro.set_rng_seed(0)

# %% [markdown]
# ## A prior learnt from data
#
# Suppose that we have seen many points from two half moons. A RealNVP learns their density: it
# samples and scores in one pass each, and its nets get a smooth activation, since NUTS follows the
# gradient. Then it is frozen: a prior is not trained further by the posterior.

# %%
moons = pf.datasets.moons(1000 if SMOKE else 5000)
prior = pf.realnvp(2, layers=4, hidden=(32,), activation="silu")
history = pf.fit(
    prior, moons.train, val=moons.val, lr=5e-3, max_epochs=2 if SMOKE else 30, progress=False
)
prior.requires_grad_(False).eval()
history

# %% [markdown]
# ## NUTS under it
#
# Of a new point we measure only the first coordinate, with noise: $m \sim N(x_1, 0.2)$. In the
# model the prior is one line, `pyro.sample("point", prior())`. What do we know of $x_2$? The
# prior's two arms pass there, so the posterior has separate pieces, and a chain that walks in $x$
# must jump the gap between them.
#
# But we may also walk in the flow's base space. Write $x = f(z)$ with $z \sim N(0, I)$, which is
# what Pyro's `TransformReparam` does to any flow. There the prior is round and the gap narrow, but
# the likelihood, which was simple in $x$, is bent. Same model, same posterior, other coordinates.


# %%
def model(measured: torch.Tensor) -> None:
    point = pyro.sample("point", prior())
    pyro.sample("measured", dist.Normal(point[..., 0], 0.2), obs=measured)


def run_nuts(model, *args, warmup, draws, seed, **options) -> MCMC:
    pyro.set_rng_seed(seed)
    kernel = NUTS(model, **options)
    mcmc = MCMC(kernel, draws, 5 if SMOKE else warmup, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


measured = torch.tensor(0.5)
setting = {"warmup": 80, "draws": 8 if SMOKE else 200, "seed": 1, "max_tree_depth": 5}
in_x = run_nuts(model, measured, **setting).get_samples()["point"]
in_base = pyro.poutine.reparam(model, config={"point": TransformReparam()})
z = run_nuts(in_base, measured, **setting).get_samples()["point_base"]
chains = {"walking in x": in_x, "walking in z": prior.transform(z)}

# %% [markdown]
# In two dimensions we can check: prior times likelihood on a grid is the exact posterior. Above,
# the draws on it; below, $x_2$ along each chain. The moons are symmetric about $(0.5, 0.25)$ and we
# measured $m = 0.5$, so half of the posterior should lie above $x_2 = 0.25$. The share of draws
# there says how well a chain moves between the pieces, and the effective sample size (ESS) how many
# independent draws the chain is worth.

# %%
across, up = torch.linspace(-1.5, 2.5, 200), torch.linspace(-1.5, 2.0, 200)
grid = torch.cartesian_prod(across, up)
with torch.no_grad():
    log_p = prior.log_prob(grid) + dist.Normal(grid[:, 0], 0.2).log_prob(measured)
mass = log_p.softmax(0)
middle = 0.25  # between the pieces
print(f"x2 > {middle}: exact {mass[grid[:, 1] > middle].sum():.2f}", end="")
fig, axes = plt.subplots(
    2, 2, figsize=(8, 6), layout="constrained", gridspec_kw={"height_ratios": [2, 1]}
)
for (top, bottom), (name, x) in zip(axes.T, chains.items(), strict=True):
    share, ess = (x[:, 1] > middle).float().mean(), effective_sample_size(x[None, :, 1], 0, 1)
    print(f", {name} {share:.2f} (ESS {ess:.0f} of {len(x)})", end="")
    top.pcolormesh(across, up, mass.reshape(200, 200).T, cmap="Greys", shading="auto")
    top.scatter(*x.T, s=4, color="C1")
    top.set(title=name, xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    bottom.plot(x[:, 1], ".-", lw=0.4, ms=3, color="C1")
    bottom.set(xlabel="step of the chain", ylabel="$x_2$", ylim=(-1.5, 2.0))

# %% [markdown]
# ## The funnel
#
# Both chains are right, but neither is quick: what the flow's coordinates make easy of the prior
# they make hard of the likelihood. What we want is a map fitted to the *posterior*. Take one that
# needs it. In Neal's funnel (2003) no fixed step size fits:
#
# $$v \sim N(0, 3), \qquad x_i \mid v \sim N(0, e^{v/2}), \quad i = 1, \ldots, 9 .$$
#
# At $v = 6$ the $x_i$ spread over $\pm 20$, at $v = -6$ over $\pm 0.05$. There are no data, so the
# truth is known: $v$ has mean 0 and standard deviation exactly 3. NUTS adapts one step size. It is
# too long for the neck, where trajectories break off (*divergences*), and so the neck is left out.


# %%
def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("dimensions", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


CHAINS, DRAWS = 2, 10 if SMOKE else 300
runs = [
    run_nuts(funnel, warmup=150, draws=DRAWS, seed=seed, max_tree_depth=8) for seed in range(CHAINS)
]
plain = {name: torch.stack([run.get_samples()[name] for run in runs]) for name in ("v", "x")}
broken = torch.zeros(CHAINS, DRAWS, dtype=torch.bool)
for chain, run in enumerate(runs):
    broken[chain, run.diagnostics()["divergences"]["chain 0"]] = True
print(f"NUTS: {broken.sum()} divergences of {CHAINS * DRAWS}, sd of v {plain['v'].std():.2f}")

# %% [markdown]
# ## NeuTra
#
# Train a guide first, as in [the tutorial before](06_iaf_guide.ipynb). Its flow $T$ maps a round
# Gaussian to (nearly) the funnel. NUTS then samples
#
# $$\log p(z) = \log p(T(z)) + \log |\det T'(z)|,$$
#
# and every draw goes through $T$. Where $T$ is exact this is the round Gaussian; where it is not,
# NUTS corrects it. So the result is right in the limit, whatever the flow: the flow only makes it
# cheap.

# %%
guide = pf.AutoFlow(funnel)
history = pf.fit_guide(funnel, guide, max_steps=20 if SMOKE else 800, progress=False)
report = pf.report(funnel, guide)
neutra = pf.NeuTra(funnel, guide)
bent = neutra.run(
    num_samples=DRAWS, warmup_steps=5 if SMOKE else 150, num_chains=CHAINS, progress=False
)
print(f"guide: {-report.elbo:.2f} nats of KL to the funnel, k-hat {report.khat:.2f}")
print(f"NeuTra: {neutra.diverging.sum()} divergences of {CHAINS * DRAWS}")

# %% [markdown]
# ## The neck
#
# Draws of each in the plane of $x_1$ and $v$, divergences in red, beside exact ones. The line marks
# two standard deviations of $x_1$ given $v$.

# %%
pyro.set_rng_seed(3)
v = 3 * torch.randn(CHAINS, DRAWS)
sources = {
    "exact": {"v": v, "x": torch.randn(CHAINS, DRAWS, 9) * (v / 2).exp()[..., None]},
    "NUTS": plain,
    "guide alone": {k: d[: CHAINS * DRAWS][None] for k, d in report.draws.items()},
    "NeuTra": bent,
}
height = torch.linspace(-10, 10, 200)
fig, axes = plt.subplots(1, 4, figsize=(12, 3.8), layout="constrained", sharey=True)
for ax, (name, drawn) in zip(axes, sources.items(), strict=True):
    ax.scatter(drawn["x"][..., 0], drawn["v"], s=3, color="0.4")
    for sign in (-2, 2):
        ax.plot(sign * (height / 2).exp(), height, color="C0", lw=0.8)
    for kind, bad in {"NUTS": broken, "NeuTra": neutra.diverging}.items():
        if kind == name:
            ax.scatter(drawn["x"][bad][:, 0], drawn["v"][bad], s=9, color="red")
    ax.set(title=name, xlim=(-20, 20), ylim=(-10, 10), xlabel="$x_1$")
axes[0].set_ylabel("$v$")

# %% [markdown]
# ## In numbers
#
# The effective sample size speaks of where the chain went: one that never enters the neck can have
# a fine one, so look first at the standard deviation of $v$, at the share of $v < -4$ (exactly
# 0.091), and at the divergences.

# %%
print(f"{'':12}{'mean v':>8}{'sd v':>7}{'v < -4':>8}{'ESS of v':>10}{'divergences':>13}")
for name, drawn in sources.items():
    v = drawn["v"]
    ess = effective_sample_size(v, 0, 1).item() if name in ("NUTS", "NeuTra") else v.numel()
    bad = {"NUTS": broken, "NeuTra": neutra.diverging}.get(name, torch.zeros(1)).sum()
    share = (v < -4).float().mean()
    print(f"{name:12}{v.mean():8.2f}{v.std():7.2f}{share:8.3f}{ess:10.0f}{int(bad):13}")
print(f"{'truth':12}{0:8.2f}{3:7.2f}{0.091:8.3f}")

# %% [markdown]
# ## What NUTS sees
#
# Why does it work? Take the draws of NeuTra back through the flow. On the left the funnel, coloured
# by $v$; in the middle the same draws in the base, where NUTS walked, seen along the direction that
# $v$ depends on most: no neck, one scale everywhere (the circle has a radius of two). On the right
# the course of $v$ along one chain of each.

# %%
latent = torch.cat([bent["v"][..., None], bent["x"]], -1).flatten(0, 1)  # as the guide stacks them
v = latent[:, 0]
with torch.no_grad():
    z = guide.flow.transform.inv(latent)
along = torch.linalg.lstsq(z, v[:, None]).solution[:, 0]
along = along / along.norm()
across = torch.eye(10)[along.abs().argmin()]
across = across - (across @ along) * along
across = across / across.norm()
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
axes[0].scatter(latent[:, 1], v, s=4, c=v)
axes[0].set(title="the funnel", xlabel="$x_1$", ylabel="$v$", xlim=(-20, 20), ylim=(-10, 10))
axes[1].scatter(z @ across, z @ along, s=4, c=v)
axes[1].add_patch(plt.Circle((0, 0), 2, fill=False, lw=0.8))
axes[1].set(title="the same draws, where NUTS walked", aspect="equal", xlim=(-4, 4), ylim=(-4, 4))
axes[1].set(xlabel="a direction in the base", ylabel="the direction along which $v$ grows")
axes[2].plot(plain["v"][0], lw=0.7, label="NUTS")
axes[2].plot(bent["v"][0], lw=0.7, label="NeuTra")
axes[2].set(title="one chain of each", xlabel="step", ylabel="$v$")
axes[2].legend()

# %% [markdown]
# ## What to read next
#
# - [A flow as a guide](06_iaf_guide.ipynb): how good is the guide alone, and when to distrust it.
# - [Write your own flow](11_write_your_own.ipynb).
# - `models/stochastic_volatility.py` and `models/horseshoe_logistic.py`: funnels that data make.
# - The docstring of `pf.NeuTra`, and `pf.to_arviz(model, neutra, ...)` for ArviZ's diagnostics.
