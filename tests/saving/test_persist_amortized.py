"""A saved amortised guide is the same guide: draws, densities, training on; and its encoder."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import pyroflows as pf
from pyroflows._files import model_folder as stored
from pyroflows.flows import builder
from pyroflows.testing import randomize

SIZE = 100
SMALL = {"layers": 2, "hidden": (8,)}
X = torch.linspace(-2, 2, 12)[:, None]


def local(x):
    with pyro.plate("data", SIZE, subsample=x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])


def of_length(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def with_globals(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("data", SIZE, subsample=x):
        z = pyro.sample("z", dist.Normal(loc[..., None], scale).to_event(1))
        u = pyro.sample("u", dist.Uniform(-torch.ones(len(x)), 2.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.sum(-1) + u + w[..., 0], 0.5), obs=x[:, 0])


def drawing_its_part(x):
    with pyro.plate("data", len(x), subsample_size=5) as indices:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[indices, 0])


def net():
    """An encoder with buffers and two modes, made anew at every call."""
    return nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def guide_of(model, build=pf.iaf, x=X, encoder=None):
    small = SMALL if build else {}
    guide = pf.AutoAmortizedFlow(model, encoder or net().to(x), build, **small).setup(x)
    randomize(guide.flow, 0.3, 0)
    if guide.global_values:
        randomize(guide.global_guide.flow, 0.3, 1)
    return guide.eval()


def draw(guide, x=X):
    torch.manual_seed(3)
    return guide.sample_posterior(4, x)


def traced(guide, x=X, seed=3):
    """Every site's value and unscaled log-density in one run of the guide, and its scale."""
    torch.manual_seed(seed)
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(x)
        trace.compute_log_prob()
    return {
        name.replace(guide.pyro_name, "guide"): (
            site["value"],
            site["unscaled_log_prob"],
            site["scale"],
        )
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name != "data"
    }


def same_runs(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name][0], other[name][0]), name
        assert torch.equal(one[name][1], other[name][1]), name
        assert one[name][2] == other[name][2], name


def same_guides(guide, loaded, x=X):
    kept, state = guide.state_dict(), loaded.state_dict()
    assert list(kept) == list(state)
    for name, value in kept.items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype == value.dtype, name
    one, other = draw(guide, x), draw(loaded, x)
    assert list(one) == list(other)
    assert all(torch.equal(one[k], other[k]) for k in one)
    same_runs(traced(guide, x), traced(loaded, x))


@pytest.mark.parametrize("build", [pf.iaf, None], ids=["iaf", "gaussian"])
@pytest.mark.parametrize("model", [local, of_length, with_globals])
def test_draws_and_densities_are_bit_for_bit_the_same(model, build, tmp_path):
    guide = guide_of(model, build)
    before = torch.get_rng_state()
    pf.save(guide, tmp_path)
    pyro.clear_param_store()
    fresh = net()
    state = torch.get_rng_state()
    alone = pf.load(tmp_path, encoder=fresh)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(before, state)  # the encoder is built by the caller, not by load
    assert not alone.training
    assert alone.encoder.module is fresh
    same_guides(guide, alone)
    same_runs(traced(guide, X[:5]), traced(alone, X[:5]))  # a batch is scaled as the model's
    same_guides(guide, pf.load(tmp_path, encoder=net(), model=model))
    again = pf.load(pf.save(alone, tmp_path / "again"), encoder=net(), model=model)
    same_guides(guide, again)
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [stored.CONFIG, stored.TENSORS]


def test_the_dtype_is_the_saved_ones(tmp_path):
    guide = guide_of(local, x=X.double())
    pf.save(guide, tmp_path)
    pyro.clear_param_store()
    same_guides(guide, pf.load(tmp_path, encoder=net()), X.double())


