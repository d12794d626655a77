"""Maps of vectors that are globals first, then rows which are independent given the globals.

Memory and time are linear in the number of rows, where a map of the whole vector takes its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyroflows._checks import check_whole
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.chain import joint_fast
from pyroflows.transforms.limits import farthest

_BOUND = 3.0  # of what globals may add to a row's log-scales


class _Layout:
    """A vector as globals ``(G,)`` and groups of rows ``(n, k)``, one after the other."""

    def __init__(self, globals_: int, groups: Sequence[Sequence[int]]) -> None:
        check_whole(0, globals_=globals_)
        self.groups = tuple((int(n), int(k)) for n, k in groups)
        for count, length in self.groups:
            check_whole(1, rows=count, numbers=length)
        if not self.groups:
            raise ValueError("groups: expected at least one (rows, numbers of a row), got none")
        self.globals = globals_
        self.features = globals_ + sum(n * k for n, k in self.groups)

    def split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Globals ``(*batch, G)`` and each group ``(*batch, n, k)``."""
        first, *parts = x.split([self.globals, *(n * k for n, k in self.groups)], dim=-1)
        rows = [part.unflatten(-1, size) for part, size in zip(parts, self.groups, strict=True)]
        return first, rows

    @staticmethod
    def join(first: Tensor, rows: list[Tensor]) -> Tensor:
        """The vector of them, ``(*batch, features)``."""
        return torch.cat([first, *(part.flatten(-2) for part in rows)], dim=-1)


