# %% [markdown]
# # PixelCNN: autoregressive models, and how they relate to flows
#
# What can a model do that predicts each pixel from the ones before it, and is it a flow?
#
# Any distribution over $D$ pixels is a product, in reading order,
#
# $$\log p(x) = \sum_{i=1}^{D} \log p(x_i \mid x_1, \dots, x_{i-1}),$$
#
# so one network that turns the pixels before $i$ into a distribution of pixel $i$ is a density
# model. PixelCNN (van den Oord et al. 2016, arXiv:1601.06759 and 1606.05328) is such a network of
# convolutions. Its pixels are whole numbers, and its score is exact.

# %%
import os
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import pyroflows as pf

SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs

# %% [markdown]
# ## Masks, and a blind spot
#
# A convolution sees all around a pixel. To blind it to what is to come, its kernel is masked: rows
# above and pixels to the left stay; the first layer masks the pixel itself too. Stacked, though,
# such kernels never reach a wedge on the upper right: its pixels come before, and are not seen.
# The remedy is two stacks, a vertical one over all rows above and a horizontal one along the row,
# where the second listens to the first. Gradients show what a pixel (the cross) depends on.


# %%
class Masked(nn.Conv2d):
    """A 3 x 3 convolution that sees what is before a pixel, and the pixel itself if told so."""

    def __init__(self, inputs, outputs, itself):
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.ones(3, 3)
        mask[1, 1 + itself :] = 0
        mask[2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * self.mask, self.bias, padding=1)


torch.manual_seed(0)
plain = nn.Sequential(Masked(1, 8, False), *(Masked(8, 8, True) for _ in range(3)))
nets = {
    "masked kernels, 4 layers": plain,
    "two stacks, 4 layers": pf.nets.PixelNet(1, channels=8, layers=4, kernel=3),
    "two stacks, 8 layers": pf.nets.PixelNet(1, channels=8, layers=8, kernel=3),
}
row, column, size = 6, 5, 11
index = torch.arange(size * size).reshape(size, size)
before = index < index[row, column]
fig, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained")
for ax, (title, net) in zip(axes, nets.items(), strict=True):
    image = torch.randn(1, 1, size, size, dtype=torch.double, requires_grad=True)
    net.double()(image)[0, :, row, column].pow(2).sum().backward()
    sees = image.grad[0, 0] != 0
    kind = torch.where(sees, 2, before.int())
    ax.imshow(kind, cmap=plt.get_cmap("Blues", 3), vmin=-0.5, vmax=2.5)
    ax.plot(column, row, "x", color="tab:red", ms=10, mew=3)
    ax.set(title=title, xlabel="column", ylabel="row")
    print(f"{title}: sees {int(sees.sum())} of {int(before.sum())} before it,", end=" ")
    print(int((sees & ~before).sum()), "of those to come")

# %% [markdown]
# Dark is seen, light comes before but is not seen, white is to come. Four layers of two stacks see
# five rows up, five pixels to the left and four columns each way above, without a gap; more layers
# see further.
#
# ## Grey levels: discretised logistics
#
# The network's answer for a pixel is a mixture of logistic densities, of which level $k$ gets the
# mass of its bin (Salimans et al. 2017, arXiv:1701.05517). With $F$ the logistic function and
# levels scaled to $[-1, 1]$, half a bin wide $h$,
#
# $$P(k) = \sum_m \pi_m \left[ F\!\left(\tfrac{x_k + h - \mu_m}{s_m}\right) -
#   F\!\left(\tfrac{x_k - h - \mu_m}{s_m}\right) \right],$$
#
# and the outermost levels take all that lies beyond. Neighbouring levels share parameters, yet the
# mass at pure black or white can be as large as it likes.

# %%
weights, means, scales = (torch.tensor(v) for v in ([0.4, 0.6], [0.1, 1.1], [0.07, 0.12]))
bins, half = 17, 1 / 16
x = torch.linspace(-1, 1, bins)
upper = torch.sigmoid((x[:, None] + half - means) / scales)
lower = torch.sigmoid((x[:, None] - half - means) / scales)
upper[-1], lower[0] = 1.0, 0.0
mass = (upper - lower) @ weights
fine = torch.linspace(-1.5, 1.7, 400)
cumulative = torch.sigmoid((fine[:, None] - means) / scales)
density = (cumulative * (1 - cumulative) / scales) @ weights
print(f"the 17 masses sum to {mass.sum():.6f}")

fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
ax.bar((x + 1) * 8, mass, 0.9, color="lightsteelblue", label="mass of each level")
ax.plot((fine + 1) * 8, density * 2 * half, color="tab:orange", label="density, a level")
ax.set(xlabel="grey level", ylabel="probability", title="two logistics, cut into 17 levels")
_ = ax.legend()

