# %% [markdown]
# # Glow: pictures as Gaussian numbers
#
# How does Glow turn a picture into independent Gaussian numbers, and what can be done with them?
#
# Glow (Kingma & Dhariwal 2018, arXiv:1807.03039) is a flow over images. One *step* of it is an
# activation norm, an invertible $1 \times 1$ convolution that mixes the channels, and a coupling.
# Several steps make a *level*; after each level but the last, half of the numbers are done and the
# rest go on at half the resolution. We take it apart, then train one on digits and steer it.

# %%
import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import pyroflows as pf

torch.manual_seed(0)
SMOKE = bool(os.environ.get("SMOKE"))  # small sizes, to see that all runs

# %% [markdown]
# ## A permutation is a matrix
#
# A coupling changes half of the channels and looks at the other half, so between couplings the
# channels have to change places. To bring $(3, 1, 2)$ to $(1, 2, 3)$, multiply by
#
# $$P = \begin{pmatrix} 0 & 1 & 0 \\ 0 & 0 & 1 \\ 1 & 0 & 0 \end{pmatrix}, \qquad |\det P| = 1.$$
#
# Glow asks: why this matrix, and not one that is learnt? At every pixel $y = W x$, and over
# $H \times W$ pixels $\log|\det| = H W \log|\det W|$. Both are checked here, the second against
# the determinant of the full Jacobian, which autograd computes.

# %%
layer = pf.transforms.Conv1x1(3, lu=False)
with torch.no_grad():
    layer.weight.copy_(torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    pixel = torch.tensor([3.0, 1.0, 2.0]).reshape(3, 1, 1)
    y, log_det = layer.forward_and_log_det(pixel)
print("P (3, 1, 2) =", y.flatten().tolist(), " log|det P| =", log_det.item())

layer = pf.transforms.Conv1x1(3).double()
with torch.no_grad():
    layer.log_diagonal.add_(torch.randn(3))  # any invertible matrix, no rotation any more
image = torch.randn(3, 4, 5, dtype=torch.double)
jacobian = torch.autograd.functional.jacobian(lambda v: layer.forward_and_log_det(v)[0], image)
exact = torch.linalg.slogdet(jacobian.reshape(60, 60)).logabsdet
print(f"layer {layer.forward_and_log_det(image)[1]:.10f}, full Jacobian {exact:.10f} nats")

# %% [markdown]
# ## A matrix may be nearly singular
#
# A learnt $W$ need not stay away from $\det W = 0$. Take a rotation whose smallest singular value
# is turned down from 1 to $t$. Then $\log|\det W| = \log t \to -\infty$, the condition number
# $1 / t$ grows, and so does the gradient, because $\nabla_W \log|\det W| = W^{-\top}$.
#
# Glow's remedy is to keep $W = P L U$ in factors: $P$ fixed, $L$ with ones on its diagonal, $U$
# with $\pm e^{s_i}$ on its own. Then $\log|\det W| = \sum_i s_i$, whose gradient by each $s_i$
# is 1 however small $t$ is, and no step of an optimiser can make the determinant zero. What
# LU does *not* do is to make $W$ well-conditioned: the round trip $W^{-1} W x$ loses the same
# digits either way.

# %%
torch.manual_seed(0)
channels = 8
left, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.double))
right, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.double))
x = torch.randn(100, channels, 4, 4)


def two_of(matrix):
    """The same matrix as plain weight and in its factors, in float32."""
    plain = pf.transforms.Conv1x1(channels, lu=False)
    factored = pf.transforms.Conv1x1(channels)
    permutation, lower, upper = torch.linalg.lu(matrix)
    with torch.no_grad():
        plain.weight.copy_(matrix)
        factored.permutation.copy_(permutation.argmax(dim=1))
        factored.signs.copy_(upper.diagonal().sign())
        factored.lower.copy_(lower.tril(-1))
        factored.upper.copy_(upper.triu(1))
        factored.log_diagonal.copy_(upper.diagonal().abs().log())
    return {"plain": plain, "LU": factored}


