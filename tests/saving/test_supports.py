"""Supports without room, or that are none: refused when a flow is built, and when one is loaded."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf
from pyroflows._files import model_folder as stored
from pyroflows.flows import builders
from pyroflows.saving.values import BOUNDED, PLAIN, encode

INTERVAL = encode(constraints.interval(0.0, 1.0), "support")
EMPTY = encode(constraints.interval(1.0, 0.0), "support")
NONE = {"float": "nan"}, {"float": "inf"}, {"float": "-inf"}, "a", None, True, [1, 2], {"dict": {}}
OF_TWO = [
    (1.0, 1.0), (2.0, 1.0), (0, 0), (0.0, NONE[1]), (NONE[2], 0.0), (NONE[2], NONE[1]),
    ({"tensor": [0.0, 2.0], "dtype": "float32"}, 1.0), *((value, value) for value in NONE),
]  # fmt: skip


def bad_supports():
    for kind, names in BOUNDED.items():
        for bounds in OF_TWO if len(names) == 2 else [(value,) for value in NONE]:
            if kind.startswith("integer"):  # without a bijection, whatever the bounds
                bounds = 0, 3
            if (kind[:4], bounds[0]) not in (("grea", NONE[0]), ("less", NONE[0])):
                yield {"constraint": kind, **dict(zip(names, bounds, strict=True))}
    yield {"constraint": "circle", "center": encode(torch.tensor(0.0), "support")}
    for base, dims in [
        (EMPTY, 1),
        (INTERVAL, -1),
        (INTERVAL, "a"),
        (INTERVAL, 2),
        (INTERVAL, None),
    ]:
        yield {"constraint": "independent", "base": base, "dims": dims}
    for kind in ("cat", "joined"):
        for parts, lengths in [
            ([INTERVAL, EMPTY], [1, 1]),
            ([INTERVAL, INTERVAL], [1, 2]),
            ([INTERVAL, INTERVAL], [-1, 3]),
            ([INTERVAL, INTERVAL], [2]),
            ([INTERVAL, INTERVAL], ["a", 1]),
            ([], []),
        ]:
            yield {"constraint": kind, "parts": parts, "lengths": lengths, "dim": -1}
    yield {"constraint": "stack", "parts": [INTERVAL, EMPTY], "dim": -1}
    yield {"constraint": "stack", "parts": [INTERVAL, INTERVAL], "dim": 5}
    matrices = [kind for kind in PLAIN if "cholesky" in kind or "matrix" in kind]
    yield from ({"constraint": kind} for kind in [*matrices, "positive_definite", "sphere"])
    yield from ({"constraint": word} for word in ("nothing", None, ["interval"], {"a": 1}))
    yield from (3, True, "positive", [1, 2], {}, {"dict": {}}, {"float": "x"}, 1e300)
    yield {"distribution": "Normal", "arguments": {"loc": 0.0, "scale": 1.0}, "event_dims": 0}
    yield {"family": "affine", "arguments": {}}


def changed(folder, change):
    """A folder whose config is another, as if it had been written so."""
    config = json.loads((folder / stored.CONFIG).read_text())
    change(config)
    config["checksum"] = stored.checksum({k: v for k, v in config.items() if k != "checksum"})
    (folder / stored.CONFIG).write_text(json.dumps(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    support = constraints.interval(0.0, 1.0)
    pf.save(pf.nice(2, layers=1, hidden=(4,), support=support), folder)
    return folder


@pytest.mark.parametrize("support", list(bad_supports()), ids=json.dumps)
def test_a_folder_with_a_bad_support_is_refused_by_file_and_key(saved, support):
    changed(saved, lambda config: config["arguments"].update(support=support))
    with pytest.raises(ValueError, match=r"config.json.*support: "):
        pf.load(saved)


BUILDERS = [name for name, make in builders().items() if "support" in make.__annotations__]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "support",
    [
        constraints.interval(2.0, 1.0),
        constraints.interval(1.0, 1.0),
        constraints.interval(0.0, math.inf),
        constraints.greater_than(math.nan),
        constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])),
        constraints.cat([constraints.positive, constraints.interval(1.0, 0.0)], -1, [1, 1]),
        constraints.interval,
        dist.Normal(0.0, 1.0),
        "positive",
    ],
    ids=str,
)
def test_builders_refuse_supports_without_room(name, support):
    with pytest.raises(ValueError, match="support: expected a constraint with room for vectors of"):
        builders()[name](2, support=support)


NO_CIRCLE = {"constraint": "circle", "center": {"float": "nan"}}


@pytest.mark.parametrize(
    "support", [EMPTY, {**EMPTY, "lower_bound": 0.0}, 3, NO_CIRCLE], ids=json.dumps
)
def test_a_guide_with_a_bad_support_is_refused_by_file_and_key(tmp_path, support):
    def model():
        pyro.sample("z", dist.Uniform(0.0, 1.0))

    guide = pf.AutoFlow(model)
    guide()
    pf.save(guide, tmp_path)
    changed(tmp_path, lambda config: config["guide"]["sites"][0].update(support=support))
    with pytest.raises(ValueError, match=r"config.json.*support: .*'z'"):
        pf.load(tmp_path)


def test_vectors_of_a_support_of_pyro_that_calls_itself_one_of_numbers_are_checked_row_by_row():
    flow = pf.nice(3, layers=1, hidden=(4,), support=dist.constraints.positive_ordered_vector)
    x = flow.sample((5,))
    assert flow.support.check(x).tolist() == [True] * 5
    assert flow.support.check(-x).tolist() == [False] * 5
    pf.fit(flow, flow.sample((100,)), max_epochs=1, progress=False)
