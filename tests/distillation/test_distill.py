"""Distillation: the student comes close, the teacher is left alone, bad input is refused."""

import copy
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf

mpl.use("Agg")

BRIEF = {"draws": 4000, "classifier_draws": 0, "speed_batches": (1,)}  # of the report
FEW = {"draws": 100, "classifier_draws": 0, "speed_batches": (1,)}


def untouched(flow):
    """A function that says whether the flow is as it is now, to the bit."""
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    return lambda: all(torch.equal(v, before[name]) for name, v in flow.state_dict().items())


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    flow = pf.maf(2, layers=2, hidden=(32, 32))
    x = pf.datasets.moons(4000).train
    pf.fit(flow, x, max_epochs=15, batch_size=256, lr=5e-3, progress=False)
    return flow


def test_student_comes_close(teacher):
    test = pf.datasets.moons(4000).test
    student = pf.student_of(teacher)
    history = pf.distill(teacher, student, max_steps=150, progress=False)
    report = pf.compare(teacher, student, test, history=history)
    assert report.reverse_kl[0] < 0.05 + 3 * report.reverse_kl[1]
    assert report.forward_kl[0] < 0.05 + 3 * report.forward_kl[1]
    assert report.teacher_nats - report.student_nats == pytest.approx(report.gap[0], abs=1e-4)
    assert report.gap[0] < 0.1
    assert report.speeds["student"][10_000] > 0
    assert "reverse KL" in str(report)
    assert "all 3 evaluations done" in str(report)


def test_history_has_both_divergences(teacher):
    history = pf.distill(teacher, pf.student_of(teacher), max_steps=150, progress=False)
    assert list(history.curves) == ["reverse KL", "forward KL"]
    reverse, forward = history.curves.values()
    assert history.val == [-(a + b) for a, b in zip(reverse, forward, strict=True)]
    ax = history.plot()
    assert ax.get_xlabel() == "step"
    drawn = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
    assert list(drawn["reverse KL"]) == list(drawn["forward KL"]) == [50, 100, 150]
    assert drawn["weights kept"][0] == 50 * (history.steps[history.best] + 1)
    plt.close(ax.figure)


def test_an_estimate_below_zero_is_drawn_on_the_logarithmic_axis():
    history = pf.History(counted="evaluation", stride=50)
    history.record(0, -1.0, None, 1e-3, {"reverse KL": -0.01})
    ax = history.plot()
    assert list(ax.get_lines()[0].get_ydata()) == [1e-4]
    plt.close(ax.figure)


@pytest.mark.parametrize("name", ["test", "draws", "classifier_draws", "speed_batches", "baseline"])
def test_what_compare_takes_is_said_to_be_its_own(teacher, name):
    student = pf.student_of(teacher)
    same = untouched(student)
    with pytest.raises(ValueError, match=rf"{name}: say pf\.compare\(teacher, student, {name}="):
        pf.distill(teacher, student, **{name: 10}, max_steps=50, progress=False)
    assert same()


def test_an_unknown_argument_is_one(teacher):
    with pytest.raises(TypeError, match="steps: there is no such argument; did you mean max_steps"):
        pf.distill(teacher, pf.student_of(teacher), steps=50)


def test_estimates_agree_with_the_student_it_leaves(teacher):
    student = pf.student_of(teacher)
    pf.distill(teacher, student, max_steps=50, progress=False)
    report = pf.compare(teacher, student, **BRIEF)
    with torch.no_grad():
        x = teacher.sample((20_000,))
        ratio = teacher.log_prob(x) - student.log_prob(x)
    error = math.hypot(ratio.std() / len(x) ** 0.5, report.forward_kl[1])
    assert abs(ratio.mean() - report.forward_kl[0]) < 4 * error


def test_teacher_is_left_exactly_as_it_was(teacher):
    teacher.train()
    same = untouched(teacher)
    flags = [(p.requires_grad, p.grad) for p in teacher.parameters()]
    student = pf.student_of(teacher)
    pf.distill(teacher, student, max_steps=50, progress=False)
    pf.compare(teacher, student, **FEW)
    assert same()
    assert flags == [(p.requires_grad, p.grad) for p in teacher.parameters()]
    assert all(m.training for m in teacher.modules())
    teacher.eval()


