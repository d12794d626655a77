"""What distillation is made of: matched layers, objectives, schedules, measures, the report."""

import dataclasses
import itertools
import math
import time

import matplotlib as mpl
import pytest
import torch
from torch.distributions import Normal, constraints, kl_divergence

import pyroflows as pf
from pyroflows.data.rows import Rows
from pyroflows.distillation import comparison
from pyroflows.distillation import training as train
from pyroflows.distillation.draws import Contexts, scored
from pyroflows.distillation.measures import plain_loop_speed, two_sample_auc
from pyroflows.distillation.objectives import (
    LOSSES,
    LayerTarget,
    Objectives,
    Task,
    half_square,
    layer_loss,
    layer_targets,
)
from pyroflows.distillation.pairs import matched
from pyroflows.distillation.schedule import CHOICES, EPOCH, Batches, Phase, phases_of, weights_at
from pyroflows.testing import randomize

mpl.use("Agg")


def teachers():
    small = {"layers": 2, "hidden": (8,)}
    return {
        "lu": lambda: pf.maf(3, **small),
        "lu_inverse": lambda: pf.maf(3, **small, linear="lu_inverse"),
        "reverse": lambda: pf.maf(3, **small, linear="reverse"),
        "permute": lambda: pf.maf(5, **small, linear="permute"),
        "conditional": lambda: pf.maf(3, 2, **small),
        "spline": lambda: pf.nsf(3, scheme="autoregressive", bins=4, **small),
        "positive": lambda: pf.maf(3, **small, support=constraints.positive),
        "one_feature": lambda: pf.maf(1, **small),
    }


def random_teacher(name):
    teacher = teachers()[name]()
    randomize(teacher, gain=0.5)
    return teacher.double()


def twin(teacher):
    """A student that is its teacher's very map: nets that are constants, turned around."""
    student = pf.student_of(teacher)
    for pair in matched(teacher, student):
        with torch.no_grad():
            for net in (pair.teacher.net, pair.student.net):
                for parameter in net.parameters():
                    parameter.zero_()
            pair.teacher.net.last.bias.normal_(std=0.5)
            raw, shift = pair.teacher.net.last.bias.unflatten(0, (-1, 2)).unbind(-1)
            log_scale = pair.teacher.family.bound * raw.tanh()
            turned = torch.stack([-raw, -shift * (-log_scale).exp()], dim=-1)
            pair.student.net.last.bias.copy_(turned.flatten())
    return student


def objectives(teacher, student, **kwargs):
    frozen = teacher.detached()
    unit = torch.ones(teacher.event_shape, dtype=torch.float64)
    return Objectives(Task(frozen, student, matched(frozen, student), unit, **kwargs))


@pytest.mark.parametrize("name", teachers())
def test_student_matches_layer_by_layer(name):
    teacher = random_teacher(name)
    student = pf.student_of(teacher)
    pairs = matched(teacher, student)
    assert len(pairs) == 2
    assert len({id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}) == 0
    # Beside its layers, which start as the identity, the student is the teacher.
    layers = {pair.index for pair in pairs}
    z = torch.randn(7, *teacher.event_shape).double()
    for index, (their, my) in enumerate(zip(teacher.parts, student.parts, strict=True)):
        if index not in layers:
            torch.testing.assert_close(my(z), their(z))
        else:
            assert my.net.descending == their.transform.net.descending


@pytest.mark.parametrize(
    "student",
    [
        lambda: pf.iaf(3, layers=3, hidden=(8,), linear="lu_inverse"),
        lambda: pf.iaf(3, layers=2, hidden=(8,), linear="reverse"),
        lambda: pf.iaf(3, layers=2, hidden=(8,), linear="lu_inverse"),  # its own LU-linear maps
        lambda: pf.nsf(3, scheme="autoregressive", fast="sample", layers=2, linear="lu_inverse"),
        lambda: pf.realnvp(3, layers=2, hidden=(8,)),
    ],
    ids=["layers", "linear", "lu", "family", "coupling"],
)
def test_other_students_do_not_match(student):
    assert matched(random_teacher("lu"), student().double()) == []


