"""Maps and flows of images: what each does to the numbers, beyond the laws that all flows keep."""

import copy
import math
import operator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import jacobian

import pyroflows as pf
from pyroflows import testing
from pyroflows.flows.images import image_coupling
from pyroflows.nets import ConvNet, ConvResNet, FromContext
from pyroflows.transforms import (
    ActNorm,
    Additive,
    Affine,
    Chain,
    Conv1x1,
    ImageCoupling,
    MaskedConv,
    MultiScale,
    RationalQuadraticSpline,
    Squeeze,
    Standardize,
    all_but_channel,
    checkerboard,
    even_columns,
    even_rows,
    first_half,
    squeeze,
    unsqueeze,
)

SHAPE = (2, 2, 4)
SPLINE = RationalQuadraticSpline(bins=3)


def coupling(mask, family=None, context=0, context_dim=1, net=ConvNet):
    family = family or Affine()
    split = mask.shape[1:] == (1, 1)
    kept = int(mask.sum()) if split else SHAPE[0]
    moved = len(mask) - kept if split else SHAPE[0]
    made = net(kept, moved * family.params, channels=3, context=context, size=SHAPE[1:])
    return ImageCoupling(made, family, mask, context_dim=context_dim)


def two_levels():
    def level(channels):
        return Chain([Conv1x1(channels), ActNorm(channels, dims=3)])

    return MultiScale(level(4), MultiScale(level(8)))


BRICKS = {
    "squeeze": (Squeeze, SHAPE, 0),
    "unsqueeze": (lambda: Squeeze().inv, (4, 1, 2), 0),
    "multiscale": (two_levels, (1, 4, 4), 0),
    "checkerboard": (lambda: coupling(checkerboard(SHAPE)), SHAPE, 0),
    "rows": (lambda: coupling(even_rows(SHAPE), Additive()), SHAPE, 0),
    "odd columns": (lambda: coupling(~even_columns(SHAPE), SPLINE), SHAPE, 0),
    "channels, class": (lambda: coupling(first_half(SHAPE), context=3), SHAPE, 3),
    "last channels, image": (
        lambda: coupling(~first_half(SHAPE), context=(1, 4, 8), context_dim=3),
        SHAPE,
        (1, 4, 8),
    ),
    "one channel of three": (lambda: coupling(all_but_channel((3, 2, 2), 1)), (3, 2, 2), 0),
    "residual net": (lambda: coupling(first_half(SHAPE), context=2, net=ConvResNet), SHAPE, 2),
    "actnorm": (lambda: ActNorm(2, dims=3), SHAPE, 0),
    "standardize": (lambda: Standardize(2, dims=3), SHAPE, 0),
    "conv1x1, lu": (lambda: Conv1x1(3), (3, 1, 2), 0),
    "conv1x1, plain": (lambda: Conv1x1(3, lu=False), (3, 1, 2), 0),
    "masked conv": (lambda: MaskedConv(2, 2), (2, 2, 2), 0),
    "masked conv, descending, concave, class": (
        lambda: MaskedConv(1, 2, context=2, descending=True, concave=True),
        (1, 2, 3),
        2,
    ),
}


@pytest.mark.parametrize("name", list(BRICKS))
def test_brick_keeps_the_contract(name):
    make, shape, context = BRICKS[name]
    testing.check_transform(make(), shape, context)


FLOWS = {
    "glow": lambda: pf.glow((3, 4, 4), 2, levels=2, steps=2, channels=4),
    "glow, plain matrices": lambda: pf.glow((1, 4, 4), levels=1, channels=4, linear="plain"),
    "realnvp": lambda: pf.multiscale_realnvp(
        (3, 4, 4), levels=2, steps=2, channels=4, blocks=1, masks=("channels", "rows", "columns")
    ),
    "mintnet": lambda: pf.mintnet((1, 4, 4), levels=2, steps=1, channels=2),
}


@pytest.mark.parametrize("name", list(FLOWS))
def test_log_det_of_a_whole_flow_is_that_of_the_jacobian(name):
    flow = FLOWS[name]().double().eval()
    testing.randomize(flow, 0.3)
    context = torch.randn(flow.context_shape, dtype=torch.float64) if flow.context_shape else None
    z = torch.randn(flow.event_shape, dtype=torch.float64)
    x, log_det = flow.transform.forward_and_log_det(z, context)
    back, inverse_log_det = flow.transform.inverse_and_log_det(x, context)
    n = z.numel()
    for step, at, found in (
        (flow.transform.forward_and_log_det, z, log_det),
        (flow.transform.inverse_and_log_det, x.detach(), inverse_log_det),
    ):
        matrix = jacobian(lambda v, step=step: step(v, context)[0], at).reshape(n, n)
        torch.testing.assert_close(found, torch.linalg.slogdet(matrix).logabsdet)
    torch.testing.assert_close(back, z, atol=1e-9, rtol=1e-9)


