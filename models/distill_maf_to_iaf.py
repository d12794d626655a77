"""A MAF scores in one pass, an IAF draws in one: the second learns the first's density.

A teacher is fitted to data, its student (``pf.student_of``, ``pf.distill``) trained on it, and the
two are compared on held-out rows, by importance weights, by a classifier and by the clock, beside
the same IAF trained on the data directly in the time that the distillation took. Prints one table,
saves one picture::

    python models/distill_maf_to_iaf.py [--sets digits miniboone] [--out runs/distill.png] [--smoke]

Data: a checkerboard of eight squares (its teacher has spline layers), 8x8 handwritten digits from
scikit-learn, and from files (``pf.datasets``) the reduced MINIBOONE and 8x8 patches of BSDS300.
Sets whose file is not there are left out; ``--smoke`` takes noise.

One run of each with seed 0, one thread (seconds of wall-clock)::

                                  checkerboard         digits      MINIBOONE         BSDS300
    features                                 2             64             43              63
    Gaussian, held-out nats              -4.50          49.58         -37.72           96.75
    teacher                              -3.56          71.10         -14.63          149.45
    student                              -3.55          71.01         -14.85          149.22
    teacher - student           -.010 +- .004    .09 +- .26    .217 +- .017    .232 +- .012
    in % of teacher - Gaussian           -1.10            .41            .94             .44
    same IAF fitted to the data          -3.62          59.66         -17.05          149.49
    KL(student || teacher)       .023 +- .002   .191 +- .005            (*)       3.5 +- 3.0
    KL(teacher || student)       .020 +- .001   .200 +- .005     4.5 +- 4.1       5.5 +- 3.9
    k-hat of the weights                   .49            .32            .52             .55
    classifier's AUC                      .514           .504           .498            .505
    samples / s: student, batch 1          340            660            220             360
      batches of 1,000; 10,000    137k; 189k      97k; 87k       41k; 44k        22k; 28k
    teacher, fast, batch 1                 190            120             90              80
      batches of 1,000; 10,000    115k; 262k      34k; 80k       15k; 38k         11k; 28k
    teacher, plain loop, batch 1           180             20             11               7
      batches of 1,000                     86k           2.8k           1.4k             .91k
    seconds: teacher, student           34, 53         31, 76         87, 67         67, 161

In equal time the student is better than the IAF fitted to the data on all but BSDS300, where many
rows serve that IAF as well as a teacher of twelve epochs does. (*) 91 +- 89. In 43 and 63
dimensions the KLs' means rest on a few of 20,000 draws, far in the tails, where the errors of five
layers compound: looks of fewer draws while training gave 0.15 and 0.6. The students' nets are half
as wide again as the teachers', for digits twice: at the teacher's width MINIBOONE's comes to .9 %
after 1,000 steps and draws faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyroflows as pf

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[tuple[str, str]]
DRAWN = 20_000  # draws of each that are kept: for the classifier and the pictures


class Case(NamedTuple):
    """A data set, its teacher, and how far from the defaults teacher and student are trained.

    Attributes:
        load: gives the rows.
        draw: draws a set of rows, given those of the data for the limits.
        teacher: builds the flow to distil.
        fit: settings of ``pf.fit``.
        hidden: widths of the student's nets; half as wide again as the teacher's if None.
        distill: settings of ``pf.distill``.
    """

    load: Callable[[], pf.datasets.Split]
    draw: Callable[[Axes, Tensor, Tensor], None]
    teacher: Callable[..., pf.Flow] = pf.maf
    fit: dict[str, Any] = {}
    hidden: tuple[int, ...] | None = None
    distill: dict[str, Any] = {}


def gaussian_nats(data: pf.datasets.Split) -> float:
    """Held-out nats of the Gaussian with the training rows' mean and covariance."""
    seen = torch.cat([data.train, data.val]).double()
    # Some pixels are always blank but for the noise: a small ridge keeps the covariance regular.
    covariance = torch.cov(seen.T) + 1e-6 * torch.eye(seen.shape[1], dtype=seen.dtype)
    gaussian = MultivariateNormal(seen.mean(dim=0), covariance)
    return gaussian.log_prob(data.test.double()).mean().item()


def draw_plane(ax: Axes, rows: Tensor, data: Tensor) -> None:
    """A histogram of the two coordinates."""
    low, high = data.min(dim=0).values, data.max(dim=0).values
    edges = torch.stack([low, high], dim=1).numpy()
    ax.hist2d(*rows.T.numpy(), bins=100, range=edges, cmap="magma")


def draw_pair(ax: Axes, rows: Tensor, data: Tensor) -> None:
    """The same of the two flattest features: of least kurtosis in the data."""
    z = (data - data.mean(dim=0)) / data.std(dim=0)
    pair = z.pow(4).mean(dim=0).argsort()[:2]
    limits = torch.stack([data[:, pair].quantile(q, dim=0) for q in (0.002, 0.998)], dim=1)
    ax.hist2d(*rows[:, pair].T.numpy(), bins=60, range=limits.numpy(), cmap="magma")


def draw_digits(ax: Axes, rows: Tensor, data: Tensor) -> None:
    """A sheet of 4 x 8 digits."""
    ax.imshow(sheet(rows), cmap="gray_r", vmin=0, vmax=1)


def draw_patches(ax: Axes, rows: Tensor, data: Tensor) -> None:
    """A sheet of 4 x 8 patches, whose last pixel the others determine: the mean is zero."""
    whole = torch.cat([rows, -rows.sum(dim=1, keepdim=True)], dim=1)
    spread = 2.5 * data.std().item()
    ax.imshow(sheet(whole), cmap="gray", vmin=-spread, vmax=spread)


