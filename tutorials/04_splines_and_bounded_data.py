# %% [markdown]
# # Splines and bounded data
#
# **How does a flow follow any shape, and end exactly where the data end?**
#
# Two scalar maps do it. A *spline* inside the flow bends one feature as far as needed, and can
# still be inverted. A *bijection onto the support* at the end of the flow sends the whole real line
# to where the data live: to $(0, 1)$ for a rate, to $(0, \infty)$ for an amount.

# %%
import copy
import math
import os
import textwrap

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyroflows as pf

SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
torch.manual_seed(0)
pyro.set_rng_seed(0)

# %% [markdown]
# ## One spline
#
# A rational-quadratic spline with $K$ bins is a curve through $K + 1$ knots, in a box from $-B$ to
# $B$ both ways. It is set by $3K - 1$ numbers $\theta$, which a network gives: $K$ widths and $K$
# heights (a softmax makes them positive and lets them fill the box), and $K - 1$ slopes at the
# inner knots (a softplus makes them positive). Between two knots the curve is a quotient of two
# quadratics. It rises throughout, and its inverse is the root of a quadratic.
#
# Outside of the box the spline is the identity: the *tails*. Its slope at both ends of the box is
# one, so the slope has no jump there.

# %%
K, B = 5, 3.0
family = pf.transforms.RationalQuadraticSpline(bins=K, bound=B)
theta = torch.tensor([0.3, -0.9, 1.0, 0.2, 0.4, 1.2, 0.1, -1.2, 0.5, 0.9, 1.5, -2.0, 0.3, 3.0])


def knots(raw: torch.Tensor) -> torch.Tensor:
    """K + 1 positions from K numbers: a floor, and a softmax of the rest."""
    share = family.min_bin / K + (1 - family.min_bin) * raw.softmax(dim=-1)
    return torch.cat([torch.zeros(1), share.cumsum(dim=-1)]) * 2 * B - B


x = torch.linspace(-4.5, 4.5, 901)
y, log_slope = family.forward(x, theta)
at, height = knots(theta[:K]), knots(theta[K : 2 * K])
through, log_slope_at = family.forward(at, theta)
print(f"numbers in theta: {family.params} = 3 * {K} - 1")
print(f"the curve at the knots against the heights: off by {(through - height).abs().max():.1e}")

fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
axes[0].plot(x, x, color="grey", ls=":", label="identity")
axes[0].plot(x, y, color="tab:blue", label="spline")
axes[0].plot(at, height, "o", color="black", label="knots")
for a, b, slope in zip(at, height, log_slope_at.exp(), strict=True):
    step = 0.35 / (1 + slope**2).sqrt()
    axes[0].plot([a - step, a + step], [b - slope * step, b + slope * step], color="tab:red", lw=2)
axes[0].plot([], [], color="tab:red", lw=2, label="slope at a knot")
axes[0].add_patch(plt.Rectangle((-B, -B), 2 * B, 2 * B, fill=False, color="grey", lw=0.8))
axes[0].set(title="the spline in its box", xlabel="x", ylabel="y", aspect="equal")
axes[1].plot(x, log_slope.exp(), color="tab:blue", label="slope")
axes[1].plot(at, log_slope_at.exp(), "o", color="tab:red", label="at the knots")
axes[1].axhline(1, color="grey", ls=":")
axes[1].set(title="its slope, everywhere positive", xlabel="x", ylabel="dy/dx", yscale="log")
for ax, place in zip(axes, ("lower right", "upper right"), strict=True):
    ax.legend(fontsize=8, loc=place)
plt.show()

# %% [markdown]
# ## It rises, whatever the network says
#
# That no $\theta$ can make the curve fall is what lets a network set it freely. Let us try two
# thousand random $\theta$, and also some that are ten times too large. For each we take the slopes
# at 200 points, and go there and back again. Slopes far from one cost digits in the round trip.

# %%
points = torch.linspace(-4, 4, 200, dtype=torch.float64)
print("size of theta   least slope   largest slope   round trip off by   tails off by")
for size in (1.0, 3.0, 10.0):
    many = size * torch.randn(500 if SMOKE else 2000, 1, family.params, dtype=torch.float64)
    y, log_slope = family.forward(points, many)
    back, _ = family.inverse(y, many)
    tails = (y - points)[:, points.abs() >= B].abs().max()
    print(
        f"{size:>13} {log_slope.min().exp():13.1e} {log_slope.max().exp():15.1e}"
        f" {(back - points).abs().max():19.1e} {tails:14.1e}"
    )

