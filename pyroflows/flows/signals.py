"""WaveNet flows: autoregressive flows over a signal, with dilated causal convolutions as nets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributions import Distribution, constraints

from pyroflows.distributions.flow import Flow
from pyroflows.flows.assembly import Example, builder, checked_int, close, free_features, one_of
from pyroflows.nets import CausalConv
from pyroflows.transforms import Autoregressive, FlowTransform
from pyroflows.transforms.families import family_from


@builder
def wavenet(
    features: int,
    context: int = 0,
    *,
    layers: int = 1,
    channels: int = 32,
    dilations: Sequence[int] | None = None,
    kernel: int = 2,
    bins: int = 0,
    bound: float | None = None,
    fast: str = "log_prob",
    base: Distribution | nn.Module | None = None,
    support: constraints.Constraint | None = None,
) -> Flow:
    r"""A flow over a signal of T steps in which step t depends on the steps before it alone.

    With ``fast="log_prob"`` it is a WaveNet: :math:`x_t = g(z_t; \theta(x_{<t}))` is scored in one
    pass and sampled step by step, with what the convolutions look back at kept, so that T steps
    cost the arithmetic of one pass. With ``fast="sample"`` it is the student of Parallel WaveNet:
    :math:`x_t = g(z_t; \theta(z_{<t}))` for all t at once. ``pf.student_of`` makes the second
    from the first.

    Layers follow each other in the same direction of time, never reversed: a reversed layer would
    let the past depend on the future. Affine layers so stacked stay Gaussian step by step, however
    many there are; ``bins`` gives steps densities of other shapes. A student has to work the past
    out from the noise and may need more layers than its teacher (Parallel WaveNet's has four):
    ``pf.student_of(teacher, layers=2)``.

    van den Oord et al. 2016, arXiv:1609.03499; van den Oord et al. 2018, arXiv:1711.10433.

    Args:
        features: number of steps T.
        context: number of context features; they enter every block of every layer.
        layers: number of autoregressive layers.
        channels: width of the nets.
        dilations: of each net's blocks; by default 1, 2, 4, ... until the last step sees all
            before it.
        kernel: taps of each convolution, at least two.
        bins: of a rational-quadratic spline for each step; 0 for an affine map.
        bound: of the affine map's log-scale (log 5 by default) or of the splines' box (5.0).
        fast: ``"log_prob"`` for a density model or teacher, ``"sample"`` for a student or guide.
        base: base distribution over the steps (standard normal by default).
        support: where the data live, if not in all of R^T.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch, pyroflows as pf
        >>> teacher = pf.wavenet(100, channels=8)
        >>> teacher.log_prob(torch.zeros(5, 100)).shape, pf.student_of(teacher).sample((5,)).shape
        (torch.Size([5]), torch.Size([5, 100]))
    """
    one_of("fast", fast, ("log_prob", "sample"))
    free = free_features(checked_int("features", features), support)
    kind = "spline" if checked_int("bins", bins, least=0) else "affine"
    family = family_from(kind, bins=bins or None, bound=bound)

    def layer() -> FlowTransform:
        net = CausalConv(
            free,
            family.params,
            channels=channels,
            dilations=dilations,
            kernel=kernel,
            context=context,
        )
        made = Autoregressive(net, family)
        return made.inv if fast == "log_prob" else made

    parts = [layer() for _ in range(checked_int("layers", layers))]
    return close(parts, features, context, base, support)


EXAMPLES = {
    "wavenet": Example(lambda: wavenet(4, channels=6), fast="log_prob"),
    "wavenet_conditional": Example(
        lambda: wavenet(4, 2, channels=5, kernel=3, dilations=(1, 1)), fast="log_prob"
    ),
    "wavenet_spline": Example(lambda: wavenet(2, channels=4, bins=4), fast="log_prob"),
    "wavenet_sample": Example(
        lambda: wavenet(4, 2, layers=2, channels=5, fast="sample"), fast="sample"
    ),
    "wavenet_interval": Example(
        lambda: wavenet(
            3, channels=4, bins=4, fast="sample", support=constraints.interval(-1.0, 2.0)
        ),
        fast="sample",
    ),
}
