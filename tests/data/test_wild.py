"""Wild rows: which are, that a fit is the one without them, and that it says so."""

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import (
    Cauchy,
    Geometric,
    LogNormal,
    Normal,
    Pareto,
    Poisson,
    StudentT,
    constraints,
)

import pyroflows as pf
from pyroflows import testing
from pyroflows.data.reach import Reach, repeated_far_out
from pyroflows.data.rows import Rows
from pyroflows.data.wild import Screen
from pyroflows.flows import examples

EXAMPLES = examples()
ROWS = 300
VECTORS = [name for name, example in EXAMPLES.items() if len(example.make().event_shape) == 1]
CONDITIONAL = [name for name, example in EXAMPLES.items() if example.make().context_shape]
QUICK = {"max_epochs": 1, "batch_size": 128, "progress": False}
SAMPLE = {"maf-float32-x", "nsf-float64-x", "glow-float32-x"}  # the others take a minute
SLOW = pytest.mark.integration
SIZES = {"float32": (-9999.0, 1e30, -3.4e38), "float64": (-9999.0, 1e30, 1e300)}


def wild_in(values):
    return Reach.of(values).beyond(values)


def normal(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def table(name, dtype, where="x"):
    """A flow, rows and contexts for it, of which three are wild, and which are not."""
    torch.manual_seed(0)
    flow = EXAMPLES[name].make().to(getattr(torch, dtype))
    rows = Rows(*testing.cases.points(flow, (ROWS,), flow.dtype))
    values = rows.x if where == "x" else rows.context
    first = (0,) * (values.dim() - 1)
    values[(17, *first)], values[(203, *first)] = SIZES[dtype][1:]
    values[(250, *first)] = SIZES[dtype][0]
    usual = torch.ones(ROWS, dtype=torch.bool)
    usual[[17, 203, 250]] = False
    return flow, rows, usual


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def cases():
    for dtype in SIZES:
        for name in EXAMPLES:
            if testing.cases.is_unbounded(EXAMPLES[name].make().support):
                yield pytest.param(name, dtype, "x", id=f"{name}-{dtype}-x")
            if name in CONDITIONAL:
                yield pytest.param(name, dtype, "context", id=f"{name}-{dtype}-context")


@pytest.mark.parametrize(("name", "dtype", "where"), list(cases()))
def test_a_start_is_the_one_without_wild_rows(name, dtype, where):
    flow, rows, usual = table(name, dtype, where)
    other = EXAMPLES[name].make().to(flow.dtype)
    other.load_state_dict(flow.state_dict())
    with pytest.warns(UserWarning, match="3 of 300 rows are far outside all others.*row 17 .* row"):
        pf.initialize(flow, rows.x, rows.context)
    rest = rows[usual]
    pf.initialize(other, rest.x, rest.context)
    assert same(flow, other)


@pytest.mark.parametrize(
    ("name", "dtype", "where"),
    [
        pytest.param(*case.values, id=case.id, marks=() if case.id in SAMPLE else SLOW)
        for case in cases()
    ],
)
def test_a_fit_is_the_one_without_wild_rows(name, dtype, where):
    flow, rows, usual = table(name, dtype, where)
    other = EXAMPLES[name].make().to(flow.dtype)
    other.load_state_dict(flow.state_dict())
    torch.manual_seed(1)  # of dropout
    with pytest.warns(UserWarning, match="3 of 300 rows .* left out of the fit"):
        history = pf.fit(flow, rows.x, rows.context, **QUICK)
    rest = rows[usual]
    torch.manual_seed(1)
    expected = pf.fit(other, rest.x, rest.context, **QUICK)
    assert same(flow, other)
    assert (history.train, history.val) == (expected.train, expected.val)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(100, 3000),
    wild=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    unit=st.sampled_from([1e-20, 1.0, 1e6]),
    shift=st.floats(-3, 3),
    data=st.data(),
)
def test_exactly_the_wild_values_are_wild(seed, rows, wild, dtype, unit, shift, data):
    values = normal(rows, 3, seed) + shift
    expected = torch.zeros(rows, 3, dtype=torch.bool)
    for _ in range(wild):
        place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 2))
        sign, power = data.draw(st.sampled_from([-1, 1])), data.draw(st.floats(4, 30))
        values[place] = sign * 10**power
        expected[place] = True
    assert torch.equal(wild_in((values * unit).to(dtype)), expected)


WHOLE = {"poisson": Poisson(0.3), "geometric": Geometric(0.1)}
HEAVY = {
    "normal": Normal(0.0, 1.0),
    "student3": StudentT(3.0),
    "student2": StudentT(2.0),
    "cauchy": Cauchy(0.0, 1.0),
    "lognormal": LogNormal(0.0, 1.0),
    "lognormal3": LogNormal(0.0, 3.0),
    "pareto": Pareto(1.0, 0.5),
    **WHOLE,
}