def test_conditional_teacher():
    torch.manual_seed(0)
    context = torch.rand(2000, 1) * 4 - 2
    x = torch.cat([context, -context], dim=1) + 0.3 * torch.randn(2000, 2)
    flow = pf.maf(2, 1, layers=1, hidden=(16,))
    pf.fit(flow, x, context, max_epochs=10, lr=5e-3, progress=False)
    student = pf.student_of(flow)
    pf.distill(flow, student, data=(x, context), max_steps=100, progress=False)
    report = pf.compare(flow, student, (x, context), **BRIEF)
    assert report.forward_kl[0] < 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.maf(3, layers=2, hidden=(8, 8)),
        lambda: pf.maf(3, 2, layers=2, hidden=(8,)),
        lambda: pf.nsf(3, scheme="autoregressive", layers=2, hidden=(8,), bins=4),
        lambda: pf.realnvp(3, layers=2, hidden=(8,)),
        lambda: pf.maf(3, layers=1, hidden=(8,), support=constraints.positive),
        lambda: pf.maf(3, layers=1, hidden=(8,)).double(),
    ],
    ids=["maf", "conditional", "nsf", "coupling", "positive", "float64"],
)
def test_student_of(make):
    flow = make()
    x = 5 + torch.rand(100, 3).to(next(flow.parameters()).dtype)
    flow.transform.initialize(x, torch.randn(100, *flow.context_shape))
    student = pf.student_of(flow)
    assert student.fast == "sample"
    assert student.event_shape == flow.event_shape
    assert student.context_shape == flow.context_shape
    assert repr(student.support) == repr(flow.support)
    assert {p.dtype for p in student.parameters()} == {p.dtype for p in flow.parameters()}
    drawn = student.sample((500,), *([torch.randn(2)] if flow.context_shape else []))
    assert torch.allclose(drawn.log().mean(0).exp(), x.log().mean(0).exp(), rtol=0.3)


def test_student_of_takes_changes(teacher):
    assert len(pf.student_of(teacher, layers=1).transform) < len(pf.student_of(teacher).transform)


def nan_teacher():
    flow = pf.maf(2, layers=1, hidden=(8,))
    with torch.no_grad():
        next(flow.parameters()).fill_(float("nan"))
    return flow


def exploding_teacher():
    flow = pf.maf(2, layers=1, hidden=(8,))
    with torch.no_grad():
        flow.transform.parts[-1].scale.fill_(float("inf"))
    return flow


def plain():
    return pf.maf(2, layers=1, hidden=(8,))


