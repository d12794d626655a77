"""What a guide's model has learned is saved with the guide, and put back."""

import functools
import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows._files import model_folder as stored

SMALL = {"layers": 1, "hidden": (4,), "init": "init"}
Y = torch.tensor([3.0, 4.0, 5.0])


def with_params(y):
    tau = pyro.param("tau", torch.tensor(0.5), constraint=constraints.positive)
    bias = pyro.param("bias", torch.zeros(2))
    z = pyro.sample("z", dist.Normal(0.0, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z + bias.sum(), 0.1), obs=y)


def fitted(model, *args):
    """A guide of a model whose parameters moved away from where they begin."""
    guide = pf.AutoFlow(model, **SMALL).setup(*args)
    moved()
    return guide


@torch.no_grad()
def moved():
    """Move all that Pyro's store holds, as optimisers do."""
    for _, value in pyro.get_param_store().named_parameters():
        value.add_(torch.rand_like(value))


QUICK = {"particles": 2, "vectorize": False, "progress": False}


def test_learnt_parameters_come_back_into_the_store(tmp_path):
    guide = fitted(with_params, Y)
    store = pyro.get_param_store()
    tau, bias = store["tau"].detach().clone(), store["bias"].detach().clone()
    assert tau != 0.5
    pf.save(guide, tmp_path)
    pyro.clear_param_store()
    pf.load(tmp_path, model=with_params)
    with_params(Y)
    assert torch.equal(store["tau"], tau)
    assert torch.equal(store["bias"], bias)


def test_a_loaded_guide_and_its_model_are_judged_as_before(tmp_path):
    guide = pf.AutoFlow(with_params, **SMALL)
    pf.fit_guide(with_params, guide, Y, max_steps=300, particles=32, progress=False)
    torch.manual_seed(0)
    before = pf.report(with_params, guide, Y, num_samples=500)
    pf.save(guide, tmp_path)
    pyro.clear_param_store()
    loaded = pf.load(tmp_path, model=with_params)
    torch.manual_seed(0)  # the same draws
    after = pf.report(with_params, loaded, Y, num_samples=500)
    assert after.khat == pytest.approx(before.khat, abs=1e-2)
    assert after.evidence == pytest.approx(before.evidence, abs=0.05)


def test_loaded_parameters_train_on_with_the_guide(tmp_path):
    pf.save(fitted(with_params, Y), tmp_path)
    pyro.clear_param_store()
    loaded = pf.load(tmp_path, model=with_params)
    before = pyro.get_param_store()["tau"].item()
    pf.fit_guide(with_params, loaded, Y, max_steps=100, **QUICK)
    assert pyro.get_param_store()["tau"].item() != before


def test_the_folders_values_win_over_the_stores(tmp_path):
    guide = fitted(with_params, Y)
    kept = pyro.get_param_store()["tau"].item()
    pf.save(guide, tmp_path)
    pyro.get_param_store()["tau"] = torch.tensor(7.0)
    pf.load(tmp_path, model=with_params)
    assert pyro.get_param_store()["tau"].item() == pytest.approx(kept)


def test_another_shape_under_the_name_is_refused_and_left_alone(tmp_path):
    pf.save(fitted(with_params, Y), tmp_path)
    pyro.clear_param_store()
    pyro.param("bias", torch.zeros(5))
    with pytest.raises(ValueError, match=r"holds 'bias' with shape \(5,\), .* has shape \(2,\)"):
        pf.load(tmp_path, model=with_params)
    assert list(pyro.get_param_store()) == ["bias"]


def test_without_its_model_it_leaves_the_store_alone_and_keeps_all_for_a_later_save(tmp_path):
    pf.save(fitted(with_params, Y), tmp_path)
    tau = pyro.get_param_store()["tau"].item()
    pyro.clear_param_store()
    alone = pf.load(tmp_path)
    assert len(pyro.get_param_store()) == 0
    pf.load(pf.save(alone, tmp_path / "again"), model=with_params)
    assert pyro.get_param_store()["tau"].item() == tau
    again = pf.save(pf.load(tmp_path, model=with_params), tmp_path / "third")
    config = [json.loads((f / stored.CONFIG).read_text()) for f in (tmp_path, again)]
    assert config[0]["model"] == config[1]["model"]


