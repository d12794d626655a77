# %% [markdown]
# # Flows in a variational autoencoder
#
# Where does a flow help a variational autoencoder: in the posterior, in the prior, or in both?
#
# A VAE (Kingma & Welling 2014, arXiv:1312.6114) draws a code $z$ from a prior, a decoder turns it
# into a picture $x$, and an encoder sets an approximate posterior $q(z \mid x)$. It is trained on
#
# $$\mathrm{ELBO} = \mathbb{E}_q[\log p(x \mid z) + \log p(z) - \log q(z \mid x)]
#   = \log p(x) - \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)).$$
#
# A flow *posterior* (Kingma et al. 2016, arXiv:1606.04934) can shrink the KL. A flow *prior* (Chen
# et al. 2017, arXiv:1611.02731) can go where the codes of the data are. Our codes have two
# dimensions: too few for the best score, but then $\log p(x)$ is an integral over a plane, which
# a grid solves, and every claim can be checked against the exact answer.

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import pyroflows as pf

SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
SEEDS = (0, 1)
LATENT = 2

# %% [markdown]
# ## Data
#
# Digits of $8 \times 8$ pixels (scikit-learn), each pixel black with the probability of its grey
# level: drawn anew for every batch in training, once for the test. Scores are in nats a picture.

# %%
digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
levels = torch.from_numpy(digits.data).float()[order] / 16
labels = torch.from_numpy(digits.target)[order]
train, test = levels[:1437], levels[1437:]
seen = torch.bernoulli(test, generator=torch.Generator().manual_seed(0))


def batches(size=128):
    """The argument of each training step."""

    def draw(rows):
        return (torch.bernoulli(torch.stack(rows)),)

    return torch.utils.data.DataLoader(train, size, shuffle=True, collate_fn=draw, drop_last=True)


print(len(train), "training pictures,", len(seen), "test pictures")

# %% [markdown]
# ## One model, two places for a flow
#
# In Pyro a flow is a distribution, so the prior is one line: `pyro.sample("z", prior())`. The
# guide is `pf.AutoAmortizedFlow(model, encoder, builder)`: with `builder=None` the Gaussian of the
# plain VAE, with `pf.iaf` a flow whose layers see what the encoder says of the picture.


# %%
def perceptron(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, outputs)
    )


class VAE:
    """Decoder, prior and guide; starts where another has ended, if one is given."""

    def __init__(self, flow_posterior, flow_prior, start=None):
        pyro.clear_param_store()
        self.decoder = perceptron(LATENT, 64)
        self.prior = pf.nsf(LATENT, layers=2, hidden=(32, 32)) if flow_prior else None
        self.guide = pf.AutoAmortizedFlow(
            self.model,
            perceptron(64, 32),
            builder=pf.iaf if flow_posterior else None,
            **({"layers": 2, "hidden": (32, 32)} if flow_posterior else {}),
        ).setup(seen[:5])
        if start is not None:  # the flows themselves start as the identity
            self.decoder.load_state_dict(start.decoder.state_dict())
            self.guide.encoder.load_state_dict(start.guide.encoder.state_dict())
            self.guide.flow.transform[-1].load_state_dict(
                start.guide.flow.transform[-1].state_dict()
            )

    def of_codes(self):
        if self.prior is not None:
            return pyro.module("prior", self.prior)()
        return dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)

    def model(self, x):
        decoder = pyro.module("decoder", self.decoder)
        with pyro.plate("pictures", len(x)):
            z = pyro.sample("z", self.of_codes())
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def posterior(self, x):
        return self.guide.flow(self.guide.encoder(x))


# %% [markdown]
# ## Train four
#
# For each seed a plain VAE is trained first, and all four kinds go on from it for the same number
# of steps: what differs afterwards is the flows' doing and not the luck of the start. Each is
# scored on the test pictures at once:
#
# - the **ELBO**, from 64 draws of $q$;
# - the **importance-weighted bound** $\mathbb{E} \log \frac{1}{64} \sum_k p(x, z_k) / q(z_k \mid
#   x)$, which is never below it (Burda et al. 2016, arXiv:1509.00519);
# - the **exact** $\log p(x) = \log \int p(x \mid z)\, p(z)\, dz$, summed over a fine grid.

# %%
side = torch.linspace(-6, 6, 121 if SMOKE else 241)
grid = torch.cartesian_prod(side, side)
SHOWN = 40  # test pictures whose posterior is looked at
cell = 2 * (side[1] - side[0]).log()  # log of a grid cell's area


