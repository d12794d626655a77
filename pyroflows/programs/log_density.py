"""The log joint of any Pyro model as a function of one unconstrained vector, and of many at once.

A model is written for one draw. ``torch.func.vmap`` runs it for many, whatever its dimensions mean,
as long as no branch and no plain number is made of a draw's values; where one is, draws run one by
one.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Independent, IndependentTransform

from pyroflows._pyro.anchored import Anchored
from pyroflows._pyro.enumeration import enumerated, log_prob_summed_out
from pyroflows._pyro.guides import FreeSite
from pyroflows._pyro.threads import runs_models
from pyroflows.programs.circles import is_angle
from pyroflows.programs.sites import changed_model, split
from pyroflows.programs.supports import bijection_of_site
from pyroflows.programs.vectorize import Program, is_subsampled, is_unobserved_part, sample_sites

# What a model may raise where it cannot be batched, or at an extreme point.
ERRORS = (RuntimeError, ValueError, IndexError, NotImplementedError, ArithmeticError, TypeError)
_AT_ONCE = 2**22  # numbers of all sites, all vectors together: 16 MiB of float32 each time
_UNSEEN = 16  # vectors that run at once to see how many numbers a run has
_ROUNDING = 1e-4  # of a log-density, relative, by which one draw may differ among others


class Ran(NamedTuple):
    """What runs of a model gave, draws first where there are several.

    Attributes:
        values: each latent site's value inside its support, ``(*batch, *site shape)``.
        log_dets: of the maps onto the supports, site by site, ``(*batch, *its batch shape)``.
        log_p: the log joint of data and unconstrained vector in nats, ``(*batch,)``.
    """

    values: dict[str, Tensor]
    log_dets: dict[str, Tensor]
    log_p: Tensor


class Subsampled(NamedTuple):
    """A plate that sees a part of its rows.

    Attributes:
        name: the plate's.
        size: how many rows it sees.
        full_size: how many there are.
        given: whether the model's arguments say which.
    """

    name: str
    size: int
    full_size: int
    given: bool


class _Rows(Messenger):
    """Gives plates the rows that they are to see, and remembers those that see a part."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.rows = rows
        self.given: dict[str, bool] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.given[msg["name"]] = msg["value"] is not None
            if msg["value"] is None and msg["name"] in self.rows:
                msg["value"], msg["done"] = self.rows[msg["name"]], True


class _Placed(Messenger):
    """Gives each latent site the value that a free one has under the support of this very run."""

    def __init__(self, sites: Sequence[FreeSite], latent: Tensor) -> None:
        super().__init__()
        self.free = split(sites, latent)
        self.known = {site.name: site.support for site in sites}
        self.values: dict[str, Tensor] = {}
        self.log_dets: dict[str, Tensor] = {}
        self.of_each: dict[str, Tensor] = {}  # of each independent number

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.free or msg["is_observed"]:
            return
        to_support = bijection_of_site(name, msg["fn"], self.known[name])
        free = self.free[name]
        value = to_support(free)
        while isinstance(to_support, IndependentTransform):
            to_support = to_support.base_transform
        log_det = self.of_each[name] = to_support.log_abs_det_jacobian(free, value)
        self.log_dets[name] = sum_rightmost(
            log_det, log_det.dim() - value.dim() + msg["fn"].event_dim
        )
        self.values[name] = msg["value"] = value
        msg["done"] = True


class _Drawn(Messenger):
    """Keeps the unconstrained value of each latent site, drawn from its prior.

    Of an angle from the whole circle: torch draws it by rejection, not many times at once.
    """

    def __init__(self, sites: Sequence[FreeSite]) -> None:
        super().__init__()
        self.sites = {site.name: site for site in sites}
        self.free: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.sites or msg["is_observed"]:
            return
        site = self.sites[name]
        to_support = bijection_of_site(name, msg["fn"], site.support)
        try:
            if is_angle(msg["fn"]):
                value = to_support(math.pi * (2 * torch.rand(site.free_shape) - 1))
            else:
                value = _drawn_from(msg["fn"])
        except (NotImplementedError, RuntimeError):  # a flat prior, or one draw at a time only
            value = to_support(2 * torch.randn(site.free_shape))
        self.free[name] = to_support.inv(value)
        msg["value"], msg["done"] = value, True


