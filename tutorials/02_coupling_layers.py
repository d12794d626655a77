# %% [markdown]
# # Coupling layers
#
# **How can a flow use any network it likes, and still be inverted and scored in one pass?**
#
# A coupling layer splits the features into two groups. One is *kept*: it is copied. The other is
# *moved*, each feature by a simple scalar map whose parameters come from a network that looks at
# the kept features:
#
# $$x_{kept} = z_{kept}, \qquad x_i = g\big(z_i;\ \theta_i(z_{kept})\big) \text{ for the others.}$$
#
# To go back, the network is called again, on the same kept features: nothing has to be inverted but
# $g$. NICE takes $g(z) = z + t$, RealNVP takes $g(z) = e^{s} z + t$.

# %%
import math
import os
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf
from pyroflows.transforms import Additive, Affine, Coupling, Standardize

SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
torch.set_num_threads(1)  # for the timing at the end
torch.manual_seed(0)
pyro.set_rng_seed(0)

# %% [markdown]
# ## Which half is copied
#
# In pyroflows a mask says what is kept: `True` is copied. Here are six features of which the first
# three are kept. The network is an ordinary one, with 3 inputs and 2 numbers (a log-scale and a
# shift) for each of the 3 moved features. We give it random weights, since a new one starts as the
# identity, and count its calls.


# %%
def coupling(mask: torch.Tensor, family: pf.transforms.Family, hidden: int = 64) -> Coupling:
    """A coupling that keeps the features where the mask is True."""
    kept = int(mask.sum())
    net = pf.nets.MLP(kept, (len(mask) - kept) * family.params, hidden=(hidden, hidden))
    return Coupling(net, family, mask)


first = torch.arange(6) < 3
layer = coupling(first, Affine())
pf.testing.randomize(layer, gain=1.0)
calls = []
layer.net.register_forward_hook(lambda *_: calls.append(1))

torch.set_printoptions(precision=3, sci_mode=False)
z = torch.randn(6)
with torch.no_grad():
    x, log_det = layer.forward_and_log_det(z)
    back, _ = layer.inverse_and_log_det(x)
print("kept   ", first.int().tolist())
print("z      ", z)
print("x      ", x)
print("z again", back)
print(f"calls of the network: {len(calls)}, one each way; log-determinant {log_det:.3f} nats")

# %% [markdown]
# ## Why the determinant is cheap
#
# A kept feature depends on itself alone, with derivative one. A moved feature depends on itself and
# on the kept ones, never on another moved one. With the kept features in front, the Jacobian is a
# triangle, and the determinant of a triangle is the product of its diagonal: the slopes of the
# scalar maps. What the network does below the diagonal may be as complicated as it likes. It never
# enters.
#
# A checkerboard mask (every second feature) has the same triangle once features are sorted by role.
# When the roles swap from layer to layer, triangles multiply to something full. After two layers
# some features still have not heard of each other. After three, each depends on all.


