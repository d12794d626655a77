"""Exact posteriors of small models, and the judge of what a guide makes of them."""

import math
import time

import pyro
import torch

import pyroflows as pf

SEEDS = (0, 1, 2)


def quadrature(log_density, grids, columns=lambda *at: at):
    """Evidence, means and sds by sums over a grid of even steps."""
    at = torch.meshgrid(*grids, indexing="ij")
    log_p = log_density(*at)
    evidence = log_p.flatten().logsumexp(0) + sum((g[1] - g[0]).log() for g in grids)
    weights = log_p.flatten().softmax(0)
    values = torch.stack([c.flatten() for c in columns(*at)])
    means = values @ weights
    return evidence.item(), means, ((values - means[:, None]).square() @ weights).sqrt()


def grid(low, high, count=801):
    return torch.linspace(low, high, count, dtype=torch.float64)


def normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))


def gaussian(loc, covariance, design, noise, y):
    """Evidence, means and sds of a Gaussian vector, given ``y = design @ vector + noise``.

    ``noise`` are standard deviations, one for each row.
    """
    loc, covariance, design, y = (t.double() for t in (loc, covariance, design, y))
    marginal = design @ covariance @ design.T + noise.double().square().diag()
    seen = torch.distributions.MultivariateNormal(design @ loc, marginal)
    gain = covariance @ design.T @ torch.linalg.inv(marginal)
    spread = covariance - gain @ design @ covariance
    return seen.log_prob(y).item(), loc + gain @ (y - design @ loc), spread.diagonal().sqrt()


def columns_of(guide):
    """All numbers of a guide's draws side by side, in the order of its sites."""
    sites = [site.name for site in guide.learned.sites]
    return lambda draws: torch.cat([draws[n].reshape(len(draws[n]), -1) for n in sites], dim=1)


def judge(model, truth, seed, *args, batches=None, of=None, **settings):
    """Fit the default guide to a model and judge it; ``of`` says what of its draws is known.

    ``truth`` may be a function, called after the training: of a model with parameters.
    """
    torch.manual_seed(seed)
    pyro.clear_param_store()
    began = time.process_time()
    guide = pf.AutoFlow(model)
    pf.fit_guide(model, guide, *args, batches=batches, progress=False, **settings)
    found = pf.report(model, guide, *args)
    seconds = time.process_time() - began
    label = f"{model.__name__} {seed}: {seconds:.0f} s, {guide.modes} modes"
    compare(label, found, truth() if callable(truth) else truth, of or columns_of(guide))
    return guide, found


def compare(label, found, truth, of):
    """A report is right, or says in words that it is not."""
    evidence, means, sds = truth
    values = of(found.draws).double()
    off, plain_off = (
        ((m - means) / sds).abs().max().item()
        for m in (found.log_weights.exp() @ values, values.mean(0))
    )
    wrong = found.evidence - evidence
    print(
        f"\n{label}, k-hat {found.khat:.2f}, ESS {found.ess:.0f}, weighted off {off:.3f} sd, "
        f"draws off {plain_off:.3f} sd, evidence off {wrong:+.4f}: {found.verdict[:60]}"
    )
    if not found.trusted:
        assert found.verdict.startswith("Do not trust it: "), found
        return
    assert off < max(0.1, 3 / found.ess**0.5), found
    assert abs(wrong) < max(0.1, 3 * found.evidence_error), found
    if found.good:
        assert plain_off < 0.1, found