def test_squeeze_moves_blocks_to_channels_and_back():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = squeeze(x)
    assert y[0, :, 0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert torch.equal(unsqueeze(y), x)
    assert squeeze(x).is_contiguous(memory_format=torch.channels_last)
    assert squeeze(x.expand(3, 2, 2, 4, 4)).shape == (3, 2, 8, 2, 2)


def test_masks():
    assert even_rows((1, 3, 2)).int().tolist() == [[[1, 1], [0, 0], [1, 1]]]
    assert even_columns((1, 2, 3)).int().tolist() == [[[1, 0, 1], [1, 0, 1]]]
    assert first_half((5, 1, 1)).flatten().int().tolist() == [1, 1, 0, 0, 0]
    assert all_but_channel((3, 1, 1), 4).flatten().int().tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "mask", [checkerboard(SHAPE), ~even_rows(SHAPE), first_half(SHAPE), ~first_half(SHAPE)]
)
@pytest.mark.parametrize("family", [Affine(), SPLINE], ids=["affine", "spline"])
def test_a_coupling_keeps_what_it_says_and_moves_the_rest(mask, family):
    layer = coupling(mask, family)
    testing.randomize(layer)
    x = torch.randn(5, *SHAPE)
    y = layer(x)
    kept = mask.expand(SHAPE)
    assert torch.equal(y[:, kept], x[:, kept])
    assert (y[:, ~kept] != x[:, ~kept]).all()


def test_channels_in_a_pattern_that_is_no_run_work_too():
    mask = torch.tensor([True, False, True, False])[:, None, None]
    layer = ImageCoupling(ConvNet(4, 8, channels=3), Affine(), mask)
    testing.check_transform(layer, (4, 1, 2))


def test_nets_fit_channels_in_a_pattern_that_is_no_run():
    def net(inputs, outputs, size):
        return ConvNet(inputs, outputs, channels=4, size=size)

    mask = torch.tensor([True, False, True, False])[:, None, None]
    layer = image_coupling((4, 2, 2), mask, Affine(), net, 0)
    assert layer(torch.ones(3, 4, 2, 2)).shape == (3, 4, 2, 2)


def test_multiscale_leaves_alone_what_is_done():
    flow = MultiScale(Chain([Squeeze(), Squeeze().inv]), MultiScale(Conv1x1(8), None))
    x = torch.randn(3, 1, 4, 4)
    h, z = squeeze(x), squeeze(flow.inv(x))
    assert torch.equal(z[:, 2:], h[:, 2:])
    expected = unsqueeze(Conv1x1(8).inv(squeeze(h[:, :2])))
    torch.testing.assert_close(z[:, :2], expected)


@pytest.mark.parametrize("inverse", [True, False])
def test_levels_are_initialised_in_the_order_in_which_data_pass(inverse):
    flow = two_levels()
    x = 7 + 5 * torch.randn(64, 1, 4, 4).cumsum(dim=-1)
    found = flow.initialize(x, inverse=inverse)
    torch.testing.assert_close(found, flow.inv(x) if inverse else flow(x), atol=1e-4, rtol=1e-4)
    assert abs(float(found.mean())) < 1e-3


def test_composed_prior_is_a_gaussian_given_the_half_that_goes_on():
    flow = pf.glow((1, 4, 4), levels=2, steps=1, channels=4)
    level = flow.transform[0].level
    prior = level[0]
    assert isinstance(prior, ImageCoupling)
    testing.randomize(prior)
    with torch.no_grad():
        for part in (*level[1:], flow.transform[0].inner.level):  # all others do nothing
            for parameter in part.parameters():
                parameter.zero_()
    x = torch.randn(3, 1, 4, 4)
    h = squeeze(x)
    mixing = level[2]  # a permutation now, with a sign
    h = mixing.inverse_and_log_det(h)[0]
    kept, done = h.chunk(2, dim=1)
    raw, loc = prior.net(kept, None).chunk(2, dim=1)
    scale = (math.log(5.0) * raw.tanh()).exp()
    inner = flow.transform[0].inner(torch.zeros(2, 2, 2))
    assert (inner == 0).all()  # linear and orthogonal: the kept half is standard normal
    expected = dist.Normal(loc, scale).to_event(3).log_prob(done)
    expected = expected + dist.Normal(0.0, 1.0).expand(kept.shape[1:]).to_event(3).log_prob(kept)
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_conv1x1_is_one_matrix_and_its_log_det_counts_the_pixels():
    for lu in (True, False):
        layer = Conv1x1(4, lu=lu, seed=3)
        testing.randomize(layer)
        x = torch.randn(2, 4, 3, 5)
        y, log_det = layer.forward_and_log_det(x)
        matrix = layer.matrix()[0]
        torch.testing.assert_close(y, torch.einsum("ij,njhw->nihw", matrix, x))
        torch.testing.assert_close(log_det, 15 * torch.linalg.slogdet(matrix)[1].expand(2))
        torch.testing.assert_close(layer.matrix(inverse=True)[0], torch.linalg.inv(matrix))