def test_student_is_wider_than_a_slow_teacher_only():
    assert pf.student_of(pf.maf(3, hidden=(16, 9))).parts[0].net.hidden == (24, 14)
    assert pf.student_of(pf.maf(3), hidden=(16,)).parts[0].net.hidden == (16,)
    assert pf.student_of(pf.iaf(3, hidden=(16, 9))).parts[0].net.hidden == (16, 9)


def test_other_order_does_not_match():
    teacher, student = random_teacher("reverse"), pf.student_of(random_teacher("reverse"))
    assert len(matched(teacher, student)) == 2
    first = student.parts[0]
    first.net = pf.nets.MADE(3, 2, hidden=(8,), descending=True).double()
    assert matched(teacher, student) == []


def test_other_base_does_not_match():
    teacher = random_teacher("lu")
    student = pf.student_of(teacher)
    assert matched(teacher, student)
    student.base.loc.add_(1.0)
    assert matched(teacher, student) == []


def test_layer_loss_is_the_kl_of_gaussians():
    teacher = random_teacher("lu")
    student = pf.student_of(teacher)
    randomize(student, gain=0.5)
    pair = matched(teacher, pf.student_of(teacher))[0]
    pair = dataclasses.replace(pair, student=student.parts[0])
    after = torch.randn(7, 3).double()
    theta = pair.teacher.net(after, None)
    before = pair.teacher(after)

    def gaussian(layer_draw):
        mean = layer_draw(torch.zeros(7, 3).double())
        return Normal(mean, layer_draw(torch.ones(7, 3).double()) - mean)

    teacher_law = gaussian(lambda noise: pair.teacher.family.inverse(noise, theta)[0])
    answer = pair.student.net(before, None)
    student_law = gaussian(lambda noise: pair.student.family.forward(noise, answer)[0])
    wanted = kl_divergence(teacher_law, student_law).sum(-1)
    target = LayerTarget(pair, before, after, theta)
    torch.testing.assert_close(layer_loss(target, None), wanted)
    assert wanted.min() > 0.01


@pytest.mark.parametrize("name", ["conditional", "spline", "permute"])
def test_targets_are_the_points_on_the_way(name):
    teacher = random_teacher(name)
    x = torch.randn(7, *teacher.event_shape).double()
    context = torch.randn(7, 2).double() if teacher.context_shape else None
    pairs = matched(teacher, pf.student_of(teacher))
    found = layer_targets(teacher, pairs, x, context)
    assert [pair.index for pair, *_ in found] == [pair.index for pair in pairs]
    points = {0: teacher.transform.inverse_and_log_det(x, context)[0]}
    for index, part in enumerate(teacher.parts):
        points[index + 1] = part.forward_and_log_det(points[index], context)[0]
    for pair, before, after, _ in found:
        torch.testing.assert_close(before, points[pair.index])
        torch.testing.assert_close(after, points[pair.index + 1])


@pytest.mark.parametrize("name", ["lu", "conditional", "permute", "positive"])
def test_every_loss_is_zero_at_the_teachers_own_map(name):
    teacher = random_teacher(name)
    student = twin(teacher)
    loss = objectives(teacher, student)
    context = torch.randn(50, 2).double() if teacher.context_shape else None
    x = teacher(context).sample(() if context is not None else (50,))
    for objective in ("layers", "reverse_kl", "z_reconstruction", "x_reconstruction"):
        assert abs(loss(x, context, {objective: 1.0}).item()) < 1e-9, objective
    entropy = loss(x, context, {"forward_kl": 1.0})
    torch.testing.assert_close(entropy, -teacher(context).log_prob(x).mean())