def test_parameters_of_other_models_are_not_kept(tmp_path):
    pyro.param("other", torch.tensor(1.0))
    pf.save(fitted(with_params, Y), tmp_path)
    words = json.loads((tmp_path / stored.CONFIG).read_text())["model"]
    assert sorted(words["parameters"]) == ["bias", "tau"]


def test_parameters_that_only_training_meets_are_kept(tmp_path):
    def model(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def larger(y):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    guide = pf.AutoFlow(model, **SMALL).setup(Y)
    pf.fit_guide(larger, guide, Y, max_steps=2, **QUICK)
    pf.save(guide, tmp_path)
    assert "loc" in json.loads((tmp_path / stored.CONFIG).read_text())["model"]["parameters"]


def test_a_model_without_parameters_adds_nothing_to_the_folder(tmp_path):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pf.save(pf.AutoFlow(model, **SMALL).setup(), tmp_path)
    assert "model" not in json.loads((tmp_path / stored.CONFIG).read_text())


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    guide = fitted(with_params, Y)
    pyro.get_param_store()["bias"] = torch.tensor([float("nan"), 0.0])
    with pytest.raises(ValueError, match="model: parameter 'bias' holds numbers that are not fin"):
        pf.save(guide, tmp_path)
    assert list(tmp_path.iterdir()) == []


# Modules


class Decoder(PyroModule):
    """A model with all that a module can hold."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, y):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 1), 1.0).to_event(2))
        mean = self.net(z.reshape(-1, 1)).reshape(z.shape) + self.shift
        pyro.sample("y", dist.Normal(mean[..., 0], self.scale).to_event(1), obs=y)


class Plain(nn.Module):
    """A module with a model as a method, that registers a part of it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def model(self, y):
        pyro.module("decoder", self.net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(self.net(z[..., None])[..., 0], 1.0), obs=y)


def of_function(net):
    def model(y):
        pyro.module("decoder", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(net(z[..., None])[..., 0], 1.0), obs=y)

    return model


def given(y, net):
    of_function(net)(y)


KINDS = {
    "PyroModule": (Decoder, lambda m: m),
    "method": (Plain, lambda m: m.model),
    "variable": (lambda: nn.Linear(1, 1), of_function),
    "argument": (lambda: nn.Linear(1, 1), lambda net: functools.partial(given, net=net)),
    "handler": (lambda: nn.Linear(1, 1), lambda n: poutine.scale(of_function(n), scale=2.0)),
    "flow": (lambda: pf.iaf(1, layers=2, hidden=(4,)), lambda flow: of_prior(flow)),
}


def of_prior(flow):
    def model(y):
        pyro.module("prior", flow)
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y[0])

    return model


