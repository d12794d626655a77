# %% [markdown]
# # The change of variables
#
# **Why is there a log-determinant in the density of a flow?**
#
# A flow draws a simple point $z$ and moves it to $x = f(z)$. The density of $x$ is
#
# $$\log p_x(x) = \log p_z(z) + \log\left|\det \frac{dz}{dx}\right|, \qquad z = f^{-1}(x).$$
#
# The first term looks up how probable the simple point was. This tutorial is about the second:
# first on a line, where it is a change of width, then in the plane, where it is a change of area,
# and last in training, where a flow without it falls in on itself.

# %%
import math
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
# ## A line, stretched
#
# Let $z$ be uniform on $(0, 1)$, with density 1, and let $x = 2z + 1$. Then $x$ is uniform on
# $(1, 3)$. The points spread over twice the width. All the probability is still there, and it is 1,
# so the height must be one half:
# $p_x(x) = p_z(z)\,\left|\frac{dz}{dx}\right| = 1 \cdot \frac12$.
#
# A transform of our own takes two methods. Each returns where the points go, and the
# log-determinant *of the map it applies*. `pf.testing.check_transform` holds it against autograd.


# %%
class Line(pf.FlowTransform):
    """x = slope * z + shift."""

    def __init__(self, slope: float, shift: float) -> None:
        super().__init__()
        self.slope, self.shift = slope, shift

    def forward_and_log_det(self, z, context=None):
        return self.slope * z + self.shift, z.new_full(z.shape[:-1], math.log(abs(self.slope)))

    def inverse_and_log_det(self, x, context=None):
        return (x - self.shift) / self.slope, x.new_full(x.shape[:-1], -math.log(abs(self.slope)))


pf.testing.check_transform(Line(2.0, 1.0), features=1)

uniform = dist.Uniform(torch.zeros(1), torch.ones(1), validate_args=False).to_event(1)
flow = pf.Flow(Line(2.0, 1.0), uniform, shape=1)
x = torch.linspace(-0.5, 3.5, 8001)
height = flow().log_prob(x[:, None]).exp()
print(f"density at x = 2: {flow.log_prob(torch.tensor([2.0])).exp():.3f} per unit of x")
print(f"area under it:    {torch.trapezoid(height, x):.3f}")

# %% [markdown]
# The same in a picture: both boxes have area 1. Bars are draws, lines are densities.

# %%
z = uniform.sample((10_000,))
draws = flow.transform(z)
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.hist(z[:, 0], bins=20, density=True, alpha=0.4, color="tab:blue")
ax.hist(draws[:, 0], bins=40, density=True, alpha=0.4, color="tab:orange")
ax.plot(x, uniform.log_prob(x[:, None]).exp(), color="tab:blue", label="$p_z$: width 1, height 1")
ax.plot(x, height, color="tab:orange", label="$p_x$: width 2, height 1/2")
ax.set(xlabel="z (blue), x = 2z + 1 (orange)", ylabel="density", ylim=(0, 1.4))
ax.set_title("Twice as wide, half as high")
ax.legend(loc="upper right")
plt.show()

# %% [markdown]
# ## Why the bars around the derivative
#
# With $x = 1 - 2z$ the line is turned round as well as stretched. Its slope is $-2$, and a density
# of $1 \cdot (-\frac12)$ makes no sense. A width has no direction: it is
# $\left|\frac{dz}{dx}\right|$ that counts. Here the points land on $(-1, 1)$, again at height 1/2.

# %%
turned = pf.Flow(Line(-2.0, 1.0), uniform, shape=1)
x = torch.linspace(-2, 2, 8001)
height = turned().log_prob(x[:, None]).exp()
slope = -1 / 2
print(f"p(z) dz/dx:   {slope:+.3f} on (-1, 1), area {2 * slope:+.3f}: no density")
print(f"p(z) |dz/dx|: {height.max():+.3f} on (-1, 1), area {torch.trapezoid(height, x):+.3f}")

