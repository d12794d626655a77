"""What a guide can be trained on, as Pyro ELBOs: for ``pyro.infer.SVI`` and ``pf.fit_guide``.

Pyro's own (``Trace_ELBO``, ``RenyiELBO``, ``TraceTailAdaptive_ELBO``) work too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyroflows._pyro.guides import ParticleELBO
from pyroflows.distributions.flow import Flow
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.importance import khat, log_mean_exp, structure_as_of
from pyroflows.programs.log_density import LogDensity
from pyroflows.programs.subsamples import runs_of_all_rows, sees_all_rows
from pyroflows.programs.vectorize import (
    ERRORS,
    PLATE,
    Program,
    per_particle,
    plate_nesting,
    run_together,
    sample_sites,
    summed,
)
from pyroflows.structured.integrated import integrated_draws

_GAP_BY_ROW = 64  # draws, each with some points in every row
_GAP_DRAWS = 4000
_GOOD_TAIL = 0.5  # k-hat up to which a report calls draws good
_LEAST = 16  # particles of each flow of a mixture, where there are as many in all


def _path_log_prob(name: str, fn: Distribution, value: Tensor) -> Tensor:
    """``fn.log_prob(value)`` with the parameters of ``fn`` held fixed."""
    if hasattr(fn, "path_log_prob"):  # a flow's
        return fn.path_log_prob(value)
    if isinstance(fn, Independent):
        inner = _path_log_prob(name, fn.base_dist, value)
        dims = fn.reinterpreted_batch_ndims
        return inner.flatten(inner.dim() - dims).sum(-1) if dims else inner
    if isinstance(fn, pyro.distributions.Delta):
        return fn.log_prob(value)  # a function of other draws alone
    if not getattr(fn, "has_rsample", False):
        raise NotImplementedError(
            f"guide: site {name!r} is drawn from {type(fn).__name__}, which is not "
            "reparameterised; train with Trace_ELBO, or hide the site from a flow guide"
        )
    arguments = {
        key: fn.__dict__[key].detach()
        for key in fn.arg_constraints
        if isinstance(fn.__dict__.get(key), Tensor)
    }
    if not arguments or isinstance(fn, torch.distributions.TransformedDistribution):
        raise NotImplementedError(
            f"guide: site {name!r} is drawn from {type(fn).__name__}, whose parameters cannot be "
            "held fixed; train with Trace_ELBO, or use pf.AutoFlow"
        )
    return type(fn)(**arguments, validate_args=False).log_prob(value)


def path_site(name: str, site: Any) -> Tensor:
    """A guide site's log-density along the path of its draw, scaled and masked."""
    log_prob = _path_log_prob(name, site["fn"], site["value"])
    return scale_and_mask(log_prob, site["scale"], site["mask"])