@pytest.mark.parametrize("cleared", [True, False], ids=["cleared", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_the_model_come_back_into_it(kind, cleared, tmp_path):
    make, model_of = KINDS[kind]
    module = make()
    begin = {name: value.clone() for name, value in module.state_dict().items()}
    guide = fitted(model_of(module), Y)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    assert any(not torch.equal(kept[name], begin[name]) for name in kept)
    pf.save(guide, tmp_path)
    if cleared:
        pyro.clear_param_store()
    else:  # what the store holds is older
        for parameter in module.parameters():
            parameter.data.add_(1.0)
    fresh = make()
    model = model_of(fresh)
    loaded = pf.load(tmp_path, model=model)
    assert all(torch.equal(fresh.state_dict()[name], kept[name]) for name in kept)
    fresh.eval()
    loaded(Y), poutine.trace(model)(Y)  # Pyro's statements do not put other values in place
    assert all(torch.equal(fresh.state_dict()[name], kept[name]) for name in kept)
    trained = set(map(id, dict(pyro.get_param_store().named_parameters()).values()))
    assert trained.issuperset(map(id, fresh.parameters()))


def test_a_module_that_the_model_does_not_have_is_asked_for(tmp_path):
    net = nn.Linear(1, 1)
    pf.save(fitted(of_function(net), Y), tmp_path)
    with pytest.raises(ValueError, match="model: expected module 'net', .* found no module"):
        pf.load(tmp_path, model=with_params)


def test_a_module_that_is_built_otherwise_is_refused_and_left_alone(tmp_path):
    pf.save(fitted(of_function(nn.Linear(1, 1)), Y), tmp_path)
    other = nn.Linear(2, 1)
    kept = other.weight.clone()
    with pytest.raises(ValueError, match="module 'net' is not built as the saved one was"):
        pf.load(tmp_path, model=of_function(other))
    assert torch.equal(other.weight, kept)


def test_a_module_in_a_list_is_said_to_come_back_into_the_store_alone(tmp_path):
    nets = [nn.Linear(1, 1)]

    def model(y):
        pyro.module("decoder", nets[0])
        pyro.sample("z", dist.Normal(nets[0](y[:1]).sum(), 1.0))

    guide = pf.AutoFlow(model, **SMALL).setup(Y)
    model(Y)
    with pytest.warns(UserWarning, match="model: 'decoder', registered by pyro.module, is no mod"):
        pf.save(guide, tmp_path)
    pyro.clear_param_store()
    pf.load(tmp_path, model=model)
    assert torch.equal(pyro.get_param_store()["decoder$$$weight"], nets[0].weight)


def test_an_amortised_guides_model_comes_back(tmp_path):
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(1, 2), nn.Linear(1, 1)

        def model(self, x):
            pyro.module("decoder", self.decoder)
            noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
            with pyro.plate("data", 10, subsample=x):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), noise).to_event(1), obs=x)

    x, vae = torch.randn(5, 1), VAE()
    guide = pf.AutoAmortizedFlow(vae.model, vae.encoder, layers=1, hidden=(4,))
    guide.setup(x)
    moved()
    noise = pyro.get_param_store()["noise"].item()
    pf.save(guide, tmp_path)
    pyro.clear_param_store()
    fresh = VAE()
    pf.load(tmp_path, model=fresh.model, encoder=fresh.encoder)
    assert pyro.get_param_store()["noise"].item() == noise
    for name, value in vae.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_local_parameters_of_a_module_come_back(tmp_path):
    with pyro.settings.context(module_local_params=True):
        model = Decoder()
        guide = pf.AutoFlow(model, **SMALL).setup(Y)
        with torch.no_grad():
            model.scale_unconstrained.add_(1.0)
        pf.save(guide, tmp_path)
        fresh = Decoder()
        pf.load(tmp_path, model=fresh)
        assert torch.equal(fresh.scale, model.scale)


# Hostile folders


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.update(parameters=[]), "the model cannot be read"),
        (lambda w: w["parameters"].pop("tau"), "expected 1 tensors of the model, the folder h"),
        (lambda w: w["parameters"].update(more={"constraint": "real"}), "cannot be read"),
        (lambda w: w["parameters"].update(tau={"constraint": "x"}), "cannot be read"),
        (lambda w: w["parameters"].update(tau={"constraint": "lower_cholesky"}), "no value under"),
        (lambda w: w["parameters"].update(tau=10**12), "expected a number that fits"),
        (lambda w: w["modules"].update(net={"a": "b"}), "cannot be read"),
        (lambda w: w["modules"].update(net=None), "cannot be read"),
    ],
)
def test_words_that_no_save_wrote_are_refused(change, words, tmp_path):
    pf.save(fitted(with_params, Y), tmp_path)
    pyro.clear_param_store()
    path = tmp_path / stored.CONFIG
    config = json.loads(path.read_text())
    change(config["model"])
    config["checksum"] = stored.checksum(config)
    path.write_text(json.dumps(config))
    for model in (None, with_params):
        with pytest.raises(ValueError, match=words):
            pf.load(tmp_path, model=model)
    assert len(pyro.get_param_store()) == 0
