"""What a flow keeps, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import torch

from pyroflows._pyro.validation import validates_args
from pyroflows.testing.cases import (
    MakeFlow,
    contexts,
    draws_of,
    points,
    prepared,
    require,
    require_close,
    seeded,
)


def check_state(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """Copies of every kind score the same, before and after use.

    ``deepcopy``, ``pickle``, ``state_dict`` through ``torch.save`` into a fresh flow, and ``.to``
    another dtype and back. What was set from data is not set again after loading.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_state(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype)
    x, context = points(flow, (6,), dtype)
    keys = list(flow.state_dict())
    early = copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))
    wanted = flow.log_prob(x, context).detach()
    with seeded():
        shape, draw_context = draws_of(flow, 3, dtype)
        d = flow(draw_context)
        d.log_prob(d.sample(shape))
    loss = flow.log_prob(x, context).sum()
    if loss.requires_grad:  # a flow may have nothing to train
        loss.backward()
    flow.zero_grad()
    require(list(flow.state_dict()) == keys, "use changed the names in the state_dict")
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(make()).to(dtype).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    other = torch.float32 if dtype == torch.float64 else torch.float64
    copies = {
        "deepcopy before use": early[0],
        "pickle before use": early[1],
        "deepcopy after use": copy.deepcopy(flow),
        "pickle after use": pickle.loads(pickle.dumps(flow)),
        "state_dict": loaded,
    }
    for what, new in copies.items():
        require_close(new.log_prob(x, context), wanted, 1e-12, f"log_prob after {what}")
        for (name, p), q in zip(flow.named_parameters(), new.parameters(), strict=True):
            require(p is not q, f"{what} shares parameter {name!r}")
    there = copy.deepcopy(flow).to(other)
    moved = there.log_prob(x.to(other), None if context is None else context.to(other))
    require(moved.dtype == other, f"log_prob is {moved.dtype} after .to({other})")
    require_close(moved.to(dtype), wanted, 2e-2, f"log_prob after .to({other})")
    back = there.to(dtype)
    require_close(back.log_prob(x, context), wanted, 2e-2, f"log_prob after .to({other}) and back")
    # Layers that data set once, such as ActNorm, say in their state that it was done.
    layers = [layer for layer in loaded.transform.layers() if getattr(layer, "initialized", False)]
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    loaded.initialize(*points(flow, (9,), dtype, seed=4))
    for layer, state in zip(layers, before, strict=True):
        for key, value in layer.state_dict().items():
            require(torch.equal(value, state[key]), f"{key} was set again after load: {layer!r}")


def _global_state() -> dict[str, object]:
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch.distributions' validation": validates_args(),
        "grad mode": torch.is_grad_enabled(),
        "Pyro's parameter store": sorted(pyro.get_param_store().keys()),
        "Pyro's settings": pyro.settings.get(),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def check_no_global_state(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """Making, scoring, drawing change nothing global; scoring leaves the random generator alone.

    Neither ``log_prob`` nor ``sample`` changes a parameter or a buffer.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_no_global_state(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    before = _global_state()
    flow = prepared(make, dtype)
    x, context = points(flow, (4,), dtype)
    shape, draw_context = draws_of(flow, 4, dtype)
    state = copy.deepcopy(flow.state_dict())
    generator = torch.get_rng_state()
    flow.log_prob(x, context)
    flow.train().log_prob(x, context).sum()
    repr(flow)
    require(torch.equal(generator, torch.get_rng_state()), "log_prob moves the random generator")
    with seeded():
        flow.sample(shape, draw_context)
        flow(draw_context).log_prob(flow.sample(shape, draw_context))
    for key, value in flow.state_dict().items():
        require(torch.equal(value, state[key]), f"log_prob or sample changed {key!r}")
    after = _global_state()
    for what, value in before.items():
        require(after[what] == value, f"{what} changed from {value} to {after[what]}")


def check_repr(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """``repr(flow)`` has under 40 lines of at most 200 characters and says what is fast.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_repr(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype)
    lines = repr(flow).splitlines()
    require(len(lines) < 40, f"repr has {len(lines)} lines")
    longest = max(lines, key=len)
    require(len(longest) <= 200, f"repr has a line of {len(longest)} characters: {longest}")
    require(repr(flow.fast) in repr(flow), "repr does not say which direction is fast")
    require(len(repr(flow(contexts(flow.context_shape, (), dtype)))) <= 400, "repr of flow()")
