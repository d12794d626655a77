"""Two Gaussians, and hidden Markov models with two states."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from priors import Restricted, ordered, positive_ordered
from pyro.distributions import TorchDistribution, constraints
from regressions import Data
from torch import Tensor


def low_dim_gauss_mix(data: Data) -> None:
    """A mixture of two Gaussians whose means are ordered; theta weighs the first."""
    y = data["y"]
    zeros = y.new_zeros(2)
    mu = pyro.sample("mu", Restricted(dist.Normal(zeros, 2.0).to_event(1), ordered))
    sigma = pyro.sample("sigma", dist.HalfNormal(zeros + 2.0).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), y.new_tensor(5.0)))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], dim=-1)[..., None, :])
    parts = dist.Normal(mu[..., None, :], sigma[..., None, :])
    rows = dist.MixtureSameFamily(weights, parts).expand((*theta.shape, len(y)))
    pyro.sample("y", rows.to_event(1), obs=y)


def hmm_example(data: Data) -> None:
    """Gaussian noise of scale 1 around each state's mean; flat priors on the transitions."""
    y = data["y"][:, None]
    transition = _transition(y.new_ones(2, 2))
    prior = dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).to_event(1)
    mu = pyro.sample("mu", Restricted(prior, positive_ordered))
    emission = dist.Normal(mu[..., None, :, None], 1.0).to_event(1)
    pyro.sample("y", HiddenMarkov(transition, emission, len(y)), obs=y)


def hmm_drive_0(data: Data) -> None:
    """Basketball: inverse speed and distance to the hoop, both exponential, in two states."""
    transition = _transition(data["alpha"])
    emission = dist.Exponential(_levels(data, positive_ordered)).to_event(1)
    seen = torch.stack([data["u"], data["v"]], dim=-1)
    pyro.sample("uv", HiddenMarkov(transition, emission, len(seen)), obs=seen)


def hmm_drive_1(data: Data) -> None:
    """Basketball: inverse speed and distance to the hoop, both Gaussian, in two states."""
    transition = _transition(data["alpha"])
    noise = torch.stack([data["tau"], data["rho"]])
    emission = dist.Normal(_levels(data, ordered), noise).to_event(1)
    seen = torch.stack([data["u"], data["v"]], dim=-1)
    pyro.sample("uv", HiddenMarkov(transition, emission, len(seen)), obs=seen)


def _transition(concentration: Tensor) -> Tensor:
    """Draw the rows of the transition matrix; its logarithm, ``(*batch, 2, 2)``."""
    first = pyro.sample("theta1", dist.Dirichlet(concentration[0]))
    second = pyro.sample("theta2", dist.Dirichlet(concentration[1]))
    return torch.stack([first, second], dim=-2).log()


def _levels(data: Data, support: constraints.Constraint) -> Tensor:
    """Draw both outcomes' parameter in each state, ``(*batch, 1, state, outcome)``."""
    prior = dist.Normal(data["u"].new_tensor([0.0, 3.0]), 1.0).to_event(1)
    phi = pyro.sample("phi", Restricted(prior, support))
    lam = pyro.sample("lambda", Restricted(prior, support))
    return torch.stack([phi, lam], dim=-1)[..., None, :, :]


class HiddenMarkov(TorchDistribution):
    """What a hidden Markov chain emits, its states summed out.

    As in Stan's code for these models, the first state has weight 1 in each state.

    Args:
        transition: log-probabilities ``(*batch, K, K)`` from row to column.
        emission: of one outcome given the state: batch ``(*batch, 1, K)``, event ``(D,)``.
        length: number of outcomes T, at least 2; an event is ``(T, D)``.

    Raises:
        ValueError: the chain has no step.
    """

    arg_constraints = {}

    def __init__(self, transition: Tensor, emission: TorchDistribution, length: int) -> None:
        if length < 2:
            raise ValueError(f"length: expected 2 outcomes or more, got {length}")
        self.transition = transition
        self.emission = emission
        batch_shape = transition.shape[:-2]
        event_shape = torch.Size((length, *emission.event_shape))
        super().__init__(batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is not zero."""
        return constraints.independent(self.emission.support, 1)

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> HiddenMarkov:
        """The same with a larger batch."""
        states = self.transition.shape[-1]
        transition = self.transition.expand(*batch_shape, states, states)
        emission = self.emission.expand((*batch_shape, 1, states))
        return HiddenMarkov(transition, emission, self.event_shape[0])

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of outcomes ``(*batch, T, D)``; ``(*batch,)``."""
        emitted = self.emission.log_prob(value[..., None, :]).movedim(-1, 0)  # (K, *batch, T)
        moves = self.transition.movedim((-2, -1), (0, 1))[..., None]  # (K, K, *batch, 1)
        paths = emitted[:, None, ..., 0] + log_product(moves + emitted[None, ..., 1:])
        return paths.logsumexp(dim=(0, 1))  # over first and last state


def log_product(matrices: Tensor) -> Tensor:
    """The product of matrices given by their logarithms, in log2(T) rounds.

    Rows and columns stand first, since sums over a short last dimension are slow.

    Args:
        matrices: logarithms ``(K, K, *batch, T)`` of positive matrices.

    Returns:
        The logarithm ``(K, K, *batch)`` of the product from the first to the last.

    Example:
        >>> factors = torch.rand(5, 2, 2)
        >>> product = torch.linalg.multi_dot(tuple(factors))
        >>> torch.allclose(log_product(factors.log().movedim(0, -1)).exp(), product)
        True
    """
    while (count := matrices.shape[-1]) > 1:
        pairs = count - count % 2
        left, right = matrices[..., 0:pairs:2], matrices[..., 1:pairs:2]
        product = (left[:, :, None] + right[None]).logsumexp(dim=1)
        matrices = torch.cat([product, matrices[..., pairs:]], dim=-1)
    return matrices[..., 0]
