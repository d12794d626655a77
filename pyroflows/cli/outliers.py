"""Which scores of a table are outliers, and how many of them chance explains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pyroflows.cli.runs import Run


def count_outliers(run: Run, scores: np.ndarray, quantile: float) -> tuple[dict[str, Any], int]:
    """What the scores of a table show, and how many outliers chance allows among them.

    Args:
        run: whose training rows and held-out rows say what is usual.
        scores: of the table; NaN where a row has none.
        quantile: of the training rows' scores; below it a row is an outlier.
    """
    trained, unseen = run.scores(run.train), run.scores(run.test)
    threshold = float(np.quantile(trained, quantile, method="lower"))
    scored = int((~np.isnan(scores)).sum())
    outliers = scores < threshold  # a NaN is not
    far = scores < lowest_by_chance(np.concatenate([trained, unseen]), scored)
    finite = scores[np.isfinite(scores)]
    facts = {
        "rows": len(scores),
        "scored": scored,
        "unscored": len(scores) - scored,
        "mean": float(finite.mean()) if len(finite) else None,
        "threshold": threshold,
        "quantile": quantile,
        "outliers": int(outliers.sum()),
        "far_out": int(far.sum()),
    }
    return facts, outliers_by_chance(scored, int((unseen < threshold).sum()), len(unseen))


def lowest_by_chance(known: np.ndarray, rows: int) -> float:
    """The score that the lowest of ``rows`` new rows stays above, 99 times in a hundred.

    A log-density's tail is at most exponential: the lowest of n scores is about log(n) of the
    tail's scales below the highest. That gives the scale; the lowest of ``100 rows`` new scores is
    less than log(100 rows) scales below the lowest known one.
    """
    lowest, highest = known.min(), known.max()
    times = max(1.0, math.log(100 * max(rows, 1)) / math.log(len(known)))
    return float(lowest - times * (highest - lowest))


def outliers_by_chance(rows: int, below: int, known: int) -> int:
    """How many outliers ``rows`` new rows have at most, 99 times in a hundred.

    Of ``known`` rows like these ``below`` were outliers. So the number of outliers is at most
    beta-binomial, of ``rows`` trials with Beta(below + 1, known - below).
    """
    a, b = below + 1.0, max(known - below, 1.0)
    count = torch.arange(rows + 1.0, dtype=torch.float64)
    log_probability = (
        math.lgamma(rows + 1)
        - torch.lgamma(count + 1)
        - torch.lgamma(rows - count + 1)
        + torch.lgamma(count + a)
        + torch.lgamma(rows - count + b)
        - math.lgamma(rows + a + b)
        - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    )
    return int((log_probability.exp().cumsum(0) < 0.99).sum())
