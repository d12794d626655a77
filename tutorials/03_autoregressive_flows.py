# %% [markdown]
# # Autoregressive flows
#
# **MAF or IAF: which direction is fast, and why?**
#
# Any density is a product of one-dimensional ones, each given the features before:
# $p(x) = p(x_1)\,p(x_2 \mid x_1)\,p(x_3 \mid x_1, x_2) \cdots$ An autoregressive layer is built the
# same way. A masked network (MADE) sets the parameters of feature $i$ from the features before $i$:
#
# - **IAF**: $x_i = g\big(z_i;\ \theta_i(z_{<i})\big)$. The network reads the *base*. Given all of
#   $z$, all of $x$ comes out in one pass: **sampling** is fast.
# - **MAF**: $z_i = g\big(x_i;\ \theta_i(x_{<i})\big)$. The network reads the *data*. Given all of
#   $x$, all of $z$ comes out in one pass: **scoring** is fast.
#
# The other direction of each has to find the features one after the other. We shall see what that
# costs, and that it need not cost much.

# %%
import math
import os
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyroflows as pf
from pyroflows.transforms import Affine, Autoregressive, Standardize

SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
torch.set_num_threads(1)  # for the timings
torch.manual_seed(0)
pyro.set_rng_seed(0)

# %% [markdown]
# ## The Jacobian is a triangle
#
# Feature $i$ depends on itself and on those before: a lower triangle, and the determinant is the
# product of the diagonal, as for couplings. There is more below the diagonal than a coupling has:
# each feature hears *all* before it. With `descending=True` the last feature comes first, and the
# triangle is an upper one. One of each after the other fills the matrix.


# %%
def layer_of(features: int, seed: int, hidden: int = 64, **options: bool) -> Autoregressive:
    """An affine autoregressive layer with random weights (a new one is the identity)."""
    layer = Autoregressive(pf.nets.MADE(features, 2, hidden=(hidden, hidden), **options), Affine())
    pf.testing.randomize(layer, gain=0.7, seed=seed)
    return layer


up, down = layer_of(8, seed=1), layer_of(8, seed=2, descending=True)
z = torch.randn(8)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
maps = {"ascending": up, "descending": down, "one after the other": pf.Chain([up, down])}
for ax, (title, layer) in zip(axes, maps.items(), strict=True):
    matrix = torch.autograd.functional.jacobian(layer, z)
    log_det = layer.forward_and_log_det(z)[1]
    shown = torch.where(matrix == 0, torch.nan, matrix.abs().log10())
    mesh = ax.imshow(shown, vmin=-3, vmax=1)
    ticks = {"xticks": range(8), "yticks": range(8)}
    ax.set(**ticks, xticklabels=range(1, 9), yticklabels=range(1, 9))
    ax.set(title=title, xlabel="feature that goes in", ylabel="feature that comes out")
    general = matrix.slogdet()[1]
    diagonal = matrix.diagonal().log().sum()
    print(f"{title:<20} log-det {log_det:+.4f}, by a general LU {general:+.4f}", end="")
    print("" if layer not in (up, down) else f", from the diagonal {diagonal:+.4f}")
fig.colorbar(mesh, ax=axes, label="log10 of |derivative|")
plt.show()

# %% [markdown]
# ## One layer, two flows
#
# MAF and IAF are the same map, used in opposite directions. In pyroflows every transform has its
# inverse `.inv`, a module with the very same weights. `Autoregressive(...)` is an IAF layer,
# `Autoregressive(...).inv` a MAF layer. Each flow knows its fast direction.

# %%
as_iaf = pf.Flow(up, shape=8)
as_maf = pf.Flow(up.inv, shape=8)
rows = torch.randn(5, 8)
with torch.no_grad():
    there = up(rows)
    back = up.inv(there)
