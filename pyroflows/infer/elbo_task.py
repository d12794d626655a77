"""The ELBO as a task of the training loop: a step, and a measurement by the same particles."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows._distributed import mean_over, reduced
from pyroflows.infer.objectives import DensityELBO
from pyroflows.programs.vectorize import ERRORS, ChangedModelError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_MEASURED_BY = 32  # particles, at least
_MEASURED_SEEDS = 8  # tried one after the other: single particles may stray


class ElboTask:
    """Maximise an ELBO over the parameters of a guide, and of a model.

    Args:
        elbo: the objective, an ``ELBO`` of Pyro's.
        model: of the posterior.
        guide: of the model.
        kwargs: keyword arguments of both.
        parameters: what is optimised.
        buffers: what else belongs to them.
        clip: largest gradient norm.
        fabric: where.
        firsts: the arguments of the first steps, by which parameters are measured.
    """

    def __init__(
        self,
        elbo: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        kwargs: dict[str, Any],
        parameters: list[Tensor],
        buffers: list[Tensor],
        clip: float,
        fabric: Fabric,
        firsts: list[tuple[Any, ...]],
    ) -> None:
        self.firsts = firsts
        self.elbo, self.programs, self.kwargs = elbo, (model, guide), kwargs
        self.parameters, self.buffers = parameters, buffers
        self.largest_norm, self.fabric = clip, fabric
        self.error: Exception | None = None  # what the model raised in the last step
        self._loss = math.nan

    def optimiser(self) -> torch.optim.Optimizer:
        """A fresh Adam."""
        return torch.optim.Adam(self.parameters)

    def backward(self, batch: tuple[Any, ...]) -> float:
        """Minus the ELBO, its gradients in place; NaN where the model raises."""
        self._loss, self.error = math.nan, None
        try:
            self._loss = self._backward(batch)
        except ChangedModelError:
            raise
        except ERRORS as error:
            self.error = error
        if self.fabric.world_size > 1:
            self._loss, self.error = _average(self.parameters, self._loss, self.error, self.fabric)
        return self._loss

    def _backward(self, batch: tuple[Any, ...]) -> float:
        if self.fabric.world_size > 1:
            batch = self.fabric.to_device(batch)
        with self.fabric.autocast():
            if not hasattr(self.elbo, "differentiable_loss"):  # as Pyro's RenyiELBO
                return self.elbo.loss_and_grads(*self.programs, *batch, **self.kwargs)
            loss = self.elbo.differentiable_loss(*self.programs, *batch, **self.kwargs)
        loss.backward()
        return loss.item()

    def measure(self) -> float:
        """The ELBO of the parameters as they are, by the same particles each time.

        NaN where it is not finite, or the model raises, with all seeds. The global generator stays.
        """
        for seed in range(_MEASURED_SEEDS):
            with self._seeded(seed):
                elbo = mean_over(self.fabric, self._measure())[0]
            if math.isfinite(elbo):
                return elbo
        return math.nan

    @contextlib.contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        device = self.parameters[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @torch.no_grad()
    def _measure(self) -> float:
        repeats = -(-_MEASURED_BY // (self.elbo.num_particles * len(self.firsts)))
        try:
            losses = [
                self.elbo.loss(*self.programs, *batch, **self.kwargs)
                for batch in self.firsts
                for _ in range(repeats)
            ]
        except ChangedModelError:
            raise
        except ERRORS:
            return math.nan
        return -sum(losses) / len(losses)

    def gap(self, seed: int) -> float:
        """By how many nats the guide's ELBO is below the evidence: the most that it can gain.

        Infinite where that is not known: with another objective, with parameters of the model,
        which move the evidence too, or where the particles' weights cannot be trusted.

        Args:
            seed: of the particles; the global generator stays.
        """
        guide = self.programs[1]
        own = {id(p) for p in guide.parameters()} if isinstance(guide, torch.nn.Module) else set()
        known = isinstance(self.elbo, DensityELBO) and all(id(p) in own for p in self.parameters)
        if not known or self.fabric.world_size > 1:
            return math.inf
        with self._seeded(seed):
            try:
                return self.elbo.gap(*self.programs, *self.firsts[0], **self.kwargs)
            except ERRORS:
                return math.inf

    def clip(self) -> float:
        """Clip the gradients; their norm before, NaN where there is no finite ELBO."""
        if self.error is not None or not math.isfinite(self._loss):
            return math.nan
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.largest_norm).item()


@torch.no_grad()
def _average(
    parameters: list[Tensor], loss: float, raised: Exception | None, fabric: Fabric
) -> tuple[float, Exception | None]:
    """Gradients and loss averaged over all processes, in one message; all fail if one does."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    ends = grads[0].new_tensor([loss, float(raised is not None)])
    mean = reduced(fabric, torch.cat([*(g.reshape(-1) for g in grads), ends]), "mean")
    *parts, ends = mean.split([*(g.numel() for g in grads), 2])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter)
    if ends[1] > 0 and raised is None:
        raised = RuntimeError("the model raised in another process")
    return ends[0].item(), raised
