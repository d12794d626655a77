"""Hostile tables over the command line: a right number or one line of ours, never a traceback."""

import csv
import io
import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import pyroflows as pf
from pyroflows.cli import app
from pyroflows.cli.tables import read_table

pytestmark = pytest.mark.integration

QUICK = ["--layers", "1", "--hidden", "4", "--epochs", "1", "--flow", "maf"]
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def few_or(many):
    """A few examples each day, many in the slow tests."""
    all_of_them = pytest.param(many, id="all", marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [pytest.param(6, id="few"), all_of_them])


def hostile(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # an example may fit a flow: no search for a smaller one
        suppress_health_check=CHECKS,
    )


def run(*args):
    """A command's outcome; it must end soon, and an error must be one line that we wrote."""
    started = time.monotonic()
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert time.monotonic() - started < 120
    assert done.exit_code in (0, 1, 2), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    assert "Traceback" not in done.output
    assert "unexpected" not in done.output, done.output
    if done.exit_code == 2:
        message = json.loads(done.stdout)["error"]
        assert len(message) > 10
        assert "\n" not in message
    return done


def pair(number):
    return repr(number), number


ordinary = st.floats(-1e3, 1e3, allow_nan=False, width=32).map(pair)
extreme = st.sampled_from(
    [
        *map(pair, (1e308, -1e308, 1e38, 3.5e38, 1e-308, 5e-324, 1e-45, -0.0, 1e20, 2.0**53 + 1)),
        ("inf", math.inf),
        ("-Infinity", -math.inf),
        ("1e999", math.inf),
        ("NaN", math.nan),
        ("", math.nan),
        ("NA", math.nan),
        ("  7 ", 7.0),
        ("+1.5e+3", 1500.0),
    ]
)
words = st.one_of(
    st.sampled_from(["1_000", "1,5", "0x10", "--1", "1e", "١٢x", "True", "=1+1", "'; DROP"]),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
)
names = st.text(st.characters(exclude_categories=("Cs",)), max_size=15)


@st.composite
def tables(draw, rows=(0, 60), width=None, bad=True):
    """A CSV's bytes and, where every cell is a number, what it says."""
    columns = width or draw(st.integers(1, 4))
    count = draw(st.integers(*rows))
    seed = draw(st.integers(0, 2**16))
    plain = np.random.default_rng(seed).normal(size=(count, columns)) * draw(
        st.sampled_from([1.0, 1e-12, 1e6, 1e30])
    )
    cells = [[pair(float(v)) for v in row] for row in plain]
    for _ in range(draw(st.integers(0, 6)) if count else 0):
        i, j = draw(st.integers(0, count - 1)), draw(st.integers(0, columns - 1))
        cells[i][j] = draw(st.one_of(ordinary, extreme))
    expected = np.array([[value for _, value in row] for row in cells]).reshape(count, columns)
    texts = [[text for text, _ in row] for row in cells]
    header = [f"c{j}" for j in range(columns)]
    if bad:
        trouble = draw(st.sampled_from(["none"] * 4 + ["word", "ragged", "header", "constant"]))
        if trouble == "word" and count:
            texts[draw(st.integers(0, count - 1))][0] = draw(words)
            expected = None
        elif trouble == "ragged" and count:
            texts[draw(st.integers(0, count - 1))] += ["1"] * draw(st.integers(1, 3))
            expected = None
        elif trouble == "header":
            header = [draw(names) for _ in header]
            expected = None
        elif trouble == "constant" and count:
            texts = [["1.0", *row[1:]] for row in texts]
            expected[:, 0] = 1.0
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=draw(st.sampled_from(",;\t")) if columns > 1 else ",")
    writer.writerow(header)
    writer.writerows(texts)
    return buffer.getvalue().encode("utf-8"), expected


@few_or(350)
def test_cells_are_read_as_they_were_written(examples, tmp_path):
    @hostile(examples)
    @given(table=tables())
    def check(table):
        data, expected = table
        path = tmp_path / "t.csv"
        path.write_bytes(data)
        try:
            found = read_table(path).values
        except ValueError:
            # A blank line is no row: a table of one column may have none that is left.
            assert expected is None or len(expected) == 0 or expected.shape[1] == 1
            return
        if expected is not None and expected.shape[1] > 1:
            assert np.array_equal(found, expected, equal_nan=True)

    check()


