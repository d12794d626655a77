"""A corpus of broken save folders: a ValueError refuses each, and says what to do."""

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import pyroflows as pf
from pyroflows._files import model_folder as stored

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path):
    pf.save(pf.maf(2, layers=1, hidden=(8,)), tmp_path)
    return tmp_path


def edit(folder, *, sign=True, **changes):
    """Change entries of the config; sign it again, as one would who knows how."""
    config = json.loads((folder / stored.CONFIG).read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    if sign:
        config["checksum"] = stored.checksum(config)
    (folder / stored.CONFIG).write_text(json.dumps(config))


def put_tensors(folder, data):
    """Other tensors, with a config that vouches for them."""
    (folder / stored.TENSORS).write_bytes(data)
    edit(folder, sha256=stored.digest(data), bytes=len(data))


def changed_tensors(folder, change):
    tensors = load_file(folder / stored.TENSORS)
    change(tensors)
    put_tensors(folder, to_bytes(tensors))


def arguments(folder, **changes):
    config = json.loads((folder / stored.CONFIG).read_text())
    edit(folder, arguments={**config["arguments"], **changes})


def nested(depth):
    return "[" * depth + "]" * depth


def write(name, content):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, keep):
    def apply(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return apply


CORPUS = {
    "nothing": (lambda f: [p.unlink() for p in f.iterdir()], "found no file"),
    "no config": (lambda f: (f / stored.CONFIG).unlink(), "found no file"),
    "no tensors": (lambda f: (f / stored.TENSORS).unlink(), "found no file"),
    "empty config": (write(stored.CONFIG, ""), "not JSON, or cut short"),
    "half a config": (cut(stored.CONFIG, 0.5), "not JSON, or cut short"),
    "config of noise": (write(stored.CONFIG, bytes(range(256))), "not JSON"),
    "config of nests": (write(stored.CONFIG, nested(100_000)), "not JSON|no format number"),
    "a list": (write(stored.CONFIG, "[1, 2]"), "no format number"),
    "null": (write(stored.CONFIG, "null"), "no format number"),
    "another's config": (write(stored.CONFIG, '{"model_type": "bert"}'), "no format number"),
    "huge number": (write(stored.CONFIG, '{"format": ' + "9" * 10_000 + "}"), "JSON|format"),
    "format 2": (lambda f: edit(f, format=2), "has format 2.*reads 1; update pyroflows"),
    "format true": (lambda f: edit(f, format=True), "has format True"),
    "format a word": (lambda f: edit(f, format="1"), "has format '1'"),
    "edited": (lambda f: edit(f, sign=False, dtype="float64"), "changed after it was saved"),
    "no checksum": (lambda f: edit(f, sign=False, checksum=...), "changed after it was saved"),
    "no sha": (lambda f: edit(f, sha256=...), "not the file"),
    "empty tensors": (write(stored.TENSORS, ""), "not the file that config.json was saved with"),
    "half the tensors": (cut(stored.TENSORS, 0.5), "not the file that config.json was saved with"),
    "all but a byte": (cut(stored.TENSORS, 0.9999), "not the file"),
    "a pickle": (lambda f: torch.save({}, f / stored.TENSORS), "not the file"),
    "a vouched-for pickle": (
        lambda f: put_tensors(f, b"\x80\x04\x95cos\nsystem\n"),
        "not a safetensors file",
    ),
    "vouched-for emptiness": (lambda f: put_tensors(f, b""), "not a safetensors file"),
    "a header too long": (
        lambda f: put_tensors(f, (2**60).to_bytes(8, "little") + b"{}"),
        "not a safetensors file",
    ),
    "a tensor missing": (lambda f: changed_tensors(f, lambda t: t.popitem()), "1 missing"),
    "a tensor too many": (
        lambda f: changed_tensors(f, lambda t: t.update(more=torch.ones(2))),
        r"1 not expected \(more\)",
    ),
    "a wrong shape": (
        lambda f: changed_tensors(f, lambda t: t.update({min(t): torch.ones(99)})),
        r"has shape \(99,\), expected",
    ),
    "a wrong kind": (
        lambda f: changed_tensors(
            f, lambda t: t.update({min(t): torch.zeros(t[min(t)].shape, dtype=torch.int64)})
        ),
        "is of torch.int64",
    ),
    "builder unknown": (lambda f: edit(f, builder="magic"), "unknown builder 'magic'.*update"),
    "builder os.system": (lambda f: edit(f, builder="os:system"), "not part of pyroflows"),
    "builder a number": (lambda f: edit(f, builder=3), "expected a builder's name"),
    "builder missing": (lambda f: edit(f, builder=...), "expected a builder's name"),
    "arguments a list": (lambda f: edit(f, arguments=[2]), "expected a builder's name and its arg"),
    "another builder": (lambda f: edit(f, builder="iaf"), "do not fit|missing|not expected"),
    "an argument too many": (lambda f: arguments(f, colour="red"), "cannot be built.*colour"),
    "no features": (lambda f: edit(f, arguments={}), "cannot be built.*features"),
    "layers of words": (lambda f: arguments(f, layers="many"), "cannot be built.*layers"),
    "more layers": (lambda f: arguments(f, layers=2), "missing"),
    "wider": (lambda f: arguments(f, hidden=[9]), "has shape"),
    "negative features": (lambda f: arguments(f, features=-3), "cannot be built.*features"),
    "support unknown": (
        lambda f: arguments(f, support={"constraint": "moon"}),
        "support: expected",
    ),
    "support odd": (lambda f: arguments(f, support={"constraint": ["real"]}), "support"),
    "support without bound": (
        lambda f: arguments(f, support={"constraint": "interval"}),
        "support: cannot read",
    ),
    "base unknown": (
        lambda f: arguments(f, base={"distribution": "Evil", "arguments": {}, "event_dims": 0}),
        "base: expected one of Normal",
    ),
    "tag unknown": (lambda f: arguments(f, base={"pickle": "gASV"}), "base: expected a known kind"),
    "dtype of wholes": (lambda f: edit(f, dtype="int64"), "floating-point dtype"),
    "dtype of words": (lambda f: edit(f, dtype="nn"), "floating-point dtype"),
    "guide of nothing": (lambda f: edit(f, guide={}), "the guide cannot be read"),
    "guide of numbers": (lambda f: edit(f, guide=7), "the guide cannot be read"),
}


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_a_broken_folder_is_refused(name, folder):
    damage, message = CORPUS[name]
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        pf.load(folder)
    assert len(str(caught.value)) < 1000


def test_no_folder_at_all(tmp_path):
    with pytest.raises(ValueError, match="found no file"):
        pf.load(tmp_path / "nowhere")


def test_no_single_bit_goes_unnoticed(folder):
    """One bit flipped anywhere: refused, or, in the blanks between words, the very same flow."""
    generator = random.Random(0)
    for name in (stored.CONFIG, stored.TENSORS):
        data = (folder / name).read_bytes()
        expected = pf.load(folder).state_dict()
        for _ in range(150):
            spot = generator.randrange(len(data))
            flipped = bytearray(data)
            flipped[spot] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(bytes(flipped))
            try:
                loaded = pf.load(folder)
            except ValueError:
                continue
            assert name == stored.CONFIG, f"byte {spot}"
            found = loaded.state_dict()
            assert all(torch.equal(found[k], expected[k]) for k in expected)
        (folder / name).write_bytes(data)


def test_what_another_folder_holds_does_not_fit(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    pf.save(pf.maf(2, layers=1, hidden=(8,)), other)
    (folder / stored.TENSORS).write_bytes((other / stored.TENSORS).read_bytes())
    with pytest.raises(ValueError, match="of another save"):
        pf.load(folder)


def test_a_failed_save_leaves_the_old_one(folder, monkeypatch):
    """No room on the disk: the error says so, nothing is left over, the old flow loads."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        pf.save(pf.nice(2, layers=2, hidden=(8,)), folder)
    assert pf.load(folder).config["builder"] == "maf"
    assert sorted(p.name for p in folder.iterdir()) == [stored.CONFIG, stored.TENSORS]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of threads and fork
def test_fifty_kills_leave_a_whole_flow(tmp_path):
    """Two flows saved in turn, the saver killed at random moments: one of both always loads."""
    flows = [pf.nice(2, layers=2, hidden=(64,)) for _ in range(2)]
    states = [flow.state_dict() for flow in flows]
    started = time.monotonic()
    for flow in flows * 2:
        pf.save(flow, tmp_path)
    round_trip = time.monotonic() - started
    generator, found = random.Random(0), []
    for _ in range(50):
        child = os.fork()
        if child == 0:
            while True:
                for flow in flows:
                    pf.save(flow, tmp_path)
        time.sleep(generator.uniform(0.0, round_trip))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = pf.load(tmp_path).state_dict()
        same = [all(torch.equal(state[k], s[k]) for k in s) for s in states]
        assert sum(same) == 1
        found.append(same.index(True))
    assert set(found) == {0, 1}  # saves went on in between