# %%
def jacobian(parts: list[Coupling], at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dx/dz of the layers one after the other, and their log-determinant."""
    chain = pf.Chain(parts)
    return torch.autograd.functional.jacobian(chain, at), chain.forward_and_log_det(at)[1]


def draw(ax: plt.Axes, matrix: torch.Tensor, title: str, names: list[int] | None = None):
    """Zeros white, everything else by its size."""
    shown = torch.where(matrix == 0, torch.nan, matrix.abs().log10())
    image = ax.imshow(shown, cmap="viridis", vmin=-3, vmax=1)
    names = list(range(1, 7)) if names is None else names
    ax.set(xticks=range(6), yticks=range(6), xticklabels=names, yticklabels=names)
    ax.set(title=title, xlabel="feature of z", ylabel="feature of x")
    return image


every_second = torch.arange(6) % 2 == 0
masks = [first, ~first, first, ~first]
layers = [coupling(mask, Affine()) for mask in masks]
for seed, part in enumerate([layer, *layers]):
    pf.testing.randomize(part, gain=1.0, seed=seed)
board = coupling(every_second, Affine())
pf.testing.randomize(board, gain=1.0)

fig, axes = plt.subplots(2, 3, figsize=(10, 6.6), layout="constrained")
one, log_det = jacobian(layers[:1], z)
draw(axes[0, 0], one, "first three kept")
checkered, _ = jacobian([board], z)
draw(axes[0, 1], checkered, "every second kept")
order = [0, 2, 4, 1, 3, 5]
draw(axes[0, 2], checkered[order][:, order], "the same, kept ones in front", [i + 1 for i in order])
for ax, count in zip(axes[1], (2, 3, 4), strict=True):
    matrix, _ = jacobian(layers[:count], z)
    image = draw(ax, matrix, f"{count} layers, roles swapped: {int((matrix == 0).sum())} zeros")
fig.colorbar(image, ax=axes, label="log10 of |derivative|; white is zero", shrink=0.7)
plt.show()

full, log_det_full = jacobian(layers, z)
print(f"one layer:   log-det {log_det:.5f}, from the diagonal {one.diagonal().log().sum():.5f}")
print(f"four layers: log-det {log_det_full:.5f}, by a general LU {full.slogdet()[1]:.5f}")

# %% [markdown]
# ## A shear, or a stretch
#
# What can one layer do? NICE adds: a column of points is shifted as a whole, by as much as the
# network says for this column. That is a shear. No cell changes its area, so the layer is
# *volume-preserving* and its log-determinant is 0 everywhere. RealNVP also multiplies: it widens
# some columns and narrows others. Here both act on a grid of equal cells. The first feature (left
# to right) is kept.

# %%
keep_first = torch.tensor([True, False])
fine = torch.linspace(-2, 2, 161)
sheet = torch.cartesian_prod(fine, fine)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
shapes = {
    "before": None,
    "NICE: shifted": Coupling(lambda kept, c: (2 * kept).sin(), Additive(), keep_first),
    "RealNVP: shifted and scaled": Coupling(
        lambda kept, c: torch.cat([-kept, (2 * kept).sin()], dim=-1), Affine(1.5), keep_first
    ),
}
for ax, (title, shape) in zip(axes, shapes.items(), strict=True):
    points, log_det = (
        (sheet, torch.zeros(len(sheet))) if shape is None else (shape.forward_and_log_det(sheet))
    )
    xs, ys = points.T.reshape(2, 161, 161)
    mesh = ax.pcolormesh(
        xs, ys, log_det.reshape(161, 161), cmap="coolwarm", vmin=-2, vmax=2, shading="gouraud"
    )
    for k in range(0, 161, 8):
        ax.plot(xs[k], ys[k], color="black", lw=0.3)
        ax.plot(xs[:, k], ys[:, k], color="black", lw=0.3)
    ax.set(title=title, xlabel="kept feature", ylabel="moved feature", ylim=(-5, 5))
    if shape is not None:
        print(f"{title:<28} log-det from {log_det.min():+.2f} to {log_det.max():+.2f} nats")
fig.colorbar(mesh, ax=axes, label="log-determinant")
plt.show()

# %% [markdown]
# ## What keeping the volume costs
#
# A flow that keeps all volumes can only move the base's density around. It cannot press it
# together. So take data that need it: half of the points in a tight Gaussian, half in a wide one.
# Their exact density is known, so we know the best score there is.
#
# `pf.nice` ends with one learnt scale a feature, as in the paper. It is a constant: it cannot be
# small here and large there. Both flows get the same networks and the same training.

# %%
centre = torch.tensor([[-1.0, 0.0], [1.5, 0.0]])
spread = torch.tensor([[0.1, 0.1], [1.0, 1.0]])
truth = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(centre, spread).to_event(1)
)
rows, test = truth.sample((1000 if SMOKE else 8000,)), truth.sample((20_000,))
settings = {"layers": 6, "hidden": (64, 64), "linear": "reverse"}
flows = {"NICE": pf.nice(2, **settings), "RealNVP": pf.realnvp(2, **settings)}
best = truth.log_prob(test)
print("             nats a row   short of the truth   log-dets of rows, from and to")
print(f"{'the truth':<10} {best.mean():12.3f}")
for name, flow in flows.items():
    pf.fit(flow, rows, max_epochs=1 if SMOKE else 25, progress=False)
    with torch.no_grad():
        log_p = flow.log_prob(test)
        log_dets = flow.transform.inverse_and_log_det(test)[1]
    gap = best - log_p
    error = gap.std() / len(gap) ** 0.5
    print(
        f"{name:<10} {log_p.mean():12.3f}   {gap.mean():10.3f} +- {error:.3f}"
        f"   {log_dets.min():17.2f} {log_dets.max():8.2f}"
    )

# %% [markdown]
# All rows have one and the same log-determinant under NICE, up to rounding. So its density cannot
# exceed $e^{\text{log-det}}$ times the base's mode, anywhere. The right panel shows that limit: the
# log-density along the line through both centres, against the truth. NICE cannot reach the peak.

# %%
side = torch.linspace(-3, 5, 200)
up = torch.linspace(-3, 3, 150)
grid = torch.cartesian_prod(side, up)
fig, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
line = torch.stack([torch.linspace(-3, 5, 800), torch.zeros(800)], dim=1)
scores = {"the truth": truth.log_prob, **{name: flow.log_prob for name, flow in flows.items()}}
colors = ("black", "tab:orange", "tab:blue")
for ax, (name, score), color in zip(axes, scores.items(), colors, strict=False):
    with torch.no_grad():
        density = score(grid)
        along = score(line)
    mesh = ax.pcolormesh(side, up, density.reshape(200, 150).T, vmin=-8, vmax=2, shading="auto")
    ax.set(title=name, xlabel="first feature", ylabel="second feature")
    axes[3].plot(line[:, 0], along, color=color, label=name, lw=1.2)
fig.colorbar(mesh, ax=axes[2], label="log-density, nats")
with torch.no_grad():
    shift = flows["NICE"].transform.inverse_and_log_det(test[:1])[1] - math.log(2 * math.pi)
axes[3].axhline(shift, color="tab:orange", ls=":", label="ceiling of NICE")
axes[3].set(title="along the first feature", xlabel="first feature", ylabel="log-density, nats")
axes[3].set_ylim(-8, 3.5)
axes[3].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## If the mask never changes
#
# A kept feature is a copy. If every layer keeps the same one, it is a copy of a copy: it comes out
# as it went in, a standard normal, whatever the data. Here is the flow with one mask throughout
# beside the flow whose masks take turns. Same layers, same data.
#
# `pf.testing` has a law against such flows. It finds features of the data that are features of the
# base, and names them.


# %%
def stacked(masks: list[torch.Tensor]) -> pf.Flow:
    """Affine couplings with these masks, and the data's own units outside."""
    parts = [coupling(mask, Affine()) for mask in masks]
    return pf.Flow(pf.Chain([*parts, Standardize(2)]), shape=2)


moons = pf.datasets.moons(1000 if SMOKE else 10_000)
stacks = {
    "one mask in all six layers": stacked([keep_first] * 6),
    "masks in turn": stacked([keep_first, ~keep_first] * 3),
}
for name, flow in stacks.items():
    pf.fit(flow, moons.train, val=moons.val, max_epochs=1 if SMOKE else 15, progress=False)
    with torch.no_grad():
        score = flow.log_prob(moons.test).mean()
    print(f"{name}: {score:.3f} nats a row")
    try:
        pf.testing.check_flow(flow, laws=["every_feature_moves"])
        print("  law every_feature_moves: holds")
    except AssertionError as error:
        print(f"  law {error}")

# %% [markdown]
# With one mask the draws run out beyond the moons on both sides. Their first feature (bars) is a
# bell, the base's own, and no training can make it follow the data (line). With masks in turn it
# has the data's width, and begins to follow their humps.

# %%
fig, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
bins = torch.linspace(-2, 3, 51)
for (ax, below), (name, flow) in zip((axes[:2], axes[2:]), stacks.items(), strict=True):
    draws = flow.sample((5000,))
    ax.scatter(*draws[:1500].T, s=2, color="tab:orange")
    ax.set(title=name, xlim=(-2, 3), ylim=(-1.2, 1.8))
    ax.set(xlabel="first feature", ylabel="second feature")
    below.hist(draws[:, 0], bins, density=True, color="tab:orange", alpha=0.6, label="draws")
    below.hist(moons.train[:, 0], bins, density=True, histtype="step", color="black", label="data")
    below.set(title="first feature", xlabel="first feature", ylabel="density")
    below.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Masks of images
#
# In an image every pixel of a channel is a feature, and a mask is a pattern. RealNVP uses two kinds
# in turn. The *checkerboard* keeps every second pixel, so each moved pixel has kept neighbours. The
# *channel* mask keeps half of the channels. For this a grey image is first *squeezed*, so that each
# 2 x 2 block becomes four channels at half the resolution. In the picture dark is kept, and masks
# of channels are shown on the pixels they stand for. `pf.multiscale_realnvp` takes names of them as
# `masks=`; `pf.glow` splits channels throughout.

# %%
shape = (1, 8, 8)
whole = torch.ones(4, 4, 4)
channels = pf.transforms.first_half((4, 4, 4)) * whole
pictures = {
    "checkerboard": pf.transforms.checkerboard(shape)[0],
    "its opposite": ~pf.transforms.checkerboard(shape)[0],
    "even rows": pf.transforms.even_rows(shape)[0],
    "even columns": pf.transforms.even_columns(shape)[0],
    "channels of a squeeze:\nfirst two of four": pf.transforms.unsqueeze(channels)[0],
    "channels of a squeeze:\nlast two of four": pf.transforms.unsqueeze(1 - channels)[0],
    "all but channel 0": pf.transforms.unsqueeze(
        pf.transforms.all_but_channel((4, 4, 4), 0) * whole
    )[0],
}
fig, axes = plt.subplots(1, 7, figsize=(14, 2.4), layout="constrained")
for ax, (title, mask) in zip(axes, pictures.items(), strict=True):
    ax.imshow(mask, cmap="Greys", vmin=0, vmax=1.3)
    ax.set_title(f"{title}\n{int(mask.sum())} of 64 kept", fontsize=9)
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The same warning holds for pixels. Four image couplings with random weights move random base
# images; the map shows by how much each pixel was changed, on average. With the same checkerboard
# in every layer half of the image is never touched. With the opposite in every second layer all of
# it is.

# %%
board = pf.transforms.checkerboard(shape)
plans = {
    "the same mask, four times": [board] * 4,
    "a mask and its opposite, twice": [board, ~board] * 2,
}
noise = torch.randn(500, *shape)
fig, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for ax, (title, plan) in zip(axes, plans.items(), strict=True):
    chain = pf.Chain(
        pf.transforms.ImageCoupling(pf.nets.ConvNet(1, 2, channels=16), Affine(), mask)
        for mask in plan
    )
    pf.testing.randomize(chain, gain=1.0)
    with torch.no_grad():
        change = (chain(noise) - noise).abs().mean(dim=0)[0]
    mesh = ax.imshow(change, vmin=0)
    fig.colorbar(mesh, ax=ax, label="mean change")
    ax.set(title=title, xticks=[], yticks=[])
    print(f"{title}: {int((change == 0).sum())} of 64 pixels never change")
plt.show()

# %% [markdown]
# ## One pass each way
#
# This is what couplings are taken for. Here is a flow over 64 features, timed in both directions,
# in milliseconds of the processor on one thread. The flow itself says that both take one pass.
# Drawing takes somewhat longer, since it also makes the noise, and since it inverts the linear maps
# that `pf.realnvp` puts between its couplings, by solving triangular systems.

# %%
wide = pf.realnvp(64, layers=6, hidden=(128, 128))
print(f"fast: {wide.fast!r}")
rows = torch.randn(1000, 64)
with torch.no_grad():
    for name, call in (
        ("log_prob", lambda: wide.log_prob(rows)),
        ("sample", lambda: wide.sample(1000)),
    ):
        call()
        times = []
        for _ in range(3 if SMOKE else 20):
            begin = time.process_time()
            call()
            times.append(time.process_time() - begin)
        print(f"{name:<9} {1e3 * min(times):6.1f} ms for 1000 rows")

# %% [markdown]
# ## What to read next
#
# - [Autoregressive flows](03_autoregressive_flows.ipynb): each feature hears all before it, not
#   just half of them. One direction gets slower for it, and it need not be by much.
# - [Splines and bounded data](04_splines_and_bounded_data.ipynb): a better scalar map than
#   $e^s z + t$ makes every coupling stronger.
# - The papers: NICE, Dinh et al. 2015, arXiv:1410.8516; RealNVP, Dinh et al. 2017,
#   arXiv:1605.08803.
