"""How close two flows are, measured: divergences of layers, a classifier, speeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.distillation.draws import Contexts, drawn
from pyroflows.distillation.objectives import layer_loss, layer_targets
from pyroflows.distillation.pairs import matched
from pyroflows.distillation.report import Estimate
from pyroflows.distributions.flow import Flow


def mean_and_error(values: Tensor) -> Estimate:
    """The mean and its standard error."""
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


@torch.no_grad()
def layer_divergences(
    teacher: Flow, student: Flow, x: Tensor, context: Tensor | None
) -> list[Estimate] | None:
    """The closed-form KL of each pair of matched Gaussian layers at the teacher's points."""
    pairs = matched(teacher, student)
    if not pairs or not all(pair.gaussian for pair in pairs):
        return None
    targets = layer_targets(teacher, pairs, x, context)
    return [mean_and_error(layer_loss(target, context)) for target in targets]


def two_sample_auc(first: Tensor, second: Tensor, seed: int = 0) -> float:
    """How well gradient-boosted trees tell two samples apart: 0.5 if not at all, 1 if always.

    scikit-learn's ``HistGradientBoostingClassifier``, trained on one half of the rows and judged on
    the other (Lopez-Paz & Oquab 2017, arXiv:1610.06545).

    Args:
        first: ``(rows, *event)``.
        second: the same of the other sample.
        seed: of the split and of the trees.
    """
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

    rows = torch.cat([first.flatten(1), second.flatten(1)]).double().cpu().numpy()
    label = np.repeat([0, 1], [len(first), len(second)])
    order = np.random.default_rng(seed).permutation(len(rows))
    train, test = order[::2], order[1::2]
    judge = HistGradientBoostingClassifier(random_state=seed).fit(rows[train], label[train])
    return float(roc_auc_score(label[test], judge.predict_proba(rows[test])[:, 1]))


def speed(draw: Callable[[], Tensor], n: int, repeats: int = 5) -> float:
    """Samples a second: the fastest of a few calls that draw ``n``, after one to warm up.

    What else the machine does then matters little.
    """
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        x = draw()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds.append(time.perf_counter() - begin)
    return n / min(seconds[1:])


def sampling_speed(flow: Flow, contexts: Contexts, n: int) -> float:
    """Samples a second in batches of ``n``."""
    context = contexts.draw(n)
    return speed(lambda: drawn(flow, context, n)[0], n, repeats=5 if n > 1 else 20)


def plain_loop_speed(flow: Flow, contexts: Contexts, n: int) -> float:
    """The same by the textbook's inversion: a whole pass of each net for every feature.

    NaN for flows without a layer to invert.
    """
    loops = [getattr(part.inv, "plain_inverse", None) for part in flow.parts]
    if not any(loops):
        return math.nan
    context = contexts.draw(n)
    shape = (n,) if context is None else ()

    @torch.no_grad()
    def draw() -> Tensor:
        x = flow(context, validate_args=False).base_dist.sample(shape)
        for part, loop in zip(flow.parts, loops, strict=True):
            x = loop(x, context) if loop else part.forward_and_log_det(x, context)[0]
        return x

    return speed(draw, n, repeats=1)
