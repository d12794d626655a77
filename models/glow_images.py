"""Glow on pictures: its bits per dimension, samples, ways between pictures, a code in all classes.

A multi-scale flow of invertible 1x1 convolutions and couplings (Kingma & Dhariwal 2018,
arXiv:1807.03039) over whole numbers, with uniform noise between the grey levels or noise that is
learnt. Prints one table, saves one picture::

    python models/glow_images.py [--data mnist|cifar10|freyfaces|digits] [--out runs/glow.png]
    python models/glow_images.py --classes --dequantizer variational [--minutes 5 | --epochs N]

Data: MNIST, Frey faces and CIFAR-10 come from the folder that ``PYROFLOWS_DATA`` names; where that
is not set, the default is the 8 x 8 digits of scikit-learn. Of CIFAR-10 the test archive will do:
its 10,000 photographs are then split.

Bits per dimension of the 180 test digits, single runs, seed 0; the second column with eight draws
of the noise together::

    --data digits --epochs 20                              2.584   2.546
    --data digits --epochs 20 --dequantizer variational    2.562   2.532
    --data digits --epochs 20 --classes                    2.528   2.493
    --data digits --epochs 60 --classes                    2.253   2.200

A step with learnt noise takes longer, with the defaults for MNIST 1.4 times as long. MNIST with
``--minutes 40``, 17 epochs that took 49 minutes of one core: 1.659 bits, 1.559 with eight draws on
200 pictures. Ways between digits and the mixes of four are digits or on the way from one to
another; samples have strokes like those of digits, few are one: that takes longer training and
larger nets.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyroflows as pf

CLASSES = 10
# levels, steps at each level, hidden channels of the coupling nets
SIZES = {
    "digits": (2, 4, 32),
    "mnist": (2, 4, 64),
    "freyfaces": (2, 4, 64),
    "cifar10": (3, 8, 64),
}


class Pictures(NamedTuple):
    """Whole numbers ``(n, channels, height, width)``, with the classes in one-hot or None."""

    bins: int
    train: tuple[Tensor, Tensor | None]
    val: tuple[Tensor, Tensor | None]
    test: tuple[Tensor, Tensor | None]


def digits() -> pf.datasets.LabelledSplit:
    """scikit-learn's, in an order of their own."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(loaded.images).to(torch.uint8)[order, None]
    labels = torch.from_numpy(loaded.target).long()[order]
    return split(x, labels, [len(x) - 360, 180, 180])


