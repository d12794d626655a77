"""Data sets for density estimation.

Each function returns a ``Split`` of training, validation and test rows. The same
seed gives the same rows, and no function touches the global random state of torch
or numpy. Sets that are read from files look for them in the folder that the
environment variable ``PYROFLOWS_DATA`` names; ``data_folder`` returns it.
"""

from pyroflows.datasets.folder import data_folder
from pyroflows.datasets.images import cifar10, freyfaces, mnist
from pyroflows.datasets.patches import bsds300
from pyroflows.datasets.sklearn_sets import breast_cancer, diabetes, digits, wine
from pyroflows.datasets.split import LabelledSplit, Split, standardize
from pyroflows.datasets.tabular import miniboone, power
from pyroflows.datasets.toy import blobs, checkerboard, circles, moons, pinwheel, swiss_roll
from pyroflows.datasets.uci_tables import uci, uci_names

__all__ = [
    "Split",
    "LabelledSplit",
    "standardize",
    "data_folder",
    "moons",
    "circles",
    "blobs",
    "checkerboard",
    "pinwheel",
    "swiss_roll",
    "digits",
    "breast_cancer",
    "wine",
    "diabetes",
    "miniboone",
    "power",
    "bsds300",
    "uci",
    "uci_names",
    "mnist",
    "cifar10",
    "freyfaces",
]