def test_reverse_kl_is_the_scheme_as_first_stated():
    """Draw from the student, score there for free, under the teacher in a pass; E[log s - log t]"""
    teacher = random_teacher("lu")
    student = pf.student_of(teacher)
    loss = objectives(teacher, student, path=False)
    x = torch.zeros(500, 3).double()
    torch.manual_seed(1)
    got = loss(x, None, {"reverse_kl": 1.0})
    torch.manual_seed(1)
    drawn, log_s = student.rsample_and_log_prob((500,))
    torch.testing.assert_close(got, (log_s - teacher.log_prob(drawn)).mean())
    assert got > 0.1


def test_path_gradient_is_the_plain_one_on_average():
    teacher = random_teacher("lu")
    student = pf.student_of(teacher)
    randomize(student, gain=0.3)
    x = torch.zeros(20_000, 3).double()
    gradients = []
    for path, _ in itertools.product((True, False), range(4)):
        loss = objectives(teacher, student, path=path)(x, None, {"reverse_kl": 1.0})
        found = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    both = torch.stack(gradients).unflatten(0, (2, 4))
    means, errors = both.mean(1), both.std(1) / 2
    apart = (means[0] - means[1]).norm()
    assert apart < 4 * errors.norm()
    assert apart < 0.2 * means[1].norm()


def test_path_gradient_vanishes_at_the_teacher():
    teacher = random_teacher("lu")
    student = twin(teacher)
    x = torch.zeros(64, 3).double()
    for path in (True, False):
        loss = objectives(teacher, student, path=path)(x, None, {"reverse_kl": 1.0})
        found = torch.autograd.grad(loss, student.parts[0].net.last.bias)[0].norm()
        assert (found < 1e-9) == path


def test_reconstructions_are_in_units_of_the_spread():
    teacher = random_teacher("lu")
    student = pf.student_of(teacher)
    x = teacher.sample((50,))
    plain = objectives(teacher, student)
    scaled = Objectives(Task(teacher.detached(), student, [], torch.full((3,), 2.0).double()))
    one, other = (o(x, None, {"z_reconstruction": 1.0}) for o in (plain, scaled))
    torch.testing.assert_close(one, 4 * other)
    assert half_square(torch.ones(5, 3)).item() == pytest.approx(1.5)


def test_a_loss_registers_the_student_alone():
    teacher = random_teacher("lu")
    loss = objectives(teacher, student := pf.student_of(teacher))
    assert dict(loss.named_children()) == {"student": student}
    assert set(loss.parameters()) == set(student.parameters())


@pytest.mark.parametrize("objective", CHOICES[1:])
@pytest.mark.parametrize("name", ["lu", "conditional"])
def test_every_objective_brings_the_student_closer(objective, name):
    teacher = random_teacher(name).float()
    student = pf.student_of(teacher)
    context = torch.randn(2000, 2) if teacher.context_shape else None
    x = teacher(context).sample(() if teacher.context_shape else (2000,))
    before = (scored(teacher, x, context) - scored(student, x, context)).mean()
    quick(teacher, student, context=context, objective=objective, max_steps=50, lr=5e-3)
    report = pf.compare(teacher, student, None, context, **{**BRIEF, "draws": 2000})
    assert report.forward_kl[0] < 0.5 * before


def test_schedule_gives_way_smoothly():
    affine, spline = (
        matched(teacher, pf.student_of(teacher))
        for teacher in map(random_teacher, ("lu", "spline"))
    )
    wanted = {
        "auto": [(affine, ["layers"]), ([], ["forward_kl", "reverse_kl"])],
        "forward_kl": [(affine, ["forward_kl"])],
        "layers": [(affine, ["layers"])],
    }
    wanted["auto"].append((spline, ["forward_kl", "reverse_kl"]))
    for objective, cases in wanted.items():
        for pairs, names in cases:
            phases = phases_of(objective, pairs)
            course = [weights_at(phases, share) for share in torch.linspace(0, 1, 41).tolist()]
            assert all(sum(weights.values()) == pytest.approx(1.0) for weights in course)
            alone = [next(iter(weights)) for weights in course if len(weights) == 1]
            assert [name for name, _ in itertools.groupby(alone)] == names


