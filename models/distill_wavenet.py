"""Parallel WaveNet in small: a teacher that draws a day step by step, a student all at once.

The signal is a household's electric power through a day. The teacher is a WaveNet flow: step t
depends on the steps before it, so a day is scored in one pass and drawn in as many steps as it has
(van den Oord et al. 2016, arXiv:1609.03499). The student has the same causal convolutions, but over
the noise: it draws a day in one pass. It learns from the teacher as in Parallel WaveNet (van den
Oord et al. 2018, arXiv:1711.10433), by the reverse KL of its own days, which it scores for free and
the teacher in one pass. That paper found the reverse KL alone too weak and added losses on the
signal; here the student first learns to make the teacher's day of the teacher's noise::

    python models/distill_wavenet.py [--out runs/distill_wavenet.png] [--smoke]

Data: Individual household electric power consumption (UCI, Hebrail & Berard 2012, CC BY 4.0),
16 December 2006 to 19 January 2007, from ``power_subset/power_subset.npz`` of the folder that
``PYROFLOWS_DATA`` names; without it days of a simulated AR(1) process around a daily wave.

One run, seed 0, five held-out days of ten-minute steps: AR(1) -0.40 nats a step, teacher -0.14,
student -0.14; KL(student || teacher) 0.03 a step. A day of 1440 steps on one thread takes the
teacher 17 s by the plain loop and 1.9 s with what it has seen kept, the student 0.015 s; a hundred
days 1157, 2.1 and 1.6 s.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pyroflows as pf

MINUTES = 1440  # of a day
BINS = 8  # of the splines: power jumps, and a Gaussian step would not do
FILE = "power_subset/power_subset.npz"


def power() -> Tensor | None:
    """Active power (kW) by the minute, from a midnight on; None where there is no file.

    Only the first stretch without a gap in time; five missing minutes in it are interpolated.
    """
    try:
        path = pf.datasets.data_folder() / FILE
    except FileNotFoundError:
        return None
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        clock, watts = arrays["minutes_since_2006_12_16"], arrays["values"][:, 0]
    watts = watts[clock - clock[0] == np.arange(len(clock))]
    there = ~np.isnan(watts)
    watts = np.interp(np.arange(len(watts)), there.nonzero()[0], watts[there])
    return torch.as_tensor(watts[-clock[0] % MINUTES :], dtype=torch.float32)


def simulated(days: int = 33) -> Tensor:
    """The exponential of an AR(1) process, correlated over an hour, around a daily wave."""
    phi = math.exp(-1 / 60)
    noise = torch.randn(days * MINUTES, generator=torch.Generator().manual_seed(0)).tolist()
    values = noise[:1]
    for e in noise[1:]:
        values.append(phi * values[-1] + (1 - phi**2) ** 0.5 * e)
    wave = torch.arange(len(values)) * (2 * math.pi / MINUTES)
    return (torch.tensor(values) / 2 - wave.cos()).exp()


def split(minutes: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Days to train on, to stop on and to judge by: four, one and one of every six.

    A day is the log of its means over ``1440 / steps`` minutes. To train there are days that begin
    up to an hour before or after midnight too, none of which reaches into a day of the others.
    """

    def in_steps(days: Tensor) -> Tensor:
        return days.unflatten(-1, (steps, -1)).mean(dim=-1).log()

    days = minutes[: len(minutes) // MINUTES * MINUTES].reshape(-1, MINUTES)
    starts = [day * MINUTES + shift for day in range(4) for shift in range(-60, 61)]
    train = []
    for first in range(0, len(days), 6):
        block = days[first : first + 4].flatten().unfold(0, MINUTES, 1)
        train.append(in_steps(block[[s for s in starts if 0 <= s < len(block)]]))
    return torch.cat(train), in_steps(days[4::6]), in_steps(days[5::6])


def ar1_nats(train: Tensor, test: Tensor) -> Tensor:
    """Held-out nats of each day under an AR(1) process around the mean and sd of each step."""
    loc, scale = train.mean(dim=0), train.std(dim=0)
    z = (train - loc) / scale
    phi = (z[:, 1:] * z[:, :-1]).mean() / z[:, :-1].square().mean()
    spread = (z[:, 1:] - phi * z[:, :-1]).std()
    z = (test - loc) / scale
    first = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0])
    rest = torch.distributions.Normal(phi * z[:, :-1], spread).log_prob(z[:, 1:])
    return first + rest.sum(dim=1) - scale.log().sum()


