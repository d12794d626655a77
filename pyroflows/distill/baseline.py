"""The honest baseline: the student's own architecture, trained on the data without a teacher."""

from __future__ import annotations

import copy
import time
from typing import Any

from pyroflows.data.rows import Batch, reference
from pyroflows.distribution import Flow
from pyroflows.fit import fit
from pyroflows.flows import builders


def untrained(student: Flow) -> Flow:
    """A fresh flow like the student, without the teacher; a copy of one made elsewhere."""
    build = builders().get((student.config or {}).get("builder"))
    if build is None:
        return copy.deepcopy(student)
    return build(**copy.deepcopy(student.config["arguments"])).to(reference(student))


def fit_for(seconds: float, flow: Flow, rows: Batch, **devices: Any) -> None:
    """Maximum likelihood for about so many seconds; the schedule is cut to the time there is.

    It takes the whole of it, without a stop before. The first epoch, by which the others are
    counted, has the set-up in it; so it takes less time rather than more.

    Args:
        seconds: of wall-clock.
        flow: what to train, in place.
        rows: data and context.
        **devices: arguments of ``pf.fit``.
    """
    begin = time.perf_counter()
    fit(copy.deepcopy(flow), *rows, max_epochs=1, progress=False, **devices)
    an_epoch = time.perf_counter() - begin
    epochs = max(1, round(seconds / an_epoch))
    fit(flow, *rows, max_epochs=epochs, patience=epochs, progress=False, **devices)
