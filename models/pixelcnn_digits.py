"""A class-conditional PixelCNN on handwritten digits: draws, classifies, completes.

One model of p(image | class) does three things: it draws digits of a wanted class, it tells the
class of an image by Bayes' rule, and it completes an image of which the upper half is known (van
den Oord et al. 2016, arXiv:1606.05328). Prints one table, saves one picture::

    python models/pixelcnn_digits.py [--out runs/pixelcnn_digits.png] [--epochs N] [--smoke]
    python models/pixelcnn_digits.py --data mnist [--rows 50000]

Data: 8 x 8 digits of 17 grey levels from scikit-learn (UCI, Alpaydin & Kaynak 1998), or MNIST from
the folder that ``PYROFLOWS_DATA`` names, see ``pf.datasets.mnist``.

With the defaults (30 epochs, about 80 seconds of one core) on the 8 x 8 digits, one run, seed 0::

    test bits/dim: independent pixels   2.166
    test bits/dim: PixelCNN             1.636
    test digits told right              98.9% of 180

The first line takes the pixels of a class as independent, each with its own histogram. A picture
of MNIST has twelve times the pixels, so three epochs over 10,000 of them are the default there: 18
minutes of a core, to 1.274 bits of the validation pictures. What it draws then are strokes, not yet
digits; of what it completes from the upper half, some are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import pyroflows as pf

CLASSES = 10


class Digits(NamedTuple):
    """Images of whole numbers ``(n, 1, side, side)`` and their labels, in three parts."""

    bins: int
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def small_digits(seed: int) -> Digits:
    """scikit-learn's digits: 1,437 to train, 180 to validate, 180 to test."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    x = torch.from_numpy(loaded.images).long()[:, None]
    labels = torch.from_numpy(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = [(x[i], labels[i]) for i in order.split([len(x) - 360, 180, 180])]
    return Digits(17, *parts)


def mnist() -> Digits:
    """MNIST's 28 x 28 digits of 256 grey levels; some of those to judge by, as a look is long."""
    split = pf.datasets.mnist()
    val, test = slice(1000), slice(2000)
    return Digits(
        256,
        (split.train, split.train_labels),
        (split.val[val], split.val_labels[val]),
        (split.test[test], split.test_labels[test]),
    )


def independent_pixels(digits: Digits) -> float:
    """Test bits per dimension if the pixels of a class were independent: the table to beat."""
    x, labels = digits.train
    test, test_labels = digits.test
    total = 0.0
    for label in range(CLASSES):
        levels = torch.nn.functional.one_hot(x[labels == label].long(), digits.bins)
        share = (levels.sum(dim=0) + 1) / (len(levels) + digits.bins)  # (1, side, side, bins)
        seen = test[test_labels == label].long()
        total += (
            share.log().expand(len(seen), *share.shape).gather(-1, seen[..., None]).sum().item()
        )
    return pf.bits_per_dim(total / len(test), test.shape[1:])


@torch.no_grad()
def bits(model: pf.PixelCNN, x: Tensor, labels: Tensor) -> float:
    """Mean bits per dimension, given the classes."""
    pairs = zip(x.split(500), labels.split(500), strict=True)
    log_prob = torch.cat([model.log_prob(a, b) for a, b in pairs]).mean().item()
    return pf.bits_per_dim(log_prob, model.event_shape)


def accuracy(model: pf.PixelCNN, x: Tensor, labels: Tensor) -> str:
    """How many classes Bayes' rule gets right."""
    right = int((model.classify(x).argmax(dim=-1) == labels).sum())
    return f"{right / len(x):.1%} of {len(x)}"


def cost_of_sampling(model: pf.PixelCNN, count: int = 16) -> list[tuple[str, str]]:
    """Seconds for some draws, and for as many passes as they have pixels."""
    labels = torch.arange(count) % CLASSES
    begin = time.perf_counter()
    x = model.sample((), labels)
    drawing = time.perf_counter() - begin
    begin = time.perf_counter()
    with torch.no_grad():
        model.log_prob(x, labels)
    passes = x.shape[-1] * x.shape[-2] * (time.perf_counter() - begin)
    return [
        (f"seconds to draw {count} images", f"{drawing:.2f}"),
        ("times faster than a pass a pixel", f"{passes / drawing:.0f}"),
    ]


def sheet(images: Tensor) -> Tensor:
    """``(rows, columns, 1, side, side)`` as one picture, a pixel of margin between."""
    framed = torch.nn.functional.pad(images[:, :, 0].double(), (0, 1, 0, 1), value=float("nan"))
    return framed.transpose(1, 2).flatten(0, 1).flatten(1)[:-1, :-1]


def draw(model: pf.PixelCNN, digits: Digits, path: Path) -> None:
    """Data and samples, a class a column; completions of unseen upper halves."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    x, labels = digits.test
    of_class = [(labels == k).nonzero()[:, 0] for k in range(CLASSES)]
    real = torch.stack([x[i[torch.arange(5) % len(i)]] for i in of_class], dim=1)
    classes = torch.arange(CLASSES)
    chosen, side = real[0], x.shape[-1]
    known = torch.arange(side)[:, None] < side // 2
    given = torch.where(known, chosen.double(), torch.nan)
    completed = [model.complete(chosen, known, classes, seed=k) for k in range(4)]
    panels = {
        "test digits": real,
        "samples of each class": model.sample(5, classes),
        "upper half given, completed 4 times": torch.stack([given, *completed]),
    }
    fig, axes = plt.subplots(1, len(panels), figsize=(12, 2.35), layout="constrained")
    colours = mpl.colormaps["gray_r"].with_extremes(bad="lightsteelblue")
    for ax, (title, images) in zip(axes, panels.items(), strict=True):
        ax.imshow(sheet(images).numpy(), cmap=colours, vmin=0, vmax=digits.bins - 1)
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Train, score, classify, draw; prints and returns the table, saves the picture."""
    digits = mnist() if args.data == "mnist" else small_digits(args.seed)
    if args.smoke:
        digits = Digits(digits.bins, *((x[:200], labels[:200]) for x, labels in digits[1:]))
    x, labels = (part[: args.rows] for part in digits.train)
    size = {"channels": 32, "layers": 4}
    if args.smoke:
        size = {"channels": 8, "layers": 2, "kernel": 3}
    torch.manual_seed(args.seed)
    model = pf.pixelcnn(x.shape[1:], CLASSES, bins=digits.bins, mixture=args.mixture, **size)
    history = pf.fit(
        model,
        x,
        labels,
        val=digits.val,
        max_epochs=1 if args.smoke else args.epochs or (3 if args.data == "mnist" else 30),
        batch_size=64,
        lr=3e-3,
        weight_decay=0.1,
        dropout=0.0 if args.data == "mnist" else 0.2,
    )
    draw(model, digits, args.out)
    rows = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("test bits/dim: independent pixels", f"{independent_pixels(digits):.3f}"),
        ("test bits/dim: PixelCNN", f"{bits(model, *digits.test):.3f}"),
        ("test digits told right", accuracy(model, *(part[:1000] for part in digits.test))),
        *cost_of_sampling(model),
        ("seconds to train", f"{history.seconds:.0f}"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>14}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--out", type=Path, default=Path("runs/pixelcnn_digits.png"))
    parser.add_argument("--epochs", type=int, help="at most; 30, for MNIST 3")
    parser.add_argument("--rows", type=int, default=10_000, help="training pictures at most")
    parser.add_argument("--mixture", type=int, default=5, help="logistics in a pixel's mixture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