def test_without_its_model_it_serves_where_guides_are_asked_for(tmp_path):
    guide = guide_of(with_globals)
    alone = pf.load(pf.save(guide, tmp_path), encoder=net())
    assert alone.median(X[:5])["z"].shape == (5, 2)
    assert alone.quantiles([0.1, 0.9], X[:5])["loc"].shape == (2,)
    for vectorized in (False, True):
        loss = Trace_ELBO(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
        values = []
        for each in (guide, alone):
            torch.manual_seed(5)
            with torch.no_grad():
                values.append(loss.loss(with_globals, each, X[:5]))
        assert values[0] == values[1]
    with pytest.raises(ValueError, match="at most 100 rows, .* of the plate 'data'.* got 101"):
        alone(torch.zeros(101, 1))


def test_without_its_model_it_takes_all_rows_of_a_plate_that_draws_its_part(tmp_path):
    guide = guide_of(drawing_its_part)
    pf.save(guide, tmp_path)
    alone = pf.load(tmp_path, encoder=net())
    assert alone(X[:7])["z"].shape == (7,)
    assert {scale for _, _, scale in traced(alone).values()} == {1.0}
    same_guides(guide, pf.load(tmp_path, encoder=net(), model=drawing_its_part))


def test_it_trains_on_with_its_model(tmp_path):
    x = 1 + torch.randn(12, 1)
    encoder = nn.Linear(1, 3)
    guide = pf.AutoAmortizedFlow(of_length, encoder, None).setup(x)
    loaded = pf.load(pf.save(guide, tmp_path), encoder=nn.Linear(1, 3), model=of_length)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    pf.fit_guide(of_length, loaded, x, particles=8, lr=0.05, max_steps=250, progress=False)
    assert not [n for n, p in loaded.named_parameters() if torch.equal(p, before[n])]
    draws = loaded.sample_posterior(4000, x)["z"]
    torch.testing.assert_close(draws.mean(0), x[:, 0] / 1.25, atol=0.15, rtol=0)
    with pytest.raises(ValueError, match=r"loaded without its model.*pf.load\(folder, model="):
        pf.load(tmp_path, encoder=nn.Linear(1, 3)).model(x)


@builder
def own(features, context=0, *, width=8):
    return pf.iaf(features, context, layers=1, hidden=(width,))


def test_an_own_builder_is_given_or_trusted(tmp_path):
    guide = pf.AutoAmortizedFlow(with_globals, net(), own, width=4).setup(X).eval()
    pf.save(guide, tmp_path)
    with pytest.raises(ValueError, match="not part of pyroflows.*trust=True"):
        pf.load(tmp_path, encoder=net())
    same_guides(guide, pf.load(tmp_path, encoder=net(), builder=own))
    same_guides(guide, pf.load(tmp_path, encoder=net(), trust=True))

    def unmarked(features, context=0):
        return pf.Flow(pf.Chain([]), shape=features, context=context)

    guide = pf.AutoAmortizedFlow(local, net(), unmarked).setup(X)
    with pytest.raises(ValueError, match="cannot save a AutoAmortizedFlow that no builder made"):
        pf.save(guide, tmp_path / "other")


def other_names():
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 3))


def other_width():
    return nn.Sequential(nn.Linear(1, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


def on_meta():
    return net().to("meta")


def lazy():
    return nn.Sequential(nn.LazyLinear(6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: None, "expected a torch.nn.Module built as .* got NoneType; use pf.load"),
        (lambda: net, "got function"),
        (other_names, r"in the folder 2 missing \(2.bias, 2.weight\) 7 not expected \("),
        (other_width, r"0.weight has shape \(6, 1\), expected \(7, 1\)"),
        (on_meta, "expected tensors with values, got none yet in '0.weight'"),
        (lazy, "expected tensors with values, got none yet in '0.weight'"),
    ],
    ids=["none", "function", "names", "width", "meta", "lazy"],
)
def test_a_wrong_encoder_is_refused_and_left_alone(make, words, tmp_path):
    pf.save(guide_of(local), tmp_path)
    encoder = make()
    kept = encoder.state_dict() if make in (other_names, other_width) else {}
    kept = {name: value.clone() for name, value in kept.items()}
    with pytest.raises(ValueError, match=f"encoder: .*{words}"):
        pf.load(tmp_path, encoder=encoder)
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in kept.items())
    assert encoder is None or encoder is net or encoder.training


def test_an_encoder_where_there_is_none_is_refused(tmp_path):
    pf.save(pf.nice(2, **SMALL), tmp_path)
    with pytest.raises(ValueError, match="encoder: expected None, the folder holds no pf.AutoAmo"):
        pf.load(tmp_path, encoder=net())


def test_an_encoder_whose_state_is_no_tensor_is_refused(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="encoder: expected a state_dict of tensors, got a dict"):
        pf.save(guide_of(local, encoder=Counting(1, 3)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [stored.CONFIG, stored.TENSORS])
def test_files_cut_short_are_refused(name, tmp_path):
    pf.save(guide_of(local), tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-10])
    encoder = net()
    kept = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="folder: .*cut short"):
        pf.load(tmp_path, encoder=encoder)
    assert all(torch.equal(encoder.state_dict()[k], v) for k, v in kept.items())