same = all(a is b for a, b in zip(as_iaf.parameters(), as_maf.parameters(), strict=True))
print(f"fast as an IAF: {as_iaf.fast!r}, as a MAF: {as_maf.fast!r}, same weights: {same}")
print(f"there and back again, largest error: {(back - rows).abs().max():.1e}")
print(f"builders: maf {pf.maf(8).fast!r}, iaf {pf.iaf(8).fast!r}")

# %% [markdown]
# ## Why the other direction takes steps
#
# Say we know the output $y$ and look for the input $x$ with $y_i = g(x_i; \theta_i(x_{<i}))$. For
# $x_1$ nothing else is needed. For $x_2$ we need $x_1$, for $x_3$ both of them. The textbook loop
# calls the network once a feature, $D$ calls in all.
#
# Let us watch it. We start from a wrong guess, and each call updates all features. The picture
# shows the error of each feature after each call. Below the diagonal all is right, to the last
# digit: after $k$ calls the first $k$ features are. So $D$ calls are always enough.


# %%
def naive_inverse(layer: Autoregressive, y: torch.Tensor) -> tuple[torch.Tensor, list]:
    """The inverse by one network call a feature, and the guess after each call."""
    x, guesses = torch.zeros_like(y), []
    for _ in range(y.shape[-1]):
        x = layer.family.inverse(y, layer.net(x))[0]
        guesses.append(x)
    return x, guesses


features = 24
layer = layer_of(features, seed=3).double()
x = torch.randn(100, features, dtype=torch.float64)
with torch.no_grad():
    y = layer(x)
    found, guesses = naive_inverse(layer, y)
    solved = layer.inv(y)
print(f"largest error of the loop {(found - x).abs().max():.1e}")
print(f"of layer.inv              {(solved - x).abs().max():.1e}")

error = torch.stack([(guess - x).abs().mean(dim=0) for guess in guesses]).clamp(min=1e-17)
fig, ax = plt.subplots(figsize=(6, 4.6), layout="constrained")
mesh = ax.imshow(error.log10(), vmin=-16, vmax=0, cmap="magma")
ax.set(title="the naive inverse, call by call", xlabel="feature", ylabel="calls so far")
ax.set(xticks=range(0, 24, 4), xticklabels=range(1, 25, 4))
ax.set(yticks=range(0, 24, 4), yticklabels=range(1, 25, 4))
fig.colorbar(mesh, ax=ax, label="log10 of the mean error")
plt.show()

# %% [markdown]
# ## Solving in one go
#
# The loop wastes nearly all its work. Call number 20 computes every hidden unit again, though most
# of them depend on early features only and have not changed. A MADE that keeps its hidden units
# sorted by what they may see can do better, by a *sequential solve*: it goes through the features
# once. At feature $i$ it computes just those hidden units that have become known, and uses them for
# all later features. Each unit is computed once, so the arithmetic is about that of two passes, for
# any $D$. The result is exact.
#
# `layer.inv` solves this way where the network can. A network that is a plain function cannot, and
# gets the loop: that gives us something to compare with. We time all three on 100 rows, in
# milliseconds of the processor on one thread, so that whatever else runs on the machine hardly
# counts.


# %%
def clock(call, most: int = 20) -> float:
    """The least processor time of several calls, in milliseconds."""
    times = []
    for _ in range(2 if SMOKE else most):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
        if sum(times) > 3:
            break
    return 1e3 * min(times)


table = []
sizes = (8, 16, 32) if SMOKE else (8, 16, 32, 64, 128, 256)
print("features   one pass     solve      loop  solve / pass   loop / pass  loop / solve")
for features in sizes:
    layer = layer_of(features, seed=4, hidden=256)
    plain = Autoregressive(lambda x, c, net=layer.net: net(x), Affine())
    x = torch.randn(100, features)
    with torch.no_grad():
        y = layer(x)
        near = torch.allclose(layer.inv(y), plain.inv(y), atol=1e-3)
        row = [
            clock(lambda layer=layer, x=x: layer(x)),
            clock(lambda layer=layer, y=y: layer.inv(y)),
            clock(lambda plain=plain, y=y: plain.inv(y), 5),
        ]
    table.append(row)
    one, solve, loop = row
    print(
        f"{features:>8} {one:7.2f} ms {solve:6.2f} ms {loop:6.1f} ms"
        f" {solve / one:13.1f} {loop / one:13.0f} {loop / solve:13.1f}   equal: {near}"
    )

