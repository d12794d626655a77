"""The laws of a whole flow: density, memory of draws, cost, state, use in Pyro, scale."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.utils._python_dispatch import TorchDispatchMode

from pyroflows._law_cases import (
    USUAL,
    MakeFlow,
    conditioners,
    contexts,
    draws_of,
    is_unbounded,
    points,
    prepared,
    randn,
    randomize,
    require,
    require_close,
    require_finite,
    require_shape,
    tolerance,
)
from pyroflows.distribution import Flow, FlowDistribution
from pyroflows.transforms import ActNorm


@contextmanager
def _seeded(seed: int = 0) -> Iterator[None]:
    """Draws from a seed, torch's generator as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_every_parameter_trains(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """Each named parameter, also the base's, gets a finite gradient from scoring and from drawing.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    flow = prepared(make, dtype)
    x, context = points(flow, (6,), dtype)
    shape, given = draws_of(flow, 6, dtype)
    with _seeded():
        losses = {"log_prob(x)": flow.log_prob(x, context).sum()}
        if flow(given).has_rsample:
            draw, log_q = flow.rsample_and_log_prob(shape, given)
            losses["rsample_and_log_prob()"] = log_q.sum() + draw.square().sum()
    names, parameters = zip(*flow.named_parameters(), strict=True)
    for what, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            require(gradient is not None, f"parameter {name!r} gets no gradient from {what}")
            require_finite(gradient, f"gradient of {name!r} from {what}")


@torch.no_grad()
def check_every_feature_moves(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """No data feature is a copy of a base feature, also without feature-wise scales.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    flow = make().to(dtype).eval()
    scales = [
        m for m in flow.transform.modules() if all(p.dim() < 2 for p in m.parameters(recurse=False))
    ]
    # Biases of networks are one-dimensional too, but they belong to matrices.
    scales = [m for m in scales if not isinstance(m, nn.Linear)]
    randomize(flow, keep=scales)
    context = contexts(flow.context_shape, (64,), dtype)
    z = randn((64, *flow.transform.inverse_shape(flow.event_shape)), dtype, seed=1)
    x = flow.transform.forward_and_log_det(z, context)[0]
    free = x if is_unbounded(flow.support) else biject_to(flow.support).inv(x)
    for index, feature in enumerate(free.flatten(1).T):
        distance = (z.flatten(1) - feature[:, None]).abs().amax(dim=0)
        copied = (distance < 1e-4).nonzero()[:, 0].tolist()
        require(not copied, f"data feature {index} is a copy of base feature {copied}")


@torch.no_grad()
def check_density_integrates_to_one(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """The integral of the density is 1, to 2%, by importance sampling.

    The proposal is a Student t around the flow's own draws, wider than they are, in the
    unconstrained space behind the support. With more than four features the random weights are
    smaller, or too few points would count.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    flow = make().to(dtype).eval()
    shape = flow.transform.inverse_shape(flow.event_shape)
    randomize(flow, USUAL if shape.numel() <= 4 else 0.1)
    context = contexts(flow.context_shape, (), dtype)
    rows = 60_000
    with _seeded():
        to_support = biject_to(flow.support)
        x = flow.sample((4000,), context)
        u = (x if is_unbounded(flow.support) else to_support.inv(x)).flatten(1)
        spread = 1.3 * torch.linalg.cholesky(torch.cov(u.T).reshape(u.shape[1], -1))
        proposal = dist.MultivariateStudentT(torch.tensor(5.0, dtype=dtype), u.mean(0), spread)
        u = proposal.sample((rows,))
        log_q = proposal.log_prob(u)
        u = u.unflatten(-1, shape)
        if is_unbounded(flow.support):
            x = u
        else:
            x = to_support(u)
            change = to_support.log_abs_det_jacobian(u, x)
            log_q = log_q - (change.sum(-1) if change.dim() > 1 else change)
        weights = (flow.log_prob(x, context) - log_q).exp()
    error = float(weights.std() / rows**0.5)
    require(error < 0.01, f"the integral is too noisy to judge: standard error {error:.3g}")
    off = abs(float(weights.mean()) - 1)
    require(
        off < min(0.02, 5 * error), f"the density integrates to {weights.mean():.4f} +- {error:.4f}"
    )


def _step_with(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[Flow], None]:
    def step(flow: Flow) -> None:
        parameters = list(flow.parameters())
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(parameter.shape, parameter.dtype, 50 + index)
        optimizer(parameters).step()
        for parameter in parameters:
            parameter.grad = None

    return step


@torch.no_grad()
def _change_in_place(flow: Flow) -> None:
    for parameter in flow.parameters():
        parameter.add_(0.1)


@torch.no_grad()
def _load(flow: Flow) -> None:
    changed = {
        k: v + 0.1 if v.is_floating_point() else v.clone() for k, v in flow.state_dict().items()
    }
    flow.load_state_dict(changed)


def _replace(flow: Flow) -> None:
    for module in flow.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() + 0.1))


