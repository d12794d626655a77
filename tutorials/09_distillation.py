# %% [markdown]
# # Distillation: a flow that scores fast teaches one that samples fast
#
# How do I get fast samples of a density that a slow sampler fits best, and what goes wrong?
#
# Both flows here push noise $z$ through the same kind of formula, feature by feature:
#
# $$\text{MAF: } x_i = \mu_i(x_{<i}) + \sigma_i(x_{<i})\, z_i, \qquad
#   \text{IAF: } x_i = \mu_i(z_{<i}) + \sigma_i(z_{<i})\, z_i.$$
#
# Given $x$, a MAF knows all $\mu_i, \sigma_i$ at once: it *scores* in one pass and draws feature by
# feature. Given $z$, an IAF does: it *draws* in one pass, and scores its own draws for free.
# Maximum likelihood wants the first, a service that answers in real time the second. *Probability
# density distillation* (van den Oord et al. 2018, arXiv:1711.10433) trains an IAF, the student,
# to have the density of a MAF, the teacher.

# %%
import math
import os
import time

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from torch import nn

import pyroflows as pf

torch.manual_seed(0)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs

# %% [markdown]
# ## What fails: the reverse KL alone
#
# The student $s$ draws, student and teacher $t$ score, and the mean difference is the loss,
#
# $$\mathrm{KL}(s \| t) = \mathbb{E}_{x \sim s}\,[\log s(x) - \log t(x)].$$
#
# Nothing slow is needed, so it looks ideal. But where $s$ draws nothing, nothing is asked: a
# student that has $k$ of 8 equal modes right and no others pays only $\log(8/k)$ nats, and no
# gradient tells it of the rest. To see it without a teacher's own errors, let the target be known:
# eight round Gaussians of standard deviation 0.2 on a circle. The student is an IAF that starts at
# random. A draw belongs to a mode if it lies within 0.7 of its centre; each should get an eighth.

# %%
angles = torch.arange(8) * math.pi / 4
centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
modes = dist.Normal(centres, 0.2).to_event(1)
target = dist.MixtureSameFamily(dist.Categorical(torch.ones(8)), modes)


def reverse(student):
    x, log_s = student().rsample_and_log_prob((256,))
    return (log_s - target.log_prob(x)).mean()


def forward(student):
    x = target.sample((256,))
    return (target.log_prob(x) - student.log_prob(x)).mean()