def test_batches_mix_data_and_draws_with_their_contexts():
    teacher = pf.maf(2, 1, layers=1, hidden=(8,))
    with torch.no_grad():
        teacher.transform.parts[-1].loc.fill_(100.0)
    numbers = torch.arange(2000.0)[:, None]
    rows = Rows(numbers.expand(-1, 2), numbers)
    contexts = Contexts(torch.full((5, 1), -1.0))
    phases = [Phase(0.0, {"forward_kl": 1.0})]
    batches = list(Batches(teacher, contexts, rows, phases, epochs=1, size=20))
    assert len(batches) == EPOCH
    x, context = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    from_data = context[:, 0] >= 0
    assert from_data.float().mean().item() == pytest.approx(0.5)
    torch.testing.assert_close(x[from_data], context[from_data].expand(-1, 2))
    assert (x[~from_data] - 100).abs().max() < 10


def test_few_rows_are_not_learned_by_heart():
    rows = Rows(torch.zeros(10, 2))
    phases = [Phase(0.0, {"forward_kl": 1.0})]
    batches = Batches(pf.maf(2), Contexts(None), rows, phases, epochs=20, size=100)
    assert batches.share * 20 * EPOCH * 100 == pytest.approx(20 * len(rows))


BRIEF = {"draws": 500, "classifier_draws": 0, "speed_batches": (1,)}


def quick(teacher, student, **kwargs):
    return pf.distill(teacher, student, progress=False, **kwargs)


def test_steps_that_are_not_finite_are_skipped_and_counted(monkeypatch):
    teacher = random_teacher("lu").float()
    student = pf.student_of(teacher)
    calls = itertools.count()
    layers = LOSSES["layers"]

    def sometimes_nan(*args):
        return layers(*args) * (math.nan if next(calls) % 10 == 3 else 1.0)

    monkeypatch.setitem(LOSSES, "layers", sometimes_nan)
    with pytest.warns(UserWarning, match="of 100 steps not finite and left out"):
        history = quick(teacher, student, max_steps=100, lr=5e-3)
    assert history.skipped >= 5
    assert history.rollbacks == 0
    report = pf.compare(teacher, student, history=history, **BRIEF)
    assert f"{history.skipped} steps not finite" in str(report)
    assert abs(report.reverse_kl[0]) < 1