sizes = 10.0 ** -torch.arange(7)
log_dets, gradients, errors = {}, {"plain": [], "LU": []}, {"plain": [], "LU": []}
for t in sizes:
    spectrum = torch.ones(channels, dtype=torch.double)
    spectrum[-1] = t
    for name, layer in two_of(left * spectrum @ right).items():
        log_det = layer.matrix()[1]
        log_det.backward()
        slope = layer.weight if name == "plain" else layer.log_diagonal
        gradients[name].append(slope.grad.norm().item())
        log_dets.setdefault(name, []).append(log_det.item())
        with torch.no_grad():
            errors[name].append((layer.inv(layer(x)) - x).abs().max().item())

fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for name, style in (("plain", "o-"), ("LU", "s--")):
    axes[0].plot(1 / sizes, log_dets[name], style, label=name)
    axes[1].loglog(1 / sizes, gradients[name], style, label=name)
    axes[2].loglog(1 / sizes, errors[name], style, label=name)
axes[0].set(title="log-determinant", xscale="log", ylabel="log|det W|, nats")
axes[1].set(title="its gradient by the parameters", ylabel="norm")
axes[2].set(title="round trip in float32", ylabel="largest error")
for ax in axes:
    ax.set(xlabel="condition number")
    ax.legend()

# %% [markdown]
# What the gradient means for training: one gradient step of length 0.01 that raises $\log|\det W|$,
# at $t = 10^{-4}$. The plain matrix is thrown far past its other singular values, which are 1;
# the factored one is hardly changed.

# %%
spectrum[-1] = 1e-4
for name, layer in two_of(left * spectrum @ right).items():
    before = torch.linalg.svdvals(layer.matrix()[0].detach())
    layer.matrix()[1].backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter += 0.01 * parameter.grad
        after = torch.linalg.svdvals(layer.matrix()[0])
    print(f"{name:<6} singular values {before[-1]:.6f} to {before[0]:.2f}", end="")
    print(f", after the step {after[-1]:.6f} to {after[0]:.2f}")

# %% [markdown]
# ## Train one
#
# Digits of $8 \times 8$ pixels with grey levels 0 to 16 (scikit-learn). `pf.quantized` adds uniform
# noise, so that whole numbers have a density; the score is in bits per dimension, lower is better.
# The class is a context: one model for ten classes. With `levels=3` the picture is squeezed to
# $4 \times 4$, $2 \times 2$ and one pixel.

# %%
digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
if SMOKE:
    order = order[:600]
x = torch.from_numpy(digits.images).long()[order, None]
labels = torch.from_numpy(digits.target)[order]
classes = torch.eye(10)
parts = (len(x) - 360, 180, 180)
train, val, test = zip(x.split(parts), classes[labels].split(parts), strict=True)

flow = pf.glow((1, 8, 8), 10, levels=3, steps=1 if SMOKE else 4, channels=16 if SMOKE else 48)
glow = pf.quantized(flow, bins=17)
epochs = 1 if SMOKE else 35
history = pf.fit(glow, *train, val=val, max_epochs=epochs, batch_size=64, lr=3e-3, progress=False)
flow.requires_grad_(False)  # trained
bits = pf.bits_per_dim(glow.log_prob(*test), glow.event_shape)
print(history)
print(f"test: {bits.mean():.3f} +- {bits.std() / len(bits) ** 0.5:.3f} bits/dim, single run")
print(f"nothing known: {torch.tensor(17.0).log2():.3f} bits/dim")

# %% [markdown]
# Samples beside pictures that the model never saw. A *temperature* below 1 draws codes nearer to
# the mean: cleaner pictures and less varied ones, but no draws of the density that was fitted.


# %%
def show(ax, pictures, title):
    """A sheet of ``(rows, columns, 1, 8, 8)`` pictures."""
    ax.imshow(pf.plots.sheet(pictures, 17).squeeze(-1), cmap="gray_r", vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])