CHANGES: dict[str, Callable[[Flow], None]] = {
    "a step of Adam": _step_with(lambda p: torch.optim.Adam(p, lr=0.1)),
    "a step of fused AdamW": _step_with(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "a step of Pyro's ClippedAdam": _step_with(lambda p: ClippedAdam(p, lr=0.1)),
    "load_state_dict": _load,
    "a change of the parameters in place": _change_in_place,
    "a replacement of the parameters": _replace,
}


def _require_memory_tells_the_truth(
    flow: Flow, d: FlowDistribution, x: Tensor, what: str, *, gradients: bool = True
) -> Tensor:
    """``log_prob(x)`` equals ``log_prob(x.clone())`` in value and in parameter gradient."""
    remembered, computed = d.log_prob(x), d.log_prob(x.clone())
    allowed = tolerance(x.dtype)
    require_close(remembered, computed, allowed, f"log_prob(x) against log_prob(x.clone()), {what}")
    require(
        remembered.requires_grad == computed.requires_grad,
        f"log_prob(x) and log_prob(x.clone()) do not both carry a graph, {what}",
    )
    if gradients and computed.requires_grad:
        names, parameters = zip(*flow.named_parameters(), strict=True)
        pairs = [
            torch.autograd.grad(
                value.sum(),
                parameters,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for value in (remembered, computed)
        ]
        for name, one, other in zip(names, *pairs, strict=True):
            # Gradients are sums that may cancel, so they are compared to the largest entry.
            scale = 1 + float(other.detach().abs().max())
            require_close(one / scale, other / scale, 10 * allowed, f"gradient of {name!r}, {what}")
    return computed.detach()


def check_memory_of_draws(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """``log_prob(x)`` equals ``log_prob(x.clone())``, in value and in parameter gradient.

    After ``sample`` and ``rsample``; twice in a row; with other calls in between; under and outside
    ``no_grad``; on an expanded copy; after every kind of change of the parameters; after a change
    of the draw in place. And nothing is kept alive: a draw and its graph die with their last name.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    with _seeded():
        for how in ("sample", "rsample"):
            flow = prepared(make, dtype)
            shape, context = draws_of(flow, 5, dtype)
            if how == "rsample" and not flow(context).has_rsample:
                continue
            _check_unchanged(flow, flow(context), how, shape)
            for label, change in CHANGES.items():
                for grad in (True, False):
                    flow = prepared(make, dtype)
                    d = flow(context)
                    with torch.set_grad_enabled(grad):
                        x = getattr(d, how)(shape)
                        before = _require_memory_tells_the_truth(
                            flow, d, x, f"after {how}()", gradients=False
                        )
                    change(flow)
                    with torch.set_grad_enabled(grad):
                        what = f"after {how}() and {label}, grad mode {grad}"
                        # The draw's own graph is of no use once its parameters have changed.
                        after = _require_memory_tells_the_truth(
                            flow, d, x, what, gradients=how == "sample"
                        )
                    require(not torch.equal(before, after), f"{label} left the density as it was")
        flow = prepared(make, dtype)
        shape, context = draws_of(flow, 5, dtype)
        _check_nothing_is_kept_alive(flow(context), shape)


def _check_unchanged(flow: Flow, d: FlowDistribution, how: str, shape: torch.Size) -> None:
    """All that may happen between drawing and scoring while the parameters stand still."""
    for drawn_with, scored_with in ((True, True), (False, False), (True, False), (False, True)):
        with torch.set_grad_enabled(drawn_with):
            x = getattr(d, how)(shape)
            second = getattr(d, how)(shape)
        with torch.set_grad_enabled(scored_with):
            what = f"after {how}(), drawn with grad mode {drawn_with}, scored with {scored_with}"
            _require_memory_tells_the_truth(flow, d, x, what)
            _require_memory_tells_the_truth(flow, d, x, f"{what}, the second time")
            d.log_prob(second)
            d.sample(shape)
            _require_memory_tells_the_truth(flow, d, x, f"{what}, other calls in between")
            _require_memory_tells_the_truth(flow, d, second, f"{what}, the other draw")
            wide = d.expand((2, *d.batch_shape))
            if not d.batch_shape:
                wide = d.expand((5,))
            _require_memory_tells_the_truth(flow, wide, x, f"{what}, on an expanded copy")
            with torch.no_grad():
                before = d.log_prob(x.clone())
                x.copy_(x.flip(0).clone())
            _require_memory_tells_the_truth(flow, d, x, f"{what} and a change of the draw in place")
            with torch.no_grad():
                require(not torch.equal(before, d.log_prob(x)), "the change of the draw is unseen")
    one = getattr(d, how)(())
    wide = d.expand((3, *d.batch_shape))
    _require_memory_tells_the_truth(flow, wide, one, f"one draw of {how}(), on an expanded copy")


class _Token:
    """Something a graph can hold, whose death can be seen."""


def _check_nothing_is_kept_alive(d: FlowDistribution, shape: torch.Size) -> None:
    if not d.has_rsample:
        return
    x = d.rsample(shape)
    log_q = d.log_prob(x)
    token = _Token()
    log_q.grad_fn.metadata["token"] = token
    draw, graph = weakref.ref(x), weakref.ref(token)
    del token, log_q
    require(draw() is x, "the draw vanished")
    del x
    require(draw() is None, "a draw is kept alive")
    require(graph() is None, "the graph of a draw's log-density is kept alive")


def check_draws_are_scored(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """``rsample_and_log_prob`` agrees with ``log_prob``, and with ``rsample`` under one seed.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    flow = prepared(make, dtype)
    for shape, batch in (((), ()), ((5,), ()), ((2, 3), (4,)), ((0,), ())):
        context = contexts(flow.context_shape, batch, dtype)
        rows = (*shape, *(batch if flow.context_shape else ()))
        d = flow(context)
        draw = "rsample" if d.has_rsample else "sample"
        with _seeded():
            x, log_q = (
                d.rsample_and_log_prob(shape)
                if d.has_rsample
                else (lambda x: (x, d.log_prob(x)))(d.sample(shape))
            )
        with _seeded():
            again = getattr(flow, draw)(shape, context)
        require_shape(x, (*rows, *flow.event_shape), f"draws of shape {shape}, context {batch}")
        require_shape(log_q, rows, f"their log-densities, shape {shape}, context {batch}")
        require_close(again, x, 0.0, f"{draw} against rsample_and_log_prob, same seed")
        require(not x.numel() or flow.support.check(x).all(), "a draw lies outside the support")
        scored = flow.log_prob(x.detach(), context)
        allowed = 10 * tolerance(dtype)
        require_close(log_q, scored, allowed, "rsample_and_log_prob against log_prob")
        scored = flow.detached().log_prob(x, context)
        require_close(log_q, scored, allowed, "rsample_and_log_prob against detached().log_prob")


@contextmanager
def _count_network_calls(flow: Flow) -> Iterator[dict[str, list[int]]]:
    """Counts of forward passes and of sequential solutions, by network."""
    networks = conditioners(flow.transform)
    counts = {name: [0, 0] for name in networks}
    handles, patched = [], []
    for name, net in networks.items():

        def passed(*_: object, name: str = name) -> None:
            counts[name][0] += 1

        handles.append(net.register_forward_hook(passed))
        if hasattr(net, "solve"):
            solve = net.solve

            def solved(
                *args: object, solve: Callable = solve, name: str = name, **kwargs: object
            ) -> object:
                counts[name][1] += 1
                return solve(*args, **kwargs)

            net.solve = solved
            patched.append(net)
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for net in patched:
            del net.solve


def check_cost(make: MakeFlow, dtype: torch.dtype = torch.float64, fast: str | None = None) -> None:
    """``flow.fast`` is kept: one call a network in the fast direction, none to score an own draw.

    Counted on the modules that layers hold as ``net``. A network that has ``solve`` is never
    called feature by feature: the slow direction solves once, and calls once more for its gradient.

    Args:
        make: makes the flow.
        dtype: of its tensors.
        fast: what ``flow.fast`` should be, if you want that checked too.
    """
    flow = prepared(make, dtype)
    require(fast in (None, flow.fast), f"fast: expected {fast!r}, got {flow.fast!r}")
    x, context = points(flow, (5,), dtype)
    shape, given = draws_of(flow, 5, dtype)

    nets = conditioners(flow.transform)

    def expect(counts: dict[str, list[int]], calls: int, what: str) -> None:
        for name, found in counts.items():
            require(
                found == [calls, 0],
                f"{what} called {name} {found[0]} times and solved {found[1]} times; "
                f"fast={flow.fast!r} promises {calls} and 0",
            )
            found[:] = [0, 0]

    def expect_slow(counts: dict[str, list[int]], calls: int, what: str) -> None:
        for name, found in counts.items():
            require(
                not hasattr(nets[name], "solve") or (found[0] <= calls and found[1] <= 1),
                f"{what} called {name} {found[0]} times and solved {found[1]} times; "
                f"at most {calls} and 1 are needed",
            )
            found[:] = [0, 0]

    with _seeded(), _count_network_calls(flow) as counts:
        scoring = expect if flow.fast in ("log_prob", "both") else expect_slow
        drawing = expect if flow.fast in ("sample", "both") else expect_slow
        flow.log_prob(x, context)
        # Outside no_grad a solution is followed by two passes that carry its gradient.
        scoring(counts, 1 if scoring is expect else 2, "log_prob")
        with torch.no_grad():
            flow.log_prob(x, context)
            scoring(counts, 1, "log_prob under no_grad")
            flow.sample(shape, given)
            drawing(counts, 1, "sample")
        for grad in (True, False):
            d = flow(given)
            if not d.has_rsample:
                continue
            with torch.set_grad_enabled(grad):
                own = d.rsample(shape)
                for found in counts.values():
                    found[:] = [0, 0]
                d.log_prob(own)
                expect(counts, 0, "log_prob of an own draw")
                d.log_prob(own)
                expect(counts, 0, "log_prob of an own draw, the second time")
        if drawing is expect and flow(given).has_rsample:
            _, context = draws_of(flow, 4, dtype)

            def model() -> None:
                d = flow(context)
                with pyro.plate("rows", 4):
                    pyro.sample("x", d if context is not None else d.expand((4,)))

            pyro.poutine.trace(model).get_trace().compute_log_prob()
            expect(counts, 1, "pyro.sample and the trace's log_prob_sum")


def check_state(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """Copies of every kind score the same, before and after use.

    ``deepcopy``, ``pickle``, ``state_dict`` through ``torch.save`` into a fresh flow, and ``.to``
    another dtype and back. What was set from data is not set again after loading.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    flow = prepared(make, dtype)
    x, context = points(flow, (6,), dtype)
    keys = list(flow.state_dict())
    early = copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))
    wanted = flow.log_prob(x, context).detach()
    with _seeded():
        shape, given = draws_of(flow, 3, dtype)
        d = flow(given)
        d.log_prob(d.sample(shape))
    flow.log_prob(x, context).sum().backward()
    flow.zero_grad()
    require(list(flow.state_dict()) == keys, "use changed the names in the state_dict")
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    loaded = make().to(dtype).eval()
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
    for name, layer in loaded.transform.named_modules():
        if isinstance(layer, ActNorm) and layer.initialized:
            before = copy.deepcopy(layer.state_dict())
            layer.initialize(3 + 2 * randn((9, len(layer.loc)), dtype, 4))
            for key, value in layer.state_dict().items():
                require(torch.equal(value, before[key]), f"{name}.{key} was set again after load")


def check_pyro(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """The distribution goes wherever a Pyro distribution goes.

    Expanded, masked, ``to_event``, in a plate, and as a prior under ``AutoNormal``.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    flow = prepared(make, dtype)
    event = len(flow.event_shape)
    context = contexts(flow.context_shape, (4,), dtype)
    d = flow(context)
    if context is None:
        d = d.expand((4,))
    require(isinstance(d, dist.TransformedDistribution), f"not a distribution of Pyro's: {type(d)}")
    require(d.event_dim == event == d.support.event_dim, "event_dim of distribution and support")
    require(d.batch_shape == (4,), f"batch shape: expected (4,), got {tuple(d.batch_shape)}")
    with _seeded(), pyro.get_param_store().scope():
        x = d.sample((3,))
        require_shape(x, (3, 4, *flow.event_shape), "draws")
        require(d.support.check(x).all(), "draws outside the support")
        wanted = d.log_prob(x.clone()).detach()
        allowed = tolerance(dtype)
        wide = d.expand((2, 4))
        require_shape(wide.sample((5,)), (5, 2, 4, *flow.event_shape), "draws, expanded")
        require_close(
            wide.log_prob(x[:2].clone()), wanted[:2], allowed, "log_prob of an expanded copy"
        )
        require_close(
            d.to_event(1).log_prob(x.clone()), wanted.sum(-1), allowed, "log_prob after to_event(1)"
        )
        mask = torch.tensor([True, False, True, True])
        require_close(
            d.mask(mask).log_prob(x.clone()), wanted * mask, allowed, "log_prob after mask"
        )

        def model() -> Tensor:
            with pyro.plate("rows", 4):
                value = pyro.sample("x", flow(context))
            pyro.sample("seen", dist.Normal(value.sum(), 10.0), obs=torch.tensor(1.0, dtype=dtype))
            return value

        trace = pyro.poutine.trace(model).get_trace()
        trace.compute_log_prob()
        require_shape(trace.nodes["x"]["log_prob"], (4,), "log_prob in a plate")
        value = trace.nodes["x"]["value"].clone()
        require_close(
            trace.nodes["x"]["log_prob"], flow.log_prob(value, context), allowed, "in a plate"
        )
        guide = pyro.infer.autoguide.AutoNormal(model)
        optimizer = pyro.optim.ClippedAdam({"lr": 0.01})
        svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
        losses = torch.tensor([svi.step() for _ in range(3)])
        require_finite(losses, "loss of AutoNormal with the flow as a prior")
        drawn = guide()["x"]
        require(flow.support.check(drawn).all(), "AutoNormal leaves the support")


def check_nuts(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """As a prior under NUTS: with small steps the chain moves, and stays in the support.

    Args:
        make: makes the flow.
        dtype: of its tensors.
    """
    flow = prepared(make, dtype)
    context = contexts(flow.context_shape, (), dtype)

    def model() -> None:
        value = pyro.sample("x", flow(context))
        pyro.sample("seen", dist.Normal(value.sum(), 10.0), obs=torch.tensor(1.0, dtype=dtype))

    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    with _seeded(), pyro.get_param_store().scope():
        # A fixed small step: what is tested is the density's gradient, not the adaptation.
        kernel = pyro.infer.NUTS(
            model,
            step_size=0.1,
            adapt_step_size=False,
            adapt_mass_matrix=False,
            max_tree_depth=4,
        )
        sampler = pyro.infer.MCMC(kernel, 20, warmup_steps=1, disable_progbar=True)
        sampler.run()
        drawn = sampler.get_samples()["x"]
    require_shape(drawn, (20, *flow.event_shape), "draws of NUTS")
    require_finite(drawn, "draws of NUTS")
    require(flow.support.check(drawn).all(), "NUTS leaves the support")
    different = len(drawn.flatten(1).unique(dim=0))
    require(different > 14, f"NUTS hardly moves: {different} different draws of 20")


def check_large_weights(make: MakeFlow, dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients are finite under random weights five times 1 / sqrt(fan-in).

    Once that size for a bounded support, where the exponential of a moderate number overflows.

    Args:
        make: makes the flow.
        dtype: of its tensors; float32 is the hard case.
    """
    gain = 10 * USUAL if is_unbounded(make().support) else 2 * USUAL
    flow = prepared(make, dtype, gain)
    x, context = points(prepared(make, dtype), (200,), dtype)
    shape, given = draws_of(flow, 200, dtype)
    with _seeded():
        losses = {"log_prob(x)": flow.log_prob(x, context)}
        if flow(given).has_rsample:
            draw, losses["rsample_and_log_prob()"] = flow.rsample_and_log_prob(shape, given)
            require_finite(draw, "draws")
        else:
            require_finite(flow.sample(shape, given), "draws")
    names, parameters = zip(*flow.named_parameters(), strict=True)
    for what, value in losses.items():
        require_finite(value, what)
        gradients = torch.autograd.grad(value.mean(), parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                require_finite(gradient, f"gradient of {name!r} from {what}")


def _global_state() -> dict[str, object]:
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch.distributions' validation": torch.distributions.Distribution._validate_args,
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
    """
    before = _global_state()
    flow = prepared(make, dtype)
    x, context = points(flow, (4,), dtype)
    shape, given = draws_of(flow, 4, dtype)
    state = copy.deepcopy(flow.state_dict())
    generator = torch.get_rng_state()
    flow.log_prob(x, context)
    flow.train().log_prob(x, context).sum()
    repr(flow)
    require(torch.equal(generator, torch.get_rng_state()), "log_prob moves the random generator")
    with _seeded():
        flow.sample(shape, given)
        flow(given).log_prob(flow.sample(shape, given))
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
    """
    flow = prepared(make, dtype)
    lines = repr(flow).splitlines()
    require(len(lines) < 40, f"repr has {len(lines)} lines")
    longest = max(lines, key=len)
    require(len(longest) <= 200, f"repr has a line of {len(longest)} characters: {longest}")
    require(repr(flow.fast) in repr(flow), "repr does not say which direction is fast")
    require(len(repr(flow(contexts(flow.context_shape, (), dtype)))) <= 400, "repr of flow()")


class _CountElements(TorchDispatchMode):
    """Adds up the sizes of all tensors made: what a computation writes to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.total += tensor.numel()
        return result


@torch.no_grad()
def check_many_rows(
    make: MakeFlow, dtype: torch.dtype = torch.float64, rows: int = 100_000
) -> None:
    """No rows work, many rows work, and what is written to memory grows linearly with them.

    Args:
        make: makes the flow.
        dtype: of its tensors.
        rows: how many.
    """
    flow = prepared(make, dtype)
    for number in (0, rows):
        context = contexts(flow.context_shape, (), dtype)
        with _seeded():
            x = flow.sample((number,), context)
            require_shape(x, (number, *flow.event_shape), f"{number} draws")
            value = flow.log_prob(x, context)
            require_shape(value, (number,), f"log_prob of {number} rows")
            require_finite(value, f"log_prob of {number} rows")
    for what in ("log_prob", "sample"):
        written = []
        for number in (500, 1000, 2000):
            x, context = points(flow, (number,), dtype)
            shape, given = draws_of(flow, number, dtype)
            with _seeded(), _CountElements() as count:
                if what == "log_prob":
                    flow.log_prob(x, context)
                else:
                    flow.sample(shape, given)
            written.append(count.total)
        first, second = written[1] - written[0], written[2] - written[1]
        require(
            second <= 2.1 * first,
            f"{what} writes {written} numbers for 500, 1000 and 2000 rows: more than linear",
        )
