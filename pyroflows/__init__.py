"""Normalizing flows for Pyro: a flow is a module whose call is a distribution."""

from pyroflows import datasets, infer, latents, nets, plots, testing, transforms
from pyroflows._version import __version__
from pyroflows.arviz_export import to_arviz
from pyroflows.discrete.levels import bits_per_dim
from pyroflows.discrete.pixel_model import PixelCNN, pixelcnn
from pyroflows.discrete.quantization import quantized
from pyroflows.distillation import Distillation, compare, distill, student_of
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.distributions.registry import FlowConstraint
from pyroflows.flows import glow, iaf, maf, mintnet, multiscale_realnvp, nice, nsf, realnvp, wavenet
from pyroflows.infer import (
    AutoAmortizedFlow,
    AutoFlow,
    NeuTra,
    Posterior,
    Report,
    fit_guide,
    importance_weights,
    khat,
    psis,
    report,
    sample_posterior,
)
from pyroflows.saving.models import from_hub, load, push_to_hub, save
from pyroflows.training.checkpoints import Checkpoint
from pyroflows.training.history import History
from pyroflows.training.likelihood import fit, initialize
from pyroflows.training.loop import DivergedError
from pyroflows.transforms import Chain, FlowTransform

__all__ = [
    # flows
    "nice",
    "realnvp",
    "maf",
    "iaf",
    "nsf",
    "wavenet",
    # of images
    "multiscale_realnvp",
    "glow",
    "mintnet",
    # images of whole numbers
    "pixelcnn",
    "PixelCNN",
    # train them
    "fit",
    "initialize",
    "History",
    "Checkpoint",
    "DivergedError",
    # integers, such as pixels
    "quantized",
    "bits_per_dim",
    # codes
    "latents",
    "plots",
    # guides
    "AutoFlow",
    "AutoAmortizedFlow",
    "fit_guide",
    "report",
    "sample_posterior",
    "Posterior",
    "Report",
    "importance_weights",
    "psis",
    "khat",
    "infer",
    "NeuTra",
    "to_arviz",
    # distillation
    "student_of",
    "distill",
    "compare",
    "Distillation",
    # keep and share
    "save",
    "load",
    "push_to_hub",
    "from_hub",
    "__version__",
    # your own
    "Flow",
    "FlowDistribution",
    "FlowConstraint",
    "FlowTransform",
    "Chain",
    "transforms",
    "nets",
    "testing",
    "datasets",
]