def test_conv1x1_starts_as_a_rotation_from_its_own_seed():
    state = torch.get_rng_state()
    one, other, third = Conv1x1(5).matrix()[0], Conv1x1(5).matrix()[0], Conv1x1(5, seed=1).matrix()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, other)
    assert not torch.equal(one, third[0])
    torch.testing.assert_close(one @ one.mT, torch.eye(5))


def fused_step(layer):
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        layer(torch.randn(2, 3, 2, 2)).square().sum().backward()
    optimiser.step()


CHANGES = {
    "in place": lambda layer: next(layer.parameters()).add_(1.0),
    "behind autograd's back": lambda layer: (
        next(layer.parameters()).data[1, 0].fill_(2.0),
        layer.eval(),  # without which it would go unseen, as it does in autograd
    ),
    "a fused step": fused_step,
    "replaced": lambda layer: setattr(
        layer, "lower" if layer.lu else "weight", torch.nn.Parameter(torch.ones(3, 3).tril() + 1)
    ),
    "loaded": lambda layer: layer.load_state_dict(Conv1x1(3, lu=layer.lu, seed=5).state_dict()),
    "a sign": lambda layer: layer.signs.neg_() if layer.lu else layer.weight.neg_(),
    "rounded": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_conv1x1_keeps_its_matrix_no_longer_than_it_is_right(change, lu):
    layer = Conv1x1(3, lu=lu).eval()
    x = torch.randn(2, 3, 2, 2)

    def kept():
        return [layer._without_graph(inverse)[0] for inverse in (False, True)]

    with torch.no_grad():
        first, _ = layer.forward_and_log_det(x)
        before = kept()
        assert torch.equal(layer(x), first)
        assert all(map(operator.is_, kept(), before))
        CHANGES[change](layer)
        assert not any(map(operator.is_, kept(), before))
        found = layer.forward_and_log_det(x), layer.inverse_and_log_det(x)
        assert not torch.equal(found[0][0], first)
    for (y, log_det), apply in zip(
        found, (layer.forward_and_log_det, layer.inverse_and_log_det), strict=True
    ):
        expected = apply(x)  # with a graph: from the parameters as they are
        assert expected[0].requires_grad
        torch.testing.assert_close((y, log_det), tuple(t.detach() for t in expected))


@torch.no_grad()
def test_conv1x1_keeps_nothing_in_training():
    layer, x = Conv1x1(3).eval(), torch.randn(2, 3, 2, 2)
    layer(x)
    layer.train()
    layer.lower.data[1, 0] += 1.0
    torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=0, atol=0)


def test_conv1x1_hands_out_nothing_that_it_keeps():
    layer = Conv1x1(3, lu=False)
    x = torch.randn(1, 3, 1, 1)
    with torch.no_grad():
        first = [t.clone() for t in layer.forward_and_log_det(x)]
        for t in (*layer.forward_and_log_det(x), *layer.matrix(inverse=True)):
            t.add_(1.0)
        torch.testing.assert_close(layer.forward_and_log_det(x), tuple(first))
    with torch.inference_mode():
        layer.forward_and_log_det(x)
    x.requires_grad_()
    layer.requires_grad_(False)(x).sum().backward()  # what inference made would refuse
    assert x.grad is not None


@pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])
@pytest.mark.parametrize("inverse", [False, True])
def test_conv1x1_has_two_right_derivatives(inverse, lu):
    layer = Conv1x1(3, lu=lu).double()
    testing.randomize(layer, 0.5)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 3, 1, 2, dtype=torch.float64, requires_grad=True)

    def apply(x, *values):
        way = layer.inv if inverse else layer
        for name, value in zip(names, values, strict=True):
            layer._parameters[name] = value
        return way.forward_and_log_det(x)

    assert torch.autograd.gradcheck(apply, (x, *parameters))
    assert torch.autograd.gradgradcheck(apply, (x, *parameters))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("concave", [False, True])
def test_masked_conv_is_triangular_in_reading_order(descending, concave):
    layer = MaskedConv(2, 3, descending=descending, concave=concave).double()
    testing.randomize(layer, 2.0)
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    matrix = jacobian(lambda v: layer.forward_and_log_det(v)[0], x)
    # Pixel by pixel, channel by channel.
    matrix = matrix.permute(1, 2, 0, 4, 5, 3).reshape(18, 18)
    matrix = matrix.mT if descending else matrix
    assert (matrix.triu(1) == 0).all()
    assert (matrix.diagonal() > 0).all()
    assert (matrix.tril(-1) != 0).any()


def test_masked_conv_inverts_to_its_tolerance_or_says_how_far_off_it_is():
    layer = MaskedConv(2, 3, tolerance=1e-12).double()
    testing.randomize(layer, 3.0)
    y = 5 * torch.randn(6, 2, 4, 4, dtype=torch.float64)
    x = layer.inv(y)
    assert (layer(x) - y).abs().max() < 1e-9
    layer.iterations = 2
    with pytest.warns(UserWarning, match="inverse of 6 of 6 rows is off by .* after 2 passes"):
        layer.inv(y)


def test_rows_that_have_converged_are_left_alone():
    layer = MaskedConv(1, 2).double()
    testing.randomize(layer, 2.0)
    y = (
        torch.randn(5, 1, 3, 3, dtype=torch.float64)
        * torch.tensor([0, 1, 3, 10, 30])[:, None, None, None]
    )
    with torch.no_grad():
        together = layer.inv(y)
        alone = torch.stack([layer.inv(row) for row in y])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)


def test_actnorm_and_standardize_go_by_channel():
    x = torch.randn(50, 3, 4, 6) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 7
    for layer in (ActNorm(3, dims=3), Standardize(3, dims=3)):
        z = layer.initialize(x)
        torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
        assert layer.inverse_and_log_det(x)[1].shape == (50,)


def test_a_glow_starts_white_and_is_not_started_again_after_load():
    x = 3 + 2 * torch.randn(64, 1, 4, 4).cumsum(dim=-1)
    flow = pf.glow((1, 4, 4), levels=2, steps=2, channels=4)
    pf.initialize(flow, x)
    z = flow.transform.inv(x)
    assert abs(float(z.detach().mean())) < 0.2
    assert 0.8 < float(z.detach().std()) < 1.2
    loaded = pf.glow((1, 4, 4), levels=2, steps=2, channels=4)
    loaded.load_state_dict(flow.state_dict())
    norms = [m for m in loaded.modules() if isinstance(m, ActNorm)]
    assert len(norms) == 4
    assert all(m.initialized for m in norms)
    pf.initialize(loaded, torch.randn(64, 1, 4, 4) - 5)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, flow.get_parameter(name)), name


@pytest.mark.parametrize("context", [3, (2, 8, 8)], ids=["class", "image"])
@pytest.mark.parametrize("build", [pf.glow, pf.multiscale_realnvp, pf.mintnet])
def test_context_enters_at_every_level(build, context):
    shape = (1, 4, 4)
    flow = build(shape, context, levels=2, steps=1, channels=8)
    testing.randomize(flow)
    readers = [m for m in flow.modules() if isinstance(m, FromContext)]
    users = [m for m in flow.modules() if isinstance(m, (ImageCoupling, MaskedConv))]
    assert len(readers) == len(users) >= 3
    c = torch.randn(6, *flow.context_shape)
    x = torch.randn(6, *shape)
    flow.log_prob(x, c).sum().backward()
    for reader in readers:
        assert all((p.grad != 0).any() for p in reader.parameters())
    assert not torch.allclose(flow.log_prob(x, c), flow.log_prob(x, c.flip(0)))


