"""Hostile arguments to the calls in Python: a right answer, or an error that we wrote."""

import math
import traceback
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf

pytestmark = pytest.mark.integration

ROOT = str(Path(pf.__file__).parent)
ERRORS = (ValueError, pf.DivergedError, FloatingPointError, OSError, ImportError)
QUICK = {"max_epochs": 1, "batch_size": 16, "progress": False}


class Raising:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def spoilt(value, at=(3, 1)):
    x = rows(40, 2)
    x[at] = value
    return x


ROWS = {
    "none": lambda: None,
    "word": lambda: "word",
    "no such file": lambda: "nowhere/x.npy",
    "bytes": lambda: b"bytes",
    "number": lambda: 3,
    "float": lambda: math.nan,
    "object": object,
    "raising": Raising,
    "dict": lambda: {"a": [1.0, 2.0]},
    "set": lambda: {1.0, 2.0},
    "generator": lambda: (row for row in [[1.0, 2.0]]),
    "function": lambda: len,
    "empty list": list,
    "empty tuple": tuple,
    "list": lambda: rows(40, 2).tolist(),
    "list of tensors": lambda: list(rows(40, 2)),
    "ragged": lambda: [[1.0, 2.0], [3.0]],
    "words": lambda: [["a", "b"], ["c", "d"]],
    "nones": lambda: [[None, 1.0], [2.0, 3.0]],
    "triple": lambda: (rows(40, 2), rows(40, 2), rows(40, 2)),
    "scalar": lambda: torch.tensor(1.0),
    "no rows": lambda: torch.empty(0, 2),
    "no columns": lambda: torch.empty(40, 0),
    "one row": lambda: rows(1, 2),
    "two rows": lambda: rows(2, 2),
    "vector": lambda: rows(40),
    "wide": lambda: rows(40, 3),
    "narrow": lambda: rows(40, 1),
    "deep": lambda: rows(40, 2, 1),
    "transposed": lambda: rows(2, 40),
    "strided": lambda: rows(2, 40).T,
    "expanded": lambda: rows(1, 2).expand(40, 2),
    "nan": lambda: spoilt(math.nan),
    "all nan": lambda: torch.full((40, 2), math.nan),
    "inf": lambda: spoilt(math.inf),
    "minus inf": lambda: spoilt(-math.inf),
    "outlier": lambda: spoilt(1e30),
    "largest": lambda: spoilt(3.4e38),
    "constant": lambda: torch.ones(40, 2),
    "zeros": lambda: torch.zeros(40, 2),
    "a constant column": lambda: spoilt(1.0, at=(slice(None), 1)),
    "equal columns": lambda: rows(40, 1).repeat(1, 2),
    "huge": lambda: 1e30 * rows(40, 2),
    "larger": lambda: 1e38 * rows(40, 2),
    "tiny": lambda: 1e-30 * rows(40, 2),
    "denormal": lambda: 1e-41 * rows(40, 2),
    "far": lambda: 1e6 + rows(40, 2),
    "beyond float32": lambda: 1e100 * rows(40, 2, dtype=torch.float64),
    "float64": lambda: rows(40, 2, dtype=torch.float64),
    "float16": lambda: rows(40, 2, dtype=torch.float16),
    "bfloat16": lambda: rows(40, 2, dtype=torch.bfloat16),
    "integers": lambda: torch.ones(40, 2, dtype=torch.int64),
    "booleans": lambda: torch.ones(40, 2, dtype=torch.bool),
    "complex": lambda: rows(40, 2, dtype=torch.complex64),
    "sparse": lambda: rows(40, 2).to_sparse(),
    "meta": lambda: torch.empty(40, 2, device="meta"),
    "with gradient": lambda: rows(40, 2).requires_grad_(),
    "of a graph": lambda: 2 * rows(40, 2).requires_grad_(),
    "parameter": lambda: torch.nn.Parameter(rows(40, 2)),
    "module": lambda: torch.nn.Linear(2, 2),
    "array": lambda: rows(40, 2).numpy(),
    "read-only array": lambda: np.broadcast_to(np.array([1.0, 2.0]), (40, 2)),
    "backwards array": lambda: rows(40, 2).numpy()[::-1, ::-1],
    "big-endian": lambda: rows(40, 2).numpy().astype(">f8"),
    "long double": lambda: rows(40, 2).numpy().astype(np.longdouble),
    "matrix": lambda: np.asmatrix(rows(40, 2).numpy()),
    "masked": lambda: np.ma.masked_less(rows(40, 2).numpy(), 0.0),
    "array of objects": lambda: rows(40, 2).numpy().astype(object),
    "array of words": lambda: np.full((40, 2), "a"),
    "dates": lambda: np.full((40, 2), np.datetime64("2020-01-01")),
    "records": lambda: np.zeros(40, dtype=[("a", "f4"), ("b", "f4")]),
    "unsigned": lambda: np.ones((40, 2), np.uint64),
    "empty data set": lambda: torch.utils.data.TensorDataset(torch.empty(0, 2)),
    "data set of words": lambda: [("a", "b")] * 40,
    "loader of another width": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(rows(40, 3)), batch_size=16
    ),
    "loader with nan": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(spoilt(math.nan)), batch_size=16
    ),
}


def flow(context=0):
    return pf.maf(2, context, layers=1, hidden=(4,))


def pair():
    teacher = flow()
    return teacher, pf.student_of(teacher)


BRIEF = {"draws": 20, "classifier_draws": 0, "speed_batches": (1,)}


def distilled(teacher, student, **arguments):
    return pf.distill(
        teacher, student, **{"max_steps": 2, "batch_size": 8, "progress": False, **arguments}
    )


