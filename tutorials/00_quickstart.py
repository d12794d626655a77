# %% [markdown]
# # A flow in five minutes
#
# How do I fit a density to data, draw from it, score with it, and use it inside a Pyro model?
#
# A *normalizing flow* turns simple noise into data by an invertible map, so that it can do both:
# draw new points, and say how probable any point is. In pyroflows a flow is an `nn.Module`, and
# calling it gives a Pyro distribution.

# %%
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf

SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
torch.manual_seed(0)
pyro.set_rng_seed(0)

# %% [markdown]
# ## Fit
#
# Two half moons, split into rows to train on, rows that say when to stop, and rows to judge by.
# `pf.nsf` is a neural spline flow; `pf.fit` trains it by maximum likelihood until the held-out
# log-density stops rising, and keeps the best weights.

# %%
moons = pf.datasets.moons(1000 if SMOKE else 5000)
flow = pf.nsf(features=2, layers=4, hidden=(64, 64))
history = pf.fit(flow, moons.train, val=moons.val, max_epochs=2 if SMOKE else 30, progress=False)
history

# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
history.plot(ax)

# %% [markdown]
# ## Score
#
# `log_prob` gives one number a row, in nats. Higher is more probable; the mean over rows that the
# training never saw is the figure to compare flows by.

# %%
with torch.no_grad():
    scores = flow.log_prob(moons.test)
print(f"{scores.mean():.3f} +- {scores.std() / len(scores) ** 0.5:.3f} nats a row")

# %% [markdown]
# ## Sample, and look
#
# Draws cost one pass here. Left the data, in the middle draws of the flow, right its density.

# %%
with torch.no_grad():
    draws = flow.sample((2000,))
    across, up = torch.linspace(-1.7, 2.7, 150), torch.linspace(-1.3, 1.8, 120)
    density = flow.log_prob(torch.cartesian_prod(across, up)).exp().reshape(150, 120)
window = {"xlim": (-1.7, 2.7), "ylim": (-1.3, 1.8), "aspect": "equal"}

fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained", sharex=True, sharey=True)
axes[0].scatter(*moons.test[:2000].T, s=2)
axes[1].scatter(*draws.T, s=2, color="tab:orange")
axes[2].pcolormesh(across, up, density.T, shading="auto")
for ax, title in zip(axes, ["data", "draws", "density"], strict=True):
    ax.set(title=title, **window)

# %% [markdown]
# ## It is a distribution
#
# Everything that takes a Pyro distribution takes `flow()`: `pyro.sample`, plates, `expand`.
# Here the flow is the prior of a point of which we only measure, with noise, the distance from
# the origin. `pf.AutoFlow` makes a guide for the model, `pf.fit_guide` trains it.


# %%
def model(measured: torch.Tensor) -> None:
    point = pyro.sample("point", flow())
    distance = point.norm(dim=-1)
    pyro.sample("measured", dist.Normal(distance, 0.1), obs=measured)


flow.requires_grad_(False)  # a prior that is known
measured = torch.tensor(1.2)
guide = pf.AutoFlow(model)
steps = pf.fit_guide(model, guide, measured, max_steps=50 if SMOKE else 600, progress=False)
steps

# %% [markdown]
# A guide is an approximation, so ask how good it is before you use it. The report's *k-hat* says
# how far the weights between posterior and guide can be trusted; below 0.7 they correct what the
# guide got wrong.

# %%
report = pf.report(model, guide, measured)
print(report)

# %%
points = guide.sample_posterior(2000)["point"].detach()
fig, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
ax.pcolormesh(across, up, density.T, shading="auto", cmap="Greys")
ax.scatter(*points.T, s=2, color="tab:orange", label="guide")
ax.add_patch(plt.Circle((0, 0), 1.2, fill=False, ls="--", label="what was measured"))
ax.set(title="prior (grey) and posterior", **window)
ax.legend(loc="upper right")  # "best" takes long among so many points

# %% [markdown]
# The posterior lies where the circle meets the moons: two pieces, and a smooth map of one Gaussian
# cannot tear it in two. The guide leaves a thin bridge between them, whose draws are worth little.
# So the weights are uneven, and the report's verdict says how much that matters and what to do.
# [A guide for a real posterior](06_iaf_guide.ipynb) tells how to read it.
#
# ## Keep it
#
# A folder with a readable `config.json` and the weights; no pickle.

# %%
import tempfile

folder = tempfile.mkdtemp()
pf.save(flow, folder)
again = pf.load(folder)
with torch.no_grad():
    print(torch.equal(again.log_prob(moons.test), flow.eval().log_prob(moons.test)))

# %% [markdown]
# ## What to read next
#
# - [What a flow computes](01_change_of_variables.ipynb): volumes, and why the log-determinant is
#   there.
# - [Which layers for which data](02_coupling_layers.ipynb), and on to
#   [autoregressive flows](03_autoregressive_flows.ipynb).
# - [A guide for a real posterior](06_iaf_guide.ipynb), and when to distrust it.
