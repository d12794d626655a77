"""``list``, ``report`` and ``check``: what there is, how good it is, whether yours is right."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from pyroflows.cli.output import Json, command, note, on_terminal, result
from pyroflows.cli.runs import read_run
from pyroflows.data.checks import checked_flow
from pyroflows.distributions.flow import Flow
from pyroflows.flows import builders, examples
from pyroflows.saving.builders import import_by_name

COSTS = {
    "both": ("1 pass", "1 pass"),
    "sample": ("1 pass", "1 solve"),
    "log_prob": ("1 solve", "1 pass"),
}


@command
def list_flows(json: Json = False) -> None:
    """The flows, and what each direction costs.

    A pass is one evaluation of the networks. A solve goes through the features once, exactly, at
    about the cost of two passes for a vector. An iteration takes a few dozen passes.

    Example: pyroflows list
    """
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    described = builders()
    for example in examples().values():
        flow = example.make()
        config = flow.config
        if config is None or config["builder"] not in described:
            continue
        name = config["builder"]
        arguments = {k: v for k, v in config["arguments"].items() if k in ("scheme", "fast")}
        defaults = inspect.signature(described[name]).parameters
        options = {k: v for k, v in arguments.items() if v != defaults[k].default}
        sample, score = COSTS[example.fast]
        if "tolerance" in defaults:  # it solves for the inverse
            sample = sample.replace("1 solve", "iteration")
        key = name, sample, score
        text = (described[name].__doc__ or "").strip().splitlines()[0]
        words = " ".join(f"{k}={v}" for k, v in options.items())
        rows.setdefault(
            key,
            {
                "flow": name,
                "options": words,
                "takes": next(iter(defaults)),
                "sample": sample,
                "log_prob": score,
                "about": text,
            },
        )
    found = sorted(rows.values(), key=lambda row: (row["flow"], row["options"]))
    result({"flows": found}, _aligned(found), json)


def _aligned(rows: list[dict[str, str]]) -> list[str]:
    titles = list(rows[0])
    lines = [titles, *([row[t] for t in titles] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


@command
def report(
    run: Annotated[Path, typer.Argument(help="A folder of pyroflows fit.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the folder.")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many draws to compare with.", min=100)] = 5000,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    json: Json = False,
) -> None:
    """A page with the course of training, data beside samples, and how right the densities are.

    One HTML file with the pictures inside. It shows held-out rows: share it as you would share
    those.

    Example: pyroflows report run/
    """
    from pyroflows.cli.page import judged, write_page

    made = read_run(run)
    out = out or made.folder / "report.html"
    torch.manual_seed(seed)
    facts = judged(made, samples)
    write_page(made, facts, out)
    summary = {k: v for k, v in facts.items() if isinstance(v, (int, float, str))}
    lines = [
        f"held out: {facts['nats']:.3f} +- {facts['error']:.3f} nats a row; a Gaussian: "
        f"{facts['gaussian']:.3f}",
        f"calibration of the densities: KS distance {facts['ks']:.3f}, "
        f"{'within' if facts['calibrated'] else 'beyond'} chance ({facts['ks_limit']:.3f})",
        f"written to {out}",
    ]
    result({**summary, "out": str(out)}, lines, json)


@command
def check(
    flow: Annotated[str, typer.Argument(help="module:function; the module here or installed.")],
    features: Annotated[
        int, typer.Option(help="Passed to a function that needs an argument.", min=1)
    ] = 3,
    json: Json = False,
) -> None:
    """Hold a flow of your own to the contract: inverses, log-determinants, gradients, state.

    Runs every law of pyroflows.testing, and goes on after one that is broken. The exit code is 1
    if any was. This imports your module: it runs its code.

    Example: pyroflows check my_flows:spiral
    """
    from pyroflows.testing import LAWS, SLOW_LAWS, check_flow

    make = _maker(flow, features)
    broken: dict[str, str] = {}
    held: list[str] = []
    for law in (name for name in LAWS if name not in SLOW_LAWS):
        try:
            check_flow(make, laws=[law])
        except AssertionError as error:
            broken[law] = " ".join(str(error).split())
        except Exception as error:  # of the flow's own code
            broken[law] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            held.append(law)
        if on_terminal(json):
            note(f"{'BROKEN' if law in broken else 'ok':8}{law}")
    lines = [f"ok      {law}" for law in held]
    lines += [f"BROKEN  {law}: {text[:300]}" for law, text in broken.items()]
    lines.append(f"{len(held)} of {len(held) + len(broken)} laws hold")
    result({"flow": flow, "held": held, "broken": broken}, lines, json)
    if broken:
        raise typer.Exit(1)


def _maker(name: str, features: int) -> Callable[[], Flow]:
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ValueError(f"expected module:function, got {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_by_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {name!r}: {error}") from None
    if isinstance(found, nn.Module):  # a flow, which is callable too
        return functools.partial(copy.deepcopy, checked_flow(name, found))
    if not callable(found):
        raise ValueError(f"{name}: expected a function that returns a Flow, got {found!r}")
    try:
        inspect.signature(found).bind()
        make = found
    except TypeError:
        make = functools.partial(found, features)
    checked_flow(name, make(), "a Flow from it")
    return make
