"""Fit the default guide to every posterior of posteriordb that has a port, and judge it.

One call each, ``pf.AutoFlow`` and ``pf.fit_guide`` with no settings, beside Pyro's own guides under
the same budget of steps and particles, and NUTS on ten of them::

    python models/posteriordb/run.py                          # the flow guide on all
    python models/posteriordb/run.py kidiq-kidscore_momiq     # on some
    python models/posteriordb/run.py --guides flow normal multivariate iaf --nuts
    python models/posteriordb/run.py --smoke

Success is that of Baudart & Mandel 2021 (arXiv:2111.03434): the largest error of a parameter's mean
below 0.3 reference standard deviations. Where there is no reference, what the guide says of itself
stands alone. Writes a table (markdown) and all figures (JSON).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from data import Moments, moments
from port import Port
from ports import MODELS, load
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from tqdm.auto import tqdm

import pyroflows as pf

GUIDES = {
    "flow": pf.AutoFlow,
    "normal": AutoNormal,
    "multivariate": AutoMultivariateNormal,
    "iaf": lambda model: AutoIAFNormal(model, hidden_dim=[32, 32], num_transforms=3),
}
NUTS_SUBSET = (
    "eight_schools-eight_schools_noncentered",
    "arK-arK",
    "arma-arma11",
    "earnings-logearn_height",
    "kidiq-kidscore_momiq",
    "kidiq_with_mom_work-kidscore_interaction_c",
    "low_dim_gauss_mix-low_dim_gauss_mix",
    "mesquite-logmesquite",
    "nes1976-nes",
    "sblrc-blr",
)


def judged(port: Port, data: Any, latents: dict[str, Tensor], reference: Moments | None) -> dict:
    """How far means and spreads of draws are from the reference's; empty where there is none."""
    if reference is None:
        return {}
    found = port.parameters_of(latents, data)
    errors, ratios = [], []
    for name in port.parameters:
        value = found[name].double()
        mean, spread = reference[name]
        errors.append(((value.mean(0) - mean) / spread).abs().flatten())
        ratios.append((value.std(0) / spread).flatten())
    error, ratio = torch.cat(errors), torch.cat(ratios)
    return {
        "error": error.max().item(),
        "sd_ratios": [ratio.min().item(), ratio.max().item()],
    }


