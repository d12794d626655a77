"""NICE on handwritten digits: a flow over integers, its bits per dimension, ways between its codes.

Additive couplings and a logistic base (Dinh et al. 2015, arXiv:1410.8516) on flattened pictures,
uniform noise between the grey levels. Prints one table, saves one picture::

    python models/nice_mnist.py [--out runs/nice_mnist.png] [--epochs N] [--smoke]

Data: MNIST (28 x 28 pixels, 256 levels) where the environment variable ``PYROFLOWS_DATA`` names a
folder with it, else the digits of scikit-learn (8 x 8 pixels, 17 levels).

The paper's density of MNIST, 1980.50 nats, is 4.36 bits per dimension, after 1,500 epochs with nets
of five layers of 1,000 units; here they are small, and trained for minutes. Single runs gave, in
bits per dimension of the test pictures, 2.857 on the small digits after 100 epochs and 5.028 on
MNIST after the 6 that are the default (13 minutes of a busy core), still falling. Between two test
pictures one digit fades into the other; of the samples some are digits, more are only strokes.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf

PUBLISHED = 1980.50  # nats of (x + u) / 256, with the paper's own preparation of the data


def load(smoke: bool) -> tuple[dict[str, Tensor], int, int]:
    """Pictures ``(n, pixels)`` of integers, the number of levels, and the width of a picture."""
    parts = ("train", "val", "test")
    try:
        split = pf.datasets.mnist()
        bins, width = 256, 28
    except FileNotFoundError:
        split = pf.datasets.digits(dequantize=False)
        bins, width = 17, 8
    most = 200 if smoke else None
    return {p: getattr(split, p)[:most].flatten(1).to(torch.uint8) for p in parts}, bins, width


def make(data: dict[str, Tensor], bins: int, args: argparse.Namespace) -> torch.nn.Module:
    """The model of integers; ``permute`` mixes the pixels anew between couplings."""
    pixels = data["train"].shape[1]
    logistic = dist.Logistic(torch.zeros(pixels), torch.ones(pixels)).to_event(1)
    flow = pf.nice(
        pixels,
        layers=args.layers,
        hidden=(16,) if args.smoke else (args.hidden,) * 2,
        linear="permute",
        base=logistic,
    )
    return pf.quantized(flow, bins, dequantizer=args.dequantizer)


@torch.no_grad()
def pictures(q: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Sheets of pictures, ``(rows, columns, pixels)``."""
    chosen = x[torch.randperm(len(x))[:64]]
    codes = pf.latents.encode(q, chosen)
    pairs = {
        kind: pf.latents.interpolate(codes[:8], codes[8:16], 8, kind, event_dim=1).transpose(0, 1)
        for kind in ("linear", "spherical")
    }
    angles = torch.linspace(0, math.pi / 2, 8)
    mixed = pf.latents.mix(*codes[16:20], angles[:, None], angles)
    return {
        "test pictures": chosen.reshape(8, 8, -1),
        "samples": q.sample((8, 8)),
        "samples, temperature 0.7": pf.latents.sample(q, (8, 8), 0.7),
        "straight ways between test pictures": pf.latents.decode(q, pairs["linear"]),
        "the same on great circles": pf.latents.decode(q, pairs["spherical"]),
        "four test pictures, mixed by two angles": pf.latents.decode(q, mixed),
    }


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Train, print the table, save the picture; returns the table."""
    pyro.set_rng_seed(args.seed)
    data, bins, width = load(args.smoke)
    q = make(data, bins, args)
    begin = time.perf_counter()
    history = pf.fit(
        q,
        data["train"],
        val=data["val"],
        max_epochs=1 if args.smoke else args.epochs or (6 if width == 28 else 100),
        batch_size=args.batch_size,
        lr=args.lr,
        dropout=0.0,
        weight_decay=0.0,
        seed=args.seed,
    )
    seconds = time.perf_counter() - begin
    few = data["test"][:1000]
    rows = [
        (f"{width} x {width} pixels, {bins} levels, training pictures", f"{len(data['train']):,}"),
        ("parameters", f"{sum(p.numel() for p in q.parameters()):,}"),
        ("bits/dim, validation", f"{history.score:.3f}"),
        ("bits/dim, test", f"{q.bits_per_dim(data['test']):.3f}"),
        (f"bits/dim, {len(few):,} test pictures", f"{q.bits_per_dim(few):.3f}"),
        ("the same, 16 draws of noise together", f"{q.bits_per_dim(few, samples=16):.3f}"),
        ("bits/dim, nothing known", f"{math.log2(bins):.3f}"),
        ("epochs, seconds", f"{len(history.steps)}, {seconds:.0f}"),
    ]
    if bins == 256:
        published = pf.bits_per_dim(PUBLISHED, q.event_shape, bins=256)
        rows.append(("published, far larger and longer", f"{published:.3f}"))
    sheets = pictures(q, data["test"])
    shape = (1, width, width)
    pf.plots.save_sheets({k: x.unflatten(-1, shape) for k, x in sheets.items()}, args.out, bins)
    length = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{length}}  {value:>10}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/nice_mnist.png"), help="picture")
    parser.add_argument("--epochs", type=int, help="6 for MNIST, 100 for the small digits")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=4, help="couplings")
    parser.add_argument("--hidden", type=int, default=256, help="width of the nets' two layers")
    noises = ("uniform", "variational")
    parser.add_argument("--dequantizer", choices=noises, default="uniform")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