@torch.no_grad()
def has_paths(guide: Program, args: tuple, kwargs: dict) -> bool:
    """Whether the path gradient can train a guide; costs a draw of the guide, no run of a model.

    Args:
        guide: any Pyro guide.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    try:
        with poutine.block():
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        for name, site in sample_sites(drawn).items():
            path_site(name, site)
    except NotImplementedError:
        return False
    except ERRORS:
        pass  # at an extreme draw
    return True


class PathELBO(ParticleELBO):
    r"""The ELBO with the path gradient ("sticking the landing"): the default for flows.

    :math:`\log q` is differentiated along the draws alone, not by the guide's parameters at fixed
    draws, a term whose expectation is zero. So the gradient's variance vanishes as the guide
    reaches the posterior. Roeder et al. 2017, arXiv:1703.09194; for flows Vaitl et al. 2022,
    arXiv:2206.09016. Costs, beside ``Trace_ELBO``, two passes of the flow and, for an
    autoregressive one, a sequential solve for the gradient.

    Args: as ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: a guide site that is not reparameterised, or whose parameters cannot
            be held fixed.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup()
        >>> elbo = pf.infer.PathELBO(num_particles=16, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> isinstance(svi.step(), float)
        True
    """

    def elbo(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """The ELBO in nats of one run, the guide's parameters acting through its draws alone.

        Args:
            model_trace: of the model.
            guide_trace: of the guide whose draws the model had.
        """
        elbo = torch.as_tensor(model_trace.log_prob_sum())
        for name, site in sample_sites(guide_trace).items():
            elbo = elbo - path_site(name, site).sum()
        return elbo


class DensityELBO(Trace_ELBO):
    r"""The ELBO of a flow guide by the model's log-density, for any model written for one draw.

    :math:`E_q [\log p(x, z) - \log q(z)]` over ``num_particles`` draws of the flow's vector, the
    model run under ``torch.func.vmap``. Its gradient is that of ``PathELBO``, or of ``Trace_ELBO``
    with ``path=False``. What ``pf.fit_guide`` trains an ``AutoFlow`` on.

    Of a mixture of K flows it is :math:`\log \sum_k \exp ELBO_k`, the ELBO at the best shares if no
    flow has density where another draws, and its gradient that of the sum of the :math:`ELBO_k`.
    Each flow has its part of the particles, 16 at least; running means of the :math:`ELBO_k` are
    the mixture's shares.

    Args:
        num_particles: draws a step.
        batching: how the model runs at several draws, as in ``pf.infer.LogDensity``.
        path: whether the guide's parameters act through its draws alone.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup()
        >>> elbo = pf.infer.DensityELBO(num_particles=16)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> isinstance(svi.step(), float)
        True
    """

    def __init__(
        self, num_particles: int = 128, batching: str | None = None, path: bool = True
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.batching, self.path = batching, path
        self.numbers: int | None = None  # of a run's sites, as the last one had them
        self.rows: str | None = None

    def _log_density(
        self, model: Callable, guide: AutoFlow, args: tuple, kwargs: dict
    ) -> LogDensity:
        return guide.log_density(args, kwargs, model, self.batching, self.numbers)

    @torch.no_grad()
    def look_at_rows(self, log_density: LogDensity, latent: Tensor) -> str:
        """Which rows a run sees: ``"all"``, ``"some"`` of its choice, or ``"some, as given"``.

        Args:
            log_density: of the model.
            latent: a vector where it can be run, ``(latent_dim,)``.
        """
        if self.rows is None:
            if not log_density.subsampled(latent):
                self.rows = "all"
            else:
                self.rows = "some" if sees_all_rows(log_density, latent) else "some, as given"
        return self.rows

    def differentiable_loss(
        self, model: Callable, guide: AutoFlow, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the ELBO in nats, whose gradient is the estimator's."""
        guide.setup(*args, **kwargs)
        count = -(-self.num_particles // guide.modes)
        count = max(count, min(_LEAST, self.num_particles))
        latent, log_q = guide.scored_by_mode(count, self.path)
        log_density = self._log_density(model, guide, args, kwargs)
        log_p = log_density(latent.flatten(0, 1)).reshape(log_q.shape)
        self.batching, self.numbers = log_density.batching, log_density.numbers
        elbos = (log_p - log_q).mean(1)
        if isinstance(guide.flow, Flow):
            return -elbos[0]
        if torch.is_grad_enabled():
            guide.flow.follow(elbos)
        # The flows hardly overlap: each goes its own way, whatever its share.
        each = -elbos.sum()
        return each - (each + elbos.logsumexp(0)).detach()

    def loss_and_grads(self, model: Callable, guide: AutoFlow, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO; its gradient is added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def loss(self, model: Callable, guide: AutoFlow, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO; of all rows, where the model draws subsamples of them itself."""
        guide.setup(*args, **kwargs)
        log_density = self._log_density(model, guide, args, kwargs)
        if self.rows is None:
            self.look_at_rows(log_density, guide.scored_draws(1)[0][0])
        if self.rows != "some":
            return self.differentiable_loss(model, guide, *args, **kwargs).item()
        latent, log_q = guide.scored_draws(self.num_particles)
        log_p = runs_of_all_rows(log_density, latent).log_p
        self.batching, self.numbers = log_density.batching, log_density.numbers
        return (log_q - log_p).mean().item()

    @torch.no_grad()
    def gap(self, model: Callable, guide: AutoFlow, *args: Any, **kwargs: Any) -> float:
        """The Kullback-Leibler divergence from guide to posterior in nats, by importance weights.

        The log evidence, as the weights of 4,000 draws see it, less the ELBO; infinite where their
        k-hat is one half or more, by which they may not see it all, and where it would cost too
        much: the model runs draw by draw, or sees a part of its rows. Of a guide with rows that are
        independent given the globals the larger of the globals' divergence and five times a row's.
        """
        if guide.structured:
            return self._gap_by_row(guide.log_density(args, kwargs, model, self.batching), guide)
        latent, log_q = guide.scored_draws(_GAP_DRAWS)
        log_density = self._log_density(model, guide, args, kwargs)
        if self.batching == "alone" or self.look_at_rows(log_density, latent[0]) != "all":
            return math.inf
        log_w = log_density(latent) - log_q
        if not khat(log_w) < _GOOD_TAIL:
            return math.inf
        return (log_mean_exp(log_w) - log_w.mean()).item()

    @staticmethod
    def _gap_by_row(log_density: LogDensity, guide: AutoFlow) -> float:
        """The divergence of the globals in nats, or five times that of a row, if that is larger.

        Rows may err by themselves: a fifth of what moves a global moves no row by 0.1 deviations.
        """
        structure = structure_as_of(guide, log_density)
        if structure is None:
            return math.inf
        draws = integrated_draws(log_density, guide.flows[0], structure, _GAP_BY_ROW)
        log_w = draws.log_p - draws.log_q
        of_globals = (log_mean_exp(log_w) - log_w.mean()).item()
        return max(of_globals, 5 * draws.gap.mean().item() / structure.rows)


class _Weighted(Trace_ELBO):
    """What objectives over all particles' weights share; subclasses give ``_surrogate``."""

    def _run(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        if self.max_plate_nesting == float("inf"):
            self.max_plate_nesting = plate_nesting(model, guide, args, kwargs)
        return run_together(model, guide, args, kwargs, self.num_particles, self.max_plate_nesting)

    def _per_particle(self, trace: Trace) -> Tensor:
        return per_particle(trace, self.num_particles, self.max_plate_nesting)

    def _path(self, trace: Trace) -> Tensor:
        total = torch.zeros(())
        for name, site in sample_sites(trace).items():
            log_q = path_site(name, site)
            total = total + summed(log_q, self.num_particles, self.max_plate_nesting)
        return total

    def _surrogate(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, whose gradient is the estimator's."""
        loss, surrogate = self._surrogate(model, guide, args, kwargs)
        return loss.detach() + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss; its gradient is added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss."""
        return self._surrogate(model, guide, args, kwargs)[0].item()


class ImportanceELBO(_Weighted):
    r"""The importance-weighted bound with the doubly reparameterised gradient.

    :math:`E \log \frac1K \sum_k w_k` over ``num_particles`` K (Burda et al. 2016,
    arXiv:1509.00519), its gradient :math:`\sum_k \tilde w_k^2 \partial \log w_k` along the paths
    (Tucker et al. 2019, arXiv:1810.04152, eq. 8). All particles run at once.

    Args: as ``pyro.infer.Trace_ELBO``.

    Raises:
        NotImplementedError: the model has parameters of its own, which would need other weights
            (``pyro.infer.RenyiELBO(alpha=0)`` trains both); or as ``PathELBO``.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup()
        >>> bound = pf.infer.ImportanceELBO(num_particles=16, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), bound)
        >>> isinstance(svi.step(), float)                        # minus the bound, in nats
        True
    """

    def _surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        ran, drawn = self._run(model, guide, args, kwargs)
        extra = [n for n, s in ran.nodes.items() if s["type"] == "param" and n not in drawn.nodes]
        if extra:
            raise NotImplementedError(
                f"model: its parameters {extra[:3]} would need other weights than the guide's; "
                "use pyro.infer.RenyiELBO(alpha=0)"
            )
        log_w = self._per_particle(ran) - self._path(drawn)
        weights = log_w.detach().softmax(0)
        bound = log_mean_exp(log_w)
        return -bound, -(weights.square() * log_w).sum()


class ForwardKL(_Weighted):
    r"""The forward KL by self-normalised importance weights: covers mass rather than seeks modes.

    :math:`-\sum_k \tilde w_k \log q(z_k)` at draws of the guide itself, held fixed (reweighted
    wake-sleep's wake phase; Bornschein & Bengio 2015, arXiv:1406.2751). The loss reported is minus
    the importance-weighted bound. An IAF pays an inversion for it.

    Args: as ``pyro.infer.Trace_ELBO``.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup()
        >>> objective = pf.infer.ForwardKL(num_particles=16, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), objective)
        >>> isinstance(svi.step(), float)
        True
    """

    def _surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ran, drawn = self._run(model, guide, args, kwargs)
            log_w = self._per_particle(ran) - self._per_particle(drawn)
            weights = log_w.softmax(0)
        with pyro.plate(PLATE, self.num_particles, dim=-self.max_plate_nesting - 1):
            replayed = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*args, **kwargs)
        log_q = self._per_particle(prune_subsample_sites(replayed))
        bound = log_mean_exp(log_w)
        return -bound, -(weights * log_q).sum()