torch.manual_seed(1)
shown = torch.stack([test[0][test[1][:, k] == 1][:4] for k in range(10)], dim=1)
fig, axes = plt.subplots(1, 3, figsize=(11, 2), layout="constrained")
show(axes[0], shown, "test digits")
show(axes[1], pf.latents.sample(glow, 4, 1.0, classes), "samples, a class a column")
show(axes[2], pf.latents.sample(glow, 4, 0.7, classes), "the same at temperature 0.7")

# %% [markdown]
# ## Which numbers are done at which level
#
# A code has the shape of its picture, because what is done stays in its place. Squeezing a picture
# of level numbers in the same way shows where each level's numbers lie: 32 of the 64 are done at
# the first, finest level, 16 at the second, 16 at the third.

# %%
squeeze, unsqueeze = pf.transforms.squeeze, pf.transforms.unsqueeze


def levels_of(shape, levels):
    """The level, 1 for the finest, at which each number of an image is done."""
    if levels == 1:
        return torch.ones(shape)
    h = squeeze(torch.ones(shape))
    kept = len(h) // 2
    h[:kept] = 1 + levels_of(h[:kept].shape, levels - 1)
    return unsqueeze(h)


level = levels_of((1, 8, 8), 3)
print({k: int((level == k).sum()) for k in (1, 2, 3)})
fig, ax = plt.subplots(figsize=(3.6, 3), layout="constrained")
drawn = ax.imshow(level[0], cmap=plt.get_cmap("viridis", 3), vmin=0.5, vmax=3.5)
ax.set(title="where each level's numbers lie", xlabel="column", ylabel="row")
_ = fig.colorbar(drawn, ticks=[1, 2, 3], label="level")

# %% [markdown]
# What do they hold? Take the code of a test digit, keep it but for one level, and draw that level's
# numbers anew. Left the digit, right of it seven redraws. The class stays, it is the context. The
# numbers below say by how many grey levels a pixel changes on average, over all test digits. The
# coarsest level changes most, with no more numbers than any other: it sets the digit's shape,
# while the finer ones touch up its strokes.

# %%
torch.manual_seed(0)
codes = pf.latents.encode(glow, *test)
chosen = [int((test[1][:, k] == 1).nonzero()[0]) for k in (2, 5, 8)]
fig, axes = plt.subplots(1, 3, figsize=(11, 2.2), layout="constrained")
for k, ax in zip((1, 2, 3), axes, strict=True):
    redrawn = torch.where(level == k, torch.randn(7, *codes.shape), codes)
    pictures = pf.latents.decode(glow, redrawn, test[1].expand(7, -1, -1))
    change = (pictures - test[0]).abs().double().mean()
    rows = torch.cat([test[0][chosen][None], pictures[:, chosen]]).transpose(0, 1)
    show(ax, rows, f"level {k} redrawn")
    print(f"level {k} redrawn: {change:.2f} grey levels a pixel, {int((level == k).sum())} numbers")

# %% [markdown]
# ## Between two digits
#
# A flow is a bijection, so every point of a line between two codes is a picture. In 64 dimensions
# codes have a length near $\sqrt{64} = 8$, and half-way on a straight line between two
# independent ones it is only about $8 / \sqrt 2 \approx 5.7$: too plain a picture. The great
# circle keeps the length. The class goes along as a mixture of two.

# %%
pairs = [(0, 6), (3, 8), (4, 9), (1, 7)]
first, last = (
    torch.tensor([int((test[1][:, pair[k]] == 1).nonzero()[1]) for pair in pairs]) for k in (0, 1)
)
ways = {}
for kind in ("linear", "spherical"):
    ways[kind] = pf.latents.interpolate(codes[first], codes[last], 9, kind, event_dim=3)
share = pf.latents.interpolate(test[1][first], test[1][last], 9)

