r"""Latent codes, to steer a flow with: from data to the base space and back, and in between.

A flow is a bijection, so a code :math:`z = f^{-1}(x)` keeps all of its data point, and whatever is
done to codes can be seen in the data. Works for any flow, and for ``pf.quantized`` ones, whose
integers get noise from a fixed seed when encoded and are rounded down when decoded.
"""

from pyroflows.latents.arithmetic import attribute, interpolate, mix
from pyroflows.latents.codes import decode, encode, sample, translate

__all__ = ["encode", "decode", "translate", "sample", "interpolate", "mix", "attribute"]