# %% [markdown]
# ## A curved density, by small pieces
#
# What if neither the density nor the map is straight? Cut $z$ into small pieces. On each the
# density is nearly uniform and the map is nearly a line, so each piece is the example above: it
# keeps its area and changes its width from $\Delta z$ to $\Delta x$. Its height becomes
# $p_z(z)\,\Delta z / \Delta x$. As the pieces shrink, $\Delta z / \Delta x$ becomes $dz/dx$.
#
# Take $z$ standard normal and $x = e^z$. The exact answer is known, the log-normal density. The
# heights should come to it as the pieces shrink.

# %%
normal, exact = dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0)


def pieces(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Edges of equal pieces in z, the same edges in x, and the height of each piece in x."""
    edges = torch.linspace(-3, 1.5, count + 1, dtype=torch.float64)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    return edges, edges.exp(), normal.log_prob(middle).exp() * width / edges.exp().diff()


fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
fine = torch.linspace(0.01, 4.5, 400)
edges, _, _ = pieces(12)
middle = (edges[1:] + edges[:-1]) / 2
axes[0].stairs(normal.log_prob(middle).exp(), edges, fill=True, alpha=0.4, color="tab:blue")
grid = torch.linspace(-3, 1.5, 200)
axes[0].plot(grid, normal.log_prob(grid).exp(), color="tab:blue", label="normal")
axes[0].set(title="12 pieces of equal width in z", xlabel="z", ylabel="density")
for ax, count in zip(axes[1:], (12, 48), strict=True):
    _, moved, height = pieces(count)
    ax.stairs(height, moved, fill=True, alpha=0.4, color="tab:orange")
    ax.plot(fine, exact.log_prob(fine).exp(), color="tab:red", label="log-normal, exact")
    ax.set(title=f"{count} pieces, moved by x = exp(z)", xlabel="x", ylabel="density")
for ax in axes:
    ax.legend()
plt.show()

for count in (12, 48, 192, 768):
    _, moved, height = pieces(count)
    at = (moved[1:] * moved[:-1]).sqrt()  # the middles of the pieces in z, moved
    error = (height - exact.log_prob(at).exp()).abs().max()
    print(f"{count:>4} pieces: largest error of a height {error:.1e}")

# %% [markdown]
# ## In the plane: a square becomes a rhombus
#
# In two dimensions a small square goes to a parallelogram, and what changes is its area. The map
# $x = A z$ with $A = \begin{pmatrix} 2 & 1 \\ 1 & 2 \end{pmatrix}$ sends the unit square to a
# rhombus with sides $(2, 1)$ and $(1, 2)$: the columns of $A$. Its area is
# $|\det A| = 2 \cdot 2 - 1 \cdot 1 = 3$. Points that were uniform with density 1 are uniform with
# density 1/3. To check, count: what share of points thrown at the box $(0, 3)^2$, of area 9, lies
# in the rhombus?

# %%
A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
z = torch.rand(1500, 2)
x = z @ A.T
box = 3 * torch.rand(1_000_000, 2)
back = torch.linalg.solve(A, box.T).T
share = ((back > 0) & (back < 1)).all(dim=1).double().mean()
print(f"area by counting {9 * share:.2f}, by the determinant {torch.linalg.det(A):.2f}")

corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
fig, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharex=True, sharey=True)
for ax, points, shape, color, title in (
    (axes[0], z, corners, "tab:blue", "z: area 1, density 1"),
    (axes[1], x, corners @ A.T, "tab:orange", "x = A z: area 3, density 1/3"),
):
    ax.scatter(*points.T, s=2, color=color)
    ax.plot(*shape.T, color="black", lw=1)
    ax.set(title=title, aspect="equal", xlabel="first feature", ylabel="second feature")
plt.show()

# %% [markdown]
# ## A curved map is straight when you look closely
#
# A flow bends the plane, so there is no one matrix $A$. Near a point it is the *Jacobian*: the
# matrix of derivatives $J = dx/dz$. A square of side $h$ around the point goes to a patch of area
# about $|\det J|\,h^2$, and the smaller the square the better this holds.
#
# Let us take a real flow (fitted to two half moons), and one point. We follow the outline of the
# square through the flow, measure the area inside by the shoelace formula, and compare.

# %%
moons = pf.datasets.moons(1000 if SMOKE else 10_000, dtype=torch.float64)
bend = pf.nsf(2, layers=3, hidden=(64, 64)).double()
pf.fit(bend, moons.train, val=moons.val, max_epochs=1 if SMOKE else 12, progress=False)
bend.requires_grad_(False)

point = torch.tensor([-0.6, 0.5], dtype=torch.float64)
outline = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1, None]
sides = [[[-1, -1], [1, -1]], [[1, -1], [1, 1]], [[1, 1], [-1, 1]], [[-1, 1], [-1, -1]]]
square = torch.cat([a + outline * (b - a) for a, b in torch.tensor(sides, dtype=torch.float64)]) / 2


def area(loop: torch.Tensor) -> torch.Tensor:
    """The shoelace formula."""
    (x, y), (x_next, y_next) = loop.T, loop.roll(-1, dims=0).T
    return (x * y_next - x_next * y).sum().abs() / 2


log_det = bend.transform.forward_and_log_det(point)[1]
jacobian = torch.autograd.functional.jacobian(bend.transform, point)
print(f"|det J|, from the flow's log-determinant: {log_det.exp():.5f}")
print(f"|det J|, by autograd:                     {torch.linalg.det(jacobian).abs():.5f}")
for h in (1.0, 0.3, 0.1, 0.03, 0.01):
    ratio = area(bend.transform(point + h * square)) / h**2
    print(f"square of side {h:<4}: area after / area before {ratio:.5f}")

# %% [markdown]
# Here is what the flow does to a whole sheet of squares. Every cell on the left has the same area.
# The colour is the log-determinant: red cells grow, blue ones shrink. The red ones bridge the gap
# between the two moons, where there are no data: spread so thin, the density there is low.

# %%
fine = torch.linspace(-2.5, 2.5, 201, dtype=torch.float64)
sheet = torch.cartesian_prod(fine, fine)
moved, log_det = bend.transform.forward_and_log_det(sheet)
fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
for ax, points, title in ((axes[0], sheet, "z: equal squares"), (axes[1], moved, "x = f(z)")):
    xs, ys = points.T.reshape(2, 201, 201)
    mesh = ax.pcolormesh(
        xs, ys, log_det.reshape(201, 201), cmap="coolwarm", vmin=-4, vmax=4, shading="gouraud"
    )
    for k in range(0, 201, 10):
        ax.plot(xs[k], ys[k], color="black", lw=0.3)
        ax.plot(xs[:, k], ys[:, k], color="black", lw=0.3)
    ax.set(title=title, xlabel="first feature", ylabel="second feature")
axes[1].set(xlim=(-1.6, 2.6), ylim=(-1.1, 1.6))
fig.colorbar(mesh, ax=axes, label=r"$\log|\det dx/dz|$")
plt.show()

# %% [markdown]
# ## What holds a flow open
#
# Training maximises the mean of $\log p_x(x)$ over the data. Suppose we forgot the log-determinant
# and maximised $\log p_z(f^{-1}(x))$ alone. It is highest at $z = 0$, the mode. Nothing speaks
# against sending *every* data point there, and so it happens. The log-determinant of $f^{-1}$
# puts a price on it: to shrink both features to a half costs $2 \log 2 = 1.39$ nats a row.
#
# We train two equal flows, one with the term and one without, and note both terms at each step.


# %%
def train(with_log_det: bool) -> tuple[pf.Flow, torch.Tensor]:
    """A flow trained by hand, and both terms in nats at each step."""
    torch.manual_seed(1)
    flow, terms = pf.realnvp(2, layers=4, hidden=(64, 64)), []
    rows = moons.train.float()
    pf.initialize(flow, rows)
    optimiser = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for _ in range(5 if SMOKE else 600):
        batch = rows[torch.randint(len(rows), (256,))]
        z, log_det = flow.transform.inverse_and_log_det(batch)
        log_base = flow.base().log_prob(z)
        loss = -(log_base + log_det if with_log_det else log_base).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        terms.append([log_base.mean().item(), log_det.mean().item()])
    return flow, torch.tensor(terms)


runs = {"with the log-determinant": train(True), "without it": train(False)}
test = moons.test.float()
for name, (flow, _) in runs.items():
    with torch.no_grad():
        z, log_det = flow.transform.inverse_and_log_det(test)
        x = flow.sample((2000,))
        score = flow.log_prob(test).mean()
    log_base = flow.base().log_prob(z).mean()
    print(f"{name}:")
    print(
        f"  log p(z) {log_base:8.3f}   log-det {log_det.mean():8.3f}   sum {score:8.3f} nats a row"
    )
    print(f"  spread of f^-1(data) {z.std():.4f}, of draws {x.std():.3g}, of data {test.std():.2f}")

# %% [markdown]
# Without the term (red) $\log p_z$ goes to its ceiling, $-\log 2\pi = -1.838$ nats, the height of
# the mode. The log-determinant pays for it: it falls and falls, and with it the true log-density.
# The draws of that flow are useless. $f$ must undo the squeeze, and throws them far away; the data
# are the blue speck between them. With the term (blue) $f^{-1}$(data) fills the base as it should:
# the mean of $\log p_z$ over a true normal in two dimensions is $-\log 2\pi - 1 = -2.838$ nats.

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for (name, (flow, terms)), color in zip(runs.items(), ("tab:blue", "tab:red"), strict=True):
    axes[0].plot(terms[:, 0], color=color, ls="--", lw=1, label=f"log p(z), {name}")
    axes[0].plot(terms.sum(dim=1), color=color, label=f"log p(x), {name}")
    with torch.no_grad():
        z = flow.transform.inv(test)
    axes[1].scatter(*z.T, s=4, color=color)
    with torch.no_grad():
        x = flow.sample((1000,))
    axes[2].scatter(*x.T, s=4, color=color, zorder=3 if color == "tab:blue" else 2)
axes[0].set(title="training", xlabel="step", ylabel="nats a row")
axes[0].legend(fontsize=8)
axes[1].set(title="$f^{-1}$(test rows)", aspect="equal", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
axes[2].set(title="draws", xlim=(-60, 60), ylim=(-60, 60), aspect="equal")
for ax in axes[1:]:
    ax.set(xlabel="first feature", ylabel="second feature")
plt.show()

# %% [markdown]
# ## Two ways to say the same
#
# Maximum likelihood minimises $\mathrm{KL}(p_{data}\,\|\,p_x)$: the model should look like the
# data. One can also look from the other end: pull the data back, and ask that $f^{-1}(x)$ look like
# the *base*: $\mathrm{KL}(p_{f^{-1}(data)}\,\|\,p_z)$. A KL divergence does not change when both of
# its densities are moved by the same invertible map, so the two numbers are equal, at every step of
# training. Let us see: data from two known Gaussians on a line, a spline flow, and each divergence
# integrated along its own axis.

# %%
mixture = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.4, 0.6])),
    dist.Normal(torch.tensor([-1.5, 1.0]), torch.tensor([0.4, 0.6])),
)
x_axis, z_axis = torch.linspace(-6, 6, 20_001), torch.linspace(-6, 6, 20_001)
entropy = -torch.trapezoid(mixture.log_prob(x_axis).exp() * mixture.log_prob(x_axis), x_axis)


def kl(log_p: torch.Tensor, log_q: torch.Tensor, axis: torch.Tensor) -> float:
    """KL(p || q) in nats by the trapezoid rule."""
    return torch.trapezoid(log_p.exp() * (log_p - log_q), axis).item()


@torch.no_grad()
def pulled_back(flow: pf.Flow) -> torch.Tensor:
    """The log-density of f^-1(data) along the z axis: the same formula, the other way."""
    x, log_det = flow.transform.forward_and_log_det(z_axis[:, None])
    return mixture.log_prob(x[:, 0]) + log_det


spline = pf.nsf(1, scheme="autoregressive", layers=1, hidden=(16,), bins=12, bound=4.0)
optimiser = torch.optim.Adam(spline.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 1001)
course = {0: pulled_back(spline)}
print(f"entropy of the data {entropy:.4f} nats\n")
print("step   KL(data || model)   KL(f^-1(data) || base)   mean of -log p(x)")
for step in range(1 + (100 if SMOKE else 1000)):
    if step in (0, 10, 100, 1000):
        with torch.no_grad():
            log_model = spline.log_prob(x_axis[:, None])
            here = kl(mixture.log_prob(x_axis), log_model, x_axis)
        there = kl(pulled_back(spline), normal.log_prob(z_axis), z_axis)
        loss = -torch.trapezoid(mixture.log_prob(x_axis).exp() * log_model, x_axis)
        course[step] = pulled_back(spline)
        print(f"{step:>4}   {here:17.5f}   {there:22.5f}   {loss:17.5f}")
    optimiser.zero_grad()
    (-spline.log_prob(mixture.sample((2048, 1))).mean()).backward()
    optimiser.step()
    schedule.step()

# %% [markdown]
# The last column is what training sees. It is the divergence plus the entropy of the data, which no
# model can change: so a score of zero divergence is not a score of zero nats. The picture shows
# both ends: on the left the model comes to the data, on the right the data come to the base. (The
# spike on the right is the valley between the two Gaussians, squeezed into a narrow stretch of $z$.
# There are few data in it, so neither divergence minds it much.)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
axes[0].fill_between(x_axis, mixture.log_prob(x_axis).exp(), alpha=0.3, label="data")
with torch.no_grad():
    axes[0].plot(x_axis, spline.log_prob(x_axis[:, None]).exp(), label="model, trained")
axes[0].plot(
    x_axis, normal.log_prob(x_axis).exp(), ls=":", color="grey", label="model at the start"
)
axes[0].set(title="data space", xlabel="x", ylabel="density", xlim=(-4, 4))
axes[1].fill_between(z_axis, normal.log_prob(z_axis).exp(), alpha=0.3, label="base")
last = max(course)
axes[1].plot(z_axis, course[last].exp(), color="tab:orange", label=r"$f^{-1}$(data), trained")
axes[1].plot(z_axis, course[0].exp(), ls=":", color="grey", label=r"$f^{-1}$(data) at the start")
axes[1].set(title="base space", xlabel="z", ylabel="density", xlim=(-4, 4))
for ax in axes:
    ax.set_ylim(0, 0.58)
    ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What to read next
#
# A general Jacobian of $D$ features costs $O(D^3)$ operations to take the determinant of. Flows are
# built from layers for which it is a sum of $D$ numbers:
#
# - [Coupling layers](02_coupling_layers.ipynb): half of the features decide what happens to the
#   other half.
# - [Autoregressive flows](03_autoregressive_flows.ipynb): each feature is decided by those before.
# - [Splines and bounded data](04_splines_and_bounded_data.ipynb): bent scalar maps, and data that
#   end somewhere.
# - The formula for any base and map: Rezende & Mohamed 2015, arXiv:1505.05770; a survey:
#   Papamakarios et al. 2021, arXiv:1912.02762.
