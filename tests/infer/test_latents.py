"""Codes of flows: there and back, ways between them, temperature, from one flow to another."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import latents


def vector_flow(context=0, **options):
    flow = pf.realnvp(3, context, layers=2, hidden=(8,), linear="permute", **options).double()
    pf.testing.randomize(flow, 1.0, 0)
    return flow


class Squares(pf.FlowTransform):
    """An elementwise map of images, moved by the mean of its context."""

    domain = codomain = constraints.independent(constraints.real, 3)

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.5))

    def _at(self, value, context):
        shift = (
            self.shift if context is None else self.shift + context.mean(-1)[..., None, None, None]
        )
        return shift, value.new_zeros(torch.broadcast_shapes(value.shape[:-3], shift.shape[:-3]))

    def forward_and_log_det(self, x, context=None):
        shift, log_det = self._at(x, context)
        return 2 * x + shift, log_det + math.prod(x.shape[-3:]) * math.log(2)

    def inverse_and_log_det(self, y, context=None):
        shift, log_det = self._at(y, context)
        return (y - shift) / 2, log_det - math.prod(y.shape[-3:]) * math.log(2)


def image_flow(context=0):
    return pf.Flow(Squares(), shape=(2, 4, 4), context=context).double()


FLOWS = {
    "vectors": (vector_flow, None),
    "vectors_given_something": (lambda: vector_flow(context=2), 2),
    "positive_vectors": (lambda: vector_flow(support=constraints.positive), None),
    "images": (image_flow, None),
    "images_given_something": (lambda: image_flow(context=2), 2),
}


@pytest.mark.parametrize("name", FLOWS)
def test_codes_keep_all_of_the_data(name):
    make, width = FLOWS[name]
    flow = make()
    context = None if width is None else torch.randn(5, width, dtype=torch.float64)
    shape = (4,) if width is None else ()
    x = flow.sample((*shape, 2) if width is None else (2,), context)
    z = latents.encode(flow, x, context)
    assert z.shape == x.shape
    torch.testing.assert_close(latents.decode(flow, z, context), x)
    standard = (
        torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(-len(flow.event_shape)).sum(-1)
    )
    log_det = flow(context).transforms[0].inverse_and_log_det(x)[1]
    torch.testing.assert_close(standard + log_det, flow.log_prob(x, context))


def test_integers_come_back_as_they_were_and_the_generator_stays_where_it_was():
    q = pf.quantized(vector_flow(), 16, logit=0.05)
    x = torch.tensor([[0, 3, 15], [15, 15, 0]])
    before = torch.get_rng_state()
    z = latents.encode(q, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(latents.encode(q, x), z)
    back = latents.decode(q, z)
    assert torch.equal(back, x)
    assert back.dtype == torch.int64
    assert latents.sample(q, 5, temperature=0.5).dtype == torch.int64


def test_gradients_pass_to_codes_and_data():
    flow = vector_flow()
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    latents.decode(flow, z).sum().backward()
    assert (z.grad != 0).all()


# Ways between codes


@pytest.mark.parametrize("kind", ["linear", "spherical"])
@pytest.mark.parametrize("shape", [(7,), (2, 4, 4)])
def test_interpolation_starts_and_ends_at_its_ends(kind, shape):
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    way = latents.interpolate(a, b, 5, kind)
    assert way.shape == (5, *shape)
    torch.testing.assert_close(way[0], a)
    torch.testing.assert_close(way[-1], b)
    torch.testing.assert_close(latents.interpolate(b, a, 5, kind), way.flip(0))


def test_the_straight_way_is_straight_and_the_circle_keeps_the_length():
    a, b = torch.randn(2, 1000, dtype=torch.float64)
    b = b * a.norm() / b.norm()
    line, circle = (latents.interpolate(a, b, 9, kind) for kind in ("linear", "spherical"))
    torch.testing.assert_close(line.diff(dim=0), line.diff(dim=0)[:1].expand(8, -1))
    torch.testing.assert_close(circle.norm(dim=-1), a.norm().expand(9))
    steps = circle.diff(dim=0).norm(dim=-1)  # equal ones
    torch.testing.assert_close(steps, steps[:1].expand(8))
    assert line[4].norm() < 0.75 * a.norm()
    torch.testing.assert_close(circle[4] / circle[4].norm(), line[4] / line[4].norm())


def test_a_batch_of_pairs_is_each_pair_by_itself():
    a, b = torch.randn(2, 6, 2, 4, dtype=torch.float64)
    way = latents.interpolate(a, b, 4, "spherical", event_dim=2)
    for i in range(6):
        torch.testing.assert_close(way[:, i], latents.interpolate(a[i], b[i], 4, "spherical"))
    assert not torch.allclose(way, latents.interpolate(a, b, 4, "spherical"))


@pytest.mark.parametrize("scale", [1.0, 2.0, -1.0])
def test_on_one_line_through_the_origin_the_circle_is_the_line(scale):
    a = torch.randn(5, requires_grad=True)
    way = latents.interpolate(a, scale * a, 3, "spherical")
    torch.testing.assert_close(way, latents.interpolate(a, scale * a, 3))
    way.sum().backward()
    assert torch.isfinite(a.grad).all()


def test_a_code_of_zeros_has_ways_to_it_too():
    way = latents.interpolate(torch.randn(5), torch.zeros(5), 3, "spherical")
    assert torch.isfinite(way).all()
    assert (way[-1] == 0).all()


def test_mix_has_its_four_codes_in_the_corners_and_draws_in_between():
    z = torch.randn(4, 20_000, dtype=torch.float64)
    angles = torch.linspace(0, math.pi / 2, 4, dtype=torch.float64)
    sheet = latents.mix(*z, angles[:, None], angles)
    assert sheet.shape == (4, 4, 20_000)
    for row, column, corner in ((0, 0, 0), (0, -1, 1), (-1, 0, 2), (-1, -1, 3)):
        torch.testing.assert_close(sheet[row, column], z[corner])
    spread = sheet.std(dim=-1)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=0.03, rtol=0)
    by_hand = math.cos(0.3) * (z[0] * math.cos(0.7) + z[1] * math.sin(0.7)) + math.sin(0.3) * (
        z[2] * math.cos(0.7) + z[3] * math.sin(0.7)
    )
    torch.testing.assert_close(latents.mix(*z, 0.3, 0.7), by_hand)
    images = torch.randn(4, 2, 4, 4)
    assert latents.mix(*images, 0.1, torch.linspace(0, 1, 3)).shape == (3, 2, 4, 4)


def test_an_attribute_is_what_the_means_differ_by():
    """On a flow whose map is affine, adding it moves the data by the difference of their means."""
    flow = image_flow()
    x = torch.randn(50, 2, 4, 4, dtype=torch.float64)
    change = torch.rand(2, 4, 4, dtype=torch.float64)
    direction = latents.attribute(latents.encode(flow, x + change), latents.encode(flow, x))
    assert direction.shape == (2, 4, 4)
    more = latents.decode(flow, latents.encode(flow, x[0]) + 2 * direction)
    torch.testing.assert_close(more, x[0] + 2 * change)


# Temperature


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.5])
def test_temperature_scales_the_distance_from_the_mean(temperature):
    flow = image_flow()
    x = latents.sample(flow, (500,), temperature)
    assert x.shape == (500, 2, 4, 4)
    assert not x.requires_grad
    assert x.mean().item() == pytest.approx(0.5, abs=0.1)
    assert x.std().item() == pytest.approx(2 * temperature, abs=0.05)


def test_temperature_one_gives_the_draws_of_the_flow():
    flow, context = vector_flow(context=2), torch.randn(4, 2, dtype=torch.float64)
    torch.manual_seed(3)
    wanted = flow.sample((6,), context)
    torch.manual_seed(3)
    assert torch.equal(latents.sample(flow, 6, context=context), wanted)


def test_temperature_works_around_the_mean_of_another_base():
    base = dist.Logistic(torch.full((3,), 5.0), torch.ones(3)).to_event(1)
    flow = pf.Flow(pf.transforms.Permute(torch.arange(3)), base, shape=3)
    torch.testing.assert_close(latents.sample(flow, 4, 0.0), torch.full((4, 3), 5.0))


def test_a_base_without_a_mean_is_named():
    base = dist.Stable(torch.full((2,), 1.5), torch.zeros(2)).to_event(1)

    class Heavy(nn.Module):
        def forward(self):
            return base

    flow = pf.Flow(pf.transforms.LULinear(2), Heavy(), shape=2)
    assert latents.sample(flow, 3).shape == (3, 2)
    base.base_dist.__class__ = type("Nameless", (dist.Stable,), {"mean": property(_refuse)})
    with pytest.raises(ValueError, match="temperature: expected 1, as the base Independent"):
        latents.sample(flow, 3, 0.5)


def _refuse(self):
    raise NotImplementedError


# From one flow to another


def test_translation_goes_through_the_shared_base_and_back():
    a, b = vector_flow(), vector_flow()
    pf.testing.randomize(b, 1.0, 1)
    x = a.sample((20,))
    there = latents.translate(a, b, x)
    torch.testing.assert_close(latents.encode(b, there), latents.encode(a, x))
    torch.testing.assert_close(latents.translate(b, a, there), x)
    assert not torch.allclose(there, x)


def test_translation_with_one_flow_and_two_contexts():
    flow = image_flow(context=2)
    first, second = torch.zeros(2).double(), torch.ones(2).double()
    x = flow.sample((4,), first)
    torch.testing.assert_close(latents.translate(flow, flow, x, first, second), x + 1)


def test_translation_moves_one_set_of_pictures_onto_another():
    """Two trained flows: the draws of one become draws of the other."""
    torch.manual_seed(0)
    sets = torch.randint(0, 3, (300, 2)), torch.randint(5, 8, (300, 2))
    flows = [pf.quantized(pf.realnvp(2, layers=2, hidden=(8,)), 8) for _ in sets]
    for flow, x in zip(flows, sets, strict=True):
        pf.fit(flow, x, max_epochs=15, lr=0.01, progress=False)
    moved = latents.translate(*flows, sets[0])
    assert ((moved >= 4) & (moved <= 7)).double().mean() > 0.95
    assert (moved.double().mean(0) - 6).abs().max() < 0.3


def logistic_flow():
    base = dist.Logistic(torch.zeros(3), torch.ones(3)).to_event(1)
    return vector_flow(base=base)


def based_on(*arguments, kind=dist.Normal):
    base = kind(*(torch.full((3,), value) for value in arguments)).to_event(1)
    return pf.Flow(pf.transforms.Permute(torch.arange(3)), base, shape=3)


def test_translation_goes_between_precisions_and_equal_bases():
    x = torch.randn(4, 3)
    torch.testing.assert_close(latents.translate(based_on(5.0, 3.0), based_on(5.0, 3.0), x), x)
    assert latents.translate(based_on(5.0, 3.0), based_on(5.0, 3.0).double(), x).shape == (4, 3)


BAD = {
    "other_base": (
        lambda: latents.translate(based_on(0.0, 1.0), based_on(0.0, 3.0), torch.zeros(3)),
        "flow_a, flow_b: expected flows from one base, got Normal with another 'scale'",
    ),
    "no_mean": (
        lambda: latents.sample(based_on(0.0, 1.0, kind=dist.Cauchy), 4, 0.7),
        "temperature: expected 1, as the base Independent has no finite mean, got 0.7",
    ),
    "x": (
        lambda: latents.encode(vector_flow(), torch.zeros(2)),
        r"x: .*\(\*batch, 3\), got \(2,\)",
    ),
    "levels": (
        lambda: latents.encode(pf.quantized(vector_flow(), 8), torch.tensor([0.5, 1.0, 300.0])),
        "x: expected integers from 0 to 7, got .* not all of them whole, from 0.5 to 300",
    ),
    "z": (
        lambda: latents.decode(image_flow(), torch.zeros(4, 4)),
        r"z: .*\(\*batch, 2, 4, 4\), got",
    ),
    "no_context": (lambda: latents.encode(vector_flow(2), torch.zeros(3)), "context: .*got None"),
    "bases": (
        lambda: latents.translate(vector_flow(), logistic_flow(), torch.zeros(3)),
        "from Normal and .* from Logistic",
    ),
    "shapes": (
        lambda: latents.translate(vector_flow(), image_flow(), torch.zeros(3)),
        r"flow_a, flow_b: .*\(3,\) from Normal and \(2, 4, 4\)",
    ),
    "ends": (lambda: latents.interpolate(torch.zeros(2), torch.zeros(3)), r"a, b: .*\(2,\)"),
    "kind": (lambda: latents.interpolate(torch.zeros(2), torch.ones(2), 3, "arc"), "kind: .*'arc'"),
    "steps": (lambda: latents.interpolate(torch.zeros(2), torch.ones(2), 1), "steps: .*got 1"),
    "event_dim": (
        lambda: latents.interpolate(torch.zeros(2), torch.ones(2), event_dim=2),
        "event_dim: expected 1 to 1",
    ),
    "mix": (
        lambda: latents.mix(*torch.zeros(3, 2), torch.zeros(3), 0.1, 0.1),
        r"z1, z2, z3, z4: .*\(2,\), \(3,\)",
    ),
    "no_rows": (lambda: latents.attribute(torch.zeros(0, 2), torch.zeros(1, 2)), "z_with: .*row"),
    "rows": (lambda: latents.attribute(torch.zeros(1, 2), torch.zeros(1, 3)), "rows of one shape"),
    "cold": (lambda: latents.sample(vector_flow(), 2, -0.1), "temperature: .*got -0.1"),
    "nan": (lambda: latents.sample(vector_flow(), 2, math.nan), "temperature: .*got nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
