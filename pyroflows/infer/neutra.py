"""NeuTra: Hamiltonian Monte Carlo in the base space of a trained flow."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyroflows._checks import check_whole, checked_int
from pyroflows._pyro.guides import diverged
from pyroflows._pyro.threads import runs_models_long
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.mixture import MixtureFlow
from pyroflows.infer.chees import chees, chosen, evaluate, first_step, trajectory
from pyroflows.infer.guides import AutoFlow
from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.programs.vectorize import is_subsampled, sample_sites
from pyroflows.training.progress import Progress

_STARTS = 100
_NUTS = (1000, 500)  # draws a chain and warm-up, by default
_TOGETHER = (400, 200)
_WALKERS = 256
_WALK = 60  # trajectories of each; every fifth of the last half is looked at
_TURN = 1.5  # length of one: a quarter of a turn in a standard normal
_SHORT = 10  # leapfrogs of one at most
_THIN = math.log(10)  # nats by which a guide's density is too low for mass to be covered by it
_WORTH = 0.02  # share of the posterior that is worth a word


class NeuTra:
    """Chains where the posterior looks like the flow's base: exact in the limit, cheap to explore.

    A trained flow T maps its base to (roughly) the posterior over the stacked unconstrained latent
    sites. Hamiltonian Monte Carlo runs on the density pulled back through T,

        log p(z) = log p(data, c(T(z))) + log|det c'(T(z))| + log|det T'(z)|,

    with c the map onto each site's support. Where T is exact this is the base density, an isotropic
    Gaussian; where T is not, the chains correct it, as importance weights would, at any dimension.
    The flow is frozen while sampling. One gradient costs a run of the model and a pass of the flow
    in the sampling direction: take a flow with ``fast="sample"`` or ``"both"``.

    By default chains are Pyro's NUTS, one after another. With ``chains=64`` that many run side by
    side, one gradient of all of them a leapfrog (ChEES-HMC, ``pyroflows.infer.chees``), and tune
    step, trajectory length and metric together. Chains that start in different modes stay there
    and show in ``r_hat``.

    Source: Hoffman et al. 2019, arXiv:1903.03704; NUTS: Hoffman & Gelman 2014, arXiv:1111.4246;
    ChEES-HMC: Hoffman, Radul & Sountsov 2021, AISTATS.

    Args:
        model: a Pyro model; discrete sites of finite support are summed out.
        guide: an ``AutoFlow`` of this model, trained (``pf.fit_guide``).
        chains: how many run at once, two or more; None for NUTS.

    Attributes:
        draws: of the last run, for each site ``(chains, draws, *site shape)``; None before a run.
        diverging: of the last run, ``(chains, draws)``: whether the trajectory diverged.
        stats: of the last run, each ``(chains, draws)``: ``diverging``, and of chains at once
            ``energy`` (nats), ``acceptance_rate``, ``step_size`` and ``n_steps``, the leapfrogs.

    Raises:
        ValueError: the guide is not an ``AutoFlow``, or ``chains`` is out of range.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(1.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,))
        >>> neutra = pf.NeuTra(model, guide)
        >>> draws = neutra.run(num_samples=20, warmup_steps=10, num_chains=2, progress=False)
        >>> draws["scale"].shape
        torch.Size([2, 20])
        >>> many = pf.NeuTra(model, guide, chains=16)
        >>> many.run(num_samples=20, warmup_steps=10, progress=False)["scale"].shape
        torch.Size([16, 20])
    """

    def __init__(
        self, model: Callable[..., Any], guide: AutoFlow, chains: int | None = None
    ) -> None:
        if not isinstance(guide, AutoFlow):
            raise ValueError(
                f"guide: expected a pf.AutoFlow, got {type(guide).__name__}; make one with "
                "pf.AutoFlow(model) and train it with pf.fit_guide"
            )
        if chains is not None:
            chains = checked_int("chains", chains, 2, ", or None for NUTS")
        self.model = model
        self.guide = guide
        self.chains = chains
        self.draws: dict[str, Tensor] | None = None
        self.stats: dict[str, Tensor] = {}

    @property
    def diverging(self) -> Tensor | None:
        """Of the last run, ``(chains, draws)``: whether the trajectory diverged."""
        return self.stats.get("diverging")

    @runs_models_long
    def run(
        self,
        *args: Any,
        num_samples: int | None = None,
        warmup_steps: int | None = None,
        num_chains: int = 1,
        progress: bool = True,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Sample the posterior; every chain starts from a draw of the base, that is of the guide.

        Of a guide with several modes each chain runs in the base of one mode's flow and hardly
        leaves that mode; modes have chains by their shares, with a warning.

        Args:
            *args: the model's arguments.
            num_samples: draws a chain, after warm-up; by default 1,000 of NUTS, and 400 where
                chains run at once.
            warmup_steps: steps a chain that adapt step size, metric and, of chains at once, the
                trajectory length, and are dropped; by default 500, and 200 of chains at once.
            num_chains: of NUTS, chains one after the other.
            progress: show a progress bar.
            **kwargs: the model's keyword arguments.

        Returns:
            For each latent site ``(chains, draws, *site shape)``, also in ``draws``.

        Raises:
            ValueError: an argument out of range; the model has a latent site that the guide
                hides, or subsamples its data; or its density is not finite where the guide draws.
        """
        draws, warmup = _TOGETHER if self.chains else _NUTS
        draws = draws if num_samples is None else num_samples
        warmup = warmup if warmup_steps is None else warmup_steps
        check_whole(1, num_samples=draws, num_chains=num_chains)
        check_whole(0, warmup_steps=warmup)
        if self.chains and num_chains != 1:
            raise ValueError(
                f"num_chains: {self.chains} chains run at once already, as NeuTra(..., chains=) "
                f"says; expected it left out, got {num_chains}"
            )
        joint = self._set_up(args, kwargs)
        run = _together if self.chains else _one_by_one
        parts = [
            run(flow, joint, chains, draws, warmup, progress)
            for flow, chains in self._flows(self.chains or num_chains)
        ]
        latent = torch.cat([part[0] for part in parts])
        with torch.no_grad():
            sites = self.guide.constrained(latent.flatten(0, 1), args, kwargs)
        self.draws = {
            name: value.reshape(*latent.shape[:2], *value.shape[1:])
            for name, value in sites.items()
        }
        self.stats = {key: torch.cat([part[1][key] for part in parts]) for key in parts[0][1]}
        return self.draws

    def r_hat(self) -> dict[str, Tensor]:
        """R-hat of every site's every coordinate, near 1 where the chains agree.

        The larger of the split R-hats of rank-normalised draws and of how far they are from the
        median, so that chains of unlike scale, or of no finite variance, show too.

        Source: Vehtari et al. 2021, arXiv:1903.08008, section 4.

        Raises:
            ValueError: nothing was run yet, or fewer than 4 draws a chain.
        """
        draws = self._enough("R-hat")
        return _by_arviz("rhat", draws)

    def ess(self) -> dict[str, Tensor]:
        """Effective number of draws of every site's every coordinate, all chains together.

        Of the rank-normalised draws, ArviZ's "bulk": a heavy tail cannot make it large.

        Source: Vehtari et al. 2021, arXiv:1903.08008, section 4.

        Raises:
            ValueError: nothing was run yet, or fewer than 4 draws a chain.
        """
        draws = self._enough("ESS")
        return _by_arviz("ess", draws)

    def _enough(self, what: str) -> dict[str, Tensor]:
        """The draws, if a figure over chains can be made of them."""
        if self.draws is None or self.stats["diverging"].shape[1] < 4:
            raise ValueError(f"draws: {what} needs at least 4 draws a chain; call run first")
        return self.draws

    def _flows(self, chains: int) -> list[tuple[Flow, int]]:
        """Frozen flows and how many chains each has: of several modes, by their shares."""
        flows, mixture = [flow.detached() for flow in self.guide.flows], self.guide.flow
        if isinstance(mixture, Flow):
            return [(flows[0], chains)]
        warnings.warn(
            f"the posterior has {len(flows)} modes, between which chains hardly move; {chains} "
            "chains start in them by their shares, which so many draws have no finer than that. "
            "Take pf.report(...).resample for draws with the right shares",
            stacklevel=4,
        )
        shares = mixture.log_shares.exp().cumsum(0)
        levels = (torch.arange(chains).to(shares) + 0.5) / chains
        counts = torch.searchsorted(shares, levels).clamp(max=len(flows) - 1).bincount()
        pairs = zip(flows, counts.tolist(), strict=False)  # the last flows may have none
        least = 2 if self.chains else 1  # chains at once learn from each other
        return [(flow, max(count, least)) for flow, count in pairs if count]

    def _set_up(self, args: tuple, kwargs: dict) -> LogDensity:
        """Build the guide if need be, see that it covers the model, and give the log-density."""
        self.guide.setup(*args, **kwargs)
        log_density = self.guide.log_density(args, kwargs, self.model)
        with torch.no_grad():
            # Also brings the flow in step with Pyro's parameter store.
            latent = self.guide.scored_by_mode(1)[0][0, 0]
            log_density(latent)  # says which sites have changed
            trace = log_density.trace(latent)
        for name, site in sample_sites(trace).items():
            if any(is_subsampled(frame) for frame in site["cond_indep_stack"]):
                raise ValueError(
                    f"model: site {name!r} stands in a plate that draws a subsample, so its "
                    "density changes from call to call; pass all rows and no subsample_size"
                )
            if not site["is_observed"] and name in log_density.hidden - log_density.discrete:
                raise ValueError(
                    f"model: {name!r} is a latent site that the guide hides, so it would be drawn "
                    "anew in every call; expected continuous sites, all in the guide, or discrete "
                    "ones of finite support, which are summed out"
                )
        return log_density


