# %% [markdown]
# # Write your own flow
#
# What do I have to write so that a map of my own is a flow like the library's: trained, saved, a
# guide, and known to be right?
#
# The answer is one file with two methods and a function. `CONTRIBUTING.md` has the short form; here
# we go through it, and then make mistakes on purpose.

# %%
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
from IPython import get_ipython

import pyroflows as pf

logging.getLogger("pyro").setLevel(logging.WARNING)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs
pyro.set_rng_seed(0)

# %% [markdown]
# ## The map
#
# We take the *sinh-arcsinh* map (Jones & Pewsey 2009, Biometrika 96), feature by feature:
#
# $$y = \sinh u, \qquad u = (\operatorname{arcsinh} x + \epsilon)\,\delta .$$
#
# $\epsilon$ makes a Gaussian skew, $\delta$ its tails heavy ($\delta > 1$ here) or light. It is
# easy to invert, $x = \sinh(\operatorname{arcsinh}(y) / \delta - \epsilon)$, which is the same
# formula with other numbers. And its log-derivative is
#
# $$\log \frac{dy}{dx} = \log\cosh u + \log\delta - \tfrac12 \log(1 + x^2) .$$
#
# The contract: `forward_and_log_det` goes from base to data, `inverse_and_log_det` back, and each
# returns the log-determinant *of the map it applies*, summed over the features. No state, no
# attention to the rest of the batch. The function below, marked as a `builder`, says how layers
# become a flow: a linear map after each gives location, scale and correlation, and `close` adds the
# standardisation of the data, the base and the support.

# %%
"""Sinh-arcsinh flow: a learned skewness and tail weight for each feature, mixed linearly."""

import torch
from torch import Tensor, nn

from pyroflows import Flow
from pyroflows.flows import Example, builder, close
from pyroflows.transforms import FlowTransform, LULinear