@pytest.mark.parametrize(
    "zeros", [0.0, 0.6, 0.95], ids=["none zero", "most zero", "nearly all zero"]
)
@pytest.mark.parametrize("kind", list(HEAVY))
def test_heavy_tails_and_nearly_constant_columns_are_not_wild(kind, zeros):
    torch.manual_seed(0)
    for rows in (20, 100, 1000):
        values = HEAVY[kind].sample((rows, 200)).double() * (torch.rand(rows, 200) >= zeros)
        assert wild_in(values).any(dim=0).sum() <= 4, f"{rows} rows"


@pytest.mark.parametrize(
    "zeros", [0.0, 0.6, 0.95], ids=["none zero", "most zero", "nearly all zero"]
)
@pytest.mark.parametrize("kind", list(HEAVY))
def test_a_wild_value_shows_in_any_column(kind, zeros):
    torch.manual_seed(0)
    values = HEAVY[kind].sample((1000, 20)).double() * (torch.rand(1000, 20) >= zeros)
    for size in (1e30, -1e30):
        spoilt = values.clone()
        spoilt[3] = size
        found = wild_in(spoilt)
        assert found[3].all()
        assert not found[torch.arange(1000) != 3].any()


def test_constant_columns_and_single_values_are_not_judged():
    values = torch.zeros(100, 2)
    values[3, 1] = 1e30
    assert not wild_in(values).any()


def test_few_rows_and_none_beyond_are_kept_as_they_are():
    for count in (1, 2, 5, 100):
        rows = Rows(normal(count, 2))
        assert Screen(pf.maf(2).support, rows).usual(rows) is rows


def frame(values, columns):
    class Frame:
        def __array__(self, *args, **kwargs):
            return values.numpy()

    made = Frame()
    made.columns = columns
    return made


def spoilt(rows=400, at=(7, 1), value=1e30, columns=2):
    x = normal(rows, columns).float()
    x[at] = value
    return x


def test_columns_are_named_where_they_have_names():
    x = frame(spoilt(), ["age", "income"])
    with pytest.warns(UserWarning, match=r"row 7 \('income' is 1e\+30, the others go from -"):
        pf.initialize(pf.maf(2), x)
    c = frame(spoilt(value=-1e30), ["sex", "year"])
    x = frame(normal(400, 2).float(), ["age", "income"])
    with pytest.warns(UserWarning, match=r"row 7 \(context 'year' is -1e\+30, the others"):
        pf.initialize(pf.maf(2, context=2), x, c)


def test_many_wild_rows_are_counted():
    x = spoilt(at=([1, 2, 3, 4, 5], 0))
    with pytest.warns(UserWarning, match=r"x: 5 of 400 .* row 1 .* row 2 .* row 3 .* and 2 more;"):
        pf.initialize(pf.maf(2), x)


def test_wild_validation_rows_are_left_out_of_the_score():
    x, val = normal(400, 2).float(), spoilt(100)
    with pytest.warns(UserWarning, match=r"val: 1 of 100 rows .* row 7 \(column 1 is 1e\+30"):
        history = pf.fit(pf.maf(2), x, val=val, **QUICK)
    assert history.val[0] > -10


def test_too_many_to_be_slips_are_kept_and_told():
    rows = Rows(normal(100, 20).float())
    rows.x[torch.arange(20), torch.arange(20)] = 1e30
    with pytest.warns(UserWarning, match="20 of 100 rows are far outside the others, too many"):
        screen = Screen(pf.maf(20).support, rows)
    assert screen.usual(rows) is rows


def said_of(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in said]


def test_files_name_their_rows_once(tmp_path):
    x = spoilt(3000, at=(1234, 1))
    x[77, 0] = -9999.0
    np.save(tmp_path / "x.npy", x.numpy())
    options = {**QUICK, "max_epochs": 3}
    history, said = said_of(lambda: pf.fit(pf.maf(2), tmp_path / "x.npy", **options))
    named = re.findall(r"row (\d+) \(column (\d) is", " ".join(said))
    assert sorted(named) == [("1234", "1"), ("77", "0")]
    assert min(history.train + history.val) > -10


def test_batches_of_a_loader_are_looked_through():
    x = spoilt(2048, at=(range(96, 132), 1))
    loader = torch.utils.data.DataLoader(x, batch_size=32)
    options = {"max_epochs": 2, "progress": False}
    history, said = said_of(lambda: pf.fit(pf.maf(2), loader, val=None, **options))
    assert "x (batch 3 of the loader): 32 of 32 rows" in said[0]
    assert "x (batch 4 of the loader): 4 of 32 rows" in said[1]
    assert len(said) == 2
    assert min(history.train) > -10