def fitted(name: str, kind: str, seed: int, smoke: bool) -> dict:
    """One guide on one posterior."""
    (port, data), reference = load(name), moments(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    usual = torch.get_default_dtype()
    if kind != "flow":  # Pyro's nets take the default dtype, not the data's
        torch.set_default_dtype(torch.float64)
    guide = GUIDES[kind](port.model)
    line: dict[str, Any] = {"posterior": name, "guide": kind}
    begin, busy = time.perf_counter(), time.process_time()
    try:
        steps = {"max_steps": 50} if smoke else {}
        if kind != "flow":
            guide(data)
        objective = "auto" if kind == "flow" else "elbo"
        history = pf.fit_guide(
            port.model, guide, data, objective=objective, progress=False, **steps
        )
        line["seconds"] = time.perf_counter() - begin
        line["cpu_seconds"] = time.process_time() - busy
        line["steps"], line["skipped"] = history.steps[-1], history.skipped
        report = pf.report(port.model, guide, data, num_samples=1000 if smoke else 10_000)
    except (RuntimeError, ValueError, ArithmeticError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {**line, "failure": reason[:120]}
    finally:
        torch.set_default_dtype(usual)
    picked = report.resample(len(report.log_weights))
    return {
        **line,
        **judged(port, data, report.draws, reference),
        "weighted_error": judged(port, data, picked, reference).get("error"),
        "khat": report.khat,
        "threshold": report.threshold,
        "ess": report.ess,
        "elbo": report.elbo,
        "elbo_error": report.elbo_error,
        "evidence": report.evidence,
        "verdict": report.verdict,
    }


def sampled(name: str, seed: int, smoke: bool) -> dict:
    """NUTS, 500 draws after 500 to warm up, one chain."""
    (port, data), reference = load(name), moments(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    count = 5 if smoke else 500
    mcmc = MCMC(NUTS(port.model), num_samples=count, warmup_steps=count, disable_progbar=True)
    begin, busy = time.perf_counter(), time.process_time()
    mcmc.run(data)
    line = {
        "posterior": name,
        "guide": "nuts",
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - busy,
    }
    return {**line, **judged(port, data, mcmc.get_samples(), reference)}


def table(lines: list[dict]) -> str:
    """Markdown, a row a posterior and guide."""
    rows = [
        "| posterior | guide | error (sd) | weighted | sd ratios | k-hat | ELBO | s | CPU s | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "failure" in line:
            rows.append(f"| {line['posterior']} | {line['guide']} | {line['failure']} |||||||| |")
            continue
        low, high = line.get("sd_ratios", (math.nan, math.nan))
        error = line.get("error", math.nan)
        weighted = f"{line['weighted_error']:.3f}" if line.get("weighted_error") is not None else ""
        khat = f"{line['khat']:.2f}" if "khat" in line else ""
        elbo = f"{line['elbo']:.2f}" if "elbo" in line else ""
        busy = f"{line['cpu_seconds']:.0f}" if "cpu_seconds" in line else ""
        good = "yes" if error < 0.1 else "0.3" if error < 0.3 else "NO"
        good = "no reference" if math.isnan(low) else good
        rows.append(
            f"| {line['posterior']} | {line['guide']} | {error:.3f} | {weighted} | "
            f"{low:.2f}-{high:.2f} | {khat} | {elbo} | {line['seconds']:.0f} | "
            f"{busy} | {good} |"
        )
    return "\n".join(rows)


def summary(lines: list[dict], kind: str) -> str:
    """How often a guide succeeded."""
    mine = [line for line in lines if line["guide"] == kind]
    done = [line for line in mine if "failure" not in line]
    near, very_near = (
        sum(line.get("error", math.inf) < limit for line in done) for limit in (0.3, 0.1)
    )
    unknown = sum("error" not in line for line in done)
    text = (
        f"{kind}: {near} of {len(mine) - unknown} within 0.3 sd, {very_near} within 0.1 sd, "
        f"{len(mine) - len(done)} failures"
    )
    if unknown:
        text += f", {unknown} without a reference"
    if done and "khat" in done[0]:
        good = [line for line in done if line["khat"] < line["threshold"]]
        lies = [line["posterior"] for line in good if (line["weighted_error"] or 0) > 0.3]
        text += f", k-hat good on {len(good)}, of which weighted means are off: {lies or 'none'}"
    if done:
        for key, of in (("seconds", "s"), ("cpu_seconds", "s of CPU")):
            times = sorted(line[key] for line in done if key in line)
            text += f"; median {times[len(times) // 2]:.0f} {of}, longest {times[-1]:.0f} {of}"
    return text


def main(args: argparse.Namespace) -> None:
    """Run what is asked for; print and keep the tables."""
    torch.set_num_threads(args.threads)
    chosen = args.posteriors or (["kidiq-kidscore_momiq"] if args.smoke else list(MODELS))
    missing = set(chosen) - set(MODELS)
    if missing:
        raise SystemExit(f"posteriors: no ports of {sorted(missing)}")
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[dict] = []
    bar = tqdm(chosen, unit="posterior", disable=None)
    for name in bar:
        bar.set_description(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new = [fitted(name, kind, args.seed, args.smoke) for kind in args.guides]
            if args.nuts and name in NUTS_SUBSET:
                new.append(sampled(name, args.seed, args.smoke))
        lines += new
        bar.write("\n".join(table(new).splitlines()[2:]))
        (args.out / f"{args.name}.json").write_text(json.dumps(lines, indent=1))
    kinds = [*args.guides, *(["nuts"] if args.nuts else [])]
    text = "\n\n".join([table(lines), "\n".join(summary(lines, kind) for kind in kinds)])
    (args.out / f"{args.name}.md").write_text(text + "\n")
    print("\n".join(summary(lines, kind) for kind in kinds))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("posteriors", nargs="*", help="by default all that have a port")
    parser.add_argument("--guides", nargs="+", default=["flow"], choices=list(GUIDES))
    parser.add_argument("--nuts", action="store_true", help="also NUTS, on ten of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="one posterior, in seconds")
    parser.add_argument("--name", default="posteriordb", help="of the files written")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