def log_likelihood(logits, x):
    """Of pictures ``(n, 64)`` under ``(m, 64)`` logits, ``(m, n)``."""
    return logits @ x.T - F.softplus(logits).sum(dim=1, keepdim=True)


@torch.no_grad()
def score(vae, draws=64):
    """Three numbers for each test picture, and what the pictures below need."""
    z, log_q = vae.posterior(seen).rsample_and_log_prob((draws,))
    log_p = vae.of_codes().log_prob(z)
    log_p += dist.Bernoulli(logits=vae.decoder(z)).to_event(1).log_prob(seen)
    weights = log_p - log_q
    on_grid = vae.of_codes().log_prob(grid)
    joint = log_likelihood(vae.decoder(grid), seen) + on_grid[:, None]
    exact = joint.logsumexp(dim=0) + cell
    return {
        "ELBO": weights.mean(dim=0),
        "64 weights": weights.logsumexp(dim=0) - math.log(draws),
        "exact": exact,
        "prior on the grid": (on_grid.logsumexp(dim=0) + cell).exp(),
        "prior": on_grid.exp(),
        "posterior": (joint - exact).T.exp(),  # p(z | x) on the grid, for each test picture
        "q": vae.posterior(seen[:SHOWN, None]).log_prob(grid).exp(),  # the same of the guide
        "codes": vae.posterior(train).sample(),
        "samples": vae.decoder(vae.of_codes().expand([100]).sample()).sigmoid(),
    }


kinds = {
    "plain": (False, False),
    "IAF posterior": (True, False),
    "flow prior": (False, True),
    "both": (True, True),
}
results = {name: [] for name in kinds}
how = {"particles": 1, "lr": 4e-3, "clip": 1e3, "progress": False}
for seed in SEEDS:
    pyro.set_rng_seed(seed)
    first = VAE(False, False)
    steps = 5 if SMOKE else 600
    pf.fit_guide(first.model, first.guide, batches=batches(), max_steps=steps, **how)
    for name, kind in kinds.items():
        pyro.set_rng_seed(seed)
        vae = VAE(*kind, start=first)
        steps = 5 if SMOKE else 250
        pf.fit_guide(vae.model, vae.guide, batches=batches(), max_steps=steps, **how)
        results[name].append(score(vae))
    pictures = {name: results[name][-1] for name in kinds}  # of the last seed

# %% [markdown]
# ## The numbers
#
# First the check: every prior's mass on the grid must be 1, else the exact column is not exact.
# Then means over test pictures and seeds, and against the plain VAE the paired differences: for
# each picture the same binarised pixels, so that what the pictures differ in cancels. The error is
# that of the mean over pictures; the two seeds stand beside it, for they differ by more than
# pictures tell.

# %%
mass = torch.stack([r["prior on the grid"] for runs in results.values() for r in runs])
print(f"prior mass on the grid: {mass.min():.5f} to {mass.max():.5f}")
columns = ("ELBO", "64 weights", "exact")
print(f"\n{'nats a picture':<14}", *(f"{c:>10}" for c in columns), "  KL(q || posterior)")
for name, runs in results.items():
    means = [torch.stack([r[c] for r in runs]).mean() for c in columns]
    print(f"{name:<14}", *(f"{m:10.2f}" for m in means), f"{means[2] - means[0]:12.2f}")
print("\nbetter than plain by (paired), nats a picture; then each seed")
for name, runs in list(results.items())[1:]:
    for column in ("ELBO", "exact"):
        pairs = zip(runs, results["plain"], strict=True)
        gain = torch.stack([r[column] - plain[column] for r, plain in pairs])
        error = gain.mean(dim=0).std() / gain.shape[1] ** 0.5
        seeds = ", ".join(f"{g:+.2f}" for g in gain.mean(dim=1))
        print(f"{name:<14} {column:<6} {gain.mean():+.2f} +- {error:.2f}   ({seeds})")

# %% [markdown]
# ## What a flow posterior does
#
# The KL in the last column falls with the IAF, but most of it stays. Where does that come from?
# Here is the exact $p(z \mid x)$ of one test picture, from the grid, beside $q(z \mid x)$ of the
# Gaussian and of the IAF ($z_1$ across, $z_2$ upwards); the picture is, of the first forty, the one
# where the plain VAE is furthest off. The IAF's $q$ is tilted, as no Gaussian with independent
# components can be. But both lie beside the exact posterior: that is the error of the *encoder* on
# a picture it never saw, the amortisation gap (Cremer et al. 2018, arXiv:1801.03558). A flow mends
# the shape of $q$ and not its place, and on this picture it is no better.

