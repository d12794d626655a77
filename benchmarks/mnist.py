"""MNIST's bits per dimension after equal processor time: our Glow beside normflows' Glow.

Same levels, steps and channels, no composed priors, the same noise between grey levels, batches,
optimiser and average of the weights; and ours given the class, and with noise that is learnt.
Contenders take turns in one process, on one core, so what else runs on the machine slows all of
them alike::

    python benchmarks/mnist.py --minutes 8
    python benchmarks/mnist.py --minutes 8 --contenders classes variational

Needs the folder with MNIST that ``PYROFLOWS_DATA`` names. Prints the bits per dimension of some
validation pictures as it goes, and those of all test pictures at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from image_peers import normflows_glow
from torch import Tensor, nn
from torch.nn import functional as F

import pyroflows as pf
from pyroflows.discrete.quantization import Quantized
from pyroflows.training.loop import Average

SHAPE, BINS, CLASSES = (1, 28, 28), 256, 10
BATCH, STEP_SIZE, CLIP, AVERAGE = 64, 1e-3, 5.0, 0.998
SLICE = 5.0  # seconds of a turn
Score = Callable[[Tensor, Tensor], Tensor]  # pictures and labels to nats
Made = tuple[nn.Module, Score]


def unconditional(levels: int, steps: int, channels: int) -> Made:
    """Our Glow, as normflows can have it too."""
    flow = pf.glow(SHAPE, levels=levels, steps=steps, channels=channels, prior=False)
    q = pf.quantized(flow, BINS)
    return q, lambda x, labels: q.log_prob(x)


def variational(levels: int, steps: int, channels: int) -> Made:
    """The same with noise from a flow."""
    flow = pf.glow(SHAPE, levels=levels, steps=steps, channels=channels, prior=False)
    q = pf.quantized(flow, BINS, dequantizer="variational")
    return q, lambda x, labels: q.log_prob(x)


def with_prior(levels: int, steps: int, channels: int) -> Made:
    """The same as the first with composed priors, the builder's default."""
    q = pf.quantized(pf.glow(SHAPE, levels=levels, steps=steps, channels=channels), BINS)
    return q, lambda x, labels: q.log_prob(x)


def classes(levels: int, steps: int, channels: int) -> Made:
    """The same as the first, given the class."""
    flow = pf.glow(SHAPE, CLASSES, levels=levels, steps=steps, channels=channels, prior=False)
    q = pf.quantized(flow, BINS)
    return q, lambda x, labels: q.log_prob(x, F.one_hot(labels, CLASSES).float())


def normflows(levels: int, steps: int, channels: int) -> Made:
    """Theirs, on the same dequantised pictures."""
    made = normflows_glow(SHAPE, levels, steps, channels)

    def score(x: Tensor, labels: Tensor) -> Tensor:
        y = (x + torch.rand(x.shape)) / BINS
        return made.log_prob(y) - math.prod(SHAPE) * math.log(BINS)

    return made.module, score


CONTENDERS: dict[str, Callable[[int, int, int], Made]] = {
    "pyroflows": unconditional,
    "normflows": normflows,
    "prior": with_prior,
    "classes": classes,
    "variational": variational,
}


class Run:
    """A contender in training.

    Args:
        made: the model and its score.
        data: MNIST.
        seed: of the batches, the same for all.
    """

    def __init__(self, made: Made, data: pf.datasets.LabelledSplit, seed: int) -> None:
        self.module, self.score = made
        self.x, self.labels = data.train, data.train_labels
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=STEP_SIZE, fused=True)
        self.average = Average(self.parameters, AVERAGE)
        self.seconds, self.steps = 0.0, 0

    def start(self) -> None:
        """The data-dependent start; normflows makes its own at the first call."""
        with torch.no_grad():
            x, labels = self.x[:2000], self.labels[:2000]
            if isinstance(self.module, Quantized):
                needs = self.module.context_shape
                context = F.one_hot(labels, CLASSES).float() if needs else None
                pf.initialize(self.module, x, context)
            self.score(x, labels)
        self.average.restart()

    def train(self, until: float) -> None:
        """Steps until so many seconds of the processor are spent."""
        self.module.train()
        before = self.seconds
        begin = time.process_time()
        while self.seconds < until:
            rows = torch.randint(len(self.x), (BATCH,), generator=self.generator)
            loss = -self.score(self.x[rows], self.labels[rows]).mean()
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimiser.step()
            self.average.update()
            self.steps += 1
            self.seconds = before + time.process_time() - begin

    @torch.no_grad()
    def bits(self, x: Tensor, labels: Tensor) -> float:
        """Bits per dimension with the averaged weights, noise from a seed."""
        self.module.eval()
        with self.average.in_place(), torch.random.fork_rng([]):
            torch.manual_seed(1)
            pairs = zip(x.split(500), labels.split(500), strict=True)
            nats = torch.cat([self.score(*pair) for pair in pairs]).mean().item()
        return pf.bits_per_dim(nats, SHAPE)


def main(args: argparse.Namespace) -> list[dict]:
    """Train all by turns; print and write the figures."""
    torch.distributions.Distribution.set_default_validate_args(False)
    data = pf.datasets.mnist()
    runs = {}
    for name in args.contenders:
        torch.manual_seed(args.seed)
        made = CONTENDERS[name](args.levels, args.steps, args.channels)
        runs[name] = Run(made, data, args.seed)
        runs[name].start()
    few = data.val[:1000], data.val_labels[:1000]
    turns = math.ceil(60 * args.minutes / SLICE)
    for turn in range(turns):
        # Backwards every other time, so nobody always comes first.
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            runs[name].train(SLICE * (turn + 1))
        if turn % 6 == 5:
            told = [f"{name} {run.bits(*few):.3f} ({run.steps})" for name, run in runs.items()]
            minutes = SLICE * (turn + 1) / 60
            print(f"{minutes:5.1f} minutes: {', '.join(told)}", flush=True)
    lines = [
        {
            "contender": name,
            "parameters": sum(p.numel() for p in run.parameters),
            "processor_seconds": run.seconds,
            "steps": run.steps,
            "test_bits_per_dim": run.bits(data.test, data.test_labels),
        }
        for name, run in runs.items()
    ]
    print(f"\n{'':14}{'parameters':>12}{'steps':>8}{'test bits/dim':>15}")
    for name, line in zip(runs, lines, strict=True):
        numbers = f"{line['parameters']:>12,}{line['steps']:>8}{line['test_bits_per_dim']:>15.3f}"
        print(f"{name:14}{numbers}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(lines, indent=1))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--minutes", type=float, default=8.0, help="of the processor, for each")
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="at each level")
    parser.add_argument("--channels", type=int, default=64, help="hidden, of the coupling nets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist.json"))
    torch.set_num_threads(1)
    main(parser.parse_args())