class RowsGivenGlobals(FlowTransform):
    r"""Globals :math:`y_0 = f(x_0)`, then rows :math:`y_i = m_i + e^{s_i} h(x_i; r_i, W y_0)`.

    The map h is shared by all rows of a group; :math:`m_i, s_i` and the features :math:`r_i` are a
    row's own, W mixes the globals; all are trained. Each direction costs what those of f and h
    cost, h at as many points as there are rows. Webb et al. 2018, arXiv:1712.00287, have such a
    structure by masks.

    Args:
        outer: the map f of the globals; None where there are none.
        shared: the map h of each group's rows, given ``width`` numbers of the row, as many of the
            globals where there are any, and the flow's context.
        globals_: how many there are.
        groups: for each the number of rows and of each row's numbers.
        width: numbers by which h knows a row, and the globals.

    Raises:
        ValueError: a size is out of range, or there is another number of maps than of groups.

    Example:
        >>> import torch, pyroflows as pf
        >>> shared = pf.transforms.ContextAffine(2, context=8)
        >>> layer = RowsGivenGlobals(pf.transforms.LULinear(3), [shared], 3, [(5, 2)], width=4)
        >>> layer(torch.zeros(13)).shape
        torch.Size([13])
    """

    def __init__(
        self,
        outer: FlowTransform | None,
        shared: Sequence[FlowTransform],
        globals_: int,
        groups: Sequence[Sequence[int]],
        *,
        width: int,
    ) -> None:
        super().__init__()
        self.layout = _Layout(globals_, groups)
        if (outer is None) != (globals_ == 0) or len(shared) != len(groups):
            raise ValueError(
                f"shared: expected a map for each of {len(groups)} groups, and outer where there "
                f"are globals, got {len(shared)} for {globals_} globals"
            )
        self.outer = outer
        self.shared = nn.ModuleList(shared)
        self.row_features = nn.ParameterList(
            [nn.Parameter(torch.zeros(n, width)) for n, _ in self.layout.groups]
        )
        sizes = self.layout.groups
        self.row_loc = nn.ParameterList([nn.Parameter(torch.zeros(n, k)) for n, k in sizes])
        self.row_log_scale = nn.ParameterList([nn.Parameter(torch.zeros(n, k)) for n, k in sizes])
        self.mix = nn.Linear(globals_, width, bias=False) if globals_ else None

    @property
    def fast(self) -> str:
        """The direction that costs one pass in every map."""
        return joint_fast(self._maps())

    def _maps(self) -> list[Any]:
        return [*self.shared] if self.outer is None else [self.outer, *self.shared]

    def _contexts(self, first: Tensor, context: Tensor | None) -> list[Tensor]:
        """For each group what its rows are told, ``(*batch, n, width of all)``."""
        batch = first.shape[:-1]
        of_all = [] if self.mix is None else [self.mix(first)]
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
            of_all.append(context)
        contexts = []
        for own in self.row_features:
            size = (*batch, len(own))
            parts = [own.expand(*size, -1)]
            parts += [part[..., None, :].expand(*size, -1) for part in of_all]
            contexts.append(torch.cat(parts, dim=-1))
        return contexts

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Globals first, then rows."""
        y, log_dets = self.forward_by_row(x, context)
        return y, log_dets.sum(-1)

    def forward_by_row(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same; log-determinants of the globals and of each row, ``(*batch, 1 + rows)``."""
        y, log_dets, _ = self._forward(x, context, lambda t, *at: (*t.forward_and_log_det(*at), 0))
        return y, log_dets

    def forward_with_state(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Any]]:
        """Globals first, then rows, and what the inverse of each map can use."""
        y, log_dets, states = self._forward(x, context, lambda t, *at: t.forward_with_state(*at))
        return y, log_dets.sum(-1), states

    def _forward(
        self, x: Tensor, context: Tensor | None, step: Any
    ) -> tuple[Tensor, Tensor, list[Any]]:
        first, rows = self.layout.split(x)
        log_det, states = first.new_zeros(first.shape[:-1]), [None]
        if self.outer is not None:
            first, log_det, states[0] = step(self.outer, first, context)
        out, log_dets = [], [log_det[..., None]]
        for j, told in enumerate(self._contexts(first, context)):
            part = rows[j].expand(*told.shape[:-1], -1)
            part, log_det, state = step(self.shared[j], part, told)
            log_scale = self.row_log_scale[j]
            out.append(torch.addcmul(self.row_loc[j], part, log_scale.exp()))
            log_dets.append(log_det + log_scale.sum(-1))
            states.append(state)
        return self._together(first, out, log_dets), torch.cat(log_dets, dim=-1), states

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows given the globals as they are, and the globals."""
        return self._inverse_by(y, context, lambda t, y, _, c: t.inverse_and_log_det(y, c))

    def inverse_from_state(
        self, y: Tensor, state: list[Any], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The inverse where each map came from."""
        return self._inverse_by(y, context, lambda t, y, s, c: t.inverse_from_state(y, s, c), state)

    def _inverse_by(
        self, y: Tensor, context: Tensor | None, step: Any, states: Sequence[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        first, rows = self.layout.split(y)
        of_outer, *of_rows = states or [None] * (1 + len(rows))
        contexts = self._contexts(first, context)
        log_det = first.new_zeros(first.shape[:-1])
        if self.outer is not None:
            first, log_det = step(self.outer, first, of_outer, context)
        out, log_dets = [], [log_det[..., None]]
        for j, (told, state) in enumerate(zip(contexts, of_rows, strict=True)):
            log_scale = self.row_log_scale[j]
            part = ((rows[j] - self.row_loc[j]) * (-log_scale).exp()).expand(*told.shape[:-1], -1)
            part, log_det = step(self.shared[j], part, state, told)
            out.append(part)
            log_dets.append(log_det - log_scale.sum(-1))
        return self._together(first, out, log_dets), torch.cat(log_dets, dim=-1).sum(-1)

    def _together(self, first: Tensor, rows: list[Tensor], log_dets: list[Tensor]) -> Tensor:
        """The vector, after its log-determinants are brought to the batch of the rows."""
        batch = rows[0].shape[:-2]
        log_dets[0] = log_dets[0].expand(*batch, 1)
        return self.layout.join(first.expand(*batch, -1), rows)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.layout.globals} globals, rows {list(self.layout.groups)}"


class RowGaussian(NamedTuple):
    """Gaussians of the rows of a group, given the globals.

    Attributes:
        loc: where the globals are at their location, ``(n, k)``.
        slope: how locations move by a standard deviation of each global, ``(n, k, G)``.
        tril: lower Cholesky factors, ``(n, k, k)``.
        log_slope: how the logarithms of their diagonals move, ``(n, k, G)``.
    """

    loc: Tensor
    slope: Tensor
    tril: Tensor
    log_slope: Tensor


class Arrow(NamedTuple):
    """A Gaussian of globals, and Gaussians of rows given these; its precision is an arrow's.

    Attributes:
        order: the place in the vector of each global, then of each row's numbers, ``(D,)``.
        loc: of the globals, ``(G,)``.
        tril: their lower Cholesky factor, ``(G, G)``.
        rows: of each group.
    """

    order: Tensor
    loc: Tensor
    tril: Tensor
    rows: list[RowGaussian]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """How many rows each group has, and how many numbers each of them."""
        return tuple((len(row.loc), row.loc.shape[1]) for row in self.rows)


class WhitenRows(FlowTransform):
    r"""Fixed Gaussians: globals :math:`y_0 = m + L u`, rows given u around a moving location.

    :math:`y_i = m_i + B_i u + L_i (e^{s_i(u)} x_i)` with :math:`s_i(u)` linear in u and bounded
    softly. What ``Whiten`` is to a full Gaussian, at a cost linear in the number of rows (as the
    precision of latent Gaussian models, Rue & Held 2005, Gaussian Markov Random Fields): buffers,
    set once (``set``). Its output has the order of the vector that was set, its input globals
    first. Starts as the identity.

    Args:
        globals_: how many there are.
        groups: for each the number of rows and of each row's numbers.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> import torch
        >>> layer = WhitenRows(2, [(3, 1)])
        >>> layer(torch.arange(5.0))
        tensor([0., 1., 2., 3., 4.])
    """

    order: Tensor
    loc: Tensor
    tril: Tensor

    def __init__(self, globals_: int, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.layout = layout = _Layout(globals_, groups)
        self.register_buffer("order", torch.arange(layout.features))
        self.register_buffer("loc", torch.zeros(globals_))
        self.register_buffer("tril", torch.eye(globals_))
        for j, (n, k) in enumerate(layout.groups):
            self.register_buffer(f"loc_{j}", torch.zeros(n, k))
            self.register_buffer(f"slope_{j}", torch.zeros(n, k, globals_))
            self.register_buffer(f"tril_{j}", torch.eye(k).repeat(n, 1, 1))
            self.register_buffer(f"log_slope_{j}", torch.zeros(n, k, globals_))

    @property
    def rows(self) -> list[RowGaussian]:
        """The Gaussians of each group's rows."""
        names = RowGaussian._fields
        return [
            RowGaussian(*(getattr(self, f"{name}_{j}") for name in names))
            for j in range(len(self.layout.groups))
        ]

    @torch.no_grad()
    def set(self, arrow: Arrow) -> None:
        """Take the Gaussians.

        Args:
            arrow: of these sizes.
        """
        for name in ("order", "loc", "tril"):
            getattr(self, name).copy_(getattr(arrow, name))
        for mine, given in zip(self.rows, arrow.rows, strict=True):
            for old, new in zip(mine, given, strict=True):
                old.copy_(new)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Globals, and rows given them."""
        y, log_dets = self.forward_by_row(x)
        return y, log_dets.sum(-1)

    def forward_by_row(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same; log-determinants of the globals and of each row, ``(*batch, 1 + rows)``."""
        u, rows = self.layout.split(x)
        log_dets = [self._log_det_of_globals(x.shape[:-1])[..., None]]
        out = []
        for part, gaussian in zip(rows, self.rows, strict=True):
            loc, log_scale = _given(gaussian, u)
            scaled = part * log_scale.exp()
            out.append(loc + (gaussian.tril @ scaled[..., None])[..., 0])
            log_dets.append(log_scale.sum(-1) + _log_diagonal(gaussian.tril))
        y = self.layout.join(u @ self.tril.mT + self.loc, out)
        return y[..., self.order.argsort()], torch.cat(log_dets, dim=-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The globals whitened, then the rows."""
        first, rows = self.layout.split(y[..., self.order])
        off = (first - self.loc).reshape(first.shape[:-1].numel(), len(self.loc))
        u = torch.linalg.solve_triangular(self.tril.mT, off, upper=True, left=False)
        u = u.reshape(first.shape)
        log_det = -self._log_det_of_globals(y.shape[:-1])
        out = []
        for part, gaussian in zip(rows, self.rows, strict=True):
            loc, log_scale = _given(gaussian, u)
            scaled = _solved(gaussian.tril, part - loc)
            out.append(scaled * (-log_scale).exp())
            log_det = log_det - (log_scale.sum(-1) + _log_diagonal(gaussian.tril)).sum(-1)
        return self.layout.join(u, out), log_det

    def _log_det_of_globals(self, batch: torch.Size) -> Tensor:
        return self.tril.diagonal().log().sum().expand(batch)

    def within_limits(self, y: Tensor) -> Tensor:
        """``y``, no farther from the location than so many standard deviations."""
        locs = [self.loc, *(row.loc.flatten() for row in self.rows)]
        reach = [self.tril.norm(dim=1), *(row.tril.norm(dim=-1).flatten() for row in self.rows)]
        back = self.order.argsort()
        loc, far = torch.cat(locs)[back], farthest(y.dtype) * torch.cat(reach)[back]
        return y.clamp(loc - far, loc + far)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.layout.globals} globals, rows {list(self.layout.groups)}"


def _given(gaussian: RowGaussian, u: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and log-scales of the rows at the globals ``(*batch, G)``, ``(*batch, n, k)``."""
    n, k = gaussian.loc.shape
    moved = u @ gaussian.slope.reshape(n * k, -1).mT
    raw = u @ gaussian.log_slope.reshape(n * k, -1).mT
    log_scale = _BOUND * torch.tanh(raw / _BOUND)
    return gaussian.loc + moved.unflatten(-1, (n, k)), log_scale.unflatten(-1, (n, k))


def _solved(tril: Tensor, off: Tensor) -> Tensor:
    """``L_i^-1`` of each row, ``(*batch, n, k)``."""
    if off.shape[-1] == 1:
        return off / tril[..., 0]
    batch = off.shape[:-2]
    columns = off.reshape(-1, *off.shape[-2:]).permute(1, 2, 0)  # (n, k, all of the batch)
    solved = torch.linalg.solve_triangular(tril, columns, upper=False)
    return solved.permute(2, 0, 1).reshape(*batch, *off.shape[-2:])


def _log_diagonal(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
