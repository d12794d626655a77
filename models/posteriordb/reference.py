"""Make references by long runs of NUTS, where posteriordb has no reference draws.

NumPyro's NUTS (Phan, Pradhan & Jankowiak 2019, arXiv:1912.11554) draws from the transcribed
log-density in JAX: four chains, in blocks, until every parameter has R-hat below 1.01 and an
effective sample size above 400, and at most one draw in 1,000 diverges, or the time is up::

    pip install pyroflows[benchmarks]
    PYROFLOWS_DATA=... python models/posteriordb/reference.py          # those still missing
    PYROFLOWS_DATA=... python models/posteriordb/reference.py pilots-pilots
    python models/posteriordb/reference.py --table                     # what each cost

``references.json`` keeps means, deviations, effective sample sizes and the processor's seconds. A
posterior whose chains disagree is kept as such, without means: it is no reference.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from compare import latent_sites, log_density_of
from data import REFERENCES, references
from port import Port
from ports import WITHOUT_DRAWS, load
from regressions import Data

CHAINS = 4
RHAT, ESS = 1.01, 400  # what every parameter must reach
DIVERGENT = 0.001  # of the draws, at most: more of them miss a part of the posterior


def support_in_numpyro(constraint: Any, shape: tuple[int, ...]) -> Any:
    """The same constraint of NumPyro's, over a whole array of this shape."""
    from numpyro.distributions import constraints

    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    kind = type(constraint).__name__.strip("_").removesuffix("Vector")
    plain = {
        "Real": constraints.real,
        "Simplex": constraints.simplex,
        "CorrCholesky": constraints.corr_cholesky,
        "Ordered": constraints.ordered_vector,
        "PositiveOrdered": constraints.positive_ordered_vector,
    }
    if kind in plain:
        support = plain[kind]
    elif hasattr(constraint, "upper_bound"):
        bounds = [np.asarray(b) for b in (constraint.lower_bound, constraint.upper_bound)]
        support = constraints.interval(*bounds)
    elif hasattr(constraint, "lower_bound"):
        support = constraints.greater_than(float(constraint.lower_bound))
    else:
        raise NotImplementedError(f"no constraint of NumPyro's for {constraint}")
    return constraints.independent(support, len(shape) - support.event_dim)


def unconstrained(name: str, port: Port, data: Data) -> tuple[Any, Any, dict[str, tuple]]:
    """The transcribed posterior on the unconstrained scale.

    Returns:
        The negative log-density of a dict of free values, the function that constrains those, and
        their shapes.
    """
    from numpyro.distributions import biject_to

    maps, shapes = {}, {}
    again = latent_sites(port.model, data)
    for site, node in latent_sites(port.model, data).items():
        shape, support = tuple(node["value"].shape), node["fn"].support
        if str(support) != str(again[site]["fn"].support):
            raise NotImplementedError(f"the support of {site} depends on other sites")
        maps[site] = biject_to(support_in_numpyro(support, shape))
        shapes[site] = maps[site].inverse_shape(shape)
    log_density = log_density_of(name)

    def constrained(free: dict[str, Any]) -> dict[str, Any]:
        return {site: to_support(free[site]) for site, to_support in maps.items()}

    def potential(free: dict[str, Any]) -> Any:
        values = constrained(free)
        log_dets = (
            to_support.log_abs_det_jacobian(free[site], values[site])
            for site, to_support in maps.items()
        )
        return -log_density(values) - sum(log_dets)

    return potential, constrained, shapes


