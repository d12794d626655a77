"""Maps of globals and of rows given them keep the contract, and cost what they say."""

import pytest
import torch

import pyroflows as pf
from pyroflows.structured.flow import rows_flow
from pyroflows.testing.cases import USUAL, randomize
from pyroflows.testing.maps import (
    check_context_rows,
    check_gradients,
    check_log_det,
    check_round_trip,
)
from pyroflows.transforms import RowsGivenGlobals, WhitenRows
from pyroflows.transforms.rows import Arrow, RowGaussian

LAYOUTS = {
    "one number a row": (3, [(5, 1)], 0),
    "two groups, a context": (2, [(4, 2), (3, 1)], 2),
    "no globals": (0, [(3, 3)], 0),
}


def sizes(name):
    globals_, groups, context = LAYOUTS[name]
    return globals_, groups, context, globals_ + sum(n * k for n, k in groups)


def some_arrow(globals_, groups):
    """Gaussians in an order of their own."""

    def factor(*shape):
        return torch.randn(shape).tril(-1) + 1.5 * torch.eye(shape[-1])

    rows = [
        RowGaussian(
            torch.randn(n, k),
            torch.randn(n, k, globals_),
            factor(n, k, k),
            torch.randn(n, k, globals_),
        )
        for n, k in groups
    ]
    features = globals_ + sum(n * k for n, k in groups)
    order = torch.randperm(features)
    return Arrow(order, torch.randn(globals_), factor(globals_, globals_), rows)


def whiten(name):
    globals_, groups, _, _ = sizes(name)
    layer = WhitenRows(globals_, groups)
    layer.set(some_arrow(globals_, groups))
    return layer.double()


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_given_globals_keep_the_contract(name):
    _, groups, context, features = sizes(name)
    flow = rows_flow(features, context, groups=groups, hidden=(8,), row_hidden=(8,)).double()
    randomize(flow.transform, USUAL, 0)
    for check in (check_round_trip, check_log_det, check_gradients, check_context_rows):
        check(flow.transform, (features,), (context,) if context else ())


@pytest.mark.parametrize("name", LAYOUTS)
def test_whitened_rows_keep_the_contract(name):
    pf.testing.check_transform(whiten(name), sizes(name)[3])


@pytest.mark.parametrize("name", LAYOUTS)
def test_log_determinants_of_rows_add_up(name):
    _, groups, context, features = sizes(name)
    flow = rows_flow(features, context, groups=groups, hidden=(8,)).double()
    x = torch.randn(4, features, dtype=torch.float64)
    told = torch.randn(4, context, dtype=torch.float64) if context else None
    for layer, by in ((flow.transform, (x, told)), (whiten(name), (x,))):
        y, log_dets = layer.forward_by_row(*by)
        expected = layer.forward_and_log_det(*by)
        assert log_dets.shape == (4, 1 + sum(n for n, _ in groups))
        torch.testing.assert_close((y, log_dets.sum(-1)), expected)


def test_a_row_depends_on_no_other_row():
    flow = rows_flow(7, groups=[(5, 1)], hidden=(8,)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(7, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: flow.transform.forward_and_log_det(x)[0])(x)
    among_rows = jacobian[2:, 2:]
    assert (among_rows - torch.diag(among_rows.diagonal())).abs().max() == 0
    assert (jacobian[2:, :2].abs() > 0).all()


def test_whitened_rows_have_the_moments_that_were_set():
    arrow = some_arrow(2, [(3, 1)])
    arrow.rows[0].log_slope.zero_()
    layer = WhitenRows(2, [(3, 1)])
    layer.set(arrow)
    x = torch.eye(5)
    matrix = (layer(x) - layer(torch.zeros(5))).T[arrow.order]
    row = arrow.rows[0]
    expected = torch.zeros(5, 5)
    expected[:2, :2] = arrow.tril
    expected[2:, :2] = row.slope[:, 0]
    expected[2:, 2:] = torch.diag(row.tril[:, 0, 0])
    torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WhitenRows(2, []), "groups: expected at least one"),
        (lambda: WhitenRows(-1, [(2, 1)]), "globals_: expected an integer >= 0"),
        (lambda: rows_flow(3, groups=[(5, 1)]), "groups: expected at most 3 numbers, got 5"),
        (
            lambda: RowsGivenGlobals(None, [], 2, [(5, 1)], width=4),
            "shared: expected a map for each of 1 groups",
        ),
    ],
    ids=["no groups", "negative", "too many numbers", "no maps"],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