def _by_arviz(figure: str, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """A figure that ArviZ has over chains, for each number of each site."""
    import arviz
    import xarray

    names = {name: f"site {index}" for index, name in enumerate(draws)}  # any name of a site does
    data = xarray.Dataset(
        {
            names[name]: (("chain", "draw", *(f"{names[name]}, {i}" for i in range(2, v.ndim))), v)
            for name, v in ((name, value.double().cpu().numpy()) for name, value in draws.items())
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's of numbers that are constant
        found = getattr(arviz, figure)(data)
    return {name: torch.as_tensor(found[names[name]].values) for name in draws}


def _potential(flow: Flow, joint: LogDensity, z: Tensor) -> Tensor:
    """Minus the log-density that base vectors ``(*chains, latent_dim)`` have, in nats."""
    latent, log_det = flow.transform.forward_and_log_det(z)
    return -joint(latent) - log_det


def _one_by_one(
    flow: Flow, joint: LogDensity, chains: int, draws: int, warmup: int, progress: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pyro's NUTS: latent vectors ``(chains, draws, D)`` and which diverged."""

    def potential(z: dict[str, Tensor]) -> Tensor:
        return _potential(flow, joint, z["z"])

    found, diverging = [], []
    for _ in range(chains):
        mcmc = MCMC(
            NUTS(potential_fn=potential),
            num_samples=draws,
            warmup_steps=warmup,
            initial_params={"z": _start(flow.base, potential)},
            disable_progbar=not progress,
        )
        mcmc.run()
        found.append(mcmc.get_samples()["z"])
        diverging.append(diverged(mcmc, 0, draws))
    return _moved(flow, torch.stack(found)), {"diverging": torch.stack(diverging)}


def _together(
    flow: Flow, joint: LogDensity, chains: int, draws: int, warmup: int, progress: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """ChEES-HMC: latent vectors ``(chains, draws, D)`` and statistics ``(chains, draws)``."""
    log_density = _pulled_back(flow, joint)
    bar = Progress(f"{chains} chains", "step", warmup + draws, show=progress)

    def tell(acceptance: float, step_size: float) -> None:
        bar.tell(acceptance=f"{acceptance:.2f}", step=f"{step_size:.2g}")
        bar.update()

    # As Pyro's MCMC does: a far step of one chain is a density that is not finite, and no error.
    with pyro.validation_enabled(False):
        try:
            start = _starts(flow.base, log_density, chains)
            run = chees(log_density, start, draws=draws, warmup=warmup, tell=tell)
        finally:
            bar.close()
    return _moved(flow, run.draws), {
        "diverging": run.diverging,
        "energy": run.energy,
        "acceptance_rate": run.acceptance,
        "step_size": torch.full_like(run.energy, run.step_size),
        "n_steps": run.leapfrogs.expand(run.energy.shape),
    }


@torch.no_grad()
def _moved(flow: Flow, z: Tensor) -> Tensor:
    """Base vectors ``(chains, draws, D)`` through the flow."""
    return flow.transform.forward_and_log_det(z.flatten(0, 1))[0].reshape(z.shape)


@torch.no_grad()
def share_beyond(
    joint: LogDensity, flow: Flow | MixtureFlow, evidence: float
) -> tuple[float, Tensor] | None:
    """The share of the posterior that chains walk into, where a guide has hardly any density.

    No weight tells of a tail where the guide does not draw. Chains that start from its draws get
    there: 256, or as many as are worth one run, by 60 short trajectories each, about 120 gradients
    of all of them. They may not have come as far as they would, so the share is a lower bound.

    Args:
        joint: of the model.
        flow: of the guide.
        evidence: the log evidence in nats by the guide's draws.

    Returns:
        The share where the guide's density is below a tenth of the posterior's, and points from
        there, ``(n, D)``; None where it is below 2 %, and where chains cannot say: the model takes
        one draw or sees a part of its rows at a time, or draws sites itself.
    """
    flows: list[Flow] = [flow] if isinstance(flow, Flow) else flow.components
    shares = torch.ones(1) if isinstance(flow, Flow) else flow.log_shares.exp()
    latent = flow.sample((1,))[0]
    if joint.batching is None:
        joint.settle(latent)
    if joint.batching == "alone" or joint.hidden - joint.discrete or joint.subsampled(latent):
        return None
    count = max(8, min(_WALKERS, joint.at_once) // len(flows))
    try:
        with pyro.validation_enabled(False):
            latent = torch.cat([_walked(each.detached(), joint, count) for each in flows])
            ratio = joint(latent) - evidence - flow.log_prob(latent)
    except ERRORS:
        return None
    bare = ratio > _THIN
    # Each flow's chains stand for its share of the posterior.
    share = (bare.reshape(len(flows), -1).to(latent).mean(1) * shares.to(latent)).sum().item()
    return (share, latent[bare]) if share > _WORTH else None


def _walked(flow: Flow, joint: LogDensity, chains: int) -> Tensor:
    """Where chains are that started from a flow's draws, ``(n, D)``."""
    log_density = _pulled_back(flow, joint)
    here = evaluate(log_density, _starts(flow.base, log_density, chains))
    step, scale = first_step(log_density, here), torch.ones_like(here.z[0])
    seen = []
    for index in range(1, _WALK + 1):
        count = min(_SHORT, math.ceil(_TURN / step))
        proposal = trajectory(log_density, here, step, count, scale)
        taken = torch.rand_like(proposal.gained) < (-proposal.gained).exp()
        here = chosen(taken, proposal.end, here)
        if index > _WALK // 2 and index % 5 == 0:
            seen.append(here.z)
    return _moved(flow, torch.stack(seen)).flatten(0, 1)


def _pulled_back(flow: Flow, joint: LogDensity) -> Callable[[Tensor], Tensor]:
    """The log-density of base vectors ``(chains, D)``, minus infinity where the model raises."""

    def log_density(z: Tensor) -> Tensor:
        try:
            return -_potential(flow, joint, z)
        except ERRORS:  # by some chain far out: it is found, and only its step is refused
            return torch.stack([_or_impossible(flow, joint, row) for row in z])

    return log_density


def _or_impossible(flow: Flow, joint: LogDensity, z: Tensor) -> Tensor:
    """The log-density of one base vector, minus infinity where the model raises."""
    try:
        return -_potential(flow, joint, z)
    except ERRORS:
        return z.sum() * 0 - torch.inf


@torch.no_grad()
def _start(base: Callable[[], Any], potential: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """A base draw where the density is finite."""
    for _ in range(_STARTS):
        z = base().sample()
        if potential({"z": z}).isfinite():
            return z
    raise ValueError(
        f"model: its density is not finite at any of {_STARTS} draws of the guide; train the guide"
    )


def _starts(
    base: Callable[[], Any], log_density: Callable[[Tensor], Tensor], chains: int
) -> Tensor:
    """Base draws ``(chains, D)`` where the density and its gradient are finite."""
    found: list[Tensor] = []
    for _ in range(_STARTS):
        z = base().sample((chains,)).detach()
        point = evaluate(log_density, z)
        found += z[point.log_p.isfinite() & point.gradient.isfinite().all(-1)]
        if len(found) >= chains:
            return torch.stack(found[:chains])
    raise ValueError(
        f"model: its density is finite at {len(found)} of {_STARTS * chains} draws of the guide, "
        f"too few to start {chains} chains from; train the guide"
    )
