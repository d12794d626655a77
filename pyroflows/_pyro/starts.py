"""Where a guide's sites start, by Pyro's ``init_loc_fn``s."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

SPHERE_ADVICE = (
    "sample it from ProjectedNormal under poutine.reparam with ProjectedNormalReparam; for the "
    "prior VonMises3D(c) take ProjectedNormal(torch.zeros(3)), which is uniform, and pyro.factor "
    "of VonMises3D(c).log_prob of its value"
)


class Started(Messenger):
    """Puts each continuous latent site at its start; discrete ones are drawn.

    Args:
        init_loc_fn: gives a site's start, as in Pyro's autoguides.
    """

    def __init__(self, init_loc_fn: Callable[..., Any]) -> None:
        super().__init__()
        self.init_loc_fn = init_loc_fn

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["value"] is not None or site_is_subsample(msg) or fn.has_enumerate_support:
            return
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Singular sample")  # a start need not be typical
            value = self._start_of(msg)
        if value.shape != fn.shape():
            raise ValueError(
                f"init_loc_fn: expected a value of shape {tuple(fn.shape())} for site "
                f"{msg['name']!r}, got {tuple(value.shape)}"
            )
        msg["value"] = value

    def _start_of(self, msg: Any) -> Tensor:
        try:
            return self.init_loc_fn(msg)
        except NotImplementedError as error:
            raise ValueError(
                f"model: latent site {msg['name']!r} ({type(msg['fn']).__name__}) has no start, "
                f"since no map from R^n onto its support is known ({error}); write it by "
                "pyro.deterministic as a function of sites with a plain support (a direction: "
                f"{SPHERE_ADVICE}), pass init_loc_fn=, or name it in hide="
            ) from error