fig, axes = plt.subplots(1, 3, figsize=(11, 2.3), layout="constrained")
for ax, (kind, way) in zip(axes, ways.items(), strict=False):
    show(ax, pf.latents.decode(glow, way, share).transpose(0, 1), f"{kind} interpolation")
    axes[2].plot(way.flatten(2).norm(dim=2).mean(dim=1), "o-", ms=3, label=kind)
axes[2].set(title="length of the codes, mean of 4", xlabel="step", ylabel="length")
_ = axes[2].legend()

# %% [markdown]
# ## Four digits mixed by two angles
#
# $$z = \cos\alpha\,(z_1 \cos\beta + z_2 \sin\beta) + \sin\alpha\,(z_3 \cos\beta + z_4 \sin\beta).$$
#
# The four squared weights sum to one, so a mix of four independent Gaussian codes is Gaussian
# again: the whole sheet is as probable as its corners (Dinh et al. 2017, arXiv:1605.08803). Left
# four ways to write one class, right four classes; there the squared weights mix the classes.

# %%
angles = torch.linspace(0, torch.pi / 2, 7)
a, b = angles[:, None].cos() ** 2, angles.cos() ** 2
weights = torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)], dim=-1)  # (7, 7, 4)
print(f"squared weights sum to {weights.sum(-1).min():.6f} ... {weights.sum(-1).max():.6f}")
threes = (test[1][:, 3] == 1).nonzero()[:4, 0]
four = torch.tensor([int((test[1][:, k] == 1).nonzero()[2]) for k in (0, 2, 6, 8)])

fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), layout="constrained")
for ax, corners, title in zip(axes, (threes, four), ("four threes", "0, 2, 6 and 8"), strict=True):
    mixed = pf.latents.mix(*codes[corners], angles[:, None], angles)
    show(ax, pf.latents.decode(glow, mixed, weights @ test[1][corners]), title)

# %% [markdown]
# ## From one set of pictures to another
#
# Two sets that share a base can be translated: encode with one, decode with the other.
# `pf.latents.translate` does it for two flows, each trained on its own set, and for one flow in two
# contexts, as here: threes become eights. Three questions, with numbers: is the result an eight (a
# classifier that never saw the flow says so)? Does it keep the hand, here the amount of ink? And
# is the way back exact? For the flow itself, before rounding to grey levels, it must be.

# %%
from sklearn.svm import SVC

judge = SVC(gamma=0.001).fit(train[0].flatten(1), train[1].argmax(dim=1))
is_three = test[1][:, 3] == 1
threes, c3 = test[0][is_three], test[1][is_three]
c8 = classes[8].expand_as(c3)
eights = pf.latents.translate(glow, glow, threes, c3, c8)
y = glow.dequantize(threes, seed=0)[0]  # the flow's own space: grey levels with their noise
there = pf.latents.translate(flow, flow, y, c3, c8)
back = pf.latents.translate(flow, flow, there, c8, c3)
told = judge.predict(eights.flatten(1))
ink = torch.stack([threes.flatten(1).sum(1), eights.flatten(1).sum(1)]).double()
print(f"{(told == 8).sum()} of {len(told)} test threes become what the classifier calls an eight")
print(f"correlation of the ink before and after: {torch.corrcoef(ink)[0, 1]:.2f}")
print(f"there and back: largest error {(back - y).abs().max():.1e} of a range of 1")

fig, ax = plt.subplots(figsize=(9, 1.9), layout="constrained")
show(ax, torch.stack([threes, eights])[:, :14], "test threes, and the same codes as eights")

# %% [markdown]
# ## What to read next
#
# - [Coupling layers](02_coupling_layers.ipynb): what a step's third part does, without pictures.
# - [Autoregressive models of pixels](10_pixelcnn.ipynb) score better at this size and draw pixel by
#   pixel; that tutorial compares the two in bits per dimension.
# - [A flow in a variational autoencoder](08_vae.ipynb): codes of fewer dimensions than pixels.
# - `models/glow_images.py` does all this at length, on MNIST and CIFAR-10, with learnt noise.