def test_batches_and_plates_of_any_rank():
    flow = pf.glow((1, 4, 4), 3, levels=2, steps=1, channels=2)
    testing.randomize(flow)
    classes = torch.eye(3)
    assert flow.sample((2, 5), classes).shape == (2, 5, 3, 1, 4, 4)
    assert flow.sample((), classes[0]).shape == (1, 4, 4)
    x = flow.sample((2, 5), classes)
    together = flow.log_prob(x, classes)
    alone = torch.stack([flow.log_prob(x[:, :, i], classes[i]) for i in range(3)], dim=-1)
    torch.testing.assert_close(together, alone)

    def model():
        with pyro.plate("a", 3), pyro.plate("b", 2):
            return pyro.sample("x", flow(classes).expand((2, 3)))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (2, 3, 1, 4, 4)
    assert trace.nodes["x"]["log_prob"].shape == (2, 3)


def test_draws_are_laid_out_as_usual():
    flow = pf.multiscale_realnvp((3, 4, 4), levels=1, steps=1, channels=2)
    assert flow.sample((2,)).is_contiguous()


def test_additive_couplings_preserve_volume():
    layer = coupling(checkerboard(SHAPE), Additive())
    assert layer.volume_preserving
    flow = pf.glow((1, 4, 4), levels=1, steps=1, channels=2, family="additive")
    couplings = [m for m in flow.modules() if isinstance(m, ImageCoupling)]
    assert couplings
    assert all(m.volume_preserving for m in couplings)


def test_nice_takes_a_logistic_prior():
    base = dist.Logistic(torch.zeros(16), torch.ones(16)).to_event(1)
    flow = pf.nice(16, layers=2, hidden=(8,), base=base)
    pixels = torch.randn(5, 1, 4, 4)
    x = pixels.flatten(1)
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(x))
    testing.randomize(flow)
    before = score(flow, x)
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(20):
        optimiser.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimiser.step()
    assert score(flow, x) > before
    assert flow.sample((3,)).shape == (3, 16)


@torch.no_grad()
def score(flow, x):
    return float(flow.log_prob(x).mean())


def test_fit_takes_images():
    torch.manual_seed(0)
    x = torch.randn(200, 1, 4, 4).cumsum(dim=-1)
    flow = pf.glow((1, 4, 4), levels=1, steps=2, channels=8)
    pf.initialize(flow, x)
    before = score(flow, x)
    pf.fit(flow, x, max_epochs=5, lr=1e-2, progress=False)
    assert score(flow, x) > before + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.glow((1, 7, 8), levels=1), "divisible by 2, got 7 x 8, which takes 0"),
        (lambda: pf.glow((1, 28, 28), levels=3), "divisible by 8, got 28 x 28, which takes 2"),
        (lambda: pf.multiscale_realnvp((3, 12, 8), levels=3), "12 x 8, which takes 2 at most"),
        (lambda: pf.mintnet((1, 2, 2), levels=2), "divisible by 4, got 2 x 2, which takes 1"),
        (lambda: pf.glow((1, 4)), r"shape: expected \(channels, height, width\), got \(1, 4\)"),
        (lambda: pf.glow((0, 4, 4)), "shape: channels: expected an integer >= 1, got 0"),
        (lambda: pf.glow((1, 4, 4), levels=0), "levels: expected an integer >= 1, got 0"),
        (lambda: pf.glow((1, 4, 4), levels=1, steps=0), "steps: expected an integer >= 1, got 0"),
        (lambda: pf.glow((1, 4, 4), levels=1, family="cubic"), "family: expected one of"),
        (lambda: pf.glow((1, 4, 4), levels=1, linear="qr"), "linear: expected one of"),
        (lambda: pf.multiscale_realnvp((3, 4, 4), masks=()), "masks: expected a tuple of names"),
        (lambda: pf.multiscale_realnvp((3, 4, 4), masks=("x",)), "masks: expected one of"),
        (
            lambda: pf.multiscale_realnvp((1, 4, 4), masks=("channels",)),
            "needs at least 2 channels, got shape with 1",
        ),
        (lambda: pf.glow((1, 4, 4), (1, 7, 7), levels=1), "multiple of 2 x 2, got 7 x 7"),
        (
            lambda: pf.glow((1, 4, 4), (4, 4), levels=1),
            r"\(channels, height, width\), got \(4, 4\)",
        ),
        (lambda: squeeze(torch.zeros(1, 1, 3, 4)), "even height and width to squeeze, got 3 x 4"),
        (lambda: unsqueeze(torch.zeros(1, 6, 2, 2)), "divisible by 4, got 6"),
        (lambda: coupling(torch.ones(1, 2, 4, dtype=torch.bool)), "with 8 kept"),
        (lambda: MaskedConv(1, tolerance=0.0), "tolerance: expected a positive number, got 0.0"),
    ],
)
def test_bad_input_gets_an_error_with_the_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