class SinhArcsinh(FlowTransform):
    """y = sinh((arcsinh(x) + skew) * tail), feature by feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.skew = nn.Parameter(torch.zeros(features))
        self.log_tail = nn.Parameter(torch.zeros(features))

    def _map(self, x: Tensor, skew: Tensor, tail: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        u = (x.asinh() + skew) * tail + shift
        # log cosh(u) and log(1 + x^2) / 2, in forms that do not overflow.
        log_cosh = u.abs() + torch.log1p((-2 * u.abs()).exp()) - torch.log(u.new_tensor(2.0))
        log_derivative = log_cosh + tail.log() - torch.hypot(x, torch.ones_like(x)).log()
        return u.sinh(), log_derivative.sum(dim=-1)

    def forward_and_log_det(self, x, context=None):
        return self._map(x, self.skew, self.log_tail.exp(), torch.zeros_like(self.skew))

    def inverse_and_log_det(self, y, context=None):
        return self._map(y, torch.zeros_like(self.skew), (-self.log_tail).exp(), -self.skew)


@builder
def sinh_arcsinh(features: int, context: int = 0, *, layers=1, base=None, support=None) -> Flow:
    """A sinh-arcsinh flow: both directions cost O(features^2)."""
    parts = [make(features) for _ in range(layers) for make in (SinhArcsinh, LULinear)]
    return close(parts, features, context, base, support)


EXAMPLES = {"sinh_arcsinh": Example(lambda: sinh_arcsinh(2), fast="both")}

# %% [markdown]
# ## What it does to a Gaussian
#
# Before any test, look: one feature, base $N(0, 1)$, and the density
# $p(y) = p_z(f^{-1}(y))\,|dx/dy|$ beside a histogram of draws. They agree, so log-determinant and
# map agree.

# %%
at = torch.linspace(-8, 8, 801)
fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained", sharey=True)
axes[0].set_ylabel("density")
for ax, (skew, tail) in zip(axes, [(0.0, 1.0), (0.6, 1.0), (0.0, 1.8)], strict=True):
    layer = SinhArcsinh(1)
    layer.skew.data.fill_(skew)
    layer.log_tail.data.fill_(tail).log_()
    alone = pf.Flow(layer, shape=1)
    with torch.no_grad():
        ax.hist(alone.sample((20_000,))[:, 0], 80, range=(-8, 8), density=True, alpha=0.4)
        ax.plot(at, alone.log_prob(at[:, None]).exp(), color="k", lw=1)
    ax.set(title=rf"$\epsilon$ = {skew}, $\delta$ = {tail}", xlabel="y")

# %% [markdown]
# ## Hold it to the laws
#
# A picture convinces in one dimension. `pf.testing` holds a flow to every law the library's own
# flows keep: the inverse inverts, the log-determinant is that of the Jacobian that autograd finds,
# gradients agree with differences, a batch equals its rows, the density integrates to one, and
# more; in float64 and float32, with random weights, at batch shapes `()`, `(7,)`, `(3, 4)` and
# `(0,)`. `pf.testing.check_flow(make)` raises at the first law that is broken. The command line
# goes on and lists all of them, so we save the cell above as the one file that it is.

# %%
folder = Path(tempfile.mkdtemp())
cell = get_ipython().user_ns["In"][2]  # the source of the second code cell
(folder / "my_flow.py").write_text(cell)
command = [sys.executable, "-m", "pyroflows", "check", "my_flow:sinh_arcsinh"]
said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
print(said.stdout, said.stderr)

# %% [markdown]
# ## Mistakes on purpose
#
# A law that always holds teaches nothing. Four mistakes that people make:
#
# - **wrong sign**: each method returns minus its log-determinant. The two still cancel;
# - **wrong inverse**: it forgets the skew;
# - **batch statistics**: it subtracts the mean of the batch, as batch normalisation does;
# - **idle parameter**: one that is declared, and used nowhere.

# %%


class WrongSign(SinhArcsinh):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x)
        return y, -log_det

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y)
        return x, -log_det


class WrongInverse(SinhArcsinh):
    def inverse_and_log_det(self, y, context=None):
        none = torch.zeros_like(self.skew)
        return self._map(y, none, (-self.log_tail).exp(), none)


class BatchStatistics(SinhArcsinh):
    def inverse_and_log_det(self, y, context=None):
        centre = y.mean(0) if y.dim() > 1 and len(y) else 0
        return super().inverse_and_log_det(y - centre)


class IdleParameter(SinhArcsinh):
    def __init__(self, features):
        super().__init__(features)
        self.idle = nn.Parameter(torch.zeros(features))


kinds = (SinhArcsinh, WrongSign, WrongInverse, BatchStatistics, IdleParameter)
made = {kind.__name__: lambda kind=kind: pf.Flow(kind(2), shape=2) for kind in kinds}
try:
    pf.testing.check_flow(made["WrongSign"])
except AssertionError as error:
    print(error)

# %% [markdown]
# The message names the law, the precision, the direction, and by how much. Now all laws on all
# five. A mistake usually breaks more than one, and each law catches something that others let pass.

# %%
laws = [name for name in pf.testing.LAWS if name not in pf.testing.SLOW_LAWS]
laws = ["round_trip", "log_det", "every_parameter_trains"] if SMOKE else laws


def holds(make, law) -> bool:
    try:
        pf.testing.check_flow(make, laws=[law])
    except Exception:  # a broken law, or a mistake that does not even run
        return False
    return True


table = torch.tensor([[holds(make, law) for make in made.values()] for law in laws])
fig, ax = plt.subplots(figsize=(7.5, 0.28 * len(laws) + 1), layout="constrained")
ax.set_title("Which laws hold (green), which are broken (red)")
ax.pcolormesh(table.flip(0), cmap="RdYlGn", vmin=-0.4, vmax=1.4, edgecolors="w", lw=1)
ax.set_xticks(torch.arange(len(made)) + 0.5, made, fontsize=8)
ax.set_yticks(torch.arange(len(laws)) + 0.5, laws[::-1], fontsize=8)
ax.set_xlabel("the first is right")

# %% [markdown]
# What the wrong sign means can be seen. Its round trip is perfect and training would go on happily,
# but what it calls a density is none: its integral is not 1, and draws do not look like it.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for ax, kind in zip(axes, [SinhArcsinh, WrongSign], strict=True):
    layer = kind(1)
    layer.skew.data.fill_(0.6)
    layer.log_tail.data.fill_(0.4)
    alone = pf.Flow(layer, shape=1)
    wide = torch.linspace(-200, 200, 400_001)
    with torch.no_grad():
        density = alone.log_prob(wide[:, None]).exp()
        drawn = alone.sample((20_000,))[:, 0]
    ax.hist(drawn, 100, range=(-5, 15), density=True, alpha=0.4, label="draws")
    area = torch.trapezoid(density, wide)
    ax.plot(wide, density, "k", lw=1, label=f"log_prob, area {area:.3f}")
    ax.set(title=kind.__name__, xlim=(-5, 15), xlabel="y", ylabel="density")
    ax.margins(y=0.2)
    ax.legend(loc="upper right")

# %% [markdown]
# ## Train it
#
# Data of which we know the density: two features with known $\epsilon$ and $\delta$, mixed by a
# matrix. Since the flow contains the truth, the fit should find it: the held-out score should come
# within about a hundredth of a nat of the truth's own, and the parameters should come near.

# %%
skew, tail = torch.tensor([0.5, 0.0]), torch.tensor([1.0, 1.4])
mix = torch.tensor([[1.0, 0.0], [0.8, 1.0]])
truth = SinhArcsinh(2)
truth.skew.data, truth.log_tail.data = skew.clone(), tail.log()
rows = 2000 if SMOKE else 12_000
with torch.no_grad():
    source = pf.Flow(truth, shape=2).sample((rows,))
    exact = pf.Flow(truth, shape=2).log_prob(source) - torch.linalg.slogdet(mix).logabsdet
data = source @ mix.T
train, val, test = data[: rows // 2], data[rows // 2 : 3 * rows // 4], data[3 * rows // 4 :]

flow = sinh_arcsinh(2)
history = pf.fit(flow, train, val=val, lr=1e-2, max_epochs=2 if SMOKE else 30, progress=False)
gaussian = dist.MultivariateNormal(train.mean(0), train.T.cov())
layer = flow.transform[0]
with torch.no_grad():
    print(f"held out, nats a row: truth {exact[3 * rows // 4 :].mean():.3f}", end=", ")
    print(f"flow {flow.log_prob(test).mean():.3f}, Gaussian {gaussian.log_prob(test).mean():.3f}")
    for name, found, true in [("skew", layer.skew, skew), ("tail", layer.log_tail.exp(), tail)]:
        print(f"{name}: {found.numpy().round(2)}, true {true.numpy()}")

# %% [markdown]
# Contours of the flow's log-density follow the skew and the spread-out tails; those of a Gaussian
# with the same mean and covariance cannot.

# %%
across, up = torch.linspace(-4, 6, 120), torch.linspace(-7, 9, 120)
grid = torch.cartesian_prod(across, up)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
history.plot(axes[0])
axes[0].set_title("training")
axes[1].set_ylabel("$x_2$")
for ax, (name, density) in zip(axes[1:], {"flow": flow, "Gaussian": gaussian}.items(), strict=True):
    with torch.no_grad():
        height = density.log_prob(grid).reshape(120, 120).T
    ax.scatter(*test[:1500].T, s=2, color="0.6")
    ax.contour(across, up, height, levels=[-8, -6, -4, -2.5], colors="C1", linestyles="solid")
    ax.set(title=f"held-out rows, {name}", xlim=(-4, 6), ylim=(-7, 9), xlabel="$x_1$")

# %% [markdown]
# ## A guide
#
# The same builder makes a guide. Waiting times $y_i \sim \mathrm{Exp}(\lambda)$ with
# $\lambda \sim \Gamma(2, 1)$ have the posterior $\Gamma(2 + n, 1 + \sum y)$; its logarithm, on
# which a guide works, is skew. That is what our map is for. In the report read the ESS and $\hat k$
# together: the first says how many of the 10,000 draws count, the second looks at the shape of the
# outermost weights, which matters little where all are nearly equal.

# %%


def waiting(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


y = torch.tensor([0.9, 2.1, 0.3])  # hours
guide = pf.AutoFlow(waiting, sinh_arcsinh)
pf.fit_guide(waiting, guide, y, max_steps=20 if SMOKE else 500, progress=False)
report = pf.report(waiting, guide, y)
posterior = dist.Gamma(2.0 + len(y), 1 + y.sum())
print(f"{report}\nmean {report.draws['rate'].mean():.3f}, exact {posterior.mean:.3f} an hour")
at = torch.linspace(0.01, 4, 300)
fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
ax.hist(report.draws["rate"], 80, range=(0, 4), density=True, alpha=0.4, label="guide")
ax.plot(at, posterior.log_prob(at).exp(), "k", lw=1, label="exact")
ax.set(xlabel=r"$\lambda$, an hour", ylabel="density", title="Posterior of the rate")
ax.legend()

# %% [markdown]
# ## Keep it
#
# A folder has the builder's name and arguments, and tensors, but no code. So `pf.load` must be
# given the function (or be told to import it, `trust=True`). What is loaded scores bit for bit the
# same.

# %%
pf.save(flow, folder / "run")
again = pf.load(folder / "run", builder=sinh_arcsinh)
with torch.no_grad():
    print(torch.equal(again.log_prob(test), flow.eval().log_prob(test)), again.config)
try:
    pf.load(folder / "run")
except ValueError as error:
    print(error)

# %% [markdown]
# To make it part of the library, drop the file into `pyroflows/flows/`: the contract's tests find
# it by its `EXAMPLES`, and `CONTRIBUTING.md` says what else to touch.
#
# ## What to read next
#
# - [What a flow computes](01_change_of_variables.ipynb): where the log-determinant comes from.
# - [Which layers for which data](02_coupling_layers.ipynb): maps whose parameters come from a
#   network.
# - [A flow as a guide](06_iaf_guide.ipynb), and when to distrust it.
# - `CONTRIBUTING.md`, and the docstring of `pf.FlowTransform`.