def distil(teacher: pf.Flow, student: pf.Flow, *, steps: int, batch: int, lr: float) -> float:
    """Train the student in place; returns the seconds it took.

    Both read the same noise. At first the student's days are to be the teacher's (squared error in
    units of each step's spread), then likely ones for the teacher, neither more nor less spread:
    KL(student || teacher) of the student's draws. The one gives way to the other in the middle.
    """
    begin, pool = time.perf_counter(), 25
    teacher, features = teacher.detached(), teacher.event_shape[0]
    scale = student.transform[-1].scale
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        if step % pool == 0:  # its solve costs little more for many days than for few
            noise = torch.randn(pool, batch, features)
            with torch.no_grad():
                days = teacher.transform.forward_and_log_det(noise)[0]
        z, wanted = noise[step % pool], days[step % pool]
        x, log_det = student.transform.forward_and_log_det(z)
        share = min(max(2 - 4 * step / steps, 0.0), 1.0)  # one for a quarter, zero from half on
        loss = share * ((x - wanted) / scale).square().mean()
        if share < 1:
            log_s = student().base_dist.log_prob(z) - log_det
            loss = loss + (1 - share) * (log_s - teacher.log_prob(x)).mean() / features
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
        schedule.step()
    student.eval()
    return time.perf_counter() - begin


@torch.no_grad()
def divergence(p: pf.Flow, q: pf.Flow, draws: int) -> Tensor:
    """``log p(x) - log q(x)`` a step, for draws x of p: its mean is KL(p || q) / steps."""
    x, log_p = p().rsample_and_log_prob((draws,))
    return (log_p - q.log_prob(x.clone())) / x.shape[-1]


def seconds(call: Callable[[], object], times: int = 2) -> float:
    """Processor time of the fastest of a few calls: what else the machine does matters little."""
    found = []
    for _ in range(times):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


@torch.no_grad()
def sampling_seconds(args: argparse.Namespace, steps: int, batch: int) -> dict[str, float]:
    """Seconds on one thread to draw days of ``steps`` steps from flows of these sizes.

    The plain loop is one pass of the teacher for each step; one pass is timed and multiplied.
    """
    teacher = pf.wavenet(steps, channels=args.channels, bins=BINS).eval()
    student = pf.student_of(teacher, layers=args.student_layers).eval()
    x, threads = torch.randn(batch, steps), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "plain loop": steps * seconds(lambda: teacher.log_prob(x)),
            "cached": seconds(lambda: teacher.sample((batch,))),
            "student": seconds(lambda: student.sample((batch,))),
        }
    finally:
        torch.set_num_threads(threads)


def mean_and_error(values: Tensor) -> str:
    """Mean and standard error over the days."""
    return f"{values.mean():.3f} +- {values.std() / len(values) ** 0.5:.3f}"