# %% [markdown]
# ## It is a distribution: the exact check
#
# There are 256 images of $2 \times 2$ pixels with 4 levels, so the probabilities of a model,
# trained or not, can be added up.

# %%
torch.manual_seed(0)
tiny = pf.pixelcnn((1, 2, 2), bins=4, channels=8, layers=2, kernel=3, mixture=3)
every = torch.cartesian_prod(*[torch.arange(4)] * 4).reshape(256, 1, 2, 2)
with torch.no_grad():
    print(f"sum of p over all 256 images: {tiny.log_prob(every).exp().sum():.6f}")

# %% [markdown]
# ## Train on digits, given the class
#
# Digits of $8 \times 8$ pixels with 17 grey levels (scikit-learn). The class goes in as a label.
# The score is in bits per dimension, lower is better, and exact: no bound, no noise.

# %%
digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
if SMOKE:
    order = order[:600]
images = torch.from_numpy(digits.images).long()[order, None]
labels = torch.from_numpy(digits.target)[order]
parts = (len(order) - 360, 180, 180)
train, val, test = zip(images.split(parts), labels.split(parts), strict=True)

torch.manual_seed(0)
model = pf.pixelcnn(
    (1, 8, 8), 10, bins=17, channels=8 if SMOKE else 32, layers=2 if SMOKE else 4, mixture=5
)
how = {"val": val, "batch_size": 64, "lr": 4e-3, "weight_decay": 0.1, "dropout": 0.1}
history = pf.fit(model, *train, max_epochs=1 if SMOKE else 12, progress=False, **how)
model.requires_grad_(False)
print(history)

# %% [markdown]
# ## Samples, and completions
#
# Left pictures of the test set, in the middle draws, a class a column. Right the same model does
# what it was never trained for: the upper half is given and the lower half drawn, four times. That
# is exact too, as the upper half comes first in reading order; a lower half that is known could not
# be used so.

# %%
of_class = [(test[1] == k).nonzero()[:, 0] for k in range(10)]
real = torch.stack([test[0][i[:5]] for i in of_class], dim=1)
torch.manual_seed(0)
drawn = model.sample(5, torch.arange(10))
known = torch.arange(8)[:, None] < 4
given = torch.where(known, real[0], 8)  # the unknown half in grey
done = [model.complete(real[0], known, torch.arange(10), seed=k) for k in range(4)]