@few_or(200)
def test_fit_is_right_or_says_why_not(examples, tmp_path):
    @hostile(examples)
    @given(table=tables(rows=(15, 60)))
    def check(table):
        data, expected = table
        path, out = tmp_path / "t.csv", tmp_path / "run"
        path.write_bytes(data)
        done = run("fit", path, "--out", out, "--overwrite", "--json", *QUICK)
        if done.exit_code:
            return
        said = json.loads(done.stdout)
        assert math.isfinite(said["held_out"]["nats"])
        if expected is not None and expected.shape[1] > 1:
            finite = np.isfinite(expected)
            assert said["used"] + said["far_out"] == finite.all(axis=1).sum()
            assert sum(said["missing"].values()) == np.isnan(expected).sum()
            assert sum(said["infinite"].values()) == np.isinf(expected).sum()
        flow = pf.load(out)
        with np.load(out / "rows.npz") as rows:
            held = torch.tensor(rows["held"], dtype=next(flow.parameters()).dtype)
        nats = flow.log_prob(held).double().mean().item()
        assert nats == pytest.approx(said["held_out"]["nats"], rel=1e-4, abs=1e-4)
        drawn = run("sample", out, "-n", 20, "--out", tmp_path / "x.csv", "--json")
        if drawn.exit_code == 0:
            header = json.loads((out / "table.json").read_text(encoding="utf-8"))["header"]
            values = read_table(tmp_path / "x.csv", header=header).values
            assert values.shape == (20, len(said["columns"]))
            assert np.isfinite(values).all()

    check()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    rows = np.random.default_rng(0).normal(size=(200, 2))
    with open(folder / "d.csv", "w", newline="") as file:
        csv.writer(file).writerows([["c0", "c1"], *rows.tolist()])
    assert run("fit", folder / "d.csv", "--out", folder / "run", "--json", *QUICK).exit_code == 0
    return folder / "run"


@few_or(250)
def test_score_is_right_row_by_row(examples, tmp_path, fitted):
    @hostile(examples)
    @given(table=tables(rows=(1, 30), width=2))
    def check(table):
        data, expected = table
        path, out = tmp_path / "t.csv", tmp_path / "scored.npy"
        path.write_bytes(data)
        done = run("score", fitted, path, "--out", out, "--json")
        if done.exit_code == 2:
            assert expected is None
            return
        if expected is None:
            return
        scores = np.load(out)[:, -1]
        flow = pf.load(fitted)
        for row, score in zip(expected, scores, strict=True):
            single = torch.tensor(row[None], dtype=torch.float32)
            if not np.isfinite(row).all():
                assert np.isnan(score)
            elif not torch.isfinite(single).all():
                assert score == -math.inf
            else:
                alone = flow(validate_args=False).log_prob(single).item()
                alone = -math.inf if math.isnan(alone) else alone
                assert score == pytest.approx(alone, rel=1e-4, abs=1e-4)

    check()


@few_or(150)
def test_bytes_that_are_no_table(examples, tmp_path, fitted):
    @hostile(examples)
    @given(data=st.binary(max_size=2000), suffix=st.sampled_from([".csv", ".npy", ".csv.gz"]))
    def check(data, suffix):
        path = tmp_path / f"t{suffix}"
        path.write_bytes(data)
        run("fit", path, "--out", tmp_path / "run", "--overwrite", "--json", *QUICK)
        run("score", fitted, path, "--json")

    check()


@few_or(60)
def test_arrays_of_every_kind(examples, tmp_path):
    @hostile(examples)
    @given(
        kind=st.sampled_from(["f2", "f4", "f8", ">f8", "i4", "u8", "b1", "c8", "S3", "M8[s]", "O"]),
        shape=st.sampled_from([(), (0,), (0, 2), (2, 0), (40,), (40, 2), (4, 2, 2)]),
    )
    def check(kind, shape):
        values = np.random.default_rng(0).normal(size=shape) * 50
        path = tmp_path / "t.npy"
        np.save(path, values.astype(int).astype(kind) if kind != "S3" else np.full(shape, b"abc"))
        done = run("fit", path, "--out", tmp_path / "run", "--overwrite", "--json", *QUICK)
        if kind in ("c8", "S3", "M8[s]", "O") or shape not in ((40,), (40, 2)):
            assert done.exit_code == 2

    check()


def test_ten_thousand_columns(tmp_path, fitted):
    wide = np.random.default_rng(0).normal(size=(30, 10_000))
    np.save(tmp_path / "t.npy", wide)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([[f"c{j}" for j in range(10_000)], *wide.tolist()])
    for name in ("t.npy", "t.csv"):
        done = run("fit", tmp_path / name, "--out", tmp_path / "run", "--json", *QUICK)
        assert done.exit_code == 2
        assert "10000 columns of numbers; a flow here takes up to 2000" in done.output
    two = ["--columns", "c17,c9999"]
    done = run("fit", tmp_path / "t.csv", "--out", tmp_path / "run", "--json", *QUICK, *two)
    assert done.exit_code == 0, done.output
    done = run("score", fitted, tmp_path / "t.csv", "--json")
    assert json.loads(done.stdout)["rows"] == 30


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_endings_and_byte_order_marks(ending, mark, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(mark + ending.join([b"a,b", b"1,2", b"", b"3,4", b""]))
    table = read_table(path)
    assert table.names == ["a", "b"]
    assert table.values.tolist() == [[1.0, 2.0], [3.0, 4.0]]