def cifar10() -> pf.datasets.LabelledSplit:
    """Photographs: the usual split, or one of the test archive alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is the test archive alone
        found = pf.datasets.cifar10()
    return found if len(found.train) else split(found.test, found.test_labels, [8000, 1000, 1000])


def split(x: Tensor, labels: Tensor, sizes: list[int]) -> pf.datasets.LabelledSplit:
    """The first rows to train, the next to validate, the last to test."""
    return pf.datasets.LabelledSplit(*x.split(sizes), *labels.split(sizes))


def load(name: str, classes: bool, smoke: bool) -> Pictures:
    """The pictures of that name."""
    loaders = {"digits": digits, "mnist": pf.datasets.mnist, "cifar10": cifar10}
    if name == "freyfaces" and classes:
        raise ValueError("classes: Frey's faces have none, take other data")
    found = pf.datasets.freyfaces() if name == "freyfaces" else loaders[name]()
    most = 200 if smoke else None

    def part(which: str) -> tuple[Tensor, Tensor | None]:
        x = getattr(found, which)[:most]
        if not classes:
            return x, None
        return x, F.one_hot(getattr(found, f"{which}_labels")[:most], CLASSES).float()

    return Pictures(17 if name == "digits" else 256, part("train"), part("val"), part("test"))


def make(data: Pictures, args: argparse.Namespace) -> nn.Module:
    """The model of whole numbers."""
    x, c = data.train
    levels, steps, channels = (1, 1, 8) if args.smoke else SIZES[args.data]
    flow = pf.glow(
        x.shape[1:],
        0 if c is None else CLASSES,
        levels=args.levels or levels,
        steps=args.steps or steps,
        channels=args.channels or channels,
    )
    return pf.quantized(flow, data.bins, dequantizer=args.dequantizer)


def epochs_within(minutes: float, q: nn.Module, data: Pictures, batch_size: int) -> int:
    """How many epochs fit, by the time that some gradients take."""
    x, c = (None if part is None else part[:batch_size] for part in data.train)
    q.log_prob(x, c).mean().backward()
    begin = time.perf_counter()
    for _ in range(5):
        q.log_prob(x, c).mean().backward()
    q.zero_grad()
    seconds = 1.1 * (time.perf_counter() - begin) / 5  # the optimiser and validation take a tenth
    return max(1, int(60 * minutes / (seconds * math.ceil(len(data.train[0]) / batch_size))))


@torch.no_grad()
def sheets(q: nn.Module, x: Tensor, c: Tensor | None) -> dict[str, Tensor]:
    """Sheets of pictures, ``(rows, columns, channels, height, width)``."""
    chosen = torch.randperm(len(x))[:64]
    x, c = x[chosen], None if c is None else c[chosen]
    codes = pf.latents.encode(q, x, c)

    def way(v: Tensor | None, kind: str) -> Tensor | None:
        if v is None:
            return None
        event_dim = v.dim() - 1
        return pf.latents.interpolate(v[:8], v[8:16], 8, kind, event_dim=event_dim).transpose(0, 1)

    angles = torch.linspace(0, math.pi / 2, 8)
    mixed = pf.latents.mix(*codes[16:20], angles[:, None], angles)
    every = None if c is None else torch.eye(CLASSES).expand(8, -1, -1)
    drawn = (8, 8) if every is None else ()
    result = {
        "test pictures": x.reshape(8, 8, *x.shape[1:]),
        "samples": pf.latents.sample(q, drawn, 1.0, every),
        "samples, temperature 0.7": pf.latents.sample(q, drawn, 0.7, every),
        "between test pictures, on great circles": pf.latents.decode(
            q, way(codes, "spherical"), way(c, "linear")
        ),
        "four test pictures, mixed by two angles": pf.latents.decode(
            q, mixed, None if c is None else shares(angles[:, None], angles) @ c[16:20]
        ),
    }
    if every is not None:
        same = codes[:8, None].expand(-1, CLASSES, *codes.shape[1:])
        result["the codes of eight pictures in all classes"] = pf.latents.decode(q, same, every)
    return result


def shares(alpha: Tensor, beta: Tensor) -> Tensor:
    """The squared weights of four codes in ``pf.latents.mix``: they sum to one."""
    first, one = alpha.cos() ** 2, beta.cos() ** 2
    parts = first * one, first * (1 - one), (1 - first) * one, (1 - first) * (1 - one)
    return torch.stack(parts, dim=-1)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Train, print the table, save the picture; returns the table."""
    torch.manual_seed(args.seed)
    data = load(args.data, args.classes, args.smoke)
    q = make(data, args)
    epochs = 1 if args.smoke else args.epochs
    history = pf.fit(
        q,
        *data.train,
        val=data.val if args.classes else data.val[0],
        max_epochs=epochs or epochs_within(args.minutes, q, data, args.batch_size),
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    x, c = data.test
    few = x[:200], None if c is None else c[:200]
    noise = f"{args.dequantizer} noise, {'given the class' if args.classes else 'without classes'}"
    rows = [
        (f"{args.data}, training pictures", f"{len(data.train[0]):,}"),
        (f"parameters; {noise}", f"{sum(p.numel() for p in q.parameters()):,}"),
        ("bits/dim, validation", f"{history.score:.3f}"),
        ("bits/dim, test", f"{q.bits_per_dim(x, c):.3f}"),
        (f"bits/dim, {len(few[0])} test pictures", f"{q.bits_per_dim(*few):.3f}"),
        ("the same, 8 draws of noise together", f"{q.bits_per_dim(*few, samples=8):.3f}"),
        ("bits/dim, nothing known", f"{math.log2(data.bins):.3f}"),
        ("epochs, seconds", f"{len(history.steps)}, {history.seconds:.0f}"),
    ]
    pf.plots.save_sheets(sheets(q, x, c), args.out, data.bins)
    length = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{length}}  {value:>10}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "mnist" if os.environ.get("PYROFLOWS_DATA") else "digits"
    parser.add_argument("--data", choices=tuple(SIZES), default=default)
    parser.add_argument("--classes", action="store_true", help="a model given the class")
    noises = ("uniform", "variational")
    parser.add_argument("--dequantizer", choices=noises, default="uniform")
    parser.add_argument("--out", type=Path, default=Path("runs/glow_images.png"), help="picture")
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long to train")
    parser.add_argument("--epochs", type=int, help="instead of minutes")
    parser.add_argument("--levels", type=int)
    parser.add_argument("--steps", type=int, help="at each level")
    parser.add_argument("--channels", type=int, help="hidden, of the coupling nets")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
