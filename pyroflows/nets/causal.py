"""A causal network over a signal: dilated convolutions whose output at t sees inputs before t only.

WaveNet (van den Oord et al. 2016, arXiv:1609.03499). A convolution is written as one linear map of
the taps put side by side, so any batch shape and dtype takes the same path. ``solve`` runs the
network one step at a time and keeps of each block only what later steps will look back at: T steps
cost the arithmetic of one pass (the "fast WaveNet generation" of Paine et al. 2016,
arXiv:1611.09482). ``solve_back`` does the same backwards in time, for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows._checks import check_whole, checked_ints
from pyroflows.nets.causal_block import CausalBlock, gate_slopes


def covering_dilations(steps: int, kernel: int) -> tuple[int, ...]:
    """1, 2, 4, ... until the last of ``steps`` steps sees all before it.

    Example:
        >>> covering_dilations(8, kernel=2)
        (1, 2, 4)
    """
    found, seen = [1], kernel
    while seen < steps:
        found.append(2 * found[-1])
        seen += (kernel - 1) * found[-1]
    return tuple(found)


class CausalConv(nn.Module):
    """Parameters ``(*batch, steps, params)`` of a signal; those of step t see ``x_<t`` and context.

    The signal, delayed by one step, is spread to ``channels``; each block adds a gated dilated
    convolution to them; a rectifier and a linear map give the parameters. The weights are the same
    at every step. The context enters every block. The last layer starts at zero: a flow starts as
    the identity.

    Args:
        features: number of steps T of the signal.
        params: numbers per step.
        channels: width of the residual stream.
        dilations: one block each; by default 1, 2, 4, ... until the last step sees all before it.
        kernel: taps of each convolution, at least two.
        context: number of context features.

    Raises:
        ValueError: a size or dilation that is not a positive integer, or one tap only.

    Example:
        >>> import torch
        >>> CausalConv(50, 2, channels=8)(torch.ones(7, 50)).shape
        torch.Size([7, 50, 2])
    """

    descending = False  # time runs one way

    def __init__(
        self,
        features: int,
        params: int,
        *,
        channels: int = 32,
        dilations: Sequence[int] | None = None,
        kernel: int = 2,
        context: int = 0,
    ) -> None:
        super().__init__()
        check_whole(1, features=features, params=params, channels=channels)
        check_whole(2, kernel=kernel)
        check_whole(0, context=context)
        if dilations is None:
            dilations = covering_dilations(features, kernel)
        self.features, self.params, self.channels = features, params, channels
        self.dilations, self.kernel = checked_ints("dilations", dilations, fewest=0), kernel
        self.first = nn.Linear(1, channels)
        self.blocks = nn.ModuleList(
            CausalBlock(channels, kernel, d, context) for d in self.dilations
        )
        self.last = nn.Linear(channels, params)
        self.context = context
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def untrained(self, wider: float = 1.0) -> CausalConv:  # noqa: ARG002 (of MADEs)
        """A new net of the same build and width: an inverse needs more layers, not wider ones."""
        return CausalConv(
            self.features,
            self.params,
            channels=self.channels,
            dilations=self.dilations,
            kernel=self.kernel,
            context=self.context,
        )

    def forward(
        self, x: Tensor, context: Tensor | None = None, record: list[Tensor] | None = None
    ) -> Tensor:
        """All steps' parameters in one pass; ``context`` broadcasts against the batch.

        Args:
            x: ``(*batch, steps)``.
            context: ``(*batch, context)`` or None.
            record: a list that takes what enters each block's gates, then the last residual sum;
                nothing is dropped then.
        """
        h = self.first(F.pad(x[..., :-1], (1, 0))[..., None])
        for block in self.blocks:
            h = h + block(h, context, record)
        if record is not None:
            record.append(h)
        return self.last(h.relu())

    def weights(self) -> list[Tensor]:
        """All weights and biases, in the order of ``solve_back``'s gradients."""
        linear = [m for m in self.modules() if isinstance(m, nn.Linear)]
        return [t for m in linear for t in (m.weight, m.bias) if t is not None]

    @torch.no_grad()
    def solve(
        self,
        step: Callable[[int, Tensor], Tensor],
        like: Tensor,
        context: Tensor | None = None,
        block_step: Callable[[int, int, Tensor], Tensor] | None = None,  # noqa: ARG002 (of MADEs)
    ) -> tuple[Tensor, Tensor]:
        """The fixed point ``x_t = step(t, params_t(x_<t))``, in the arithmetic of one pass. Exact.

        Not differentiable; never uses dropout. Memory grows with the receptive field, not with the
        steps.

        Args:
            step: gives step t, ``(rows,)``, from its parameters ``(rows, params)``.
            like: ``(rows, steps)``; its number of rows, dtype and device are used.
            context: ``(rows, context)`` or None.
            block_step: not used; other networks try many steps at once with it.

        Returns:
            The fixed point ``(rows, steps)`` and its parameters ``(rows, steps, params)``.
        """
        rows = len(like)
        x, theta = (
            like.new_empty(self.features, rows),
            like.new_empty(self.features, self.params, rows),
        )
        modules: list[CausalBlock] = [*self.blocks]
        blocks = [
            (
                block.bias(context),
                block.taps(),
                block.dilation,
                block.mix.weight,
                like.new_empty(block.remembered(self.features), self.channels, rows).unbind(),
            )
            for block in modules
        ]
        before = like.new_zeros(1, rows)
        for t in range(self.features):
            h = torch.addmm(self.first.bias[:, None], self.first.weight, before)
            for bias, taps, dilation, mix, ring in blocks:
                ring[t % len(ring)].copy_(h)
                u = torch.addmm(bias, taps[0], h)
                for k in range(1, min(self.kernel, t // dilation + 1)):
                    u.addmm_(taps[k], ring[(t - k * dilation) % len(ring)])
                a, b = u.chunk(2)
                h.addmm_(mix, a.tanh_().mul_(b.sigmoid_()))
            torch.addmm(self.last.bias[:, None], self.last.weight, h.relu_(), out=theta[t])
            x[t] = step(t, theta[t].mT)
            before = x[t : t + 1]
        return x.mT, theta.permute(2, 0, 1)

    def solve_back(
        self,
        step: Callable[[int, Tensor, Tensor], object],
        x: Tensor,
        context: Tensor | None = None,
        block_step: Callable[[int, int, Tensor], Tensor] | None = None,  # noqa: ARG002 (of MADEs)
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Back through the fixed point: the gradients of weights and context.

        The network's derivative, from the last step to the first, gives the adjoint of every step's
        parameters; one ordinary backward pass carries those to weights and context.

        Args:
            step: ``step(t, sent, adjoint)`` writes the adjoint of step t's parameters, ``(params,
                rows)``, into ``adjoint``; ``sent``, ``(rows,)``, is what the parameters of all
                later steps send to step t. Steps come in descending order.
            x: ``(rows, steps)``, where the network is taken.
            context: ``(rows, context)`` or None.
            block_step: not used.

        Returns:
            The gradients of ``weights()`` and of the context.
        """
        weights = self.weights()
        record: list[Tensor] = []
        with torch.enable_grad():
            leaf = None if context is None else context.detach().requires_grad_()
            theta = self.forward(x.detach(), leaf, record)
        adjoint = self._adjoints(step, record, x.shape[0])
        wanted = [w for w in weights if w.requires_grad] + ([] if leaf is None else [leaf])
        if not wanted:
            return [None] * len(weights), None
        # A net without a context may be handed one all the same, in a chain of nets that have.
        found = iter(
            torch.autograd.grad(theta, wanted, adjoint.permute(2, 0, 1), allow_unused=True)
        )
        return [next(found) if w.requires_grad else None for w in weights], next(found, None)

    @torch.no_grad()
    def _adjoints(
        self, step: Callable[[int, Tensor, Tensor], object], record: list[Tensor], rows: int
    ) -> Tensor:
        """The adjoints ``(steps, params, rows)`` of all parameters, last step first."""
        *gates, h = record
        passes = (h > 0).to(h.dtype).permute(1, 2, 0).contiguous()
        adjoint = h.new_empty(self.features, self.params, rows)
        modules: list[CausalBlock] = [*self.blocks]
        blocks = [
            (
                gate_slopes(u),
                block.taps(),
                block.dilation,
                block.mix.weight.mT,
                h.new_empty(block.remembered(self.features), 2, self.channels, rows).unbind(),
            )
            for block, u in zip(modules, gates, strict=True)
        ]
        sent = h.new_zeros(rows)
        for t in reversed(range(self.features)):
            step(t, sent, adjoint[t])
            g = (self.last.weight.mT @ adjoint[t]).mul_(passes[t])
            for slopes, taps, dilation, mix, ring in reversed(blocks):
                now = torch.mul(slopes[t], mix @ g, out=ring[t % len(ring)])
                g.addmm_(taps[0].mT, now.flatten(0, 1))
                for k in range(1, min(self.kernel, (self.features - 1 - t) // dilation + 1)):
                    later = ring[(t + k * dilation) % len(ring)]
                    g.addmm_(taps[k].mT, later.flatten(0, 1))
            sent = (self.first.weight.mT @ g)[0]
        return adjoint

    def __repr__(self) -> str:
        context = f", context={self.context}" if self.context else ""
        return (
            f"CausalConv({self.features} -> {self.features} x {self.params}, "
            f"channels={self.channels}, dilations={self.dilations}, kernel={self.kernel}{context})"
        )