# %% [markdown]
# ## What the bending buys
#
# Couplings set each moved feature by a scalar map. With $e^s z + t$ that map is a straight line:
# given the kept features, the moved one is Gaussian. With a spline it may have several humps and
# sharp edges. A chessboard has both. Its exact density is 1/32 on the dark squares, so the best
# score is $-\log 32 = -3.466$ nats. Four layers each, the same networks, the same training.

# %%
board = pf.datasets.checkerboard(1000 if SMOKE else 10_000)
settings = {"layers": 4, "hidden": (64, 64)}
boards = {"affine": pf.realnvp(2, **settings), "spline": pf.nsf(2, **settings)}
for name, flow in boards.items():
    pf.fit(flow, board.train, val=board.val, max_epochs=1 if SMOKE else 12, progress=False)
    with torch.no_grad():
        score = flow.log_prob(board.test)
    short = -math.log(32) - score.mean()
    print(f"{name}: {score.mean():.3f} nats a row, short by {short:.3f}")

side = torch.linspace(-5, 5, 200)
grid = torch.cartesian_prod(side, side)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
axes[0].scatter(*board.train[:4000].T, s=1)
axes[0].set(title="data", xlim=(-5, 5), ylim=(-5, 5))
for ax, (name, flow) in zip(axes[1:], boards.items(), strict=True):
    with torch.no_grad():
        density = flow.log_prob(grid).exp().reshape(200, 200).T
    mesh = ax.pcolormesh(side, side, density, vmin=0, vmax=0.05, shading="auto")
    ax.set(title=f"four {name} couplings")
for ax in axes:
    ax.set(xlabel="first feature", ylabel="second feature", aspect="equal")
fig.colorbar(mesh, ax=axes, label="density (truth: 0 or 0.031)")
plt.show()

# %% [markdown]
# ## A table with borders
#
# Now data that end somewhere. Each row is a shop, with three columns:
#
# - the *rate* of visitors who buy, in $(0, 1)$, mostly near 0;
# - the *amount* they spend, in euros, positive and skewed; it depends on the rate;
# - the *growth* on last year, a share of any sign; it depends on the amount.
#
# We make the rows up, so that the exact density is known. `support=` says where a column lives. One
# constraint holds for all columns; a `cat` joins several, with how many columns each takes.

# %%
support = constraints.cat(
    [constraints.unit_interval, constraints.positive, constraints.real], dim=-1, lengths=[1, 1, 1]
)
rate_of = dist.Beta(0.8, 5.0)


def amount_given(rate: torch.Tensor) -> dist.Distribution:
    return dist.LogNormal(3.0 + 2.0 * rate, 0.8)


def growth_given(amount: torch.Tensor) -> dist.Distribution:
    return dist.Normal(0.1 * (amount.log() - 3.0), 0.1)


def shops(n: int) -> torch.Tensor:
    rate = rate_of.sample((n,))
    amount = amount_given(rate).sample()
    return torch.stack([rate, amount, growth_given(amount).sample()], dim=1)


def exact(x: torch.Tensor) -> torch.Tensor:
    """The true log-density of rows in nats, per unit rate, euro and unit growth."""
    rate, amount, growth = x.T
    parts = rate_of.log_prob(rate), amount_given(rate).log_prob(amount)
    return parts[0] + parts[1] + growth_given(amount).log_prob(growth)


rows, test = shops(1000 if SMOKE else 8000), shops(10_000)
bounded = pf.nsf(3, support=support, **settings)
free = pf.nsf(3, **settings)
print("first rows (rate, euros, growth):")
for row in rows[:3]:
    print("  " + ", ".join(f"{value:.3f}" for value in row))
print("the flow ends in", bounded.transform[-1])

# %% [markdown]
# ## With the borders, and without
#
# We fit both flows to the same rows: one that knows the borders, one that takes every column for a
# real number. Both get the same layers and the same training. The one without borders cannot help
# but put some of its mass where no shop can be, and what lies there is missing elsewhere.

# %%
truth = exact(test)
print(f"the truth        {truth.mean():8.3f} nats a row")
draws = {}
for name, flow in (("with borders", bounded), ("without", free)):
    pf.fit(flow, rows, max_epochs=1 if SMOKE else 15, progress=False)
    with torch.no_grad():
        gap = truth - flow.log_prob(test)
        x = draws[name] = flow.sample(50_000)
    off_rate = ((x[:, 0] <= 0) | (x[:, 0] >= 1)).double().mean()
    off_amount = (x[:, 1] <= 0).double().mean()
    print(
        f"{name:<14} short by {gap.mean():.3f} +- {gap.std() / len(gap) ** 0.5:.3f}; draws with a"
        f" rate outside (0, 1): {off_rate:.2%}, an amount <= 0: {off_amount:.2%}"
    )