def sheet(rows: Tensor) -> Any:
    """32 pictures of 8 x 8 pixels as one, with a line between them."""
    pictures = torch.nn.functional.pad(rows[:32].reshape(4, 8, 8, 8), (0, 1, 0, 1), value=torch.nan)
    return pictures.transpose(1, 2).reshape(36, 72).numpy()[:-1, :-1]


CASES = {
    "checkerboard": Case(
        lambda: pf.datasets.checkerboard(20_000),
        draw_plane,
        teacher=partial(
            pf.nsf, scheme="autoregressive", fast="log_prob", layers=3, hidden=(64, 64)
        ),
        fit={"max_epochs": 30, "lr": 3e-3},
        distill={"max_steps": 1500},
    ),
    # A larger teacher learns the 1,439 pictures by heart and scores others no better.
    "digits": Case(
        pf.datasets.digits,
        draw_digits,
        teacher=partial(pf.maf, layers=3, hidden=(64, 64)),
        hidden=(128, 128),
    ),
    "miniboone": Case(pf.datasets.miniboone, draw_pair, distill={"max_steps": 2000}),
    "bsds300": Case(
        lambda: pf.datasets.bsds300(n_train=50_000, n_val=5_000, n_test=10_000),
        draw_patches,
        fit={"max_epochs": 12},
        distill={"max_steps": 4000},
    ),
}


FEATURES = {"checkerboard": 2, "digits": 64, "miniboone": 43, "bsds300": 63}


def random_rows(name: str) -> pf.datasets.Split:
    """Noise of a set's width, to see that all runs without its file."""
    return pf.datasets.Split(*(torch.randn(n, FEATURES[name]) for n in (200, 50, 50)))


def run(name: str, case: Case, data: pf.datasets.Split, smoke: bool) -> tuple[Rows, dict]:
    """Fit, distil, compare: rows of the table and the pictures' rows."""
    size, fit, distill, draws = {}, case.fit, case.distill, DRAWN
    if smoke:
        size = {"layers": 1, "hidden": (8,)}
        fit, distill, draws = {"max_epochs": 1}, {"max_steps": 50}, 100
    teacher = case.teacher(data.train.shape[1], **size)
    history = pf.fit(teacher, data.train, val=data.val, **fit)
    changes = {} if case.hidden is None else {"hidden": case.hidden}
    student = pf.student_of(teacher, **changes)
    course = pf.distill(teacher, student, data=data.train, **distill)
    report = pf.compare(
        teacher,
        student,
        data.test,
        draws=draws,
        classifier_draws=draws,
        data=data.train,
        baseline=course.seconds,
        history=course,
    )
    print(f"\n{name}\n{report}")
    pictures = {
        "data": torch.cat([data.test, data.train])[:draws],
        "teacher": teacher.sample((draws,)),
        "student": student.sample((draws,)),
    }
    rows = table(report, data, (history.seconds, course.seconds))
    return [(f"{name}: {what}", value) for what, value in rows], pictures


def table(report: pf.Distillation, data: pf.datasets.Split, seconds: tuple[float, float]) -> Rows:
    """What the comparison came to."""
    gaussian = gaussian_nats(data)
    gap, error = report.gap
    share = gap / (report.teacher_nats - gaussian)
    rows = [
        ("Gaussian, held-out nats", f"{gaussian:.2f}"),
        ("teacher", f"{report.teacher_nats:.2f}"),
        ("student", f"{report.student_nats:.2f}"),
        ("teacher - student, paired", f"{gap:.3f} +- {error:.3f}"),
        ("in % of teacher - Gaussian", f"{100 * share:.2f}"),
        ("same IAF fitted to the data", f"{report.baseline_nats:.2f}"),
        ("the student and that IAF", report.verdict),
        ("KL(student || teacher)", "{:.3f} +- {:.3f}".format(*report.reverse_kl)),
        ("KL(teacher || student)", "{:.3f} +- {:.3f}".format(*report.forward_kl)),
        ("k-hat of the weights", f"{report.khat:.2f}"),
        ("classifier's AUC", f"{report.auc:.3f}"),
    ]
    for name, by_batch in report.speeds.items():
        for n, rate in by_batch.items():
            rows.append((f"{name}, samples / s, batch {n:,}", f"{rate:,.0f}"))
    return [*rows, ("seconds: teacher, student", "{:.0f}, {:.0f}".format(*seconds))]


def draw(pictures: dict[str, dict[str, Tensor]], path: Path) -> None:
    """A line for each data set: rows of the data, of the teacher and of the student."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shape = (len(pictures), 3)
    size = (10, 0.3 + 2.4 * shape[0])
    fig, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for line, (name, samples) in zip(axes, pictures.items(), strict=True):
        for ax, (title, rows) in zip(line, samples.items(), strict=True):
            CASES[name].draw(ax, rows, samples["data"])
            ax.set(title=f"{name}: {title}", xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(args: argparse.Namespace) -> Rows:
    """Distil on every set, print the table, save the picture; returns the table."""
    rows: Rows = []
    pictures = {}
    for name in args.sets:
        torch.manual_seed(args.seed)
        begin = time.perf_counter()
        try:
            data = random_rows(name) if args.smoke else CASES[name].load()
        except FileNotFoundError as error:
            print(f"{name} is left out: {error}")
            continue
        found, pictures[name] = run(name, CASES[name], data, args.smoke)
        rows += [*found, (f"{name}: seconds in all", f"{time.perf_counter() - begin:.0f}")]
    draw(pictures, args.out)
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>18}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/distill_maf_to_iaf.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