def test_the_rest_is_counted_where_warnings_would_be_many():
    x = spoilt(2048, at=(range(0, 2048, 128), 1))
    x[:, 0] += torch.arange(2048.0)
    loader = torch.utils.data.DataLoader(x, batch_size=32)
    options = {"max_epochs": 2, "progress": False}
    _, said = said_of(lambda: pf.fit(pf.maf(2), loader, val=None, **options))
    assert len(said) == 4
    assert "further ones are counted" in said[2]
    assert "x: in all 16 rows" in said[3]


def test_rows_that_are_sorted_are_not_taken_for_wild():
    x = normal(4000, 2).float()
    x[:, 1] += torch.arange(4000.0) ** 2
    loader = torch.utils.data.DataLoader(x, batch_size=50)
    screen = Screen(pf.maf(2).support, Rows(x[:400]))
    kept, said = said_of(lambda: [screen.usual(Rows(part)) for part in loader])
    assert sum(map(len, kept)) > 3500
    assert "too many for slips, so from now on they stay in the fit" in said[-1]


def test_the_history_counts_rows_left_out():
    x = spoilt(at=([1, 2, 3], 0))
    history, _ = said_of(lambda: pf.fit(pf.maf(2), x, **QUICK))
    assert history.left_out == 3
    assert "3 rows far outside left out" in repr(history)
    loader = torch.utils.data.DataLoader(x, batch_size=50)
    history, _ = said_of(
        lambda: pf.fit(pf.maf(2), loader, val=None, **{**QUICK, "batch_size": None})
    )
    assert history.left_out == 3


def test_equal_wild_rows_are_each_counted():
    x = spoilt(at=([1, 2, 3], slice(None)), value=-9999.0)
    history, said = said_of(lambda: pf.fit(pf.maf(2), x, **QUICK))
    assert "x: 3 of 400 rows are far outside" in said[0]
    assert history.left_out == 3
    loader = torch.utils.data.DataLoader(x, batch_size=2)
    options = {**QUICK, "batch_size": None, "max_epochs": 2}
    history, said = said_of(lambda: pf.fit(pf.maf(2), loader, val=None, **options))
    assert [int(text.split(": ")[1].split()[0]) for text in said] == [1, 2]
    assert history.left_out == 3


def test_wild_rows_of_a_validation_loader_are_not_called_rows_of_x():
    loader = torch.utils.data.DataLoader(spoilt(100), batch_size=10)
    training = torch.utils.data.DataLoader(normal(400, 2).float(), batch_size=50)
    options = {**QUICK, "batch_size": None}
    history, said = said_of(lambda: pf.fit(pf.maf(2), training, val=loader, **options))
    assert "val (batch 0 of the loader): 1 of 10 rows" in said[0]
    assert min(history.val) > -10


@pytest.mark.parametrize("share", [0.03, 0.12])
@pytest.mark.parametrize("where", ["x", "context"])
def test_a_code_in_too_many_rows_to_be_wild_is_told(share, where):
    x, context = normal(1000, 2).float(), normal(1000, 1, seed=1).float()
    changed = x if where == "x" else context
    changed[: int(1000 * share), 0] = -9999.0
    flow = pf.maf(2, context=1, layers=1, hidden=(4,))
    with pytest.warns(UserWarning, match="column 0 is -9999 in .* a code for a missing value"):
        pf.fit(flow, x, context, max_epochs=1, progress=False)


def test_a_code_at_the_end_of_a_long_table_is_told():
    x = normal(20_000, 2)
    x[-2000:, 1] = -9999.0
    with pytest.warns(UserWarning, match="'income' is -9999 in 500 of 5,000 rows"):
        Screen(constraints.real_vector, Rows(x), ["age", "income"])


@pytest.mark.parametrize(
    "values",
    [
        StudentT(1.5).sample((1000, 3)),
        LogNormal(0.0, 3.0).sample((1000, 3)),
        Poisson(3.0).sample((1000, 3)),
        torch.cat([torch.zeros(900, 1), Normal(0.0, 1.0).sample((100, 1))]),
        torch.tensor([0.0, 1.0, 100.0]).repeat(300)[:, None],
        Normal(0.0, 1.0).sample((1000, 1)).clamp(max=1.0),
    ],
    ids=["student", "log-normal", "poisson", "zeros", "few values", "top-coded"],
)
def test_honest_columns_hold_no_codes(values):
    assert repeated_far_out(values) == []