def test_a_loss_scaled_too_far_is_skipped_until_it_fits(monkeypatch):
    """As in half precision on a GPU, whose first steps overflow."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))
    monkeypatch.setattr(train, "open_fabric", lambda *_, **__: fabric)
    teacher = random_teacher("lu").float()
    with pytest.warns(UserWarning, match="of 50 steps not finite and left out"):
        history = quick(teacher, pf.student_of(teacher), max_steps=50)
    assert 5 < history.skipped < 25
    assert history.rollbacks == 0
    assert scaler.get_scale() < 2.0**25


def test_gives_up_where_no_step_is_finite(monkeypatch):
    teacher = random_teacher("lu").float()
    student = pf.student_of(teacher)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    forward_kl = LOSSES["forward_kl"]
    monkeypatch.setitem(LOSSES, "layers", lambda *args: math.nan * forward_kl(*args))
    with pytest.raises(pf.DivergedError, match="not finite"):
        quick(teacher, student, max_steps=1000)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_interrupted_it_returns_the_best_student(monkeypatch):
    teacher = random_teacher("lu").float()
    student = pf.student_of(teacher)
    calls = itertools.count()
    layers = LOSSES["layers"]

    def interrupted(*args):
        if next(calls) == 130:
            raise KeyboardInterrupt
        return layers(*args)

    monkeypatch.setitem(LOSSES, "layers", interrupted)
    history = quick(teacher, student, max_steps=400, lr=5e-3)
    assert history.stopped == "interrupted"
    assert [len(values) for values in history.curves.values()] == [2, 2]
    best = max(history.val)
    report = pf.compare(teacher, student, **{**BRIEF, "draws": 4000})
    measured = -(report.reverse_kl[0] + report.forward_kl[0])
    assert measured == pytest.approx(best, abs=0.1)


def test_interrupted_at_once_it_still_gives_a_history(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    teacher = random_teacher("lu").float()
    monkeypatch.setitem(LOSSES, "layers", interrupted)
    student = pf.student_of(teacher)
    history = quick(teacher, student, max_steps=100)
    assert history.stopped == "interrupted"
    history.plot()
    pf.compare(teacher, student, history=history, **BRIEF).plot()
    mpl.pyplot.close("all")


def test_student_keeps_its_flags():
    teacher = random_teacher("lu").float()
    student = pf.student_of(teacher)
    quick(teacher, student, max_steps=50)
    assert all(p.requires_grad for p in student.parameters())
    # What stands between the layers is the teacher's still, so the flows match as before.
    assert len(matched(teacher, student)) == 2


def test_a_base_that_could_learn_stays_the_teachers():
    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.ones(2))

        def forward(self):
            return torch.distributions.Independent(Normal(self.loc, 1.0), 1)

    teacher = pf.maf(2, layers=1, hidden=(8,), base=Base())
    randomize(teacher, gain=0.5)
    student = pf.student_of(teacher)
    quick(teacher, student, objective="reverse_kl", max_steps=50)
    assert len(matched(teacher, student)) == 1
    quick(teacher, student, objective="layers", max_steps=50)
    assert student.base.loc.requires_grad


def test_stops_early(monkeypatch):
    teacher = random_teacher("lu").float()
    plain = {"objective": "reverse_kl", "path": False}
    monkeypatch.setattr(train._Evaluation, "__call__", lambda self: 0.0)
    history = quick(
        teacher, pf.student_of(teacher), max_steps=5000, patience=2, batch_size=8, **plain
    )
    assert history.stopped == "no better score for 2 evaluations"
    assert len(history.steps) == 3


def test_auc_tells_samples_apart():
    first, same, other = torch.randn(3, 1000, 4).unbind()
    assert two_sample_auc(first, same) == pytest.approx(0.5, abs=0.08)
    assert two_sample_auc(first, other + 3) > 0.95


@pytest.mark.parametrize("name", ["lu", "conditional", "spline"])
def test_plain_inverse_is_the_inverse(name):
    teacher = random_teacher(name)
    context = torch.randn(7, 2).double() if teacher.context_shape else None
    z = torch.randn(7, 3).double()
    for pair in matched(teacher, pf.student_of(teacher)):
        wanted = pair.teacher.inverse_and_log_det(z, context)[0]
        torch.testing.assert_close(pair.teacher.plain_inverse(z, context), wanted)


def test_plain_loop_is_for_flows_with_a_slow_direction():
    assert math.isnan(plain_loop_speed(pf.realnvp(2, layers=2, hidden=(8,)), Contexts(None), 10))
    assert plain_loop_speed(pf.maf(2, layers=2, hidden=(8,)), Contexts(None), 10) > 0


def test_the_plain_loop_is_timed_once_for_a_number_of_rows(monkeypatch):
    teacher, timed = random_teacher("lu").float(), []
    clock = comparison.plain_loop_speed

    def counted(flow, contexts, n):
        timed.append(n)
        return clock(flow, contexts, n)

    monkeypatch.setattr(comparison, "plain_loop_speed", counted)
    report = pf.compare(
        teacher, pf.student_of(teacher), **{**BRIEF, "speed_batches": (1, 1000, 2000)}
    )
    assert timed == [1, 1000]
    loop = report.speeds["plain loop"]
    assert list(loop) == [1, 1000, 2000]
    assert loop[1000] == loop[2000]


def test_a_baseline_has_its_whole_schedule(monkeypatch):
    given = []
    monkeypatch.setattr(
        comparison, "fit", lambda *rows, **how: given.append(how) or time.sleep(0.001)
    )
    comparison.fitted_like(pf.iaf(2), gaussian_rows(20), 1.0)
    assert given[1]["patience"] == given[1]["max_epochs"] > 30


def test_scored_does_not_answer_from_memory():
    teacher = random_teacher("conditional")
    context = torch.randn(12, 2).double()
    x = torch.randn(12, 3).double()
    torch.testing.assert_close(scored(teacher, x, context), teacher.log_prob(x, context))


def gaussian_rows(n):
    return torch.randn(n, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])


@pytest.fixture(scope="module")
def full_report():
    torch.manual_seed(0)
    teacher = pf.maf(2, layers=1, hidden=(8,))
    x = gaussian_rows(2000)
    pf.fit(teacher, x, max_epochs=5, lr=1e-2, progress=False)
    student = pf.student_of(teacher)
    history = pf.distill(teacher, student, data=x, max_steps=200, lr=5e-3, progress=False)
    return pf.compare(
        teacher,
        student,
        gaussian_rows(1000),
        classifier_draws=1000,
        data=x,
        baseline=history.seconds,
        history=history,
        progress=False,
    )


def test_a_baseline_is_a_fresh_flow_like_the_student(monkeypatch):
    monkeypatch.setattr(comparison, "fit", lambda *rows, **how: time.sleep(0.001))
    student = pf.student_of(random_teacher("lu"))
    fresh = comparison.fitted_like(student, torch.randn(20, 3), 0.01)
    assert fresh.state_dict().keys() == student.state_dict().keys()
    assert next(fresh.parameters()).dtype == torch.float64
    assert not set(fresh.parameters()) & set(student.parameters())


def test_report_is_complete(full_report):
    report = full_report
    assert report.ess > 0.95
    assert report.khat < 0.7
    assert report.auc == pytest.approx(0.5, abs=0.1)
    assert len(report.layer_kl) == 1
    assert report.layer_kl[0][0] == pytest.approx(report.forward_kl[0], abs=0.01)
    assert set(report.speeds) == {"student", "teacher", "plain loop"}
    assert report.baseline_nats == pytest.approx(report.student_nats, abs=0.5)
    difference = report.student_nats - report.baseline_nats
    assert report.baseline_gap[0] == pytest.approx(difference, abs=1e-4)
    for word in ("reverse KL", "k-hat", "AUC", "plain loop", "student - baseline", "layers' KL"):
        assert word in str(report)
    assert "IAF" not in str(report)  # the student may be any flow


def test_report_says_who_is_better(full_report):
    from dataclasses import replace

    for gap, words in (
        ((0.5, 0.1), "the student is better"),
        ((-0.5, 0.1), "the flow trained on the data is better"),
        ((0.1, 0.1), "no clear difference"),
        (None, "baseline=seconds"),
    ):
        assert words in replace(full_report, baseline_gap=gap).verdict


def test_picture(full_report):
    from dataclasses import replace

    for report, pictures in ((full_report, 6), (replace(full_report, history=None), 5)):
        figure = report.plot()
        assert len(figure.axes) == pictures
        assert all(ax.get_title() for ax in figure.axes)
        mpl.pyplot.close(figure)


def test_the_classifier_has_a_seed():
    teacher = random_teacher("lu").float()
    student = pf.student_of(teacher)

    def auc(seed):
        torch.manual_seed(0)
        return pf.compare(teacher, student, **{**BRIEF, "classifier_draws": 500}, seed=seed).auc

    assert auc(0) == auc(0) != auc(1)