def learn(divergence, steps=10 if SMOKE else 400):
    """A student that starts at random, trained on one divergence alone."""
    torch.manual_seed(0)
    student = pf.iaf(2, layers=4, hidden=(48, 48))
    optimiser = torch.optim.Adam(student.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        divergence(student).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    return student.requires_grad_(False)


def shares(draws):
    """The share of the draws in each mode."""
    distance, mode = torch.cdist(draws, centres).min(dim=1)
    return torch.bincount(mode[distance < 0.7], minlength=8) / len(draws)


def judge(name, student):
    """Its draws; prints how many modes it has, and both divergences."""
    x, y = student.sample((10_000,)), target.sample((10_000,))
    kept = int((shares(x) > 0.02).sum())
    values = {
        "reverse KL": student.log_prob(x) - target.log_prob(x),
        "forward KL": target.log_prob(y) - student.log_prob(y),
    }
    told = [f"{kl} {v.mean():.2f} +- {v.std() / 100:.2f}" for kl, v in values.items()]
    print(f"trained on the {name}: {kept} of 8 modes; {', '.join(told)} nats")
    return x


found = {"target": target.sample((10_000,))}
found["reverse KL"] = judge("reverse KL", learn(reverse))
print("log(8 / k):", ", ".join(f"{math.log(8 / k):.2f} for k = {k}" for k in (1, 2, 3, 4, 8)))

# %% [markdown]
# The mark of dropped modes is a moderate reverse KL beside a huge forward one: the forward KL is an
# average over the target's draws, and at those in the dropped modes the student's density is next
# to nothing.
#
# ## What works: the forward KL
#
# $$\mathrm{KL}(t \| s) = \mathbb{E}_{x \sim t}\,[\log t(x) - \log s(x)]$$
#
# asks at the teacher's draws, in every mode. The price is that the student must score points that
# are not its own: a sequential solve, feature by feature, instead of a pass. Same random start,
# same number of steps, other loss.

# %%
found["forward KL"] = judge("forward KL", learn(forward))

fig, axes = plt.subplots(2, 3, figsize=(9, 5.4), layout="constrained", height_ratios=[2.2, 1])
for (top, low), (name, draws) in zip(axes.T, found.items(), strict=True):
    top.hist2d(*draws.T.numpy(), bins=100, range=[(-3, 3)] * 2, cmap="magma")
    title = name if name == "target" else f"student of the {name}"
    top.set(title=title, aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    low.bar(range(8), 100 * shares(draws), color="tab:orange")
    low.axhline(12.5, color="grey", ls=":")
    low.set(xlabel="mode", ylabel="% of draws", xticks=range(8))

# %% [markdown]
# It finds every mode and leaves bridges between them: a smooth map of one Gaussian cannot tear it
# in eight, and this loss minds a missing mode more than a draw too many between two. Note that the
# reverse KL can hardly tell the two students apart, while by the forward KL they are worlds apart:
# look at both, always.
#
# ## What works better: layer by layer
#
# A student of a *flow* need not start at random. First the teacher, a MAF fitted to such data. It
# too leaves bridges; what matters now is that the student copies it. The best possible score is
# known, minus the entropy $\log 8 + \log(2 \pi e\, 0.2^2)$.

# %%
blobs = pf.datasets.blobs(2000 if SMOKE else 10_000)
teacher = pf.maf(2, layers=5, hidden=(64, 64))
epochs = 2 if SMOKE else 22
history = pf.fit(
    teacher, blobs.train, val=blobs.val, max_epochs=epochs, batch_size=256, lr=4e-3, progress=False
)
teacher.requires_grad_(False)
print(f"teacher on held-out rows {teacher.log_prob(blobs.test).mean():.3f} nats")
print(f"the true density         {-math.log(8) - math.log(2 * math.pi * math.e * 0.04):.3f} nats")

# %% [markdown]
# `pf.student_of(teacher)` has the teacher's layers in the same order, turned around, and what
# stands between them is copied. So each of its layers has one of the teacher's to learn: one pass
# of the teacher gives the points before and after each, and as both are Gaussian given what came
# before, the loss of a layer is an exact KL, a sum over $i$ of
#
# $$\log \frac{\sigma^s_i}{\sigma^t_i} +
#   \frac{(\sigma^t_i)^2 + (\mu^t_i - \mu^s_i)^2}{2 (\sigma^s_i)^2} - \frac12 .$$
#
# No inversion, no mode to miss: this is what `pf.distill` takes by default (`objective="auto"`)
# where layers match; `"reverse_kl"` and `"forward_kl"` are there by name. Then `pf.compare` reports
# both divergences, the weights $t / s$ with their $\hat k$ (below its threshold they can correct
# what is left), a classifier that tries to tell the draws apart (0.5: it cannot), and samples a
# second.

# %%
student = pf.student_of(teacher)
course = pf.distill(
    teacher, student, data=blobs.train, max_steps=50 if SMOKE else 700, progress=False
)
report = pf.compare(
    teacher,
    student,
    blobs.test,
    draws=1000 if SMOKE else 10_000,
    classifier_draws=200 if SMOKE else 2000,
    history=course,
)
print(report)

# %% [markdown]
# The report draws itself: the course of both divergences, draws side by side, the weights, the
# quantiles and the speeds. With two features the student gains little time, if any.

# %%
_ = report.plot()

# %% [markdown]
# ## What is gained: time
#
# The gain grows with the number of features, so here are flows of the same architecture over more
# of them; the clock does not care whether they are trained.
# The teacher draws in two ways: by a plain loop, one full pass a feature, as is usual, and by
# pyroflows' sequential solve, which computes each hidden unit once. One core of a shared machine,
# so read the ratios, not the digits. At 64 features the student draws tens of times as many rows as
# the plain loop, and several times as many as the sequential solve.


# %%
def plain_loop(flow, z):
    """The draws that belong to noise ``z``, by one full pass a feature and layer."""
    x = z
    for part in flow.parts:
        loop = getattr(part.inv, "plain_inverse", part)  # other parts cost one pass either way
        x = loop(x)
    return x


def rate(draw, rows):
    """Rows a second, the best of some goes."""
    seconds = []
    for _ in range(1 if SMOKE else 3):
        begin = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - begin)
    return rows / min(seconds)


widths = [2, 8] if SMOKE else [2, 8, 32, 64]
rates, apart = {}, []
for features in widths:
    slow = pf.maf(features, layers=5, hidden=(128, 128)).requires_grad_(False)
    for parameter in slow.parameters():
        parameter += 0.02 * torch.randn_like(parameter)  # no longer the identity
    fast = pf.student_of(slow)
    with torch.no_grad():
        z = torch.randn(500, features)
        for name, draw in {
            "teacher, plain loop": lambda slow=slow, z=z: plain_loop(slow, z),
            "teacher, solve": lambda slow=slow, z=z: pf.latents.decode(slow, z),
            "student, one pass": lambda fast=fast, z=z: pf.latents.decode(fast, z),
        }.items():
            rates.setdefault(name, []).append(rate(draw, len(z)))
        apart.append((plain_loop(slow, z) - pf.latents.decode(slow, z)).abs().max().item())
print(f"the teacher's two ways give the same draws, to {max(apart):.0e}")
for name, by_width in rates.items():
    pairs = zip(widths, by_width, strict=True)
    print(f"{name:<20}", ", ".join(f"{each:>9,.0f}/s at {features}" for features, each in pairs))

fig, ax = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
for name, by_width in rates.items():
    ax.loglog(widths, by_width, "o-", label=name)
ax.set(xlabel="features", ylabel="rows a second", title="drawing 500 rows", xticks=widths)
ax.set_xticks([], minor=True)
ax.set_xticklabels(widths)
_ = ax.legend()

# %% [markdown]
# ## What to read next
#
# - [Autoregressive flows](03_autoregressive_flows.ipynb): why one direction is fast and the other
#   is not.
# - [Autoregressive models of pixels](10_pixelcnn.ipynb): a teacher of whole numbers, which no flow
#   can copy, and how its draws are made cheap instead.
# - `models/distill_maf_to_iaf.py` distils on digits, MINIBOONE and image patches and compares the
#   student with an IAF fitted to the data; `models/distill_wavenet.py` does it for signals.