# %% [markdown]
# The loop costs as many passes as there are features. The sequential solve costs a few, more than
# the two that its arithmetic amounts to, since it goes in many small steps, and a small step costs
# more to call than to compute. The wider the network, the less that counts. (Where calls would
# dominate, pyroflows takes a block of features at once and repeats until nothing changes. The
# picture above shows why this pays: most of it was right long before the last call.)

# %%
times = torch.tensor(table)
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for column, name, color in zip(
    times.T, ("one pass", "sequential solve", "loop"), ("C0", "C2", "C3"), strict=True
):
    ax.loglog(sizes, column, "o-", label=name, color=color)
ax.set(title="100 rows through one layer", xlabel="features", ylabel="milliseconds")
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# ## What this means for whole flows
#
# Here are both flows over 64 features, with five layers each. The third row is the case of a
# variational guide: it draws points and scores *its own* draws. For those an IAF needs no inverse,
# since it knows the $z$ they came from. `rsample_and_log_prob` gives both in one go.

# %%
print("64 features, 100 rows          MAF          IAF")
flows = [build(64, hidden=(256, 256)) for build in (pf.maf, pf.iaf)]
given = torch.randn(100, 64)
work = {
    "score given points": lambda flow: flow.log_prob(given),
    "draw": lambda flow: flow.sample(100),
    "draw, and score the draws": lambda flow: flow.rsample_and_log_prob(100),
}
with torch.no_grad():
    for name, do in work.items():
        maf_time, iaf_time = (clock(lambda flow=flow, do=do: do(flow)) for flow in flows)
        print(f"{name:<26} {maf_time:6.1f} ms   {iaf_time:7.1f} ms")

# %% [markdown]
# So: data to be scored, as in maximum likelihood, ask for a MAF. Draws to be scored, as in
# variational inference, ask for an IAF.
#
# ## The order matters
#
# One affine layer says: given those before, each feature is Gaussian. Whether that is true depends
# on the order. Take $x_1 \sim \mathcal{N}(0, 1)$ and $x_2 = x_1^2 + \text{noise}$. With $x_1$
# first, $x_2$ given $x_1$ is Gaussian, and one layer is enough. With $x_2$ first we must describe
# $x_1$ given $x_2$: two humps, at $\pm\sqrt{x_2}$, and no Gaussian has two. The example is from the
# MAF paper. The exact density is known, so we can say how far each falls short.

# %%
first, second = dist.Normal(0.0, 1.0), 0.5


def exact(x: torch.Tensor) -> torch.Tensor:
    """The true log-density in nats."""
    return first.log_prob(x[:, 0]) + dist.Normal(x[:, 0] ** 2, second).log_prob(x[:, 1])


def bow(n: int) -> torch.Tensor:
    """Draws of it."""
    x = first.sample((n,))
    return torch.stack([x, x**2 + second * torch.randn(n)], dim=1)


def maf_in_order(descending: list[bool]) -> pf.Flow:
    """MAF layers that take the features in these orders, nothing else between them."""
    nets = [pf.nets.MADE(2, 2, hidden=(64, 64), descending=order) for order in descending]
    layers = [Autoregressive(net, Affine()).inv for net in nets]
    return pf.Flow(pf.Chain([*layers, Standardize(2)]), shape=2)