def compared(teacher, student, **arguments):
    return pf.compare(teacher, student, **{**BRIEF, **arguments})


def conditional(value):
    teacher = flow(2)
    return distilled(teacher, pf.student_of(teacher), context=value)


def conditional_pair(value):
    teacher = flow(2)
    return compared(teacher, pf.student_of(teacher), context=value)


TAKE_ROWS = {
    "fit": lambda value: pf.fit(flow(), value, **QUICK),
    "fit val": lambda value: pf.fit(flow(), rows(40, 2), val=value, **QUICK),
    "fit context": lambda value: pf.fit(flow(2), rows(40, 2), value, **QUICK),
    "fit unwanted": lambda value: pf.fit(flow(), rows(40, 2), value, **QUICK),
    "fit bins": lambda value: pf.fit(flow(), value, bins=4, **QUICK),
    "initialize": lambda value: pf.initialize(flow(), value),
    "distill data": lambda value: distilled(*pair(), data=value),
    "distill context": conditional,
    "compare test": lambda value: compared(*pair(), test=value),
    "compare data": lambda value: compared(*pair(), test=rows(40, 2), data=value, baseline=0.01),
    "compare context": conditional_pair,
}

VALUES = {
    "none": None,
    "minus one": -1,
    "zero": 0,
    "nan": math.nan,
    "inf": math.inf,
    "half": 0.5,
    "two and a half": 2.5,
    "large": 10**30,
    "word": "word",
    "list": [1, 2],
    "tensor": torch.ones(2),
    "object": object(),
    "true": True,
}


def model(*args):
    pyro.sample("z", dist.Normal(torch.tensor(3.0), 0.5))


def guided(**arguments):
    guide = pf.AutoFlow(model, layers=1, hidden=(4,))
    settings = {"max_steps": 2, "particles": 2, "progress": False, **arguments}
    return pf.fit_guide(model, guide, **settings)


def fitted(**arguments):
    return pf.fit(flow(), rows(40, 2), **{**QUICK, **arguments})


def scored(made):
    """A log-density of rows or an image, and a draw."""
    x = made.sample((3,))
    assert made.log_prob(x.detach()).isfinite().all()
    return x


NUMBERS = {
    "fit": (
        fitted,
        "max_epochs batch_size lr weight_decay dropout average clip patience seed bins val "
        "checkpoint fabric every precision",
    ),
    "distill": (
        lambda **arguments: distilled(*pair(), **arguments),
        "objective max_steps batch_size lr clip average patience checkpoint fabric every precision",
    ),
    "compare": (
        lambda **arguments: compared(*pair(), **arguments),
        "draws classifier_draws speed_batches seed",
    ),
    "fit_guide": (
        guided,
        "objective particles lr max_steps clip average batches fabric every precision",
    ),
    "Checkpoint": (lambda **a: pf.Checkpoint(**{"folder": "x", **a}), "folder every resume"),
    "maf": (
        lambda features=2, **a: scored(pf.maf(features, **a)),
        "features context layers hidden",
    ),
    "realnvp": (
        lambda features=2, **a: scored(pf.realnvp(features, **a)),
        "features layers linear",
    ),
    "nsf": (lambda features=2, **a: scored(pf.nsf(features, **a)), "features bins bound hidden"),
    "glow": (
        lambda shape=(1, 4, 4), **a: scored(pf.glow(shape, **a)),
        "shape levels steps channels",
    ),
    "pixelcnn": (lambda shape=(1, 4, 4), **a: pf.pixelcnn(shape, **a), "shape classes"),
    "quantized": (lambda **a: pf.quantized(**{"flow": flow(), "bins": 4, **a}), "flow bins"),
    "student_of": (pf.student_of, "teacher"),
    "AutoFlow": (
        lambda **a: pf.AutoFlow(model, layers=1, hidden=(4,), **a).setup(),
        "init init_scale init_loc_fn",
    ),
    "load": (pf.load, "folder"),
    "save": (lambda **a: pf.save(**{"flow": flow(), "folder": "saved", **a}), "flow folder"),
}
# A large number asks for as much work: it is done until someone stops it.
WORK = "max_epochs max_steps draws particles features layers levels steps channels bins classes"
WORK = {*WORK.split(), "batch_size", "classifier_draws", "patience", "context"}
CALLS = [
    pytest.param(lambda take=take, make=make: take(make()), id=f"{call}-{name}")
    for call, take in TAKE_ROWS.items()
    for name, make in ROWS.items()
] + [
    pytest.param(lambda call=call, key=key, v=v: call(**{key: v}), id=f"{verb}-{key}-{name}")
    for verb, (call, keys) in NUMBERS.items()
    for key in keys.split()
    for name, v in VALUES.items()
    if not (name == "large" and key in WORK)
]


def is_ours(error):
    """Whether a statement of ours raised it, in words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        isinstance(error, ERRORS)
        and last.filename.startswith(ROOT)
        and last.line.startswith("raise ")
        and 20 < len(str(error)) < 1000
    )


def check_numbers(answer):
    """What a training tells of itself is finite."""
    history = answer if isinstance(answer, pf.History) else getattr(answer, "history", None)
    if history is not None and history.steps:
        assert all(map(math.isfinite, history.train + history.val + history.lr))


# One in twenty each day, the others in the slow tests.
SHARED_OUT = [
    pytest.param(*case.values, id=case.id, marks=pytest.mark.slow if index % 20 else ())
    for index, case in enumerate(CALLS)
]


@pytest.mark.parametrize("call", SHARED_OUT)
def test_a_right_answer_or_an_error_of_ours(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_numbers(call())
        except Exception as error:
            if not is_ours(error):
                raise


def test_there_are_a_thousand():
    assert len(CALLS) > 1000
