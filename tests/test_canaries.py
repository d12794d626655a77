"""Private names of Pyro that the library leans on: a test for each says which one changed."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoNormal


def model():
    pyro.sample("z", dist.HalfNormal(1.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.zeros(2))


def same(name, got, wanted):
    assert got == wanted, f"Pyro changed {name}: expected {wanted}, got {got}"


class Prototype(AutoContinuous):
    """Pyro's guide over one vector, which has run the model."""

    def __init__(self):
        super().__init__(model)
        self._setup_prototype()


@pytest.mark.parametrize(
    ("name", "read", "wanted"),
    [
        ("_unconstrained_shapes", dict, {"z": (), "y": (2,)}),
        ("_prototype_frames", lambda d: {k: frame.dim for k, frame in d.items()}, {"rows": -1}),
        ("_cond_indep_stacks", lambda d: {k: len(v) for k, v in d.items()}, {"z": 0, "y": 1}),
        ("_pyro_name", str, "Prototype"),
        ("_model", lambda models: (type(models), len(models)), (tuple, 1)),
    ],
)
def test_what_a_guide_learned(name, read, wanted):
    guide = Prototype()
    assert hasattr(guide, name), f"Pyro changed AutoContinuous.{name}: it is gone"
    same(f"AutoContinuous.{name}", read(getattr(guide, name)), wanted)


@pytest.mark.parametrize("name", ["_parameters", "_buffers", "_modules", "_pyro_context"])
def test_what_a_copy_of_a_guide_does_not_share(name):
    assert name in vars(Prototype()), f"Pyro or torch changed {name}: it is gone from a guide"


def test_a_guide_sets_itself_up_by_a_private_method():
    class Watched(AutoNormal):
        asked = False

        def _setup_prototype(self, *args, **kwargs):
            self.asked = True
            super()._setup_prototype(*args, **kwargs)

    guide = Watched(model)
    guide()
    assert guide.asked, "Pyro changed AutoGuide._setup_prototype: a first call does not call it"


def test_a_guide_makes_its_plates():
    guide = Prototype()
    guide._create_plates()
    same("AutoGuide._create_plates", {k: p.dim for k, p in guide.plates.items()}, {"rows": -1})


def test_a_guide_hides_what_is_not_latent():
    trace = pyro.poutine.trace(model).get_trace()
    kept = [n for n, s in trace.nodes.items() if not Prototype._prototype_hide_fn(s)]
    same("AutoGuide._prototype_hide_fn", kept, ["z", "y"])


def test_a_guide_stacks_and_unpacks_its_sites():
    guide = Prototype()
    same("AutoContinuous._init_loc", guide._init_loc().shape, (3,))
    found = {node["name"]: free.tolist() for node, free in guide._unpack_latent(torch.arange(3.0))}
    same("AutoContinuous._unpack_latent", found, {"z": 0.0, "y": [1.0, 2.0]})


def test_a_model_without_latent_sites_has_no_dimension():
    guide = AutoContinuous(lambda: None)
    with pytest.raises(RuntimeError):
        guide._setup_prototype()
    same("AutoContinuous.latent_dim", vars(guide).get("latent_dim"), 0)


def test_a_sampler_reports_its_divergences():
    mcmc = MCMC(NUTS(model), num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run()
    found = mcmc._diagnostics[0]["divergences"]
    same("MCMC._diagnostics", set(found) <= {0, 1}, True)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_get_traces", ["self", "model", "guide", "args", "kwargs"]),
        ("_differentiable_loss_particle", ["self", "model_trace", "guide_trace"]),
    ],
)
def test_an_elbo_asks_for_traces_and_for_the_loss_of_one(name, arguments):
    found = getattr(Trace_ELBO, name, None)
    assert found is not None, f"Pyro changed Trace_ELBO.{name}: it is gone"
    same(f"Trace_ELBO.{name}", list(inspect.signature(found).parameters), arguments)
