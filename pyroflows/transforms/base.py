"""The contract every transform keeps: two methods, from which torch's whole protocol is derived.

``FlowTransform`` is the contract; ``Inverse`` and ``Conditioned`` are views of one transform.
``Chain``, which joins several, and the layers live in the neighbouring files.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor
from torch.distributions import constraints

from pyroflows._pyro.memo import Memo
from pyroflows.transforms.limits import within_limits

# What a transform is run by, and a compiler may put a version of in its place for a while.
DIRECTIONS = (
    "forward_and_log_det",
    "inverse_and_log_det",
    "forward_with_state",
    "inverse_from_state",
)
_OPPOSITE = {"sample": "log_prob", "log_prob": "sample", "both": "both", "neither": "neither"}


class FlowTransform(TransformModule):
    r"""An invertible map :math:`y = f(x; c)` whose log-determinant is known.

    To write one, subclass it and give two methods:

    * ``forward_and_log_det(x, context=None)`` returns ``y = f(x; c)`` and ``log|det dy/dx|``;
    * ``inverse_and_log_det(y, context=None)`` returns ``x = f^-1(y; c)`` and ``log|det dx/dy|``.

    Each returns the log-determinant *of the map it applies*, of shape ``batch``. Forward is torch's
    direction: base to data, that is, sampling. ``x`` is ``(*batch, features)`` and ``context``
    broadcasts against its batch. Everything else (calling, ``.inv``, ``log_abs_det_jacobian``,
    ``condition``) follows. As with every ``torch.distributions.Transform``, a call is the map
    itself; ``nn.Module`` forward hooks do not fire.

    Attributes:
        fast: the direction that costs one pass: ``"sample"``, ``"log_prob"``, ``"both"``
            or ``"neither"``.
        volume_preserving: whether the log-determinant is zero everywhere.

    Example:
        >>> import torch, pyroflows as pf
        >>> class Shift(pf.FlowTransform):
        ...     def forward_and_log_det(self, x, context=None):
        ...         return x + 1, x.new_zeros(x.shape[:-1])
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y - 1, y.new_zeros(y.shape[:-1])
        >>> Shift().inv(torch.ones(2))
        tensor([0., 0.])
    """

    bijective = True
    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    _known_inverse: weakref.ref[Inverse] | None = None
    _memo: Memo

    if TYPE_CHECKING:  # attributes, which some transforms compute

        @property
        def fast(self) -> str:
            """The direction that costs one pass."""

        @property
        def volume_preserving(self) -> bool:
            """Whether the log-determinant is zero everywhere."""
    else:
        fast = "both"
        volume_preserving = False

    def __init__(self) -> None:
        super().__init__()
        self._memo = Memo(size=1)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``y = f(x; c)`` of shape ``(*batch, features)`` and ``log|det dy/dx|`` (``batch``)."""
        raise NotImplementedError(f"{type(self).__name__}.forward_and_log_det")

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x = f^-1(y; c)`` of shape ``(*batch, features)`` and ``log|det dx/dy|`` (``batch``)."""
        raise NotImplementedError(f"{type(self).__name__}.inverse_and_log_det")

    def forward_with_state(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """``forward_and_log_det(x)``, and what ``inverse_from_state`` can use of it.

        That may hold any tensors of the pass, with their graph: what a flow draws keeps it for
        ``path_log_prob`` for as long as the draw lives. None by default.
        """
        return *self.forward_and_log_det(x, context), None

    def inverse_from_state(
        self, y: Tensor, state: Any, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``inverse_and_log_det(y)`` for the y that ``forward_with_state`` gave, with its state.

        The same values and gradients; a transform whose inverse has to be solved for need not solve
        for what it has just come from.
        """
        return self.inverse_and_log_det(y, context)

    def initialize(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = True
    ) -> Tensor:
        """Set what depends on data, seeing ``value`` arrive at the map's output; return its image.

        With ``inverse=False`` the data arrive at the input instead. Most transforms have nothing to
        set and only pass the data on.
        """
        with torch.no_grad():
            step = self.inverse_and_log_det if inverse else self.forward_and_log_det
            return step(value, context)[0]

    def mirror(self, wider: float = 1.0, *, inverse: bool = False) -> FlowTransform:
        """A new map, or with ``inverse`` one for the inverse, that costs one pass to sample.

        What is fast already is copied, with its weights; an autoregressive map is made anew,
        untrained, in the direction that samples fast, the nets of one that did not ``wider`` by a
        factor.
        """
        mine = copy.deepcopy(self)
        return mine.inv if inverse else mine

    @property
    def inv(self) -> FlowTransform:
        """The inverse map, a module with the same parameters. ``t.inv.inv is t``."""
        inverse = None if self._known_inverse is None else self._known_inverse()
        if inverse is None:
            inverse = Inverse(self)
            self.inverse_is(inverse)
        return inverse

    def inverse_is(self, inverse: Inverse) -> None:
        """Take a module that is this map's inverse for what ``.inv`` gives."""
        self._known_inverse = weakref.ref(inverse)

    def condition(self, context: Tensor) -> Conditioned:
        """This map at a fixed ``context``: a light view on the same parameters."""
        return Conditioned(self, context)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Itself: a flow transform never answers from a cache, whatever is asked for."""
        return self

    def within_limits(self, y: Tensor) -> Tensor:
        """``y`` as ``log_prob`` reads it: numbers that arithmetic cannot carry through, moved in.

        By default numbers beyond 4e9 in single precision, 1e30 in double. A map that brings data of
        any size to size one counts from its own location and in its own scale.
        """
        return within_limits(y)

    def layers(self) -> Iterator[FlowTransform]:
        """This map and those that it is made of, each once."""
        return (module for module in self.modules() if isinstance(module, FlowTransform))

    def dependencies(self) -> Tensor | None:
        """Which input each output may depend on: booleans ``(features, features)``.

        None where the transform does not say. ``pf.testing.check_structure`` holds it to that.
        """
        return None

    def clear_cache(self) -> None:
        """Forget the log-determinant remembered for the last pair."""
        self._memo.clear()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` of shape ``batch``; one pass unless the pair was just computed."""
        log_det = self._memo.get(y, self, x)
        if log_det is not None:
            return log_det
        log_det = self._memo.get(x, self, y)
        if log_det is not None:
            return -log_det
        if self.fast == "log_prob":
            return -self.inverse_and_log_det(y)[1]
        return self.forward_and_log_det(x)[1]

    def mapped(self, value: Tensor, *, inverse: bool = False) -> Tensor:
        """What a call gives, or the call of ``.inv``; the log-determinant is remembered with it."""
        step = self.inverse_and_log_det if inverse else self.forward_and_log_det
        output, log_det = step(value)
        # An alias: the graph of log_det may hold the output, and must not keep its own key alive.
        output = output.view_as(output)
        self._memo.put(output, log_det, self, value)
        return output

    def _call(self, x: Tensor) -> Tensor:
        return self.mapped(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.mapped(y, inverse=True)

    def forget_others(self) -> None:
        """Drop what is bound to the module that this one was copied from, in a copy."""
        for name in DIRECTIONS:
            self.__dict__.pop(name, None)
        self._known_inverse = None

    def __getstate__(self) -> dict:
        state = {k: v for k, v in self.__dict__.items() if k not in DIRECTIONS}
        return {**state, "_known_inverse": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class Inverse(FlowTransform):
    """The inverse of a transform, as a module that shares its parameters.

    What ``transform.inv`` gives. Each direction costs what the other one of the transform does, so
    ``fast`` is the opposite too.

    Args:
        transform: the map whose inverse this is.

    Example:
        >>> import torch, pyroflows as pf
        >>> layer = pf.transforms.LULinear(2)
        >>> layer.inv(layer(torch.ones(3, 2))).allclose(torch.ones(3, 2)), layer.inv.inv is layer
        (True, True)
    """

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__()
        self.transform = transform

    @property
    def fast(self) -> str:
        """The direction that costs one pass."""
        return _OPPOSITE[self.transform.fast]

    @property
    def volume_preserving(self) -> bool:
        """Whether the log-determinant is zero everywhere."""
        return self.transform.volume_preserving

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """What may go in."""
        return self.transform.codomain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """What comes out."""
        return self.transform.domain

    @property
    def inv(self) -> FlowTransform:
        """The transform itself, whose ``.inv`` is then this very inverse."""
        self.transform.inverse_is(self)  # a copy has lost the link
        return self.transform

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transform's inverse."""
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transform's forward."""
        return self.transform.forward_and_log_det(y, context)

    def mirror(self, wider: float = 1.0, *, inverse: bool = False) -> FlowTransform:
        """The transform's mirror in the other direction."""
        return self.transform.mirror(wider, inverse=not inverse)

    def initialize(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = True
    ) -> Tensor:
        """Initialise the transform from its other side."""
        return self.transform.initialize(value, context, inverse=not inverse)

    def mapped(self, value: Tensor, *, inverse: bool = False) -> Tensor:
        """What the transform gives in the other direction, and remembers."""
        return self.transform.mapped(value, inverse=not inverse)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` of shape ``batch``."""
        return -self.transform.log_abs_det_jacobian(y, x)

    def forward_shape(self, shape: Size) -> Size:
        """The output's shape."""
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: Size) -> Size:
        """The input's shape."""
        return self.transform.forward_shape(shape)

    def clear_cache(self) -> None:
        """Forget the log-determinant remembered for the last pair."""
        self.transform.clear_cache()

    def __repr__(self) -> str:
        return f"Inverse({self.transform!r})"


class Conditioned(FlowTransform):
    """A transform bound to a context of shape ``(*batch, context)``; mutates nothing.

    What ``transform.condition(c)`` gives, with the transform's parameters and at its cost: one pass
    with the context is one pass.

    Args:
        transform: the map that takes a context.
        context: ``(*batch, context)``, or with ``context_dim`` dimensions of its own.
        context_dim: how many of the last dimensions belong to one context.

    Example:
        >>> import torch, pyroflows as pf
        >>> layer = pf.transforms.ContextAffine(2, context=3)
        >>> layer.condition(torch.zeros(5, 3)).inv(torch.ones(2)).shape
        torch.Size([5, 2])
    """

    context: Tensor

    def __init__(self, transform: FlowTransform, context: Tensor, context_dim: int = 1) -> None:
        super().__init__()
        self.transform = transform
        self.register_buffer("context", context, persistent=False)
        self.context_dim = context_dim

    @property
    def fast(self) -> str:
        """The direction that costs one pass."""
        return self.transform.fast

    @property
    def volume_preserving(self) -> bool:
        """Whether the log-determinant is zero everywhere."""
        return self.transform.volume_preserving

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """What may go in."""
        return self.transform.domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """What comes out."""
        return self.transform.codomain

    def _broadcast(self, value: Tensor, event_dim: int) -> Tensor:
        """``value`` with at least the context's batch."""
        batch = self.context.shape[: self.context.dim() - self.context_dim]
        cut = value.dim() - event_dim
        batch = torch.broadcast_shapes(value.shape[:cut], batch)
        return value.expand(batch + value.shape[cut:])

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transform's forward at the bound context."""
        x = self._broadcast(x, self.domain.event_dim)
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transform's inverse at the bound context."""
        y = self._broadcast(y, self.codomain.event_dim)
        return self.transform.inverse_and_log_det(y, self.context)

    def forward_with_state(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """The transform's forward at the bound context, and what its inverse can use."""
        x = self._broadcast(x, self.domain.event_dim)
        return self.transform.forward_with_state(x, self.context)

    def inverse_from_state(
        self, y: Tensor, state: Any, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transform's inverse at the bound context, where forward came from."""
        y = self._broadcast(y, self.codomain.event_dim)
        return self.transform.inverse_from_state(y, state, self.context)

    def within_limits(self, y: Tensor) -> Tensor:
        """What the transform makes of it."""
        return self.transform.within_limits(y)

    def initialize(
        self, value: Tensor, context: Tensor | None = None, *, inverse: bool = True
    ) -> Tensor:
        """Initialise the transform at the bound context."""
        side = self.codomain if inverse else self.domain
        value = self._broadcast(value, side.event_dim)
        return self.transform.initialize(value, self.context, inverse=inverse)

    def forward_shape(self, shape: Size) -> Size:
        """The output's shape."""
        return self.transform.forward_shape(shape)

    def inverse_shape(self, shape: Size) -> Size:
        """The input's shape."""
        return self.transform.inverse_shape(shape)

    def extra_repr(self) -> str:
        """The transform and the context's shape."""
        return f"{self.transform!r}, context={tuple(self.context.shape)}"