def sampled(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the chains of one posterior and judge them."""
    from jax import block_until_ready

    port, data = load(name)
    clock = [time.process_time()]
    first, advance = chains(*unconstrained(name, port, data), args)
    clock.append(time.process_time())
    states, _ = block_until_ready(advance(first))
    clock.append(time.process_time())
    compiled, warm = np.diff(clock).tolist()
    blocks: list[dict[str, np.ndarray]] = []
    leapfrogs, divergences, drawing = 0, 0, 0.0
    while True:
        begin = time.process_time()
        states, (draws, steps, diverging) = block_until_ready(advance(states))
        drawing += time.process_time() - begin
        leapfrogs, divergences = leapfrogs + int(steps.sum()), divergences + int(diverging.sum())
        blocks.append({key: np.asarray(value) for key, value in draws.items()})
        figures = judged(port, data, blocks)
        enough = figures["rhat"] < RHAT and figures["ess"] > ESS
        if enough or compiled + warm + drawing * (1 + 1 / len(blocks)) > args.seconds:
            break
    return {
        "chains": CHAINS,
        "warmup": args.draws,
        "draws": args.draws * len(blocks),
        "leapfrogs": leapfrogs,
        "divergences": divergences,
        "compile_cpu_seconds": round(compiled, 1),
        "warmup_cpu_seconds": round(warm, 1),
        "draws_cpu_seconds": round(drawing, 1),
        **figures,
    }


def chains(
    potential: Any, constrained: Any, shapes: dict[str, tuple], args: argparse.Namespace
) -> tuple[Any, Any]:
    """First states of all chains, and a function that advances them one after the other.

    One compiled program: ``numpyro.infer.MCMC`` compiles anew for each chain, which takes longer
    than small posteriors do.
    """
    import jax
    from numpyro.infer import NUTS

    kernel = NUTS(potential_fn=potential, target_accept_prob=args.accept)

    def first(key: Any) -> Any:
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        free = {
            site: jax.random.uniform(keys[site], shape, float, -args.radius, args.radius)
            for site, shape in shapes.items()
        }
        return kernel.init(key, args.draws, free, (), {})

    def step(state: Any, _: None) -> tuple[Any, Any]:
        state = kernel.sample(state, (), {})
        return state, (constrained(state.z), state.num_steps, state.diverging)

    def advance(states: Any) -> Any:
        return jax.lax.map(lambda state: jax.lax.scan(step, state, length=args.draws), states)

    keys = jax.random.split(jax.random.PRNGKey(args.seed), CHAINS)
    states = jax.jit(lambda keys: jax.lax.map(first, keys))(keys)
    return states, jax.jit(advance).lower(states).compile()


def judged(port: Port, data: Data, blocks: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Means, deviations, R-hat and effective sample sizes of the port's parameters."""
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    latents = {k: np.concatenate([block[k] for block in blocks], axis=1) for k in blocks[0]}
    flat = {k: torch.tensor(v.reshape(-1, *v.shape[2:])) for k, v in latents.items()}
    found = {k: v.numpy() for k, v in port.parameters_of(flat, data).items()}
    rhats, sizes, parameters = [], [], {}
    for key, value in found.items():
        chained = value.reshape(CHAINS, -1, *value.shape[1:])
        rhats.append(np.ravel(split_gelman_rubin(chained)))
        sizes.append(np.ravel(effective_sample_size(chained)))
        parameters[key] = {
            "mean": rounded(value.mean(0)),
            "sd": rounded(value.std(0)),
            "ess": round(float(sizes[-1].min())),
        }
    rhat, size = np.concatenate(rhats), np.concatenate(sizes)
    return {
        "rhat": round(float(np.max(rhat)), 4),
        "ess": round(float(np.min(size))),
        "ess_median": round(float(np.median(size))),
        "parameters": parameters,
    }


def rounded(values: np.ndarray) -> Any:
    """Six digits."""
    return np.vectorize(lambda x: float(f"{x:.6g}"))(values).tolist()


def why_not(line: dict[str, Any]) -> str:
    """What speaks against a run as a reference; empty if nothing."""
    share = line["divergences"] / (line["chains"] * line["draws"])
    reasons = {
        f"R-hat {line['rhat']:.3f}": line["rhat"] >= RHAT,
        f"ESS {line['ess']}": line["ess"] <= ESS,
        f"{share:.1%} of the draws diverge": share > DIVERGENT,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def table() -> str:
    """Markdown: what each reference cost, the time to compile left out."""
    rows = [
        "| posterior | R-hat | ESS, least and median | CPU s | of which warm-up | a 1,000 ESS | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, line in references().items():
        warm = line["warmup_cpu_seconds"]
        spent = warm + line["draws_cpu_seconds"]
        rows.append(
            f"| {name} | {line['rhat']:.3f} | {line['ess']}, {line['ess_median']} | {spent:.1f} | "
            f"{warm:.1f} | {1000 * spent / line['ess']:.1f} | {line.get('no_reference', '')} |"
        )
    return "\n".join(rows)


def kept(name: str, line: dict[str, Any]) -> None:
    """Put a posterior into ``references.json``; a failed one without its means."""
    reason = why_not(line)
    if reason:
        line = {k: v for k, v in line.items() if k != "parameters"}
        line = {"no_reference": reason, **line}
    everything = dict(sorted({**references(), name: line}.items()))
    rows = [f" {json.dumps(key)}: {_lines(value)}" for key, value in everything.items()]
    REFERENCES.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def _lines(of: dict[str, Any]) -> str:
    """JSON with a line a parameter."""
    parameters = of.get("parameters")
    head = json.dumps({k: v for k, v in of.items() if k != "parameters"})
    if parameters is None:
        return head
    rows = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in parameters.items())
    return f'{head[:-1]}, "parameters": {{\n{rows}\n  }}}}'


def main(args: argparse.Namespace) -> None:
    """Run what is asked for, one after the other."""
    if args.table:
        print(table())
        return
    import numpyro

    chosen = args.names or [name for name in WITHOUT_DRAWS if name not in references()]
    for name in chosen:
        try:
            line = {"sampler": f"numpyro {numpyro.__version__}", **sampled(name, args)}
        except NotImplementedError as error:
            print(f"{name}: no reference, since {error}", flush=True)
            continue
        kept(name, line)
        shown = {k: v for k, v in line.items() if k not in ("parameters", "sampler")}
        print(name, " ".join(f"{k}={v}" for k, v in shown.items()), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="posteriors, by default those without a reference")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    parser.add_argument("--seconds", type=float, default=240, help="of the processor, a posterior")
    parser.add_argument("--draws", type=int, default=1000, help="of a chain's blocks and warm-up")
    parser.add_argument("--accept", type=float, default=0.8, help="target acceptance of NUTS")
    parser.add_argument("--radius", type=float, default=2.0, help="of the box chains start in")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
