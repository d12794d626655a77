"""The posterior of item_response.py by a long run of NUTS, to hold its guide against.

NumPyro's NUTS (Phan, Pradhan & Jankowiak 2019, arXiv:1912.11554) draws all 10,050 unknowns in
double precision, chains one after the other, in blocks, until every item parameter has R-hat below
1.01 and an effective sample size above 400, or the time is up. ``item_response_reference.json``
keeps means, deviations and effective sample sizes of the item parameters alone, and what they cost;
of chains that disagree it keeps nothing::

    pip install pyroflows[benchmarks]
    python models/item_response_reference.py [--chains 2] [--draws 250] [--minutes 25]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from item_response import REFERENCE, SIZE, simulate
from numpy.typing import NDArray

RHAT, ESS = 1.01, 400  # what every item parameter must reach


def model(y: NDArray) -> None:
    """The model of ``item_response.two_parameters``."""
    import numpyro
    import numpyro.distributions as dist

    people, items = y.shape
    with numpyro.plate("of_items", items):
        a = numpyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = numpyro.sample("b", dist.Normal(0.0, 2.0))
    with numpyro.plate("of_people", people):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    logits = a * (theta[:, None] - b)
    numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=y)


def judged(blocks: list[dict[str, NDArray]]) -> dict[str, Any]:
    """R-hat, effective sample sizes and moments of ``(chains, draws, items)`` in blocks."""
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    draws = {k: np.concatenate([block[k] for block in blocks], axis=1) for k in blocks[0]}
    sizes = {k: effective_sample_size(v) for k, v in draws.items()}
    return {
        "draws": len(blocks) * blocks[0]["a"].shape[1],
        "rhat": round(float(max(split_gelman_rubin(v).max() for v in draws.values())), 4),
        "ess": round(float(min(size.min() for size in sizes.values()))),
        "parameters": {
            k: {
                "mean": v.mean((0, 1)).round(6).tolist(),
                "sd": v.std((0, 1)).round(6).tolist(),
                "ess": sizes[k].round().tolist(),
            }
            for k, v in draws.items()
        },
    }


def main(args: argparse.Namespace) -> None:
    """Warm up, draw blocks until it is enough, write the file where it is."""
    import jax
    import numpyro
    from numpyro.infer import MCMC, NUTS

    numpyro.enable_x64()
    y, _ = simulate(*SIZE)
    data = y.numpy().astype(np.float64)
    chains = {"num_chains": args.chains, "chain_method": "sequential", "progress_bar": False}
    mcmc = MCMC(NUTS(model), num_warmup=args.warmup, num_samples=args.draws, **chains)
    begin, cpu = time.perf_counter(), time.process_time()
    mcmc.warmup(jax.random.PRNGKey(args.seed), data)
    warm = time.process_time() - cpu
    print(f"warm-up: {warm:.0f} CPU s", flush=True)
    blocks: list[dict[str, NDArray]] = []
    leapfrogs = divergences = 0
    while True:
        mcmc.run(mcmc.post_warmup_state.rng_key, data, extra_fields=("num_steps", "diverging"))
        drawn, extra = mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields()
        blocks.append({k: np.asarray(drawn[k]) for k in ("a", "b")})
        leapfrogs += int(extra["num_steps"].sum())
        divergences += int(extra["diverging"].sum())
        mcmc.post_warmup_state = mcmc.last_state
        found = judged(blocks)
        spent = time.perf_counter() - begin
        print({k: found[k] for k in ("draws", "rhat", "ess")}, f"{spent:.0f} s", flush=True)
        enough = found["rhat"] < RHAT and found["ess"] > ESS
        if enough or spent * (1 + 1 / (1 + len(blocks))) > 60 * args.minutes:
            break
    if not enough:
        print("no reference: chains disagree, or are too short; nothing is written")
        return
    head = {
        "sampler": f"numpyro {numpyro.__version__}",
        "people": len(y),
        "items": y.shape[1],
        "chains": args.chains,
        "warmup": args.warmup,
        "leapfrogs_after_warmup": leapfrogs,
        "divergences": divergences,
        "warmup_cpu_seconds": round(warm, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    REFERENCE.write_text(json.dumps({**head, **found}) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=500, help="of each chain")
    parser.add_argument("--draws", type=int, default=250, help="of each chain in a block")
    parser.add_argument("--minutes", type=float, default=25, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