fig, axes = plt.subplots(1, 3, figsize=(11, 2.5), layout="constrained")
for ax, sheet, title in zip(
    axes,
    (real, drawn, torch.stack([given, *done])),
    ("test digits", "draws of each class", "upper half given, completed 4 times"),
    strict=True,
):
    ax.imshow(pf.plots.sheet(sheet, 17).squeeze(-1), cmap="gray_r", vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# ## Classify by Bayes
#
# With equal prior weights $p(c \mid x) = p(x \mid c) / \sum_{c'} p(x \mid c')$: ten scores, and no
# training for it. Is the probability that it states honest? Then the mean of what it states would
# be the share of right answers. It is not quite: the model states a little more than it gets right.
# Small errors of 64 pixels' log-probabilities can add up, and Bayes' rule takes their sum at its
# word.

# %%
stated = model.classify(test[0])
told = stated.argmax(dim=1)
right = told == test[1]
error = (right.double().mean() * (1 - right.double().mean()) / len(right)).sqrt()
print(f"right {right.double().mean():.1%} +- {error:.1%} of {len(right)} test digits")
print(f"stated {stated.max(dim=1).values.mean():.1%} on average")

doubtful = stated.max(dim=1).values.argsort()[:10].tolist()
sheet = pf.plots.sheet(test[0][doubtful][None], 17).squeeze(-1)
names = [f"is {test[1][i]}\ntold {told[i]}\np = {stated[i].max():.2f}" for i in doubtful]
fig, ax = plt.subplots(figsize=(7, 1.8), layout="constrained")
ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
ax.set_xticks([4.5 + 9 * k for k in range(10)], names, fontsize=8)
_ = ax.set(title="the ten digits it is least sure of", yticks=[])

# %% [markdown]
# ## What a draw costs
#
# Drawing goes pixel by pixel. Done naively, that is a whole pass of the network for each of the 64
# pixels. But an activation depends only on pixels before it, so once computed it stays: pyroflows
# keeps it and computes each once, about the arithmetic of one pass. By the clock, 16 pictures at
# once, one core of a shared machine, so only the ratio means something:

# %%
classes = torch.arange(16) % 10
context = torch.eye(10)[classes]
begin = time.perf_counter()
for _ in range(3):
    model.sample((), classes)
cached = (time.perf_counter() - begin) / 3
begin = time.perf_counter()
canvas = torch.zeros(16, 1, 8, 8)
for _ in range(64):
    model.net(canvas, context)  # the features of all pixels, to use one
naive = time.perf_counter() - begin
print(f"cached {1000 * cached:.0f} ms, a pass a pixel {1000 * naive:.0f} ms:", end=" ")
print(f"{naive / cached:.1f} times as long (without drawing the pixels)")

# %% [markdown]
# ## Is it a flow?
#
# If the pixels were continuous, yes. Put $z_i = F_i(x_i \mid x_{<i})$, the cumulative distribution
# of pixel $i$ at its value: the map $x \mapsto z$ is invertible, its Jacobian is triangular with
# the densities $p(x_i \mid x_{<i})$ on the diagonal, and $z$ is uniform. So *every autoregressive
# model of continuous data is a flow*. With Gaussians, and $z$ made normal in place of uniform, it
# reads $z_i = (x_i - \mu_i) / \sigma_i$: a MAF layer. Checked below: the Jacobian of one, and its
# log-density beside the sum of the conditional Gaussians' log-densities,
# $\log N(z_i; 0, 1) - \log \sigma_i$, with $1 / \sigma_i$ read off the diagonal.

# %%
torch.manual_seed(0)
maf = pf.maf(4, layers=1, hidden=(16, 16), linear="reverse").double()
for parameter in maf.parameters():
    parameter.data += 0.3 * torch.randn_like(parameter)  # as if trained
x = torch.randn(4, dtype=torch.double)
jacobian = torch.autograd.functional.jacobian(lambda v: pf.latents.encode(maf, v), x)
z = pf.latents.encode(maf, x)
gaussians = torch.distributions.Normal(0.0, 1.0).log_prob(z) + jacobian.diagonal().abs().log()
print(jacobian.numpy().round(2))
print(f"MAF {maf.log_prob(x):.8f}, sum of the conditionals {gaussians.sum():.8f} nats")

# %% [markdown]
# With whole numbers, no: $F$ has steps, nothing on the other side is continuous, and there is no
# code of a picture to interpolate. What is lost in codes is gained in the score: a flow must first
# add noise, and then bounds the probability of the whole numbers from below. Here the two meet on
# the same test digits in the same unit. For Glow there are two figures: one draw of noise, and 16
# draws together, a tighter bound. The table to beat takes the pixels of a class as independent.

# %%
torch.manual_seed(0)
one_hot = torch.eye(10)
glow = pf.quantized(pf.glow((1, 8, 8), 10, levels=2, steps=1 if SMOKE else 3, channels=32), 17)
history = pf.fit(
    glow,
    train[0],
    one_hot[train[1]],
    val=(val[0], one_hot[val[1]]),
    max_epochs=1 if SMOKE else 16,
    batch_size=64,
    lr=3e-3,
    progress=False,
)
tight = pf.quantized(glow.flow, 17, samples=16)
levels = nn.functional.one_hot(train[0], 17).double()
table = torch.stack([levels[train[1] == k].sum(dim=0) + 1 for k in range(10)])
table = (table / table.sum(dim=-1, keepdim=True)).log()
independent = table[test[1]].gather(-1, test[0][..., None]).sum(dim=(1, 2, 3, 4))
with torch.no_grad():
    scores = {
        "independent": independent,
        "Glow,\n1 draw": glow.log_prob(test[0], one_hot[test[1]]),
        "Glow,\n16 draws": tight.log_prob(test[0], one_hot[test[1]]),
        "PixelCNN": model.log_prob(*test),
    }
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, log_prob in scores.items():
    bits = pf.bits_per_dim(log_prob, (1, 8, 8)).double()
    mean, error = bits.mean().item(), (bits.std() / len(bits) ** 0.5).item()
    ax.bar(name, mean, yerr=error, capsize=4, color="lightsteelblue")
    ax.text(name, 0.1, f"{mean:.2f}", ha="center")
    print(f"{' '.join(name.split()):<15} {mean:.3f} +- {error:.3f} bits/dim")
_ = ax.set(ylabel="bits a dimension", title="test digits, given the class; lower is better")

# %% [markdown]
# This small Glow, trained briefly, does not even beat the table: many pixels are always blank,
# which a table says at no cost, while a flow has to learn the flat noise on each of them. The
# larger Glow of [tutorial 05](05_glow.ipynb), trained for longer, comes to about the table's score
# on these test digits. Drawing the noise 16 times tightens the bound by a few hundredths of a bit
# only, so it is the models that differ: against the best of the others, to predict levels as levels
# is worth almost half a bit a pixel here.
#
# ## What to read next
#
# - [Glow](05_glow.ipynb): what the codes that PixelCNN does not have are good for.
# - [Autoregressive flows](03_autoregressive_flows.ipynb): the continuous case, fast one way.
# - [Distillation](09_distillation.ipynb): fast draws of a continuous autoregressive density.
# - `models/pixelcnn_digits.py` trains for longer (1.64 bits/dim), and on MNIST.