# %% [markdown]
# The histograms of the draws, beside the exact density. Red bars are draws that no shop can have:
# negative rates, negative euros. The flow with borders has none, by construction and not by
# training. The other one does not do badly: a spline can imitate an edge, by bending hard. But it
# is never done with it, and one negative amount is enough to break what comes next, such as a
# logarithm.

# %%
fig, axes = plt.subplots(2, 2, figsize=(11, 5.6), layout="constrained", sharex="col")
many = shops(400_000)
for line, (name, x) in zip(axes, draws.items(), strict=True):
    for ax, column, label, (low, high) in (
        (line[0], 0, "rate", (-0.15, 0.8)),
        (line[1], 1, "amount, euros", (-25.0, 150.0)),
    ):
        bins = torch.linspace(low, high, 96)
        width = bins[1] - bins[0]
        share = torch.histogram(x[:, column].contiguous(), bins)[0] / len(x) / width
        middle = (bins[1:] + bins[:-1]) / 2
        color = ["tab:red" if m < 0 else "tab:blue" for m in middle.tolist()]
        ax.bar(middle, share, width, color=color, alpha=0.6)
        real = torch.histogram(many[:, column].contiguous(), bins)[0] / len(many) / width
        ax.stairs(real, bins, color="black", lw=1, label="the truth")
        ax.axvline(0, color="grey", lw=0.8)
        ax.set(title=f"{name}: {label}", ylabel="density", xlim=(low, high))
        ax.legend(fontsize=8)
for ax, label in zip(axes[1], ("rate", "amount, euros"), strict=True):
    ax.set_xlabel(label)
plt.show()

# %% [markdown]
# ## Densities in the data's own units
#
# `log_prob` is a density of the data as they came: per unit rate, per euro, per unit growth. Two
# checks. First, by hand: take the flow without its last part, score the unbounded point $u$, and
# add the logarithms of the slopes $1 / (r (1 - r))$, of the logit of the rate $r$, and $1 / a$, of
# the logarithm of the amount $a$. Second, in cents instead of euros each row's density must fall by
# a factor of 100, that is by $\log 100 = 4.605$ nats. Nothing is better or worse for it. So compare
# scores only in the same units.

# %%
inner = pf.Flow(pf.Chain(bounded.transform.parts[:-1]), shape=3)
rate, amount, growth = test.T
with torch.no_grad():
    u = torch.stack([rate.logit(), amount.log(), growth], dim=1)
    by_hand = inner.log_prob(u) - (rate * (1 - rate)).log() - amount.log()
    score = bounded.log_prob(test)
    cents = copy.deepcopy(bounded)
    cents.transform[-2].loc[1] += math.log(100)  # a shift of the logarithm is a change of unit
    in_cents = cents.log_prob(test * torch.tensor([1.0, 100.0, 1.0]))
print(f"by hand against log_prob: off by at most {(by_hand - score).abs().max():.1e} nats")
print(f"in euros {score.mean():.3f} nats a row, in cents {in_cents.mean():.3f}, ", end="")
print(f"difference {(score - in_cents).mean():.3f}")

# %% [markdown]
# ## At the border itself
#
# What lies outside is no data: `log_prob` and `fit` refuse it, and say which support they expected.
# A point *on* the border is harder. The logit of 0 is $-\infty$. The closed interval of torch
# lets 0 and 1 pass, and what `log_prob` then gives is a matter of rounding: a number that means
# nothing. A training would chase it, so `fit` refuses rows on a border too, before it trains
# anything. Where might such rows come from? Say that our table has its rates with three decimals
# only: each rate below 0.0005 has become an exact 0.

# %%
for bad in ([1.2, 30.0, 0.1], [0.2, -5.0, 0.1]):
    try:
        bounded.log_prob(torch.tensor(bad))
    except ValueError as error:
        told = str(error).split(" of the distribution")[0]
        print(f"log_prob refuses {bad}:\n{textwrap.fill(told, 95)}")
with torch.no_grad():
    for value in (0.1, 1e-2, 1e-4, 1e-6, 0.0):
        point = torch.tensor([value, 20.0, 0.0])
        here = bounded.log_prob(point)
        there = f"truth {exact(point[None])[0]:5.2f} nats" if value else "no meaning"
        print(f"rate {value:<6g}: log-density {here:9.2f}, {there}")

rounded = rows.clone()
rounded[:, 0] = (rows[:, 0] * 1000).round() / 1000
try:
    pf.fit(bounded, rounded, progress=False)
except ValueError as error:
    print(f"fit refuses the rounded rows:\n{textwrap.fill(str(error), 95)}")

