"""Discrete sites summed out by Pyro's own enumeration: what of it has no public name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

Program = Callable[..., Any]


class _LogRing(LogRing):
    _backend = "pyroflows._pyro.log_einsum"


class _Enumerate(EnumMessenger):
    """Pyro's, which looks at shapes by ``Tensor.data``: torch.func.vmap does not allow that."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if value is None or not isinstance(msg["fn"], TorchDistributionMixin):
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        dim_to_id = msg["infer"].setdefault("_dim_to_id", {})
        dim_to_id.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {
            dim: id_ for dim, id_ in dim_to_id.items() if len(shape) >= -dim and shape[dim] > 1
        }


def configured(model: Program, names: Collection[str]) -> Program:
    """The model with these sites marked for Pyro's parallel enumeration.

    Args:
        model: with discrete sites of finite support.
        names: of these sites.
    """

    def infer(site: Any) -> Any:
        return {"enumerate": "parallel"} if site["name"] in names else {}

    return poutine.infer_config(model, config_fn=infer)


def enumerated(model: Program, names: Collection[str], nesting: int) -> Program:
    """The model with these sites' values side by side, each in a dimension left of all plates.

    Args:
        model: with discrete sites of finite support.
        names: of these sites.
        nesting: how many dimensions to the left the model's plates reach.
    """
    return _Enumerate(-1 - nesting)(configured(model, names))


def log_prob_summed_out(trace: Trace) -> Tensor:
    """The log-density of a run of an enumerated model, its enumerated sites summed out.

    Args:
        trace: without the indices that plates draw, its log-densities computed.
    """
    trace.pack_tensors()
    costs, factors, _, dims, scale = _compute_model_factors(trace, Trace())
    terms = [term for terms in costs.values() for term in terms]
    if factors:
        sizes: dict[str, int] = {}
        for parts in factors.values():
            for part in parts:
                sizes.update(zip(part._pyro_dims, part.shape, strict=True))
        with shared_intermediates() as cache:
            ring = _LogRing(cache=cache, dim_to_size=sizes)
            tree = contract_tensor_tree(factors, dims, ring=ring)
        for parts in tree.values():
            terms += [packed.scale_and_mask(part, scale=scale) for part in parts]
    return torch.stack([torch.as_tensor(term).sum() for term in terms]).sum()
