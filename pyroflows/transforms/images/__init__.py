"""Transforms of images: squeezing, scales, couplings, convolutions that invert."""