# %% [markdown]
# What to do depends on what an exact 0 means.
#
# - *It was rounded*, as here: give back what the rounding took, by noise as wide as a rounding
#   step. That is better than `clamp()`, which moves all zeros to one and the same small number. A
#   density takes many equal numbers for a spike, and fits it.
# - *It is a case of its own* (nobody bought): it has a probability and not a density. Leave these
#   rows out, and model their share and their other columns apart.
# - *The limit is not one of nature* (a sensor's range): build the flow with a wider `support=`.
#
# Here are both ways to move them inside, scored on the same exact rows as before.

# %%
noisy, clamped = rounded.clone(), rounded.clone()
noisy[:, 0] = (rounded[:, 0] + 0.001 * (torch.rand(len(rows)) - 0.5)).abs()  # 0: 0 to 0.0005
clamped[:, 0] = rounded[:, 0].clamp(min=1e-6)
for name, inside in (("noise", noisy), ("clamp()", clamped)):
    flow = pf.nsf(3, support=support, **settings)
    pf.fit(flow, inside, max_epochs=1 if SMOKE else 15, progress=False)
    with torch.no_grad():
        gap = truth - flow.log_prob(test)
    print(f"{name:<8} short by {gap.mean():.3f} +- {gap.std() / len(gap) ** 0.5:.3f} nats a row")

# %% [markdown]
# ## Close to the border
#
# Uniform data show it best. Their exact density is 1 right up to the edge.
# The logit of a uniform number is logistic. A Gaussian base has thinner tails than that, so the fit
# must come down at the very edge. A logistic base has the tails that are needed. (Its scale makes
# its standard deviation one, since the flow standardises the logits, and the spline's tails keep
# what they get.)

# %%
uniform = torch.rand(2000 if SMOKE else 20_000, 1)
unit = constraints.unit_interval
logistic = dist.Logistic(torch.zeros(1), torch.full((1,), 3**0.5 / math.pi)).to_event(1)
flat = {
    "no support": pf.nsf(1, scheme="autoregressive", layers=1, hidden=(16,)),
    "Gaussian base": pf.nsf(1, scheme="autoregressive", layers=1, hidden=(16,), support=unit),
    "logistic base": pf.nsf(
        1, scheme="autoregressive", layers=1, hidden=(16,), support=unit, base=logistic
    ),
}
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
wide, near = torch.linspace(-0.2, 1.2, 1401), torch.logspace(-5, -0.5, 200)
for (name, flow), color in zip(flat.items(), ("tab:red", "tab:blue", "tab:green"), strict=True):
    pf.fit(flow, uniform, max_epochs=2 if SMOKE else 15, progress=False)
    inside = (wide > 0) & (wide < 1)
    shown = wide if flow.support is constraints.real_vector else wide[inside]
    with torch.no_grad():
        axes[0].plot(shown, flow.log_prob(shown[:, None]).exp(), label=name, color=color)
        axes[1].semilogx(near, flow.log_prob(near[:, None]).exp(), label=name, color=color)
for ax in axes:
    ax.axhline(1, color="black", ls=":", lw=1, label="the truth, inside")
    ax.legend(fontsize=8)
axes[0].set(title="uniform data", xlabel="x", ylabel="density", ylim=(0, 1.5))
axes[1].set(title="the left edge, enlarged", xlabel="x", ylabel="density", ylim=(0, 1.5))
plt.show()

# %% [markdown]
# ## Other supports
#
# `support=` takes what `biject_to` of torch and Pyro knows. Limits of your own, one-sided ones, and
# shares that sum to one, for which the flow has one dimension less inside.

# %%
kinds = {
    "positive": constraints.positive,
    "interval(32, 42)": constraints.interval(32.0, 42.0),
    "greater_than(5)": constraints.greater_than(5.0),
    "less_than(0)": constraints.less_than(0.0),
    "simplex": constraints.simplex,
}
for name, kind in kinds.items():
    flow = pf.maf(3, layers=2, hidden=(16,), support=kind)
    x = flow.sample(10_000)
    print(f"{name:<17} draws from {x.min():9.3f} to {x.max():9.3f}", end="")
    sums = f", sums {x.sum(1).min():.6f} to {x.sum(1).max():.6f}" if name == "simplex" else ""
    print(f"; inside: {flow.transform.inverse_shape(x.shape)[-1]} dimensions{sums}")

# %% [markdown]
# ## What to read next
#
# - [The change of variables](01_change_of_variables.ipynb), if the log-slopes came too fast.
# - [Autoregressive flows](03_autoregressive_flows.ipynb): `pf.nsf(scheme="autoregressive")` is the
#   same spline, set by all features before.
# - [A guide for a real posterior](06_iaf_guide.ipynb): `pf.AutoFlow` reads each site's support from
#   the model by itself.
# - The paper: Durkan et al. 2019, arXiv:1906.04032.
