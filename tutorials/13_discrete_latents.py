# %% [markdown]
# # Discrete latent variables
#
# A flow is continuous. What becomes of a model with labels, or with hidden states?
#
# `pf.AutoFlow` sums sites of finite support out, by Pyro's enumeration, so the flow is over the
# continuous sites alone. Given these, the discrete ones come back exactly.

# %%
import itertools
import logging
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf

logging.getLogger("pyro").setLevel(logging.WARNING)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
pyro.set_rng_seed(0)
options = {"max_steps": 20 if SMOKE else 300, "progress": False}

# %% [markdown]
# ## A mixture
#
# Twelve numbers come from one of two Gaussians each. Nothing in the model says which is the first:
# exchange the two and the density is the same. This *label switching* is a posterior with two equal
# modes, and the guide finds both.


# %%
def mixture(x: torch.Tensor) -> None:
    with pyro.plate("groups", 2):
        centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        label = pyro.sample("label", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(centre[label], 1.0), obs=x)


x = torch.cat([torch.randn(6) - 2, torch.randn(6) + 2])
guide = pf.AutoFlow(mixture)
pf.fit_guide(mixture, guide, x, **options)
print(f"{guide.modes} modes, shares {guide.flow.log_shares.exp().numpy().round(3)}")
print(pf.report(mixture, guide, x))

# %% [markdown]
# `guide.sample_discrete` draws labels and centres together; `guide.discrete_probabilities` has the
# probability of each label. Over both modes each is near one half, which says nothing of the rows:
# ask what does not depend on names, such as whether two rows are of one group.

# %%
drawn = guide.sample_discrete(20 if SMOKE else 200, x)
label, centre = drawn["label"], drawn["centre"]
print("P(label = 1)", guide.discrete_probabilities(x)["label"][:, 1].numpy().round(2))
together = (label[:, :, None] == label[:, None, :]).float().mean(0)
points = guide.sample_posterior(1000)["centre"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
axes[0].scatter(*points.T, s=3)
axes[0].axline((0, 0), slope=1, color="k", lw=0.7, ls="--")
axes[0].set(title="1,000 draws of the centres", xlabel="first", ylabel="second", aspect="equal")
shown = axes[1].imshow(together, vmin=0, vmax=1, cmap="Blues")
axes[1].set(title="P(both rows of one group)", xlabel="row", ylabel="row")
fig.colorbar(shown, ax=axes[1])

# %% [markdown]
# ## A hidden Markov model
#
# A state stays with probability 0.8 from one time to the next, and is seen through noise.
# `pyro.markov` tells the enumeration that each state needs the last one alone. One parameter is
# unknown: how far apart the states are.

# %%
STAY = torch.tensor([[0.8, 0.2], [0.2, 0.8]])


def hidden(y: torch.Tensor) -> None:
    gap = pyro.sample("gap", dist.Normal(2.0, 0.5))
    state = 0
    for t in pyro.markov(range(len(y))):
        start = dist.Categorical(STAY[state] if t else torch.tensor([0.5, 0.5]))
        state = pyro.sample(f"state_{t}", start, infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(gap * state, 0.6), obs=y[t])


y = torch.tensor([0.2, -0.5, 1.1, 2.4, 1.7, 2.5, 0.9, -0.1])
chain = pf.AutoFlow(hidden)
pf.fit_guide(hidden, chain, y, **options)
judged = pf.report(hidden, chain, y)
print(judged)

# %% [markdown]
# ## Against brute force
#
# Eight states of two values are 256 paths. We add up all of them, on a grid of the gap: that is the
# exact evidence, and the exact probability of each state.

# %%
paths = torch.tensor(list(itertools.product([0, 1], repeat=len(y))))
prior = torch.tensor(0.5).log() + STAY.log()[paths[:, :-1], paths[:, 1:]].sum(1)
gap = torch.linspace(-2, 6, 1601)
seen = dist.Normal(gap[:, None, None] * paths, 0.6).log_prob(y).sum(-1)  # gap, path
log_joint = dist.Normal(2.0, 0.5).log_prob(gap)[:, None] + prior + seen
log_joint = log_joint + (gap[1] - gap[0]).log()
evidence = log_joint.flatten().logsumexp(0)
exact = (log_joint - evidence).exp().sum(0) @ paths.float()
probabilities = chain.discrete_probabilities(y, draws=20 if SMOKE else 400)
ours = torch.stack([probabilities[f"state_{t}"][..., 1].squeeze() for t in range(len(y))])
print(f"log evidence {judged.evidence:.3f}, by all paths {evidence:.3f} nats")
print(f"P(state = 1), off by {(ours - exact).abs().max():.3f} at most")

# %%
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.bar(torch.arange(len(y)), exact, color="0.8", label="P(state = 1), all paths")
ax.plot(ours, "C0o", label="P(state = 1), guide")
ax.plot(y, "C1.-", lw=0.8, label="$y$")
ax.set(xlabel="time", title="Hidden states, seen through noise")
ax.legend(fontsize=8)

# %% [markdown]
# What is summed out must have a finite support, and the sum costs time: states that all depend on
# each other, without `pyro.markov`, are as many terms as paths.
#
# ## What to read next
#
# - [A posterior with several modes](12_several_modes.ipynb): how modes are found, and where not.
# - [A flow as a guide](06_iaf_guide.ipynb), and when to distrust it.
# - [A thousand groups](14_many_groups.ipynb): a posterior of two thousand unknowns.
# - The docstring of `pf.AutoFlow`.
