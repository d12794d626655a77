"""Rows with and without a context: every way to take some of them takes the contexts along."""

import pytest
import torch

from pyroflows.data.batches import Batches
from pyroflows.data.rows import Rows

COUNT = 23


def rows(conditional: bool) -> Rows:
    x = torch.arange(float(COUNT))[:, None]
    return Rows(x, x.expand(-1, 2) + 0.5 if conditional else None)


def check_together(some: Rows, conditional: bool) -> None:
    assert (some.context is not None) == conditional
    if conditional:
        assert torch.equal(some.context, some.x.expand(-1, 2) + 0.5)


@pytest.fixture(params=[False, True], ids=["alone", "with context"])
def conditional(request):
    return request.param


@pytest.mark.parametrize("index", [slice(3, 9), slice(None, None, 4), torch.tensor([5, 0, 5])])
def test_an_index_takes_data_and_contexts(conditional, index):
    some = rows(conditional)[index]
    assert torch.equal(some.x, rows(conditional).x[index])
    check_together(some, conditional)


def test_chunks_are_all_rows_in_order(conditional):
    parts = list(rows(conditional).chunks(10))
    assert [len(part) for part in parts] == [10, 10, 3]
    for part in parts:
        check_together(part, conditional)
    assert torch.equal(Rows.joined(parts).x, rows(conditional).x)
    check_together(Rows.joined(parts), conditional)


def test_a_split_parts_the_rows(conditional):
    rest, share = rows(conditional).split(0.3, seed=4)
    assert (len(rest), len(share)) == (16, 7)
    for part in (rest, share):
        check_together(part, conditional)
    assert sorted([*rest.x[:, 0].tolist(), *share.x[:, 0].tolist()]) == list(range(COUNT))
    again = rows(conditional).split(0.3, seed=4)[1]
    assert torch.equal(again.x, share.x)
    assert not torch.equal(rows(conditional).split(0.3, seed=5)[1].x, share.x)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001, float("nan")])
def test_a_share_that_leaves_a_side_empty_is_refused(share):
    with pytest.raises(ValueError, match="val: "):
        rows(False).split(share, seed=0)


def test_to_moves_both(conditional):
    there = rows(conditional).to(torch.float64)
    assert there.x.dtype == torch.float64
    check_together(there, conditional)


def test_spread_rows_come_from_everywhere(conditional):
    some = rows(conditional).spread(5)
    assert some.x[:, 0].tolist() == [0, 5, 10, 15, 20]
    check_together(some, conditional)
    assert len(rows(conditional).spread(COUNT)) == COUNT


def test_batches_keep_rows_and_contexts_together(conditional):
    batches = [Rows(*batch) for batch in Batches(rows(conditional), 8, seed=0)]
    assert [len(batch) for batch in batches] == [8, 8, 7]
    for batch in batches:
        check_together(batch, conditional)
