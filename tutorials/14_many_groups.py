# %% [markdown]
# # A thousand groups
#
# Each of a thousand groups has an intercept and a slope of its own: two thousand unknowns and a few
# that they share. Must I choose a guide for that, or write the model in some special way?
#
# No. Groups are independent given what they share, and `pf.AutoFlow` finds that out by itself.

# %%
import logging
import os
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf

logging.getLogger("pyro").setLevel(logging.WARNING)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
pyro.set_rng_seed(0)

# %% [markdown]
# ## The data
#
# Observation $n$ is of group $g_n$. Groups have from 2 to 40 observations, shuffled:
#
# $$\alpha_j \sim N(1, 0.7), \quad \beta_j \sim N(-0.5, 0.3), \quad
# y_n \sim N(\alpha_{g_n} + \beta_{g_n} x_n, 0.8).$$

# %%
J = 300 if SMOKE else 1000
TRUTH = {"mean": torch.tensor([1.0, -0.5]), "spread": torch.tensor([0.7, 0.3]), "noise": 0.8}
sizes = (2 * torch.exp(torch.rand(J) * torch.tensor(20.5).log())).long()
group = torch.arange(J).repeat_interleave(sizes)
group = group[torch.randperm(len(group))]
x = torch.randn(len(group))
alpha, beta = (TRUTH["mean"] + TRUTH["spread"] * torch.randn(J, 2)).T
y = alpha[group] + beta[group] * x + TRUTH["noise"] * torch.randn(len(group))
print(f"{J} groups of {sizes.min()} to {sizes.max()}, {len(y)} observations in all")

# %% [markdown]
# ## The model
#
# It says the same, with priors for the five shared numbers. There is no plate, and the groups'
# numbers are picked by `[group]`.


