"""Posteriors of awkward geometry: many modes, funnels, a hierarchy of real data."""

import os
import time
from pathlib import Path

import data as posteriordb
import ports
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import SEEDS, grid, judge, normal, quadrature

import pyroflows as pf

PEAKS = torch.tensor([2.0, 2.5, 3.0])
RADON = ["radon_mn-radon_pooled", "radon_mn-radon_partially_pooled_noncentered"]


def eight():
    """Modes of unlike shares, in ten dimensions."""
    z = pyro.sample("z", dist.Normal(torch.full((10,), 0.3), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(z[:3].abs(), 0.4).to_event(1), obs=PEAKS)


def of_eight():
    """A product, so evidences add up."""
    parts = [
        quadrature(lambda z, y=y: normal(z, 0.3, 2) + normal(y, z.abs(), 0.4), [grid(-9, 9, 4001)])
        for y in PEAKS.tolist()
    ]
    rest = torch.full((7,), 0.3).double(), torch.full((7,), 2.0).double()
    means, sds = (torch.cat([*(part[i] for part in parts), rest[i - 1]]) for i in (1, 2))
    return sum(part[0] for part in parts), means, sds


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_eight_modes(seed):
    judge(eight, of_eight(), seed)


def funnel(size):
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", size - 1):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    return model


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_neals_funnel(seed):
    torch.manual_seed(seed)
    began = time.process_time()
    found = pf.sample_posterior(funnel(10), draws=4000, progress=False)
    seconds = time.process_time() - began
    v = found["v"]
    print(
        f"\nfunnel of 10 {seed}: {seconds:.0f} s, k-hat {found.report.khat:.2f}, v {v.mean():.3f} "
        f"+- {v.std():.3f}, evidence off {found.report.evidence:+.4f}, {found.trusted}: {found.how}"
    )
    if found.trusted:
        assert abs(v.std() - 3.0) < 0.3
        assert abs(v.mean()) < 0.3
    else:
        assert "Do not trust" in found.how


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_large_funnel(seed):
    """The guide alone: chains, which its verdict asks for, take many minutes here."""
    torch.manual_seed(seed)
    began = time.process_time()
    guide = pf.AutoFlow(funnel(50))
    pf.fit_guide(guide.model, guide, progress=False)
    found = pf.report(guide.model, guide)
    seconds = time.process_time() - began
    v = found.draws["v"].double()
    mean = found.means()["v"]
    sd = (found.log_weights.exp() @ (v - mean).square()).sqrt()
    print(
        f"\nfunnel of 50 {seed}: {seconds:.0f} s, k-hat {found.khat:.2f}, weighted v {mean:.3f} "
        f"+- {sd:.3f}, evidence off {found.evidence:+.4f}: {found.verdict[:90]}"
    )
    if found.trusted:
        assert abs(sd - 3.0) < 0.3
        assert abs(mean) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RADON)
def test_radon(name, seed):
    folder = os.environ.get("PYROFLOWS_DATA")
    if not folder or not (Path(folder) / posteriordb.ROOT).is_dir():
        pytest.skip("PYROFLOWS_DATA names no folder that holds posteriordb")
    port, data = ports.load(name)
    torch.manual_seed(seed)
    began = time.process_time()
    found = pf.sample_posterior(port.model, data, draws=4000, progress=False)
    seconds = time.process_time() - began
    parameters = port.parameters_of(found.draws, data)
    off = max(
        ((parameters[key].mean(0) - mean) / sd).abs().max().item()
        for key, (mean, sd) in posteriordb.moments(name).items()
    )
    print(
        f"\n{name} {seed}: {seconds:.0f} s, k-hat {found.report.khat:.2f}, means off {off:.3f} sd, "
        f"{found.trusted}: {found.how}"
    )
    if found.trusted:
        assert off < 0.1
    else:
        assert "Do not trust" in found.how