# %%
plain = pictures["plain"]
gap = (plain["exact"] - plain["ELBO"])[:SHOWN]
worst = int(gap.argmax())
fig, axes = plt.subplots(1, 5, figsize=(12, 2.7), layout="constrained")
axes[0].imshow(seen[worst].reshape(8, 8), cmap="gray_r")
axes[0].set(title=f"test picture, a {labels[1437:][worst]}", xticks=[], yticks=[])
n = len(side)
for k, name in enumerate(("plain", "IAF posterior")):
    found = pictures[name]
    exact, q = found["posterior"][worst].reshape(n, n), found["q"][worst].reshape(n, n)
    loss = (found["exact"] - found["ELBO"])[worst]
    near = grid[found["posterior"][worst].argmax()]
    for ax, density, title in zip(
        axes[1 + 2 * k : 3 + 2 * k],
        (exact, q),
        (f"{name}: exact", f"its q, KL {loss:.2f} nats"),
        strict=True,
    ):
        ax.pcolormesh(side, side, density.T, shading="auto", cmap="magma")
        ax.set(title=title, xlabel="$z_1$", xlim=near[0] + torch.tensor([-1.5, 1.5]))
        ax.set(ylim=near[1] + torch.tensor([-1.5, 1.5]), aspect="equal")

# %% [markdown]
# ## What a flow prior does
#
# The *aggregate posterior* is the mixture of $q(z \mid x)$ over all training pictures: a draw of
# each, coloured by its class (which the model never saw). A picture drawn from the model begins
# with a code from the prior, so where the prior has mass and the aggregate has none, the decoder
# was never trained. A standard normal pulls all codes into one round heap; a flow lets classes move
# apart and goes after them.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharex=True, sharey=True)
for ax, name in zip(axes, ("plain", "flow prior"), strict=True):
    found = pictures[name]
    density = found["prior"].reshape(n, n).T
    ax.contour(side, side, density, levels=8, colors="black", linewidths=0.6)
    points = ax.scatter(*found["codes"].T, s=4, c=labels[:1437], cmap="tab10", vmin=-0.5, vmax=9.5)
    ax.set(title=f"{name}: codes, and the prior's contours", xlabel="$z_1$", ylabel="$z_2$")
    ax.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
_ = fig.colorbar(points, ax=axes, ticks=range(10), label="class")

# %% [markdown]
# And what the decoders make of draws from their priors, beside test pictures: with two numbers a
# picture, none is sharp, but one can look for shapes that are no digit.

# %%
sheets = {"test pictures (grey levels)": test[:100]}
sheets |= {f"draws, {name}": pictures[name]["samples"] for name in ("plain", "flow prior")}
fig, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
for ax, (title, rows) in zip(axes, sheets.items(), strict=True):
    sheet = pf.plots.sheet(rows.reshape(10, 10, 1, 8, 8), bins=2).squeeze(-1)
    ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# ## Where to put it
#
# - The **exact** column judges the model, prior and decoder; the KL column judges the guide. A flow
#   posterior aims at the second, and moves the first only as far as the Gaussian's shape had held
#   the decoder back; a flow prior aims at the first.
# - In numbers: each flow gains about a tenth of a nat or less of 24, with the same sign for both
#   seeds. Whether the two together beat one of them, these runs cannot tell.
# - The importance-weighted bound is the exact value here, up to the noise of its draws. It is what
#   is left to use in more than a few dimensions, where no grid goes.
# - These are small nets, two seeds and a few hundred test pictures. A difference of less than two
#   of its errors, or one whose sign changes with the seed, is no difference.
#
# ## What to read next
#
# - [A guide for a real posterior](06_iaf_guide.ipynb): latent variables that all rows share.
# - [Flows as priors](07_flow_priors_and_neutra.ipynb), with NUTS in place of a guide.
# - [Glow](05_glow.ipynb): a flow of the pixels themselves, without decoder or encoder.
# - `models/vae_flow_prior.py` and `models/vae_frey_faces.py` do this at length, in 16 to 32
#   dimensions.
