"""A small folder that asks for a huge flow is refused before memory or time are spent."""

import contextlib
import json
import resource
import time

import pytest
import torch

import pyroflows as pf
from pyroflows._files import model_folder as stored

EXAMPLES = pf.flows.examples()
SECONDS, MEBIBYTES = 20.0, 300


def signed(folder, config):
    config["checksum"] = stored.checksum(config)
    (folder / stored.CONFIG).write_text(json.dumps(config))


def numbers_of(value, path=()):
    """Places of whole numbers in a config's arguments."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_of(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers_of(item, (*path, index))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path


def replaced(value, path, by):
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("changes", [{"layers": 10**12}, {"layers": 10**5}, {"hidden": [10**5]}])
def test_a_flow_much_larger_than_its_tensors_is_refused(changes, tmp_path):
    pf.save(pf.maf(2, layers=1, hidden=(8,)), tmp_path)
    config = json.loads((tmp_path / stored.CONFIG).read_text())
    signed(tmp_path, {**config, "arguments": {**config["arguments"], **changes}})
    with pytest.raises(ValueError, match="tensors in the folder"):
        pf.load(tmp_path)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_number_made_huge_costs_neither_memory_nor_time(name, tmp_path):
    pf.save(EXAMPLES[name].make(), tmp_path)
    config = json.loads((tmp_path / stored.CONFIG).read_text())
    places = list(numbers_of(config["arguments"]))
    assert places
    for place in places:
        for number in (3_000, 10**6, 10**12, 10**400):
            arguments = replaced(config["arguments"], place, number)
            signed(tmp_path, {**config, "arguments": arguments})
            before, started = peak(), time.monotonic()
            # Of a picture's height, say, no tensor tells, nor depends on it.
            with contextlib.suppress(ValueError):
                pf.load(tmp_path)
            what = f"{place} = {number}"
            assert time.monotonic() - started < SECONDS, what
            assert peak() - before < MEBIBYTES, what


def test_many_small_layers_are_refused(tmp_path):
    """No number is large here: the list is long."""
    pf.save(pf.maf(2, layers=1, hidden=(8,)), tmp_path)
    config = json.loads((tmp_path / stored.CONFIG).read_text())
    config["arguments"]["hidden"] = [8] * 20_000
    signed(tmp_path, config)
    started = time.monotonic()
    with pytest.raises(ValueError, match="ask for more than the tensors"):
        pf.load(tmp_path)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("wider", [1e12, 1e308, 10**400, -1, "x", None])
def test_a_student_mirrored_beyond_its_tensors_is_refused(wider, tmp_path):
    pf.save(pf.student_of(pf.maf(2, layers=1, hidden=(8,))), tmp_path)
    config = json.loads((tmp_path / stored.CONFIG).read_text())
    assert "mirrored" in config
    signed(tmp_path, {**config, "mirrored": wider})
    with pytest.raises(ValueError, match=r"config\.json: the flow cannot be mirrored"):
        pf.load(tmp_path)


def scales_of(flow):
    ends = "log_scale", "log_diagonal"
    return {key: p for key, p in flow.named_parameters() if key.endswith(ends)}


@pytest.mark.parametrize(
    "name", [n for n, example in EXAMPLES.items() if scales_of(example.make())]
)
@pytest.mark.parametrize("by", [1e3, -1e6])
def test_scales_that_no_float_holds_are_refused_by_save(name, by, tmp_path):
    flow = EXAMPLES[name].make()
    for key, parameter in scales_of(flow).items():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(by)
        with pytest.raises(ValueError, match=f"{key} holds the logarithm .* of a scale"):
            pf.save(flow, tmp_path)
        with torch.no_grad():
            parameter.copy_(before)
    pf.save(flow, tmp_path)