def autocorrelation(days: Tensor) -> Tensor:
    """Of the deviations from each step's mean, at lags up to half a day."""
    z = days - days.mean(dim=0)
    lags = range(days.shape[1] // 2)
    products = [(z[:, lag:] * z[:, : z.shape[1] - lag]).mean() for lag in lags]
    return torch.stack(products) / products[0]


def draw(
    days: dict[str, Tensor], times: dict[int, dict[str, float]], long: int, path: Path
) -> None:
    """Four days of each, then how they compare: spread of values, memory, and time to draw.

    The real days shown are held out; their spread and autocorrelation are of the others too.
    What was timed are days of ``long`` steps.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        5, 3, figsize=(12, 10), layout="constrained", height_ratios=[1] * 4 + [2]
    )
    colours = dict(zip(days, ("black", "tab:blue", "tab:orange"), strict=True))
    for column, (name, x) in zip(axes.T, days.items(), strict=True):
        edges = torch.linspace(0, 24, x.shape[1] + 1)
        for ax, day in zip(column[:4], x, strict=False):
            ax.stairs(day.exp(), edges, baseline=None, color=colours[name], lw=1)
            ax.set(xlim=(0, 24), ylim=(0, 8), xticks=range(0, 25, 6))
            ax.tick_params(labelbottom=ax is column[3], labelleft=ax in axes[:4, 0])
        column[0].set_title(name)
        column[3].set_xlabel("hour")
        axes[4, 0].hist(
            x.flatten(),
            bins=60,
            range=(-2.5, 2.5),
            density=True,
            histtype="step",
            color=colours[name],
            label=name,
        )
        axes[4, 1].plot(edges[: x.shape[1] // 2], autocorrelation(x), color=colours[name])
    for ax in axes[:4, 0]:
        ax.set_ylabel("kW")
    axes[4, 0].set(xlabel="log kW", title="values")
    axes[4, 0].legend(loc="upper right")
    axes[4, 1].set(xlabel="lag in hours", title="autocorrelation", xlim=(0, 12))
    axes[4, 1].axhline(0, color="0.8", lw=0.8, zorder=0)
    for index, (batch, found) in enumerate(times.items()):
        at = [place + 0.4 * index for place in range(len(found))]
        bars = axes[4, 2].bar(at, found.values(), width=0.38, label=f"batch of {batch}")
        axes[4, 2].bar_label(
            bars, fmt=lambda value: f"{value:.2g}" if value < 100 else f"{value:.0f}"
        )
    axes[4, 2].set(yscale="log", title=f"seconds to draw, {long} steps", xticks=[0.2, 1.2, 2.2])
    axes[4, 2].set_xticklabels(["teacher,\nplain loop", "teacher,\ncached", "student"])
    axes[4, 2].margins(y=0.2)
    axes[4, 2].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Fit, distil, measure, print the table, save the picture; returns the table."""
    torch.manual_seed(args.seed)
    minutes = power()
    steps = 24 if args.smoke else args.steps
    train, val, test = split(simulated() if minutes is None else minutes, steps)
    teacher = pf.wavenet(steps, channels=args.channels, bins=BINS)
    # A fixed number of steps; the days that end training decide when the weights were best.
    epochs = max(1, (2 if args.smoke else args.teacher_steps) * 32 // len(train))
    history = pf.fit(
        teacher,
        train,
        val=val,
        batch_size=32,
        max_epochs=epochs,
        lr=3e-3,
        weight_decay=0.1,
        dropout=0.0,
    )
    student = pf.student_of(teacher, layers=args.student_layers)
    spent = distil(
        teacher, student, steps=4 if args.smoke else args.student_steps, batch=32, lr=4e-3
    )
    with torch.no_grad():
        nats = {
            "AR(1)": ar1_nats(train, test),
            "teacher": teacher.log_prob(test),
            "student": student.log_prob(test),
        }
        draws = 20 if args.smoke else 300
        days = {
            "real": torch.cat([test, train]),
            "teacher": teacher.sample((draws,)),
            "student": student.sample((draws,)),
        }
    long = 48 if args.smoke else MINUTES
    times = {batch: sampling_seconds(args, long, batch) for batch in (1, 100)}
    rows = [
        ("data", "simulated" if minutes is None else "household power, log kW"),
        ("steps a day; days to train on, to judge by", f"{steps}; {len(train)}, {len(test)}"),
        *((f"{name}: held-out nats a step", mean_and_error(n / steps)) for name, n in nats.items()),
        ("KL(student || teacher) a step", mean_and_error(divergence(student, teacher, draws))),
        ("KL(teacher || student) a step", mean_and_error(divergence(teacher, student, draws))),
    ]
    for batch, found in times.items():
        rows += [
            (f"seconds (one thread), {batch} x {long} steps: {name}", f"{value:.3g}")
            for name, value in found.items()
        ]
        gain = found["cached"] / found["student"], found["plain loop"] / found["student"]
        rows.append(
            (f"student faster, batch {batch}: cached, loop", f"{gain[0]:.1f}x, {gain[1]:.0f}x")
        )
    rows.append(("seconds to fit, to distil", f"{history.seconds:.0f}, {spent:.0f}"))
    draw(days, times, long, args.out)
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value:>24}" for name, value in rows))
    print(f"\npicture: {args.out}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distill_wavenet.png"), help="picture"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=144, help="of a day; a divisor of 1440")
    parser.add_argument("--channels", type=int, default=24)
    parser.add_argument("--teacher-steps", type=int, default=320, help="of training")
    parser.add_argument("--student-steps", type=int, default=300, help="of training")
    parser.add_argument("--student-layers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