# %%
def regressions(group: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    alpha = pyro.sample("alpha", dist.Normal(mean[0], spread[0]).expand([J]).to_event(1))
    beta = pyro.sample("beta", dist.Normal(mean[1], spread[1]).expand([J]).to_event(1))
    line = alpha[group] + beta[group] * x
    pyro.sample("y", dist.Normal(line, noise).to_event(1), obs=y)


begin = time.process_time()
guide = pf.AutoFlow(regressions).setup(group, x, y)
print(f"{guide.latent_dim} unknowns, set up in {time.process_time() - begin:.1f} s of a processor")
for rows, numbers in guide.learned.groups:
    print(f"found {rows} rows of {numbers} numbers each, independent given all others")

# %% [markdown]
# `setup` looks which unknowns meet in a factor of the density. No factor holds numbers of two
# groups, so each group is a *row*: its intercept and its slope, though these are two sites. What is
# left, two means, two spreads and the noise, is *global*.
#
# The guide then starts at the mode of the globals, with each row integrated out by a Gaussian
# (Laplace's approximation). The mode of all unknowns together would be no place to start: there the
# spreads are too small, if not zero. The flow is made likewise: one over the globals, and one,
# given these, that all rows share.

# %%
begin = time.process_time()
options = {"max_steps": 20 if SMOKE else 300, "progress": False}
history = pf.fit_guide(regressions, guide, group, x, y, **options)
print(f"{history.stopped}, {time.process_time() - begin:.0f} s of a processor")
report = pf.report(regressions, guide, group, x, y, num_samples=200 if SMOKE else 1000)
print(report)

# %% [markdown]
# ## What the verdict says
#
# A plain importance weight is a product over all rows. Where the guide is a little off in each, a
# thousand of them make weights of which one outdoes all others. So the report integrates: given a
# draw of the globals, sixteen points in each row estimate the row's own integral, without bias, and
# the weight is that of the globals alone. The first line says so.
#
# - $\hat k$ and ESS are about five numbers now, not about two thousand.
# - ELBO and evidence are those of the globals, rows integrated; so this ELBO is above the one that
#   training maximises.
# - The shift is the farthest that any mean moves, those of the groups too, by the weights of the
#   globals and of the points within rows.
# - `report.draws` has one point of each row, picked by its weight; `report.resample` picks whole
#   draws by theirs.

# %% [markdown]
# ## Against the rows integrated by hand
#
# Here all is normal given the globals, so each group can be integrated in closed form, from sums
# over its observations. What is left is a model of five unknowns, which is no large one.

# %%
columns = torch.stack([torch.ones_like(x), x, x * x, y, x * y, y * y], dim=-1)
n, sx, sxx, sy, sxy, syy = torch.zeros(J, 6).index_add(0, group, columns).T


def by_hand() -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    (m0, m1), (t0, t1), v = mean, spread, noise**2
    # Residuals from the mean line, and the precision of a group's deviations from it.
    r0, r1 = (sy - n * m0 - sx * m1) / v, (sxy - sx * m0 - sxx * m1) / v
    squares = syy - 2 * (m0 * sy + m1 * sxy) + n * m0**2 + 2 * m0 * m1 * sx + m1**2 * sxx
    a, b, c = n / v + t0**-2, sx / v, sxx / v + t1**-2
    det = a * c - b * b
    explained = (c * r0**2 - 2 * b * r0 * r1 + a * r1**2) / det
    log_dets = n * (2 * torch.pi * v).log() + det.log() + 2 * (t0 * t1).log()
    pyro.factor("y", -0.5 * (log_dets + squares / v - explained).sum())


exact = pf.sample_posterior(by_hand, progress=False)
print(f"log evidence {report.evidence:.3f}, by hand {exact.report.evidence:.3f} nats")
draws = report.resample(4000)
shared = {
    "mean of intercepts": ("mean", 0, TRUTH["mean"][0]),
    "mean of slopes": ("mean", 1, TRUTH["mean"][1]),
    "spread of intercepts": ("spread", 0, TRUTH["spread"][0]),
    "spread of slopes": ("spread", 1, TRUTH["spread"][1]),
    "noise": ("noise", 0, TRUTH["noise"]),
}
print(f"\n{'':22}{'guide':>16}{'by hand':>18}{'truth':>8}")
fig, axes = plt.subplots(1, 5, figsize=(12, 2.6), layout="constrained")
for ax, (name, (site, k, truth)) in zip(axes, shared.items(), strict=True):
    drawn, hand = (found[site].reshape(len(found[site]), -1)[:, k] for found in (draws, exact))
    moments = "  ".join(f"{d.mean():7.3f} +- {d.std():.3f}" for d in (drawn, hand))
    print(f"{name:22}{moments}{truth:8.2f}")
    ax.hist(drawn.numpy(), bins=16, density=True, color="C0", alpha=0.5, label="guide")
    ax.hist(hand.numpy(), bins=16, density=True, histtype="step", color="C1", label="by hand")
    ax.axvline(truth, color="k", lw=1.2, label="truth")
    ax.set(title=name, yticks=[])
    ax.locator_params(axis="x", nbins=4)
axes[0].legend(fontsize=7)

# %% [markdown]
# Both agree, on the evidence too. The true spread of the slopes is far out in the tail of both:
# that is the data's doing, a rare draw of them, and no fault of the guide. Whether a guide is right
# is a question to the posterior, not to the truth.

# %% [markdown]
# ## Shrinkage
#
# A group's mean of $y$ is a poor guess of its intercept where observations are few. The posterior
# draws it towards the others, the more so the fewer there are; what it gains is on the right.

# %%
raw = torch.zeros(J).index_add(0, group, y) / sizes
ours = report.means()["alpha"].float()
shown = sizes.argsort()[:: J // 50]
place = torch.arange(len(shown))
fig, (left, right) = plt.subplots(
    1, 2, figsize=(12, 4), layout="constrained", width_ratios=(1.6, 1)
)
left.vlines(place, raw[shown], ours[shown], color="0.75", lw=1.5, zorder=0)
left.plot(place, raw[shown], "o", mfc="w", mec="0.4", ms=4.5, label="mean of the group's y")
left.plot(place, ours[shown], "C0o", ms=4.5, label="posterior mean")
left.plot(place, alpha[shown], "k_", ms=8, mew=1.6, label="truth")
left.axhline(report.means()["mean"][0], color="C0", lw=0.8, ls="--")
left.set(
    title="Intercepts of one group in twenty",
    xlabel="observations of the group",
    xlim=(-1, len(shown)),
)
left.set_xticks(place[::7], [str(n.item()) for n in sizes[shown[::7]]])
left.legend(fontsize=8, ncols=3)
edges = [2, 3, 5, 8, 13, 21, 41]
bins = [(sizes >= low) & (sizes < high) for low, high in zip(edges, edges[1:], strict=False)]
labels = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in zip(edges, edges[1:], strict=False)]
for guess, style, name in ((raw, "o--", "mean of the group's y"), (ours, "o-", "posterior mean")):
    error = [(guess - alpha)[chosen].square().mean().sqrt() for chosen in bins]
    right.plot(labels, error, style, color="0.4" if guess is raw else "C0", label=name)
right.set(title="Error of the intercepts (rms)", xlabel="observations of the group", ylim=(0, None))
right.legend(fontsize=8)

# %%
low, high = (draws["alpha"].quantile(q, dim=0) for q in (0.05, 0.95))
print(
    f"90 % intervals hold {((low < alpha) & (alpha < high)).float().mean():.1%} of the intercepts"
)
low, high = (draws["beta"].quantile(q, dim=0) for q in (0.05, 0.95))
print(f"and {((low < beta) & (beta < high)).float().mean():.1%} of the slopes")

# %% [markdown]
# ## A group not seen yet
#
# Its intercept and slope come from the globals: a draw of them, then a draw given them, then one of
# an observation. Two thousand new groups from the truth tell whether the band is right. A group of
# many observations is known better.

# %%
at = torch.linspace(-2.5, 2.5, 41)
new = draws["mean"] + draws["spread"] * torch.randn(4000, 2)
most = sizes.argmax()
known = torch.stack([draws["alpha"][:, most], draws["beta"][:, most]], dim=-1)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
for ax, numbers, title in zip(
    axes, (new, known), ("new group", "group of most observations"), strict=True
):
    line = numbers[:, :1] + numbers[:, 1:] * at
    noisy = line + draws["noise"][:, None] * torch.randn_like(line)
    for drawn, alpha_of, label in ((noisy, 0.2, "an observation"), (line, 0.4, "the line")):
        edges = drawn.quantile(torch.tensor([0.05, 0.95]), dim=0)
        ax.fill_between(at, *edges, color="C0", alpha=alpha_of, lw=0, label=f"90 %, {label}")
    ax.set(title=f"Prediction, {title}", xlabel="$x$")
axes[1].plot(x[group == most], y[group == most], "k.", ms=4, label="its observations")
x_new = 5 * torch.rand(2000) - 2.5
lines = TRUTH["mean"] + TRUTH["spread"] * torch.randn(2000, 2)
y_new = lines[:, 0] + lines[:, 1] * x_new + TRUTH["noise"] * torch.randn(2000)
axes[0].plot(x_new[:150], y_new[:150], "k.", ms=4, label="one each of 150 new groups")
axes[0].set(ylabel="$y$")
for ax in axes:
    ax.legend(fontsize=8, loc="lower left")
given = new[:, :1] + new[:, 1:] * x_new + draws["noise"][:, None] * torch.randn(4000, 2000)
low, high = given.quantile(torch.tensor([0.05, 0.95]), dim=0)
inside = ((low < y_new) & (y_new < high)).float().mean()
print(f"90 % bands hold {inside:.1%} of the observations of new groups")

# %% [markdown]
# ## Where it ends
#
# - Up to 64 unknowns there is one flow over all of them, and nothing is integrated.
# - Rows must be independent given at most 400 globals. Numbers that all meet, as in a random walk
#   or a Gaussian process, make no rows.
# - A row has 64 numbers at most. Discrete sites, `hide=`, a builder of your own and `init="init"`
#   leave the rows out.
# - There is one start: a second mode is not looked for.
# - Were the slopes nearly equal, so that their spread could be 0, the guide of the model as it
#   stands would miss the mass near 0, as the report's chains would find. Written non-centred, as
#   `mean[1] + spread[1] * z` with a standard normal `z`, it has that mass.
#
# ## What to read next
#
# - [A flow as a guide](06_iaf_guide.ipynb), and when to distrust it.
# - [A posterior with several modes](12_several_modes.ipynb), which a small one may have.
# - `models/item_response.py`: 10,000 people, 25 items, beside NUTS.