rows, test = bow(1000 if SMOKE else 8000), bow(10_000)
orders = {
    "one layer, x1 first": [False],
    "one layer, x2 first": [True],
    "five layers, x2 first in all": [True] * 5,
    "five layers, in turn": [True, False] * 2 + [True],
}
trained = {name: maf_in_order(order) for name, order in orders.items()}
best = exact(test)
print(f"{'the truth':<30} {best.mean():.3f} nats a row")
for name, flow in trained.items():
    pf.fit(flow, rows, max_epochs=1 if SMOKE else 20, progress=False)
    with torch.no_grad():
        gap = best - flow.log_prob(test)
    print(f"{name:<30} short by {gap.mean():.3f} +- {gap.std() / len(gap) ** 0.5:.3f}")

# %% [markdown]
# Stacking helps only where the order changes, which is why `pf.maf` takes features ascending and
# descending in turn, and mixes them by a linear map besides. The densities show what one layer in
# the wrong order does: it covers both arms with a single wide Gaussian at each height.

# %%
across, high = torch.linspace(-3.5, 3.5, 180), torch.linspace(-2, 9, 180)
grid = torch.cartesian_prod(across, high)
fig, axes = plt.subplots(1, 5, figsize=(15, 3.6), layout="constrained", sharey=True)
scores = {"the truth": exact, **{name: flow.log_prob for name, flow in trained.items()}}
for ax, (name, score) in zip(axes, scores.items(), strict=True):
    with torch.no_grad():
        density = score(grid).reshape(180, 180).T
    mesh = ax.pcolormesh(across, high, density, vmin=-10, vmax=0, shading="auto")
    ax.set_title(name, fontsize=10)
    ax.set_xlabel("$x_1$")
axes[0].set_ylabel("$x_2$")
fig.colorbar(mesh, ax=axes, label="log-density, nats")
plt.show()

# %% [markdown]
# ## Inverses are not twins
#
# A MAF turned round is an IAF: same weights, fast draws. It is tempting to think that this gives a
# fast sampler of the same density. It does not. A MAF maps data to noise in one pass. Turned round,
# that pass maps *noise* to something that is not data. Look at what each makes of normal noise, and
# at what the fast pass does to data: it makes noise of them, which is what it was trained for.

# %%
maf = trained["five layers, in turn"]
turned = pf.Flow(maf.transform.inv, shape=2)
with torch.no_grad():
    clouds = {
        f"draws of the MAF (fast: {maf.fast!r})": maf.sample(2000),
        f"draws of it turned round (fast: {turned.fast!r})": turned.sample(2000),
        "the fast pass, applied to data": maf.transform.inv(test[:2000]),
    }
fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for ax, (title, points) in zip(axes, clouds.items(), strict=True):
    ax.scatter(*points.T, s=2)
    ax.set(xlabel="first feature", ylabel="second feature", xlim=(-4, 4), ylim=(-4, 8))
    ax.set_title(title, fontsize=10)
plt.show()
noise = clouds["the fast pass, applied to data"]
means, spreads = noise.mean(dim=0), noise.std(dim=0)
print(f"data after the fast pass: means {means[0]:+.2f} and {means[1]:+.2f}, ", end="")
print(f"standard deviations {spreads[0]:.2f} and {spreads[1]:.2f}")
ceiling = -math.log(2 * math.pi) - 1
mean = turned.base().log_prob(noise).mean()
print(f"mean log-density under the base {mean:.3f}, for a true normal {ceiling:.3f}")

# %% [markdown]
# An IAF with the *density* of a MAF needs weights of its own, and can learn them from the MAF. That
# is distillation: `pf.distill(teacher, pf.student_of(teacher))`.
#
# ## What to read next
#
# - [Splines and bounded data](04_splines_and_bounded_data.ipynb): what to put in the place of
#   $e^s z + t$.
# - [A guide for a real posterior](06_iaf_guide.ipynb), where the IAF is at home.
# - The papers: MADE, Germain et al. 2015, arXiv:1502.03509; IAF, Kingma et al. 2016,
#   arXiv:1606.04934; MAF, Papamakarios et al. 2017, arXiv:1705.07057.
