"""One call for a posterior: a guide, its verdict, and chains where the verdict asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows._checks import check_whole
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.neutra import NeuTra
from pyroflows.infer.training import fit_guide
from pyroflows.infer.verdict import Report, report
from pyroflows.programs.circles import about_mean

_R_HAT = 1.01  # Vehtari et al. 2021, arXiv:1903.08008
_LEAST = 400  # effective draws that chains are worth, of every number
_LENGTHS = 1, 4  # of the chains, one after the other until they agree
_WARMUP = 200


@dataclass(frozen=True)
class Posterior:
    """Draws of a posterior, and how they came about; printable.

    Of angles the mean that is printed is their direction, and the spread is about it.

    Attributes:
        draws: for each latent site ``(draws, *site shape)``, all of equal weight.
        how: what was done, in a sentence.
        trusted: whether nothing speaks against the draws.
        guide: the trained guide.
        report: its verdict.
        chains: the chains in the guide's base space that gave the draws, where it took them.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.tensor([0.0, 5.0]), 1.0).to_event(1))
        >>> found = pf.sample_posterior(model, draws=200, progress=False)
        >>> found["z"].shape, found.how.split(" for ")[0]
        (torch.Size([200, 2]), 'An AutoFlow was trained')
    """

    draws: dict[str, Tensor]
    how: str
    trusted: bool
    guide: AutoFlow
    report: Report
    chains: NeuTra | None = None

    def __getitem__(self, site: str) -> Tensor:
        """A site's draws."""
        return self.draws[site]

    def __str__(self) -> str:
        rows = [f"{'site':<20} {'mean':>10} {'sd':>10}"]
        for name, value in self.draws.items():
            flat = value.double().reshape(len(value), -1)
            if name in self.guide.angles:
                flat = about_mean(flat)
            for index, column in enumerate(flat.T[:10]):
                label = name if flat.shape[1] == 1 else f"{name}[{index}]"
                rows.append(f"{label:<20} {column.mean():>10.4g} {column.std():>10.3g}")
            if flat.shape[1] > 10:
                rows.append(f"{name}: {flat.shape[1] - 10} more numbers")
        return "\n".join([*rows, self.how])


def sample_posterior(
    model: Callable[..., Any],
    *args: Any,
    draws: int = 1000,
    guide: AutoFlow | None = None,
    chains: int = 64,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Draws of a model's posterior by one call, with what they rest on in a sentence.

    A flow guide is trained (``pf.fit_guide``) and judged (``pf.report``). Where its verdict is
    good, its draws are taken; where they need their importance weights, they are resampled by
    them; where the guide misses a mode, the sentence says so. Else many chains run in the guide's
    base space (``pf.NeuTra``), and again four times as long where they do not agree.

    Args:
        model: a Pyro model.
        *args: its arguments.
        draws: how many.
        guide: an ``AutoFlow`` of one's own settings, trained or not; it is trained on.
        chains: how many, where the verdict asks for them.
        progress: show what goes on.
        **kwargs: the model's keyword arguments.

    Raises:
        ValueError: an argument out of range, or what ``pf.AutoFlow`` and ``pf.fit_guide`` raise.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> found = pf.sample_posterior(model, torch.tensor([1.0, 2.0, 3.0]), progress=False)
        >>> found["loc"].shape, found.trusted
        (torch.Size([1000]), True)
    """
    check_whole(1, draws=draws)
    check_whole(2, chains=chains)
    guide = AutoFlow(model) if guide is None else guide
    history = fit_guide(model, guide, *args, progress=progress, **kwargs)
    found = report(model, guide, *args, num_samples=max(10_000, draws), **kwargs)
    trained = f"An AutoFlow was trained for {history.steps[-1]} steps (k-hat {found.khat:.2f}"
    if found.good:
        how = f"{trained}) and its draws taken as they are. {found.verdict}"
        taken = {name: value[:draws] for name, value in found.draws.items()}
        return Posterior(taken, how, True, guide, found)
    if found.trusted and found.ess >= min(_LEAST, draws):
        how = f"{trained}) and its draws resampled by their weights, worth {found.ess:.0f} draws."
        return Posterior(found.resample(draws), how, True, guide, found)
    if found.missed:  # chains start where the guide draws, and would not see it either
        how = f"Do not trust these draws: {trained}); {found.verdict}"
        return Posterior(found.resample(draws), how, False, guide, found)
    return _by_chains(model, guide, args, kwargs, (draws, chains, progress), trained, found)


def _by_chains(
    model: Callable[..., Any],
    guide: AutoFlow,
    args: tuple,
    kwargs: dict,
    asked: tuple[int, int, bool],
    trained: str,
    found: Report,
) -> Posterior:
    """Draws of chains that start from the guide's, and go on until they agree."""
    draws, chains, progress = asked
    neutra = NeuTra(model, guide, chains=chains)
    length = max(100, -(-draws // chains))
    for times in _LENGTHS:
        samples = neutra.run(
            *args,
            num_samples=times * length,
            warmup_steps=_WARMUP * times,
            progress=progress,
            **kwargs,
        )
        varies = {name: _varies(value.flatten(0, 1)) for name, value in samples.items()}
        r_hat = _largest({name: r[varies[name]] for name, r in neutra.r_hat().items()})
        ess = _smallest({name: e[varies[name]] for name, e in neutra.ess().items()})
        agree = r_hat[1] <= _R_HAT and ess[1] >= _LEAST
        if agree:
            break
    flat = {name: value.flatten(0, 1) for name, value in samples.items()}
    count = len(next(iter(flat.values())))
    index = torch.randperm(count)[:draws]
    how = (
        f"{trained}, not to be trusted by itself), and {chains} chains of {times * length} draws "
        f"in its base space: largest R-hat {r_hat[1]:.3f} ({r_hat[0]}), least effective number of "
        f"draws {ess[1]:.0f} ({ess[0]})."
    )
    if not agree:
        how = f"Do not trust these draws: {how} {found.verdict}"
    taken = {name: value[index] for name, value in flat.items()}
    return Posterior(taken, how, agree, guide, found, neutra)


def _varies(draws: Tensor) -> Tensor:
    """Which numbers differ between draws: the zeros of a Cholesky factor tell nothing of chains."""
    return draws.amax(0) != draws.amin(0)


def _largest(values: dict[str, Tensor]) -> tuple[str, float]:
    """The site with the largest number, and that; NaN is larger than all."""
    found = {name: v.max().item() for name, v in values.items() if v.numel()}
    name = max(found, key=lambda n: (found[n] != found[n], found[n]))
    return name, found[name]


def _smallest(values: dict[str, Tensor]) -> tuple[str, float]:
    name, value = _largest({name: -v for name, v in values.items()})
    return name, -value