BAD = {
    "shape": (plain, lambda: pf.iaf(3), r"student: its event_shape \(3,\).*\(2,\)"),
    "context": (plain, lambda: pf.iaf(2, 1), "student: its context_shape"),
    "support": (plain, lambda: pf.iaf(2, support=constraints.positive), "student: its support"),
    "slow": (plain, lambda: pf.maf(2), "student: expected a flow that samples in one pass"),
    "nan": (nan_teacher, lambda: pf.iaf(2), "teacher: its parameters are not finite"),
    "infinite": (exploding_teacher, lambda: pf.iaf(2), "teacher: it scores its own samples"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    make_teacher, make_student, message = BAD[case]
    student = make_student()
    same = untouched(student)
    with pytest.raises(ValueError, match=message):
        pf.distill(make_teacher(), student, max_steps=10, progress=False)
    assert same()
    if case != "slow":  # which is no reason not to compare
        with pytest.raises(ValueError, match=message):
            pf.compare(make_teacher(), student, **FEW)


def nan_student():
    flow = pf.iaf(2, layers=1, hidden=(8,))
    with torch.no_grad():
        next(flow.parameters()).fill_(float("nan"))
    return flow


def test_refuses_a_student_of_nans(teacher):
    with pytest.raises(ValueError, match="student: its parameters are not finite"):
        pf.distill(teacher, nan_student(), progress=False)


def test_refuses_a_student_that_is_the_teacher():
    flow = pf.realnvp(2, layers=2, hidden=(8,))
    with pytest.raises(ValueError, match="student: it shares"):
        pf.distill(flow, flow, progress=False)


def test_refuses_an_unknown_objective(teacher):
    with pytest.raises(ValueError, match="objective: expected one of"):
        pf.distill(teacher, pf.student_of(teacher), objective="kl", progress=False)


def test_layers_need_a_student_that_matches(teacher):
    with pytest.raises(ValueError, match="objective: 'layers' needs a student whose layers match"):
        pf.distill(teacher, pf.iaf(2), objective="layers", progress=False)


def test_speeds_are_of_the_batches_asked_for(teacher):
    with pytest.raises(ValueError, match="speed_batches.*expected"):
        pf.compare(teacher, pf.student_of(teacher), speed_batches=(0,))
    report = pf.compare(teacher, pf.student_of(teacher), **{**FEW, "speed_batches": (2, 30)})
    assert {tuple(by_batch) for by_batch in report.speeds.values()} == {(2, 30)}


def test_reconstruction_needs_bases_of_one_shape(teacher, monkeypatch):
    student = pf.student_of(teacher)
    monkeypatch.setattr(student.transform, "inverse_shape", lambda shape: torch.Size([3]))
    with pytest.raises(ValueError, match="pairs the same z in both flows"):
        pf.distill(teacher, student, objective="mixed", progress=False)


BASELINES = {
    "no data": ({"baseline": 1.0, "test": torch.randn(20, 2)}, "baseline: expected data="),
    "no test": ({"baseline": 1.0, "data": torch.randn(20, 2)}, "baseline: expected test="),
    "few": (
        {"baseline": 1.0, "data": torch.randn(4, 2), "test": torch.randn(20, 2)},
        "baseline: expected enough data=.*got 4 rows",
    ),
    "no time": (
        {"baseline": 0, "data": torch.randn(20, 2), "test": torch.randn(20, 2)},
        "baseline: expected a positive number",
    ),
    "truth": (
        {"baseline": True, "data": torch.randn(20, 2), "test": torch.randn(20, 2)},
        "baseline: expected a positive number, got True",
    ),
    "word": (
        {"baseline": "iaf", "test": torch.randn(20, 2)},
        "baseline: expected a flow, got str",
    ),
    "no baseline": ({"data": torch.randn(20, 2)}, "data: only a baseline is trained on it"),
    "shape": (
        {"baseline": pf.iaf(3), "test": torch.randn(20, 2)},
        r"baseline: its event_shape \(3,\) differs from the student's",
    ),
}


@pytest.mark.parametrize("case", BASELINES)
def test_refuses_a_baseline(teacher, case):
    arguments, message = BASELINES[case]
    with pytest.raises(ValueError, match=message):
        pf.compare(teacher, pf.student_of(teacher), **arguments, **FEW)


def test_a_student_made_by_hand_needs_a_baseline_made_by_hand(teacher):
    hand_made = pf.Flow(pf.transforms.LULinear(2), shape=2)
    rows = {"data": torch.randn(20, 2), "test": torch.randn(20, 2)}
    with pytest.raises(ValueError, match="train one yourself and pass baseline=flow"):
        pf.compare(teacher, hand_made, baseline=1.0, **rows, **FEW)
    report = pf.compare(teacher, hand_made, rows["test"], baseline=pf.iaf(2), **FEW)
    assert math.isfinite(report.baseline_gap[0])


def test_any_two_flows_over_the_same_rows_compare(teacher):
    report = pf.compare(teacher, teacher, torch.randn(20, 2), **FEW)
    assert report.gap == (0.0, 0.0)
    assert report.history is None
    assert "training" not in str(report)


def test_flows_in_training_mode_are_compared_in_eval_mode():
    class Moody(pf.FlowTransform):
        def forward_and_log_det(self, x, context=None):
            return x + 5.0 * self.training, x.new_zeros(x.shape[:-1])

        def inverse_and_log_det(self, y, context=None):
            return y - 5.0 * self.training, y.new_zeros(y.shape[:-1])

    flow = pf.Flow(pf.Chain([pf.transforms.LULinear(2), Moody()]), shape=2)
    report = pf.compare(flow.train(), copy.deepcopy(flow).eval(), **FEW)
    assert abs(report.reverse_kl[0]) < 1e-6
    assert flow.training


def test_a_classifier_needs_some_draws(teacher):
    student = pf.student_of(teacher)
    for name, value in (("classifier_draws", 9), ("draws", 9)):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*(at least|>=) 10, got 9"):
            pf.compare(teacher, student, **{**FEW, "draws": 10, name: value})
    report = pf.compare(teacher, student, **{**FEW, "draws": 10, "classifier_draws": 10})
    assert 0 <= report.auc <= 1
    assert pf.compare(teacher, student, **{**FEW, "classifier_draws": 200}).classifier_draws == 100


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (
            torch.zeros(50, 1).index_fill(0, torch.tensor([7]), math.nan),
            r"1 of 50 rows.*\(rows 7\)",
        ),
        (torch.arange(5)[:, None], "expected floating-point values, got torch.int64"),
        (torch.zeros(0, 1), r"expected shape \(rows, 1\), got \(0, 1\)"),
    ],
    ids=["nan", "integers", "empty"],
)
def test_contexts_are_checked_as_rows_are(context, message):
    flow = pf.maf(2, 1, layers=1, hidden=(8,))
    with pytest.raises(ValueError, match=f"context: {message}"):
        pf.distill(flow, pf.student_of(flow), context=context, max_steps=50, progress=False)
    with pytest.raises(ValueError, match=f"context: {message}"):
        pf.compare(flow, pf.student_of(flow), context=context, **FEW)


