"""NeuTra: Hamiltonian Monte Carlo in the base space of a trained flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyroflows._checks import check_whole
from pyroflows._pyro.guides import diverged
from pyroflows._pyro.threads import runs_models_long
from pyroflows.distributions.flow import Flow
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.log_joint import LogJoint
from pyroflows.infer.vectorize import is_subsampled, sample_sites

_STARTS = 100


class NeuTra:
    """NUTS where the posterior looks like the flow's base: exact in the limit, cheap to explore.

    A trained flow T maps its base to (roughly) the posterior over the stacked unconstrained latent
    sites. NUTS runs on the density pulled back through T,

        log p(z) = log p(data, c(T(z))) + log|det c'(T(z))| + log|det T'(z)|,

    with c the map onto each site's support. Where T is exact this is the base density, an isotropic
    Gaussian; where T is not, NUTS corrects it, as importance weights would, at any dimension. The
    flow is frozen while sampling. One gradient costs a run of the model and a pass of the flow in
    the sampling direction, so a flow with ``fast="sample"`` or ``"both"`` is the one to take.

    Source: Hoffman et al. 2019, arXiv:1903.03704; NUTS: Hoffman & Gelman 2014, arXiv:1111.4246.

    Args:
        model: a Pyro model without discrete latent variables.
        guide: an ``AutoFlow`` of this model, trained (``pf.fit_guide``).

    Attributes:
        draws: of the last run, for each site ``(chains, draws, *site shape)``; None before a run.
        diverging: of the last run, ``(chains, draws)``: whether the trajectory diverged.

    Raises:
        ValueError: the guide is not an ``AutoFlow``.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(1.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,))
        >>> neutra = pf.NeuTra(model, guide)
        >>> draws = neutra.run(num_samples=20, warmup_steps=10, num_chains=2, progress=False)
        >>> draws["scale"].shape
        torch.Size([2, 20])
    """

    def __init__(self, model: Callable[..., Any], guide: AutoFlow) -> None:
        if not isinstance(guide, AutoFlow):
            raise ValueError(
                f"guide: expected a pf.AutoFlow, got {type(guide).__name__}; make one with "
                "pf.AutoFlow(model) and train it with pf.fit_guide"
            )
        self.model = model
        self.guide = guide
        self.draws: dict[str, Tensor] | None = None
        self.diverging: Tensor | None = None

    @runs_models_long
    def run(
        self,
        *args: Any,
        num_samples: int = 1000,
        warmup_steps: int = 500,
        num_chains: int = 1,
        progress: bool = True,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Sample the posterior; every chain starts from a draw of the base, that is of the guide.

        Chains run one after the other.

        Args:
            *args: the model's arguments.
            num_samples: draws a chain, after warm-up.
            warmup_steps: steps a chain that adapt step size and mass matrix, and are dropped.
            num_chains: independent chains.
            progress: show Pyro's progress bar, one a chain.
            **kwargs: the model's keyword arguments.

        Returns:
            For each latent site ``(chains, draws, *site shape)``, also in ``draws``.

        Raises:
            ValueError: an argument out of range; the model has a latent site that the guide does
                not draw (a discrete one, say), or subsamples its data; or its density is not
                finite where the guide draws.
        """
        check_whole(1, num_samples=num_samples, num_chains=num_chains)
        check_whole(0, warmup_steps=warmup_steps)
        log_joint = self._set_up(args, kwargs)
        flow = self.guide.flow.detached()

        def potential(z: dict[str, Tensor]) -> Tensor:
            return _potential(flow, log_joint, z["z"])

        chains, diverging = [], []
        for _ in range(num_chains):
            mcmc = MCMC(
                NUTS(potential_fn=potential),
                num_samples=num_samples,
                warmup_steps=warmup_steps,
                initial_params={"z": _start(flow.base, potential)},
                disable_progbar=not progress,
            )
            mcmc.run()
            chains.append(mcmc.get_samples()["z"])
            diverging.append(diverged(mcmc, 0, num_samples))
        with torch.no_grad():
            latent = flow.transform.forward_and_log_det(torch.cat(chains))[0]
            draws = self.guide.constrained(latent)
        self.draws = {
            name: value.reshape(num_chains, num_samples, *value.shape[1:])
            for name, value in draws.items()
        }
        self.diverging = torch.stack(diverging)
        return self.draws

    def r_hat(self) -> dict[str, Tensor]:
        """Split R-hat of every site's every coordinate, near 1 where the chains agree.

        Source: Gelman et al. 2013, Bayesian Data Analysis, section 11.4.

        Raises:
            ValueError: nothing was run yet, or fewer than 4 draws a chain.
        """
        if self.draws is None or self.diverging is None or self.diverging.shape[1] < 4:
            raise ValueError("draws: R-hat needs at least 4 draws a chain; call run first")
        return {name: split_gelman_rubin(value, 0, 1) for name, value in self.draws.items()}

    def _set_up(self, args: tuple, kwargs: dict) -> LogJoint:
        """Build the guide if need be, see that it covers the model, and give the log-density."""
        self.guide.setup(*args, **kwargs)
        self.guide.get_transform()  # brings the flow in step with Pyro's parameter store
        log_joint = self.guide.log_joint(args, kwargs, self.model)
        with torch.no_grad():
            trace, _ = log_joint.trace(self.guide.flow.sample(()))
        for name, site in sample_sites(trace).items():
            if any(is_subsampled(frame) for frame in site["cond_indep_stack"]):
                raise ValueError(
                    f"model: site {name!r} stands in a plate that draws a subsample, so its "
                    "density changes from call to call; pass all rows and no subsample_size"
                )
            if not site["is_observed"]:
                kind = "a discrete" if site["fn"].support.is_discrete else "a"
                raise ValueError(
                    f"model: {name!r} is {kind} latent site that the guide does not draw; "
                    "expected continuous sites only, all in the guide. Sum discrete ones out"
                )
        return log_joint


def _potential(flow: Flow, log_joint: LogJoint, z: Tensor) -> Tensor:
    """Minus the log-density that the base vector ``(latent_dim,)`` has, in nats."""
    latent, log_det = flow.transform.forward_and_log_det(z)
    return -log_joint(latent) - log_det


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
