"""The numbers of a training that are rarely changed, and words that are no arguments (any more)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypedDict

_FABRIC = "fabric={{{name!r}: ...}}, the arguments of lightning_fabric.Fabric by name"
_CHECKPOINT = "checkpoint=pf.Checkpoint(folder, {name}=...)"
_COMPARE = "pf.compare(teacher, student, {name}=...), which makes the report after pf.distill"
MOVED = {
    **dict.fromkeys(("accelerator", "devices", "strategy", "precision", "num_nodes"), _FABRIC),
    **dict.fromkeys(("every", "resume"), _CHECKPOINT),
}
COMPARED = dict.fromkeys(
    ("test", "draws", "classifier_draws", "speed_batches", "baseline"), _COMPARE
)


class Recipe(TypedDict, total=False):
    """How ``pf.fit`` and ``pf.distill`` take their steps: AdamW, cosine decay, averaged weights.

    Attributes:
        lr: first step size; falls to zero as half a cosine.
        clip: largest gradient norm.
        average: decay of the weights' exponential average; 0 for none.
        patience: epochs (evaluations, in a distillation) without a better score before stopping.
    """

    lr: float
    clip: float
    average: float | None
    patience: int


class FitRecipe(Recipe, total=False):
    """What ``pf.fit`` takes beside.

    Attributes:
        weight_decay: of AdamW, for weight matrices.
        dropout: share of hidden units dropped while training.
        start: make the data-dependent start first (``pf.initialize``).
    """

    weight_decay: float | None
    dropout: float | None
    start: bool


def complete(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    known: tuple[str, ...],
    moved: Mapping[str, str] = MOVED,
) -> dict[str, Any]:
    """The defaults, with what was given in their place.

    Args:
        given: keyword arguments.
        defaults: all that there are.
        known: names of the function's other arguments, for a hint at what was meant.
        moved: names that were arguments once, and how to say the same now.

    Raises:
        ValueError: an argument that has moved.
        TypeError: one that is unknown.

    Example:
        >>> complete({"lr": 0.1}, {"lr": 1e-3, "clip": 5.0}, ())
        {'lr': 0.1, 'clip': 5.0}
        >>> complete({"patiance": 3}, {"patience": 30}, ())
        Traceback (most recent call last):
        TypeError: patiance: there is no such argument; did you mean patience?
    """
    check_moved(given, moved)
    for name in given:
        if name not in defaults:
            words = [*defaults, *known]
            near = difflib.get_close_matches(name, words, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(sorted(words))}"
            raise TypeError(f"{name}: there is no such argument; {hint}")
    return {**defaults, **given}


def check_moved(given: Mapping[str, Any], moved: Mapping[str, str] = MOVED) -> None:
    """Raise a ``ValueError`` for an argument that has moved, with how to say the same now."""
    for name in given:
        if name in moved:
            raise ValueError(f"{name}: say {moved[name].format(name=name)}")