def test_student_of_needs_contexts_that_are_vectors():
    class Moved(pf.FlowTransform):
        event_dim = 1

        def forward_and_log_det(self, x, context=None):
            return x + context.sum(dim=(-2, -1))[..., None], x.new_zeros(x.shape[:-1])

    with pytest.raises(ValueError, match=r"teacher: expected contexts that are vectors.*\(2, 3\)"):
        pf.student_of(pf.Flow(Moved(), shape=2, context=(2, 3)))


def test_numbers_of_numpy_are_numbers(teacher, tmp_path):
    few = {"max_steps": np.int64(50), "batch_size": np.int64(32)}
    pf.distill(
        teacher,
        pf.student_of(teacher),
        **few,
        lr=np.float32(1e-3),
        average=np.float32(0.9),
        checkpoint=tmp_path,
        progress=False,
    )
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    numbers = {"draws": np.int64(100), "classifier_draws": np.int64(10)}
    report = pf.compare(
        teacher, pf.student_of(teacher), **numbers, speed_batches=(np.int64(1),), seed=np.int64(0)
    )
    assert type(report.draws) is type(report.classifier_draws) is int
    assert [type(size) for size in report.speeds["student"]] == [int]


def test_unconditional_teacher_takes_no_context(teacher):
    with pytest.raises(ValueError, match="context: this flow takes no context"):
        pf.distill(teacher, pf.student_of(teacher), context=torch.zeros(5, 1), progress=False)


def test_contexts_of_another_width_are_refused():
    flow = pf.maf(2, 1, layers=1, hidden=(8,))
    with pytest.raises(ValueError, match=r"context: expected shape \(rows, 1\), got \(5, 3\)"):
        pf.distill(flow, pf.student_of(flow), context=torch.zeros(5, 3), progress=False)


def test_conditional_teacher_needs_contexts():
    flow = pf.maf(2, 1, layers=1, hidden=(8,))
    for call in (pf.distill, pf.compare):
        with pytest.raises(ValueError, match="context: this flow needs one of shape"):
            call(flow, pf.student_of(flow), progress=False)


def test_bad_rows_are_named(teacher):
    student, bad = pf.student_of(teacher), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="data: expected shape"):
        pf.distill(teacher, student, data=bad, progress=False)
    with pytest.raises(ValueError, match="test: expected shape"):
        pf.compare(teacher, student, bad)
    with pytest.raises(ValueError, match="data: expected shape"):
        pf.compare(teacher, student, torch.zeros(5, 2), data=bad, baseline=1.0)


def test_student_has_a_base_of_its_own():
    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(2))

        def forward(self):
            return torch.distributions.Independent(torch.distributions.Normal(self.loc, 1.0), 1)

    teacher = pf.maf(2, layers=1, hidden=(8,), base=Base())
    assert pf.student_of(teacher).base is not teacher.base


def test_student_of_a_hand_made_flow_has_its_support():
    parts = [pf.transforms.LULinear(2), pf.transforms.ToSupport(constraints.positive, 2)]
    teacher = pf.Flow(pf.Chain(parts), shape=2)
    student = pf.student_of(teacher, hidden=(8,))
    pf.distill(teacher, student, max_steps=50, progress=False)
    report = pf.compare(teacher, student, **BRIEF)
    assert math.isfinite(report.reverse_kl[0])


def test_refuses_another_dtype(teacher):
    with pytest.raises(ValueError, match="student: its dtype"):
        pf.distill(teacher, pf.student_of(teacher).double(), max_steps=10, progress=False)


@pytest.mark.parametrize("name", ["lr", "clip", "max_steps", "batch_size"])
def test_refuses_argument(teacher, name):
    with pytest.raises(ValueError, match=name):
        pf.distill(teacher, pf.student_of(teacher), **{name: -1}, progress=False)


@pytest.mark.parametrize("name", ["draws", "classifier_draws", "seed"])
def test_compare_refuses_argument(teacher, name):
    with pytest.raises(ValueError, match=name):
        pf.compare(teacher, pf.student_of(teacher), **{name: -1})
