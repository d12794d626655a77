# %% [markdown]
# # A posterior with several modes
#
# What does a guide say of a posterior that is several islands, and how do I know that it has all?
#
# A flow is a smooth, invertible map of one round Gaussian: it can bend the Gaussian, but not tear
# it. And the ELBO punishes a draw where the posterior is not, never a place without draws. So one
# flow tends to sit on one island, and to be content there.

# %%
import logging
import math
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf

logging.getLogger("pyro").setLevel(logging.WARNING)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
pyro.set_rng_seed(0)

# %% [markdown]
# ## The posterior
#
# Two instruments that lose the sign measure a place $z$ in the plane:
#
# $$z_1 \sim N(0.5, 1.5), \quad z_2 \sim N(0.3, 1.5), \quad
# y_1 \sim N(z_1^2, 0.5), \quad y_2 \sim N(z_2^2 + z_1 / 2, 0.4).$$
#
# Four places explain $y = (4, 3)$ well. The prior prefers some, so their shares are unequal. In two
# dimensions a fine grid gives the truth: the evidence, and the share of each quadrant.


# %%
def signs(y: torch.Tensor) -> None:
    first = pyro.sample("first", dist.Normal(0.5, 1.5))
    second = pyro.sample("second", dist.Normal(0.3, 1.5))
    pyro.sample("y1", dist.Normal(first**2, 0.5), obs=y[0])
    pyro.sample("y2", dist.Normal(second**2 + first / 2, 0.4), obs=y[1])


y = torch.tensor([4.0, 3.0])
line = torch.linspace(-4, 4, 801, dtype=torch.float64)
z1, z2 = torch.meshgrid(line, line, indexing="ij")
log_joint = dist.Normal(0.5, 1.5).log_prob(z1) + dist.Normal(0.3, 1.5).log_prob(z2)
log_joint += dist.Normal(z1**2, 0.5).log_prob(y[0])
log_joint += dist.Normal(z2**2 + z1 / 2, 0.4).log_prob(y[1])
log_step = 2 * math.log(line[1] - line[0])
evidence = (log_joint.flatten().logsumexp(0) + log_step).item()
density = (log_joint + log_step - evidence).exp()  # of each cell
quadrants = {"- -": (-1, -1), "- +": (-1, 1), "+ -": (1, -1), "+ +": (1, 1)}


def shares(z1: torch.Tensor, z2: torch.Tensor, mass: torch.Tensor) -> list[float]:
    """The mass of each quadrant."""
    return [mass[(z1 * a > 0) & (z2 * b > 0)].sum().item() for a, b in quadrants.values()]


exact = shares(z1, z2, density)
print(f"log evidence {evidence:.3f} nats")
print("shares", {name: round(share, 3) for name, share in zip(quadrants, exact, strict=True)})

# %% [markdown]
# ## One flow
#
# `init="init"` starts one flow as a narrow Gaussian at the prior medians. Its weights know only
# where it draws, so `pf.report` also climbs from other points, and the verdict names what is
# missing.

# %%
options = {"max_steps": 20 if SMOKE else 300, "progress": False}
single = pf.AutoFlow(signs, init="init")
pf.fit_guide(signs, single, y, **options)
alone = pf.report(signs, single, y)
print(alone)
print(f"\nevidence {alone.evidence:.3f}, exact {evidence:.3f} nats")

# %% [markdown]
# ## A flow for each mode
#
# By default `pf.AutoFlow` looks first. Newton ascents start far apart, and where they end in places
# with a dip of the density between them, each gets a flow of its own. Each is trained by its own
# ELBO; at the end importance weights give them their shares.

# %%
guide = pf.AutoFlow(signs)
pf.fit_guide(signs, guide, y, **options)
report = pf.report(signs, guide, y)
print(f"{guide.modes} modes, shares {guide.flow.log_shares.exp().numpy().round(3)}")
print(report)
print(f"\nevidence {report.evidence:.3f}, exact {evidence:.3f} nats")

# %% [markdown]
# Nearly every draw counts in full and the evidence is right. $\hat k$, the slope of the few
# outermost weights, is above its threshold, but where weights are as even as this they have no
# tail that could move anything.
#
# The exact density, and draws of each guide over its contours.

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
axes[0].pcolormesh(line, line, density.T, cmap="Blues", rasterized=True)
axes[0].set(title="posterior, exact", ylabel="$z_2$")
levels = density.max().item() * torch.tensor([0.01, 0.1, 0.5])
for ax, (name, drawn) in zip(axes[1:], {"one flow": alone, "mixture": report}.items(), strict=True):
    ax.scatter(drawn.draws["first"][:2000], drawn.draws["second"][:2000], s=2, color="C1")
    ax.contour(line, line, density.T, levels=levels.tolist(), colors="k", linewidths=0.7)
    ax.set(title=f"2,000 draws, {name}")
for ax in axes:
    ax.set(xlabel="$z_1$", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal")

# %% [markdown]
# ## In one call, and NUTS
#
# `pf.sample_posterior` trains a guide (here ours, further), judges it and says what it did.
# `pf.NeuTra` corrects a flow by NUTS, but a chain hardly leaves its mode: chains are dealt out by
# the shares, and it warns. Four chains are coarse; the guide's own shares are the better ones.

# %%
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    called = pf.sample_posterior(signs, y, guide=guide, progress=False)
    chains = pf.NeuTra(signs, guide).run(
        y,
        num_samples=10 if SMOKE else 50,
        warmup_steps=5 if SMOKE else 50,
        num_chains=4,
        progress=False,
    )
print(called.how)
print("\nNeuTra:", *dict.fromkeys(str(warning.message) for warning in told), sep="\n")

# %% [markdown]
# The share of each quadrant, against the grid:

# %%
found = {
    "one flow": alone.draws,
    "mixture": report.draws,
    "sample_posterior": called.draws,
    "NeuTra, 4 chains": chains,
}
print(f"{'':18}" + "".join(f"{name:>8}" for name in quadrants))
print(f"{'exact':18}" + "".join(f"{share:8.3f}" for share in exact))
for name, drawn in found.items():
    a, b = drawn["first"].flatten(), drawn["second"].flatten()
    print(f"{name:18}" + "".join(f"{s:8.3f}" for s in shares(a, b, torch.ones(len(a)) / len(a))))

# %% [markdown]
# ## Where it ends
#
# - Several ascents are made in up to 50 dimensions; beyond, there is one, and so one flow.
# - A mode that no ascent finds is missed. `pf.report` looks again from other points; a narrow mode
#   far from the prior can escape both.
# - Modes more than 7 nats below the best get no flow, and there are 24 flows at most.
# - A model that branches on its draws runs one draw at a time, and has one ascent.
#
# ## What to read next
#
# - [A flow as a guide](06_iaf_guide.ipynb), and when to distrust it.
# - [Discrete latent variables](13_discrete_latents.ipynb): labels that switch make modes too.
# - The docstrings of `pf.AutoFlow`, `pf.report` and `pf.sample_posterior`.
