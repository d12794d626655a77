"""A student mirrors its teacher layer by layer, whatever the family and whoever built it."""

from dataclasses import dataclass

import pytest
import torch

import pyroflows as pf
from pyroflows.distillation.pairs import matched
from pyroflows.flows import LinearRationalSpline, builder
from pyroflows.nets import MADE, CausalConv
from pyroflows.transforms import Autoregressive, Chain, LULinear, RationalQuadraticSpline
from pyroflows.transforms.autoregressive import autoregressive_in
from pyroflows.transforms.families import families


@dataclass(frozen=True)
class Softer(RationalQuadraticSpline):
    """A subclass of a spline, with more parameters than it."""

    per_bin = 1


def randomized(flow, gain=0.3):
    pf.testing.randomize(flow, gain)
    return flow


def hand_built():
    """Two MAF layers as an inverse of a chain, a MADE and a causal net, made by no builder."""
    layers = [
        Autoregressive(MADE(3, 2, hidden=(8,), context=2), pf.transforms.Affine()),
        LULinear(3),
        Autoregressive(CausalConv(3, 1, channels=4, context=2), pf.transforms.Additive()),
    ]
    return pf.Flow(Chain(layers).inv, shape=3, context=2)


@builder
def three_layers(features: int, context: int = 0, *, hidden: tuple[int, ...] = (8,)) -> pf.Flow:
    """A builder that pyroflows does not know."""
    family = LinearRationalSpline(bins=4)
    made = [MADE(features, family.params, hidden=hidden, context=context) for _ in range(3)]
    return pf.Flow(Chain(Autoregressive(net, family).inv for net in made), shape=features)


def maf_of(family):
    return lambda: pf.maf(3, layers=2, hidden=(8,), family=family)


TEACHERS = {
    **{name: maf_of(name) for name in families()},
    "subclass": maf_of(Softer(bins=4)),
    "permuted": lambda: pf.maf(3, layers=2, hidden=(8,), linear="permute"),
    "hand built": hand_built,
    "own builder": lambda: three_layers(3),
    "deep nets": lambda: pf.nsf(3, scheme="autoregressive", layers=2, hidden=(8, 8, 6)),
    "wavenet": lambda: pf.wavenet(3, layers=2, channels=4),
}


@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_every_layer_is_matched(make):
    teacher = randomized(make().double())
    student = pf.student_of(teacher)
    slow = [p for p in teacher.parts if autoregressive_in(p) is not None]
    pairs = matched(teacher, student)
    assert len(pairs) == len(slow) >= 2
    assert (student.fast, student.dtype) == ("sample", torch.float64)
    assert all(pair.student.family == pair.teacher.family for pair in pairs)
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("name", ["linear_rational_spline", "spline", "subclass", "own builder"])
def test_a_student_starts_closer_than_one_that_inherits_nothing(name):
    teacher = randomized(TEACHERS[name](), gain=0.1)
    student, blank = pf.student_of(teacher), teacher.mirror()
    z = torch.randn(500, 3)
    exact = teacher.transform(z)
    error = (student.transform(z) - exact).square().mean()
    assert error < (blank.transform(z) - exact).square().mean() / 2


@pytest.mark.parametrize("name", ["linear_rational_spline", "own builder", "wavenet", "permuted"])
def test_a_student_is_saved_and_rebuilt(name, tmp_path):
    teacher = randomized(TEACHERS[name]())
    student = randomized(pf.student_of(teacher))
    x = teacher.sample((5,))
    pf.save(student, tmp_path)
    again = pf.load(tmp_path, builder=three_layers if name == "own builder" else None)
    assert torch.equal(again.log_prob(x), student.eval().log_prob(x))
    assert again.config["mirrored"] == 1.5
    assert len(matched(teacher, pf.student_of(again))) == len(matched(teacher, student))


def test_changes_are_arguments_of_the_teachers_builder():
    teacher = randomized(three_layers(3))
    student = pf.student_of(teacher, hidden=(12, 12))
    assert [p.net.hidden for p in student.parts] == [(12, 12)] * 3
    assert len(matched(teacher, student)) == 3
    maf = randomized(pf.maf(3, layers=2, hidden=(8,), linear="lu"))
    deeper = pf.student_of(maf, layers=4)
    assert len(deeper.parts) == 9
    assert torch.equal(deeper.parts[-2].transform.lower, maf.parts[-2].transform.lower)
    with pytest.raises(ValueError, match="hidden: expected no changes, as the teacher was made by"):
        pf.student_of(hand_built(), hidden=(8,))


def test_a_student_of_a_student_is_as_wide():
    student = pf.student_of(pf.maf(3, layers=1, hidden=(8,)))
    again = pf.student_of(student)
    assert again.parts[0].net.hidden == student.parts[0].net.hidden == (12,)
    assert again.config == student.config
    assert pf.student_of(student, hidden=(16,)).parts[0].net.hidden == (16,)


def test_a_mirror_of_what_is_fast_both_ways_is_a_copy():
    flow = randomized(pf.realnvp(3, layers=2, hidden=(8,)))
    x = torch.randn(5, 3)
    assert torch.equal(flow.mirror().log_prob(x), flow.log_prob(x))
    standard = pf.student_of(flow)
    assert matched(flow, standard) == []
    assert torch.equal(standard.parts[-1].loc, flow.parts[-1].loc)


def test_other_maps_between_the_layers_do_not_match():
    teacher = randomized(pf.maf(3, layers=2, hidden=(8,)))
    student = pf.student_of(teacher)
    assert len(matched(teacher, student)) == 2
    with torch.no_grad():
        student.parts[1].transform.bias.add_(0.1)
    assert matched(teacher, student) == []


def test_the_same_map_from_the_other_side_does_match():
    """Students of a permuted teacher once had its permutations turned around."""
    teacher = pf.maf(4, layers=2, hidden=(8,), linear="permute")
    student = pf.iaf(4, layers=2, hidden=(8,), linear="permute")
    order = teacher.parts[1].transform
    student.parts[1].load_state_dict({"permutation": order.back, "back": order.permutation})
    assert len(matched(teacher, student)) == 2