def _drawn_from(fn: Any) -> Tensor:
    """A draw that ``torch.func.vmap`` takes many of: by quantiles where there are such.

    torch's own draws are often written into one tensor for all.
    """
    base = fn
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        if not base.event_shape:
            level = torch.rand(base.batch_shape)
            tiny = torch.finfo(level.dtype).eps
            return base.icdf(level.clamp(tiny, 1 - tiny))
    except NotImplementedError:
        pass
    return fn()


class LogDensity:
    """A model's log-density over the stacked unconstrained vector of its sites, Jacobians included.

    Calling it with ``(latent_dim,)`` gives a scalar; with ``(n, latent_dim)`` it gives ``(n,)``,
    in one run of the model under ``torch.func.vmap`` (without gradients in as many as keep a run's
    numbers, data included, below four millions), or in n where ``settle`` finds a problem.
    Each site is mapped by the support that its distribution has in that very run, so that
    ``Uniform(0, a)`` is right. An angle's is the circle, and its Jacobian a share of its density
    (``pyroflows.programs.circles``). Discrete sites are summed out. Random choices of the run
    itself, such as a subsample, are the same for all vectors of a call; hidden sites are drawn for
    each.

    Args:
        model: a Pyro model, for one draw.
        sites: the latent ones, in the order in which vectors stack them.
        args: the model's arguments.
        kwargs: its keyword arguments.
        hidden: names of latent sites that the model draws itself; they are not scored.
        discrete: names of those that are summed out.
        nesting: how many dimensions to the left the model's plates reach; only where sites are
            summed out.
        batching: how several vectors run: ``"vmap"``; ``"anchored"``, where the model writes draws
            into tensors that it makes (a little slower); ``"alone"``, one by one; None to find out
            at the first of them.
        numbers: how many a run's sites have, data included, where another run has told it; None to
            see it in the first.

    Raises:
        ValueError: a run has other latent sites.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("z", dist.Uniform(0.0, scale))       # a support that depends on a site
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup()
        >>> guide.log_density((), {})(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Program,
        sites: Sequence[FreeSite],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        hidden: Collection[str] = (),
        discrete: Collection[str] = (),
        nesting: int = 0,
        batching: str | None = None,
        numbers: int | None = None,
    ) -> None:
        self.model, self.sites, self.args, self.kwargs = model, sites, args, kwargs or {}
        self.hidden, self.discrete, self.nesting = frozenset(hidden), frozenset(discrete), nesting
        self.batching, self.numbers = batching, numbers
        self.rows: dict[str, Tensor] = {}

    def with_rows(self, rows: dict[str, Tensor]) -> LogDensity:
        """The same, with these rows in the plates that draw a subsample.

        Args:
            rows: their indices, by the plate's name.
        """
        twin = copy.copy(self)
        twin.rows = rows
        return twin

    @torch.no_grad()
    def subsampled(self, latent: Tensor) -> list[Subsampled]:
        """The plates that see a part of their rows, by a run of the model.

        Args:
            latent: a vector where it can be run, ``(latent_dim,)``.
        """
        seen = _Rows({})
        trace, _ = self._traced(seen(self.model), latent)
        frames = {
            frame.name: frame
            for site in sample_sites(trace).values()
            for frame in site["cond_indep_stack"]
            if is_subsampled(frame)
        }
        return [
            Subsampled(name, frame.size, frame.full_size, seen.given[name])
            for name, frame in frames.items()
        ]

    @property
    def at_once(self) -> int:
        """How many vectors are worth one run: more would take memory and no less time."""
        return _UNSEEN if self.numbers is None else max(1, _AT_ONCE // max(1, self.numbers))

    def __call__(self, latent: Tensor) -> Tensor:
        """Nats, one for each vector."""
        return self.run(latent).log_p

    @runs_models
    def run(self, latent: Tensor) -> Ran:
        """Run the model at one vector or at several.

        Args:
            latent: ``(latent_dim,)`` or ``(n, latent_dim)``.
        """
        if latent.dim() == 1:
            return self._alone(latent)
        if self.batching is None:
            self.settle(latent[0])
        if self.batching != "alone":
            return self._in_parts(latent)
        values, log_dets, log_p = zip(*map(self._alone, latent), strict=True)
        return Ran(_stacked(values), _stacked(log_dets), torch.stack(log_p))

    @runs_models
    @torch.no_grad()
    def prior_draws(self, n: int, like: Tensor) -> Tensor:
        """Unconstrained vectors ``(n, latent_dim)`` of draws from the prior, in one run, or in n.

        A site whose prior cannot be drawn from many times at once is drawn around zero on its
        unconstrained scale. None, ``(0, latent_dim)``, where the model cannot be run there.

        Args:
            n: how many.
            like: a vector, for its size, dtype and device.
        """

        def one(_: Tensor) -> Tensor:
            drawn = _Drawn(self.sites)
            with poutine.block(), drawn:
                self.model(*self.args, **self.kwargs)
            return torch.cat([drawn.free[site.name].reshape(-1) for site in self.sites])

        try:
            with pyro.validation_enabled(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's of loops over draws
                if self.batching == "alone":
                    return torch.stack([one(like) for _ in range(n)]).to(like)
                return torch.func.vmap(one, randomness="different")(torch.zeros(n, 1)).to(like)
        except (*ERRORS, KeyError):
            return like.new_empty(0, len(like))

    def trace(self, latent: Tensor) -> Trace:
        """The trace of a run at one vector, its log-densities computed, nothing enumerated.

        Args:
            latent: ``(latent_dim,)``.
        """
        trace = self._traced(self.model, latent)[0]
        trace.compute_log_prob()
        return trace

    def _traced(self, model: Program, latent: Tensor) -> tuple[Trace, _Placed]:
        placed = _Placed(self.sites, latent)
        # Parameters are seen outside: SVI and fit_guide ask by their statements what to train.
        with poutine.block(hide_fn=lambda msg: msg["type"] != "param"), placed, _Rows(self.rows):
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        return prune_subsample_sites(trace), placed

    def _alone(self, latent: Tensor) -> Ran:
        model = self.model
        if self.discrete:
            model = enumerated(model, self.discrete, self.nesting)
        trace, placed = self._scored(model, latent)
        trace.compute_log_prob()
        log_p = log_prob_summed_out(trace) if self.discrete else trace.log_prob_sum()
        log_det = torch.stack([log_det.sum() for log_det in placed.log_dets.values()]).sum()
        return Ran(placed.values, placed.log_dets, log_p + log_det)

    def _scored(self, model: Program, latent: Tensor) -> tuple[Trace, _Placed]:
        """A run with the sites that are scored."""
        trace, placed = self._traced(model, latent)
        self._check(trace, placed.values)
        self.numbers = sum(site["value"].numel() for site in sample_sites(trace).values())
        for name, site in sample_sites(trace).items():
            if name in self.hidden and name not in self.discrete and not site["is_observed"]:
                trace.remove_node(name)  # drawn from its prior, which is its guide: they cancel
            elif is_unobserved_part(trace, name):
                site["mask"] = None  # what is masked would have no density at all
        return trace, placed

    @runs_models
    def factors(self, latent: Tensor) -> Tensor:
        """The log-densities that sum to the joint one, of each number of each site by itself.

        Those of a site's independent numbers are apart, whatever its events are, and Jacobians are
        factors of their own. Their order is the same in all runs.

        Args:
            latent: ``(latent_dim,)`` or ``(n, latent_dim)``.

        Returns:
            ``(factors,)`` or ``(n, factors)`` in nats.
        """
        if latent.dim() == 1:
            return self._factors(latent)
        if self.batching is None:
            self.settle(latent[0])
        if self.batching == "alone":
            return torch.stack([self._factors(one) for one in latent])
        return self._mapped(self._factors, latent)

    def _factors(self, latent: Tensor) -> Tensor:
        trace, placed = self._scored(self.model, latent)
        parts = [_each_number(site) for site in sample_sites(trace).values()]
        return torch.cat([part.reshape(-1) for part in (*parts, *placed.of_each.values())])

    def _check(self, trace: Trace, values: dict[str, Tensor]) -> None:
        """See that a run has these latent sites, those that are hidden, and no others."""
        sites = sample_sites(trace).items()
        found = {name for name, site in sites if not site["is_observed"]} - self.discrete
        changed = found.symmetric_difference(values) - self.hidden
        changed.update(site.name for site in self.sites if site.name not in values)
        if changed:
            raise changed_model(changed)

    def _batched(self, latent: Tensor) -> Ran:
        return Ran(*self._mapped(self._alone, latent))

    def _mapped(self, one: Callable[[Tensor], Any], latent: Tensor) -> Any:
        """What a run gives, of several vectors at once."""

        def anchored(latent: Tensor) -> Any:
            with Anchored(latent):
                return one(latent)

        randomness = "different" if self.hidden - self.discrete else "same"
        run = anchored if self.batching == "anchored" else one
        # Validation reads values, which a batch has none of: runs of one draw have done it.
        with pyro.validation_enabled(False):
            return torch.func.vmap(run, randomness=randomness)(latent)

    def _in_parts(self, latent: Tensor) -> Ran:
        """Several vectors, not more at a time than is worth one run; all if gradients keep them."""
        if torch.is_grad_enabled() or len(latent) <= self.at_once:
            return self._batched(latent)
        hidden = self.hidden - self.discrete  # drawn for each vector; all else is alike in all runs
        rans: list[Ran] = []
        while len(latent):  # the first part may be what tells the size of the others
            part, latent = latent.tensor_split([self.at_once])
            differ = hidden or not len(latent)
            with contextlib.nullcontext() if differ else _same_choices(part.device):
                rans.append(self._batched(part))
        values, log_dets, log_p = zip(*rans, strict=True)
        return Ran(_joined(values), _joined(log_dets), torch.cat(log_p))

    @torch.no_grad()
    def settle(self, latent: Tensor) -> str | None:
        """Find out how the model runs at several vectors, in two runs, or three to five.

        Args:
            latent: a vector where it can be run, ``(latent_dim,)``.

        Returns:
            Why it cannot run at several at once, in words; None where it can.
        """
        alone = self._alone(latent)  # an error that has nothing to do with batches comes out here
        two = torch.stack([latent, latent + 0.01])
        problem = None
        for self.batching in ("vmap", "anchored"):
            try:
                among = self._batched(two).log_p[0]
            except ERRORS as error:
                problem = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
                continue
            near = torch.isclose(among, alone.log_p, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True)
            if near or self._alone(latent).log_p != alone.log_p:  # random, as a subsample is
                return None
            problem = (
                f"its log-density at one draw is {alone.log_p:.4f} alone and {among:.4f} among "
                "others, which means that it keeps something from run to run"
            )
            break
        self.batching = "alone"
        return problem


def _each_number(site: dict[str, Any]) -> Tensor:
    """A site's log-density, of each of its independent numbers by itself where they are."""
    fn, dims = site["fn"], 0
    while isinstance(fn, Independent):
        fn, dims = fn.base_dist, dims + fn.reinterpreted_batch_ndims
    log_prob = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    scale, mask = site["scale"], site["mask"]
    if isinstance(scale, Tensor):
        scale = scale.reshape(scale.shape + (1,) * dims)
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * dims)
    return scale_and_mask(log_prob, scale, mask)


def warn_alone(problem: str, otherwise: str = "", stacklevel: int = 7) -> None:
    """Warn that a model runs at one draw at a time.

    Args:
        problem: why.
        otherwise: what follows from it.
        stacklevel: how many calls above this one the user's is.
    """
    warnings.warn(
        f"the model cannot run at many draws at once ({problem}); they run one by one, which is "
        f"slower{otherwise}. Choose by torch.where in place of if, and make no plain numbers "
        "(.item(), float()) of sampled values",
        stacklevel=stacklevel,
    )


def _same_choices(device: torch.device) -> contextlib.AbstractContextManager:
    """Random numbers that come again after it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _joined(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
