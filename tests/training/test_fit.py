"""Maximum likelihood training: what it reaches, what it refuses, what it leaves behind."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, constraints
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import pyroflows as pf
from pyroflows.data.batches import Batches
from pyroflows.data.loaders import sources
from pyroflows.data.rows import Rows
from pyroflows.nets.mlp import Dropping
from pyroflows.training.regularize import set_dropout

QUICK = {"max_epochs": 3, "progress": False}


def small(features=2, context=0, **changes):
    return pf.maf(features, context, layers=1, hidden=(8,), **changes)


def rows(n=300, features=2):
    mixing = torch.eye(features) + 0.5 * torch.ones(features, features)
    return torch.randn(n, features) @ mixing + 3


class Pairs(Dataset):
    """A map-style data set that is not a TensorDataset."""

    def __init__(self, *tensors):
        self.tensors_ = tensors

    def __len__(self):
        return len(self.tensors_[0])

    def __getitem__(self, index):
        item = tuple(t[index] for t in self.tensors_)
        return item if len(item) > 1 else item[0]


@pytest.mark.parametrize("builder", [pf.nice, pf.realnvp, pf.maf, pf.nsf])
def test_reaches_the_entropy_of_a_gaussian(builder):
    x = rows(3000)
    test = rows(3000)
    exact = MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(test).mean()
    flow = builder(2, layers=3, hidden=(32,))
    pf.fit(flow, x, max_epochs=15, lr=5e-3, progress=False)
    assert flow.log_prob(test).mean() > exact - 0.05


def test_conditional_flow_learns_its_context():
    context = torch.rand(3000, 1) * 4 - 2
    x = context + 0.1 * torch.randn(3000, 1)
    flow = pf.maf(1, 1, layers=2, hidden=(16,))
    pf.fit(flow, x, context, max_epochs=15, lr=5e-3, progress=False)
    means = flow.sample((2000,), torch.tensor([[-1.0], [1.0]])).mean(0)[:, 0]
    assert torch.allclose(means, torch.tensor([-1.0, 1.0]), atol=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.double(),
        lambda x: TensorDataset(x),
        lambda x: Pairs(x),
    ],
    ids=["tensor", "array", "float64", "tensor_dataset", "dataset"],
)
def test_takes_data_as(make):
    history = pf.fit(small(), make(rows()), **QUICK)
    assert len(history.val) == 3
    assert all(map(math.isfinite, history.train))


def test_takes_a_loader_with_a_validation_set():
    loader = DataLoader(TensorDataset(rows()), batch_size=50, shuffle=True)
    history = pf.fit(small(), loader, val=rows(50), **QUICK)
    assert len(history.val) == 3


def test_takes_a_loader_of_pairs():
    loader = DataLoader(Pairs(rows(), torch.randn(300, 1)), batch_size=50)
    history = pf.fit(small(2, 1), loader, val=(rows(50), torch.randn(50, 1)), **QUICK)
    assert len(history.val) == 3


def test_takes_a_dataset_of_pairs():
    history = pf.fit(small(2, 1), TensorDataset(rows(), torch.randn(300, 1)), **QUICK)
    assert len(history.val) == 3


def test_without_validation_judges_by_the_training_score():
    history = pf.fit(small(), rows(), val=None, **QUICK)
    assert history.val == []
    assert history.score == max(history.train)


def test_keeps_the_best_weights():
    x, val = rows(), rows(200)
    flow = small()
    history = pf.fit(flow, x, val=val, max_epochs=20, lr=0.3, clip=1e3, progress=False)
    assert history.score == max(history.val)
    with torch.no_grad():
        assert flow.log_prob(val).mean().item() == pytest.approx(history.score, abs=1e-4)


def test_stops_early():
    history = pf.fit(small(), rows(100), max_epochs=200, patience=2, lr=0.1, progress=False)
    assert len(history.val) < 200
    assert "no better score" in history.stopped


def test_same_seed_same_course():
    courses = []
    for _ in range(2):
        torch.manual_seed(5)
        courses.append(pf.fit(small(), x := rows(), **QUICK).val)
    assert x is not None
    assert courses[0] == courses[1]


def test_leaves_eval_mode_and_no_dropout():
    flow = small()
    pf.fit(flow, rows(), dropout=0.5, **QUICK)
    assert not flow.training
    assert {m.dropout for m in flow.modules() if hasattr(m, "dropout")} == {0.0}


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.realnvp(4, hidden=(8,)),
        lambda: pf.maf(4, hidden=(8,)),
        lambda: pf.wavenet(4, layers=1, channels=4),
        lambda: pf.glow((1, 2, 2), levels=1, steps=1, channels=4),
        lambda: pf.multiscale_realnvp((1, 2, 2), levels=1, steps=1, channels=4, blocks=1),
        lambda: pf.pixelcnn((1, 2, 2), bins=2, channels=4, layers=1, kernel=3),
    ],
    ids=["realnvp", "maf", "wavenet", "glow", "multiscale_realnvp", "pixelcnn"],
)
def test_dropout_reaches_every_kind_of_net(build):
    flow = build()
    pf.testing.randomize(flow, 1.0, 0)
    x = torch.ones(5, *flow.event_shape)
    plain = flow.eval().log_prob(x)
    set_dropout(flow, 0.5)
    assert torch.equal(flow.log_prob(x), plain)
    assert not flow.train().log_prob(x).isclose(plain).all()
    set_dropout(flow, 0.0)
    assert torch.equal(flow.log_prob(x), plain)


def test_float64_flow_trains_in_float64():
    flow = small().double()
    pf.fit(flow, rows(), **QUICK)
    assert {p.dtype for p in flow.parameters()} == {torch.float64}


def test_slow_direction_trains_too():
    flow = pf.iaf(2, layers=1, hidden=(8,))
    history = pf.fit(flow, rows(), max_epochs=5, progress=False)
    assert history.val[-1] > history.val[0]


def test_data_in_far_units():
    x = rows() * torch.tensor([1e6, 1e-6]) + torch.tensor([1e8, 0.0])
    flow = small().double()
    pf.fit(flow, x.double(), max_epochs=10, lr=5e-3, progress=False)
    exact = MultivariateNormal(x.double().mean(0), torch.cov(x.double().T))
    assert flow.log_prob(x.double()).mean() > exact.log_prob(x.double()).mean() - 0.5


def test_bounded_data():
    flow = pf.nsf(2, layers=2, hidden=(16,), support=constraints.unit_interval)
    x = torch.distributions.Beta(2.0, 5.0).sample((2000, 2))
    pf.fit(flow, x, max_epochs=10, progress=False)
    drawn = flow.sample((2000,))
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert torch.allclose(drawn.mean(0), x.mean(0), atol=0.05)


def test_mini_batches_hold_every_row_once():
    x = torch.arange(10.0)[:, None]
    seen = torch.cat([b for b, _ in Batches(Rows(x), 4, seed=0)])
    assert sorted(seen[:, 0].tolist()) == list(range(10))


def test_mini_batches_of_two_processes_share_one_order():
    x = torch.arange(10.0)[:, None]
    shards = [Batches(Rows(x), 4, seed=0, rank=r, processes=2) for r in (0, 1)]
    seen = torch.cat([b for shard in shards for b, _ in shard])
    assert sorted(seen[:, 0].tolist()) == list(range(10))
    assert len(shards[0]) == len(shards[1]) == 3


# What goes wrong


class Explodes(nn.Module):
    """A net whose output turns NaN after a number of calls."""

    def __init__(self, calls):
        super().__init__()
        self.inner = pf.nets.MADE(2, 2, hidden=(8,))
        self.left = calls

    def forward(self, x, context=None):
        self.left -= self.training
        out = self.inner(x, context)
        return out * float("nan") if self.training and self.left == 0 else out


def explosive(calls):
    net = Explodes(calls)
    layer = pf.transforms.Autoregressive(net, pf.transforms.Affine())
    return pf.Flow(pf.Chain([layer.inv]), shape=2), net


def test_a_bad_step_rolls_back_to_the_best_weights():
    flow, net = explosive(calls=12)
    with pytest.warns(UserWarning, match="fit: 1 time back to the best weights"):
        history = pf.fit(flow, rows(), max_epochs=8, batch_size=64, progress=False)
    assert history.rollbacks == 1
    assert "1 time back to the best weights" in repr(history)
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert net.left < 0
    assert history.lr[-1] < history.lr[0] * 0.35


def test_ends_with_advice_after_three_rollbacks():
    flow, net = explosive(calls=9)
    best = None

    class Always(Explodes):
        def forward(self, x, context=None):
            self.left -= self.training
            out = self.inner(x, context)
            return out * float("nan") if self.training and self.left < 0 else out

    net.__class__ = Always
    with pytest.raises(pf.DivergedError, match="smaller lr="):
        pf.fit(flow, rows(), max_epochs=20, batch_size=64, progress=False)
    assert best is None
    assert all(torch.isfinite(p).all() for p in flow.parameters())


def test_interrupt_keeps_the_best_weights():
    flow = small()

    class Interrupts(Dataset):
        count = 0

        def __len__(self):
            return 200

        def __getitem__(self, index):
            Interrupts.count += 1
            if Interrupts.count == 1100:
                raise KeyboardInterrupt
            return torch.randn(2)

    history = pf.fit(flow, Interrupts(), val=rows(20), start=False, max_epochs=50, progress=False)
    assert history.stopped == "interrupted"
    assert 3 < len(history.val) < 50


BAD = {
    "wrong_features": (lambda: (small(), rows(50, 3)), r"x: expected shape \(rows, 2\).*\(50, 3\)"),
    "one_dimension": (lambda: (small(), torch.randn(50)), r"x: expected shape \(rows, 2\)"),
    "nan_rows": (
        lambda: (small(), torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [1.0, 2.0]])),
        r"x: 1 of 3 rows are NaN or infinite \(rows 1\)",
    ),
    "infinite_rows": (
        lambda: (small(), torch.tensor([[0.0, float("inf")], [float("-inf"), 0.0], [1.0, 2.0]])),
        r"x: 2 of 3 rows are NaN or infinite \(rows 0, 1\)",
    ),
    "integers": (lambda: (small(), torch.ones(50, 2).long()), r"x: expected floating-point.*int64"),
    "integer_array": (lambda: (small(), np.ones((50, 2), dtype=int)), "x: expected floating-point"),
    "empty": (lambda: (small(), torch.zeros(0, 2)), "x: expected at least one row"),
    "strings": (
        lambda: (small(), np.array([["a", None]], dtype=object)),
        "x: expected real numbers",
    ),
    "outside_support": (
        lambda: (small(support=constraints.positive), rows(50) - 100),
        "x: 50 of 50 rows are outside the flow's support",
    ),
    "on_the_border": (
        lambda: (
            small(support=constraints.interval(-1.0, 2.0)),
            torch.rand(50, 2)
            .index_fill(0, torch.tensor([3]), -1.0)
            .index_fill(0, torch.tensor([7, 9]), 2.0),
        ),
        r"x: 3 of 50 rows are on the border of the flow's support .*\(rows 3, 7, 9\); move them",
    ),
    "on_the_border_of_the_simplex": (
        lambda: (small(3, support=constraints.simplex), torch.eye(3)),
        "x: 3 of 3 rows are on the border",
    ),
    "on_the_border_of_one_part": (
        lambda: (
            small(
                support=constraints.cat([constraints.real, constraints.nonnegative], lengths=[1, 1])
            ),
            torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        ),
        r"x: 1 of 2 rows are on the border .*\(rows 1\)",
    ),
    "three_tensors": (
        lambda: (small(2, 1), TensorDataset(rows(50), rows(50, 1), rows(50, 1))),
        "x: expected a TensorDataset of rows.*3 tensors",
    ),
    "context_missing": (lambda: (small(2, 3), rows(50)), r"context: .*needs one.*got None"),
    "context_unwanted": (lambda: (small(), rows(50), torch.zeros(50, 1)), "context: .*takes no"),
    "context_width": (
        lambda: (small(2, 3), rows(50), torch.zeros(50, 2)),
        r"context: expected shape \(50, 3\), got \(50, 2\)",
    ),
    "context_rows": (
        lambda: (small(2, 3), rows(50), torch.zeros(49, 3)),
        r"context: expected shape \(50, 3\), got \(49, 3\)",
    ),
    "context_nan": (
        lambda: (small(2, 1), rows(50), torch.full((50, 1), float("nan"))),
        "context: 50 of 50 rows are NaN",
    ),
    "too_few_to_split": (lambda: (small(), rows(3)), "val: a share of 0.1 of 3 rows"),
    "loader_without_val": (
        lambda: (small(), DataLoader(TensorDataset(rows(50)))),
        "val: a DataLoader cannot be split",
    ),
}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (small()(), "got FlowDistribution, .*pass the flow itself"),
        (pf.nsf, r"got function nsf, .*called to make one, as in pf.nsf\(features\)"),
        (torch.zeros(5, 2), "got Tensor, builders such as pf.nsf make one"),
        (torch.nn.Linear(2, 2), "got Linear, builders"),
    ],
)
def test_refuses_what_is_no_flow(value, message):
    with pytest.raises(ValueError, match=f"flow: expected a flow, {message}"):
        pf.fit(value, rows(50), **QUICK)
    with pytest.raises(ValueError, match=f"flow: expected a flow, {message}"):
        pf.initialize(value, rows(50))
    with pytest.raises(ValueError, match=f"student: expected a flow, {message}"):
        pf.distill(small(), value)


def test_a_csv_file_is_refused_with_advice():
    with pytest.raises(ValueError, match="x: .*'houses.csv'; read it by pandas.read_csv, or use"):
        pf.fit(small(), "houses.csv", **QUICK)


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    make, message = BAD[case]
    arguments = make()
    before = {k: v.clone() for k, v in arguments[0].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pf.fit(*arguments, **QUICK)
    after = arguments[0].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("clip", -1.0), ("patience", 0), ("max_epochs", 0), ("batch_size", 0)],
)
def test_refuses_argument(name, value):
    with pytest.raises(ValueError, match=name):
        pf.fit(small(), rows(), **{**QUICK, name: value})


@pytest.mark.parametrize(("name", "value"), [("seed", 2**70), ("weight_decay", -1.0)])
def test_refuses_what_no_generator_takes(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an? (integer|number)"):
        pf.fit(small(), rows(), **QUICK, **{name: value})


def test_a_batch_size_beside_a_loader_is_refused():
    loader = DataLoader(TensorDataset(rows()), batch_size=100)
    with pytest.raises(
        ValueError, match=r"batch_size: a DataLoader brings its own \(100\), got 10"
    ):
        pf.fit(small(), loader, val=None, batch_size=10, **QUICK)


class Once(IterableDataset):
    """A stream that can be gone through once."""

    def __init__(self, x):
        self.left = iter(x)

    def __iter__(self):
        return self.left


@pytest.mark.parametrize("val", [TensorDataset(rows(0)), Once(rows(50))], ids=["empty", "once"])
def test_a_validation_loader_without_rows_is_named(val):
    flow = small()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    with pytest.raises(ValueError, match="val: the data loader gave no rows; give one"):
        pf.fit(flow, rows(), val=DataLoader(val), **QUICK)
    assert all(torch.equal(before[k], v) for k, v in flow.state_dict().items())


@pytest.mark.parametrize("shuffle", [False, True])
def test_validation_batches_are_the_same_in_all_processes(shuffle):
    val = DataLoader(TensorDataset(rows(8)), batch_size=2, shuffle=shuffle)
    if not shuffle:
        assert sources(small(), rows(), None, val, None, 0, (0, 2))[1].loader is val
        sampler = DistributedSampler(val.dataset, 2, 0)
        val = DataLoader(val.dataset, batch_size=2, sampler=sampler)
    with pytest.raises(ValueError, match="val: .*the same batches in all processes"):
        sources(small(), rows(), None, val, None, 0, (0, 2))
    assert sources(small(), rows(), None, val, None, 0, (0, 1))[1].loader is val


def test_numbers_of_numpy_are_numbers(tmp_path):
    numbers = {
        "val": np.float32(0.1),
        "lr": np.float32(1e-3),
        "clip": np.float32(5),
        "weight_decay": np.float32(0.1),
        "average": np.float32(0.9),
        "dropout": np.float32(0.1),
        "seed": np.int64(3),
        "batch_size": np.int64(32),
        "max_epochs": np.int64(2),
        "patience": np.int64(2),
    }
    folders = [tmp_path / name for name in ("numpy", "python")]
    courses = []
    for folder, given in zip(
        folders, (numbers, {k: v.item() for k, v in numbers.items()}), strict=True
    ):
        torch.manual_seed(0)
        checkpoint = pf.Checkpoint(folder, every=np.float32(1))
        courses.append(pf.fit(small(), rows(), checkpoint=checkpoint, progress=False, **given))
    assert courses[0].train == courses[1].train
    assert type(courses[0].lr[0]) is float


def test_arrays_that_are_only_to_be_read_are_left_alone():
    x = rows().numpy()
    before = x.copy()
    x.flags.writeable = False
    pf.fit(small(), x, **QUICK)
    assert np.array_equal(x, before)


def test_a_data_set_gets_batches_by_its_number_of_rows():
    train, _ = sources(small(), Pairs(rows(4000)), None, None, None, 0, (0, 1))
    assert train.loader.batch_size == 128  # as of a tensor of as many


def test_refuses_dropout_out_of_range():
    with pytest.raises(ValueError, match="dropout"):
        pf.fit(small(), rows(), dropout=1.0, **QUICK)


def test_bad_validation_rows_are_named():
    val = rows(10)
    val[4] = float("nan")
    with pytest.raises(ValueError, match=r"val: 1 of 10 rows are NaN or infinite \(rows 4\)"):
        pf.fit(small(), rows(), val=val, **QUICK)


def test_numbers_too_large_for_the_dtype_are_not_called_infinite():
    x = rows(10).double()
    x[4, 1] = 1e300
    with pytest.raises(ValueError, match=r"x: 1 of 10 rows are beyond what torch.float32 holds"):
        pf.fit(small(), x, **QUICK)
    context = x[:, :1] * 0 + 1e300
    flow = pf.maf(2, layers=1, hidden=(8,), context=1)
    with pytest.raises(ValueError, match=r"context: 10 of 10 rows are beyond what torch.float32"):
        pf.fit(flow, rows(10), context, **QUICK)


def test_a_bad_batch_of_a_validation_loader_is_not_taken_for_one_of_the_training():
    x = rows(100)
    x[60] = float("nan")
    loader = DataLoader(TensorDataset(x), batch_size=50)
    with pytest.raises(ValueError, match=r"^val \(batch 1 of the loader\).*rows 10"):
        pf.fit(small(), rows(), val=loader, **QUICK)


def test_bad_batch_of_a_loader_is_named():
    x = rows(100)
    x[60] = float("nan")
    loader = DataLoader(TensorDataset(x), batch_size=50)
    with pytest.raises(ValueError, match=r"batch 1 of the loader.*rows 10"):
        pf.fit(small(), loader, val=None, **QUICK)


def test_constant_columns_warn_and_still_train():
    x = rows()
    x[:, 1] = 7.0
    with pytest.warns(UserWarning, match=r"1 of 2 columns are constant \(\[1\]\)"):
        history = pf.fit(small(), x, **QUICK)
    assert all(map(math.isfinite, history.val))


@pytest.mark.parametrize("builder", [pf.nice, pf.realnvp, pf.nsf])
def test_one_feature_for_a_coupling_flow(builder):
    with pytest.raises(ValueError, match="features: expected an integer >= 2 for a coupling flow"):
        builder(1)


def test_initialize_is_explicit_and_in_the_state_dict():
    flow, fresh = small(), small()
    pf.initialize(flow, rows())
    assert flow.log_prob(rows()).mean() > fresh.log_prob(rows()).mean()
    fresh.load_state_dict(flow.state_dict())
    x = rows()
    assert torch.equal(flow.log_prob(x), fresh.log_prob(x))


def test_history_plots_and_reads_well():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    history = pf.fit(small(), rows(), **QUICK)
    ax = history.plot()
    assert {line.get_label() for line in ax.get_lines()} >= {"train", "validation"}
    assert "nats" in repr(history)
    plt.close("all")


# Found by trying to break it


def test_a_flow_that_never_scores_is_an_error():
    flow = small()
    with torch.no_grad():
        next(flow.parameters()).fill_(float("nan"))
    with pytest.raises(pf.DivergedError, match="the weights it came with"):
        pf.fit(flow, rows(), **QUICK)


@pytest.mark.parametrize("val", [1.5, 0.0, 0.01])
def test_share_of_a_dataset_is_checked(val):
    with pytest.raises(ValueError, match="val: "):
        pf.fit(small(), Pairs(rows(10)), val=val, **QUICK)


def test_dataset_order_comes_from_the_seed():
    courses = []
    for seed in (1, 2):
        torch.manual_seed(3)
        flow = small()
        torch.manual_seed(seed)
        courses.append(pf.fit(flow, Pairs(rows_fixed()), dropout=0.0, **QUICK).val)
    assert courses[0] == courses[1]


def rows_fixed():
    return torch.randn(200, 2, generator=torch.Generator().manual_seed(0))


def test_mixed_precision_trains_large_nets():
    flow = pf.maf(10, layers=1, hidden=(256, 256))
    history = pf.fit(flow, rows(200, 10), fabric={"precision": "bf16-mixed"}, **QUICK)
    assert all(map(math.isfinite, history.val))


def test_refuses_to_change_the_flows_dtype():
    with pytest.raises(ValueError, match="precision: "):
        pf.fit(small(), rows(), fabric={"precision": "bf16-true"}, **QUICK)


def test_dropout_reaches_a_net_of_ones_own():
    class Net(Dropping):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 2)
            self.seen = set()

        def forward(self, x, context=None):
            self.seen.add(self.dropout)
            return self.linear(self.drop(x))

    layer = pf.transforms.Coupling(Net(), pf.transforms.Affine(), torch.tensor([True, False]))
    flow = pf.Flow(pf.Chain([layer]), shape=2)
    pf.fit(flow, rows(), dropout=0.2, **QUICK)
    net = flow.transform.parts[0].net
    assert 0.2 in net.seen
    assert net.dropout == 0.0


def test_leaves_other_modules_dropout_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.1)
            self.linear = nn.Linear(1, 2)

        def forward(self, x, context=None):
            return self.dropout(self.linear(x))

    layer = pf.transforms.Coupling(Net(), pf.transforms.Affine(), torch.tensor([True, False]))
    flow = pf.Flow(pf.Chain([layer]), shape=2)
    pf.fit(flow, rows(), dropout=0.2, **QUICK)
    assert flow.transform.parts[0].net.dropout.p == 0.1


def test_without_validation_patience_does_not_stop():
    history = pf.fit(small(), rows(), val=None, max_epochs=12, patience=1, lr=0.3, progress=False)
    assert len(history.train) == 12


def test_bad_batch_of_a_loader_leaves_the_flow_as_it_was():
    x = rows(100)
    x[60] = float("nan")
    flow = small()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    loader = DataLoader(TensorDataset(x), batch_size=10)
    with pytest.raises(ValueError, match="batch 6"):
        pf.fit(flow, loader, val=None, **QUICK)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


def test_takes_arrays_in_pairs_and_reversed_views():
    x, c = rows().numpy(), rows(300, 1).numpy()
    history = pf.fit(small(2, 1), x[::-1], c, val=(x[:50], c[:50]), **QUICK)
    assert len(history.val) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.maf(3, -1), "context: expected an integer >= 0"),
        (lambda: pf.maf(3, 2.0), "context: expected an integer >= 0"),
        (lambda: pf.maf(0), "features: expected an integer >= 1"),
        (lambda: pf.maf(3, layers=0), "layers: expected an integer >= 1"),
        (lambda: pf.maf(3, hidden=()), "hidden: expected a tuple"),
        (lambda: pf.maf(3, linear="qr"), "linear: expected one of"),
        (lambda: pf.nsf(3, bins=1), "bins: expected an integer >= 2"),
        (lambda: pf.Flow(pf.transforms.LULinear(2), shape=3), "shape: the transform does not take"),
    ],
)
def test_builders_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_start_sees_sorted_data_from_end_to_end():
    x = torch.arange(50_000.0)[:, None]
    flow = pf.maf(1, layers=1, hidden=(4,))
    pf.fit(flow, x, val=x[::100], max_epochs=1, progress=False)
    assert flow.transform.parts[-1].loc.item() == pytest.approx(25_000, rel=0.01)
