"""Prove the ports: by Stein's identities on reference draws, or on a transcription of Stan's code.

Let p be the density of a posterior on the unconstrained scale, where each site is mapped to R^n by
the inverse of ``biject_to(support)``. Then for theta ~ p and g = grad log p(theta)

    E[g_j] = 0    and    E[theta_i g_j] = -1 if i = j, else 0,

under mild conditions at infinity (Stein 1972). They hold in any affine coordinates; where the draws
have mean 0 and covariance 1, the means have the smallest errors. With reference draws in place of p
and the port's gradient for g, every mean must have its value within its standard error. A port with
another likelihood or another prior fails, if the prior moves the posterior by more than the error
of 10,000 draws::

    PYROFLOWS_DATA=... python models/posteriordb/prove.py [names]

prints a line for each posterior: its dimension, the largest |z| of all identities, the bound that a
right port keeps 999 times in 1,000, and the largest standard error of E[theta_i g_i]. Where
posteriordb has no draws, it prints by how many nats the port's log-density and the transcribed one
(``compare.py``) are off from differing by a constant, and what rounding may do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from compare import compare, log_joint
from data import reference_draws
from port import Port
from ports import MODELS, WITH_DRAWS, load
from pyro import poutine
from regressions import Data
from torch import Tensor
from torch.distributions import biject_to

CHUNK = 1000  # draws whose gradients are computed at once


@dataclass(frozen=True)
class Proof:
    """How far a port is from Stein's identities on given draws.

    Attributes:
        dimension: number of unconstrained variables.
        z: the largest distance of a mean from its value, in standard errors.
        bound: what the largest of so many |z| stays below with probability 0.999.
        error: the largest standard error of E[theta_i g_i], whose value is -1.
    """

    dimension: int
    z: float
    bound: float
    error: float

    @property
    def passes(self) -> bool:
        """Whether all identities hold within their errors."""
        return self.z < self.bound  # false for a NaN


def prove(port: Port, data: Data, draws: Data) -> Proof:
    """Test Stein's identities.

    Args:
        port: the model.
        data: its prepared data.
        draws: nearly independent draws ``(draws, *shape)`` of the reference parameters.
    """
    theta, gradient = gradients(port.model, data, port.to_latents(draws, data))
    white, gradient = whitened(theta, gradient)
    count, dimension = white.shape
    products = white[:, :, None] * gradient[:, None, :]
    products = products + torch.eye(dimension, dtype=white.dtype)
    terms = torch.cat([gradient, products.flatten(1)], dim=1)  # each has mean 0
    error = terms.std(dim=0) / count**0.5
    z = (terms.mean(dim=0) / error).abs().max().item()
    bound = statistics.NormalDist().inv_cdf(1 - 0.001 / (2 * terms.shape[1]))
    diagonal = error[dimension:].reshape(dimension, dimension).diagonal()
    return Proof(dimension, z, bound, diagonal.max().item())


def whitened(theta: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Draws with mean 0 and covariance 1, and the gradient with respect to those.

    The symmetric root of the correlation makes the change of variables: with a triangular one, the
    diagonal terms would be off by O(n / draws) each.
    """
    scale = theta.std(dim=0)
    standard = (theta - theta.mean(dim=0)) / scale
    values, vectors = torch.linalg.eigh(torch.cov(standard.T))
    root = vectors * values.sqrt() @ vectors.T
    return torch.linalg.solve(root, standard.T).T, gradient * scale @ root


def gradients(model: Callable[[Data], None], data: Data, latents: Data) -> tuple[Tensor, Tensor]:
    """Unconstrained draws and the gradient of the log-density there, both ``(draws, n)``."""
    first = {name: value[0] for name, value in latents.items()}
    trace = poutine.trace(poutine.condition(model, data=first)).get_trace(data)
    maps = {name: biject_to(trace.nodes[name]["fn"].support) for name in latents}
    free = {name: maps[name].inv(value) for name, value in latents.items()}
    shapes = {name: value.shape[1:] for name, value in free.items()}
    theta = torch.cat([value.reshape(len(value), -1) for value in free.values()], dim=1)

    def log_density(rows: Tensor) -> Tensor:
        pieces = rows.split([shape.numel() for shape in shapes.values()], dim=1)
        values, log_det = {}, rows.new_zeros(len(rows))
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
            piece = piece.reshape(len(rows), *shape)
            values[name] = maps[name](piece)
            log_det = log_det + maps[name].log_abs_det_jacobian(piece, values[name])
        return log_det + log_joint(model, data, values)

    result = []
    for chunk in theta.split(CHUNK):
        rows = chunk.detach().requires_grad_()
        result.append(torch.autograd.grad(log_density(rows).sum(), rows)[0])
    return theta, torch.cat(result)


def main(args: argparse.Namespace) -> bool:
    """Print a line for each posterior; returns whether all passed."""
    fine = True
    print(f"{'posterior':<58}{'n':>6}{'|z|, gap':>9}{'bound':>9}{'error':>8}{'s':>6}")
    for name in args.names or MODELS:
        begin = time.perf_counter()
        port, data = load(name)
        if name in WITH_DRAWS:
            proof = prove(port, data, reference_draws(name))
            numbers = f"{proof.z:>9.2f}{proof.bound:>9.2f}{proof.error:>8.3f}"
        else:
            proof = compare(name, port, data)
            numbers = f"{proof.gap:>9.0e}{proof.bound:>9.0e}{'':>8}"
        fine &= proof.passes
        seconds, word = time.perf_counter() - begin, "" if proof.passes else "  FAILS"
        print(f"{name:<58}{proof.dimension:>6}{numbers}{seconds:>6.1f}{word}", flush=True)
    return fine


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="posteriors, all by default")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(0 if main(parse()) else 1)
