"""Private names of Pyro and torch that the library leans on: a test for each says which changed."""

import inspect
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.nn import PyroModule
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import _bound_partial
from pyro.poutine.util import prune_subsample_sites
from torch import nn
from torch.distributions import Distribution, constraints
from torch.utils._python_dispatch import TorchDispatchMode


def model():
    pyro.sample("z", dist.HalfNormal(1.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.zeros(2))


def same(name, got, wanted, owner="Pyro"):
    assert got == wanted, f"{owner} changed {name}: expected {wanted}, got {got}"


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


def test_a_module_is_named_anew_as_an_attribute_of_another():
    class Watched(PyroModule):
        named = None

        def _pyro_set_supermodule(self, name, context):
            super()._pyro_set_supermodule(name, context)
            self.named = name, self._pyro_name

    outer = PyroModule("outer")
    outer.inner = PyroModule()
    outer.inner.part = Watched("part")
    found = outer.inner.part.named
    same("PyroModule._pyro_set_supermodule", found, ("outer.inner.part", "outer.inner.part"))


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


class Watching(nn.Linear):
    """Notes which functions it is gone through by, and their local variables."""

    def named_modules(self, *args, **kwargs):
        frame, self.seen = sys._getframe(1), {}
        while frame is not None:
            self.seen.setdefault(frame.f_code, dict(frame.f_locals))
            frame = frame.f_back
        yield from super().named_modules(*args, **kwargs)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_registration_goes_through_the_modules_and_has_the_name(depth):
    module = watching = Watching(1, 1)
    for _ in range(depth):
        module = nn.Sequential(module)
    pyro.module("it", module)
    caller = watching.seen.get(pyro.primitives.module.__code__)
    assert caller is not None, "Pyro changed pyro.module: it does not call named_modules"
    same("pyro.module's local name", caller.get("name"), "it")


def test_access_to_a_module_in_a_pyro_module_goes_through_its_modules():
    with pyro.settings.context(module_local_params=True):
        holder = PyroModule()
        holder.inner = Watching(1, 1)
        with pyro.poutine.trace(), holder._pyro_context:
            inner = holder.inner
    by = PyroModule.__getattr__.__code__
    assert by in inner.seen, "Pyro changed PyroModule.__getattr__: it does not call named_modules"


def test_the_store_holds_tensors_by_name_and_names_by_tensor():
    value = torch.ones(2)
    pyro.param("it", value)
    store = pyro.get_param_store()
    held = store._params["it"]
    same("ParamStoreDict._params", held.tolist(), [1.0, 1.0])
    same("ParamStoreDict._param_to_name", store._param_to_name[held], "it")
    same("ParamStoreDict._constraints", store._constraints["it"], constraints.real)


def test_a_handler_around_a_model_knows_the_model():
    around = pyro.poutine.block(pyro.poutine.scale(model, scale=2.0))
    for _ in range(2):
        same("poutine's _bound_partial", type(around), _bound_partial)
        around = around.func.args[1]
    same("poutine's _context_wrap", around, model)


def test_parameters_say_where_they_are_unconstrained():
    got = pyro.param("it", torch.ones(2))
    same("param.unconstrained", got.unconstrained() is pyro.get_param_store()._params["it"], True)


def test_a_module_keeps_tensors_in_tables():
    state = vars(nn.BatchNorm1d(2))
    for name, wanted in [("_parameters", "weight"), ("_buffers", "running_mean"), ("_modules", "")]:
        assert name in state, f"torch changed nn.Module.{name}: it is gone"
        assert isinstance(state[name], dict), f"torch changed nn.Module.{name}: it is no dict"
        assert not wanted or wanted in state[name], f"torch changed nn.Module.{name}"


def test_a_module_knows_which_buffers_it_does_not_save():
    module = nn.Module()
    module.register_buffer("it", torch.ones(1), persistent=False)
    same(
        "nn.Module._non_persistent_buffers_set", module._non_persistent_buffers_set, {"it"}, "torch"
    )


def test_a_module_moves_by_apply():
    class Watched(nn.Module):
        moved = 0

        def _apply(self, fn, recurse=True):
            self.moved += 1
            return super()._apply(fn, recurse)

    same("nn.Module._apply", nn.Sequential(Watched()).double()[0].moved, 1, "torch")


def test_versions_count_writes():
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        start = x._version
        x.add_(1)
    same("Tensor._version", x._version, start + 1, "torch")
    with torch.inference_mode():
        made = torch.ones(2)
    with pytest.raises(RuntimeError):
        made._version  # noqa: B018


def test_transforms_of_functions_are_seen():
    seen = []

    def look(x):
        seen.append(torch._C._functorch.peek_interpreter_stack() is not None)
        return x

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    same("torch._C._functorch.peek_interpreter_stack", seen, [False, True], "torch")


def test_many_tensors_move_at_once():
    x, y = torch.zeros(2), torch.ones(2)
    torch._foreach_lerp_([x], [y], 0.25)
    same("torch._foreach_lerp_", x.tolist(), [0.25, 0.25], "torch")


def test_distributions_have_a_default_of_validation_and_their_own():
    found = []
    for wanted in (True, False):
        Distribution.set_default_validate_args(wanted)
        found.append(Distribution._validate_args)
    Distribution.set_default_validate_args(True)
    same("Distribution._validate_args", found, [True, False], "torch")
    d = torch.distributions.Normal(torch.zeros(3), 1.0, validate_args=False)
    same("Distribution._validate_args of one", d._validate_args, False, "torch")
    same("Distribution._extended_shape", d._extended_shape((2,)), (2, 3), "torch")
    with pytest.raises(ValueError, match="support"):
        d._validate_sample(torch.tensor(float("nan")))


def test_a_transform_is_called_by_call_and_inverted_by_inverse():
    class Doubled(torch.distributions.Transform):
        domain = codomain = torch.distributions.constraints.real
        bijective = True

        def _call(self, x):
            return 2 * x

        def _inverse(self, y):
            return y / 2

    double = Doubled()
    same("Transform._call", float(double(torch.tensor(3.0))), 6.0, "torch")
    same("Transform._inverse", float(double.inv(torch.tensor(3.0))), 1.5, "torch")


def test_operations_can_be_watched():
    class Watched(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    with Watched() as watched:
        torch.ones(2)
    assert watched.seen, "torch changed TorchDispatchMode: it does not see operations"


def enumerated_trace():
    def mixture():
        with pyro.plate("rows", 3):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(k, 1.0), obs=torch.zeros(3))

    model = pyro.poutine.enum(mixture, first_available_dim=-2)
    trace = prune_subsample_sites(pyro.poutine.trace(model).get_trace())
    trace.compute_log_prob()
    trace.pack_tensors()
    return trace


def test_the_factors_of_an_enumerated_model():
    costs, factors, _, dims, scale = _compute_model_factors(enumerated_trace(), Trace())
    assert not costs, "Pyro changed _compute_model_factors: its first value"
    (parts,) = factors.values()
    same("_compute_model_factors: how many", len(parts), 2)
    sizes = {
        dim: size for part in parts for dim, size in zip(part._pyro_dims, part.shape, strict=True)
    }
    same("_pyro_dims", sorted(sizes.values()), [2, 3])
    same("_compute_model_factors: what is summed", {sizes[dim] for dim in dims}, {2})
    same("_compute_model_factors: the scale", scale, 1)


def test_the_log_rings_backend():
    same("LogRing._backend", LogRing._backend, "pyro.ops.einsum.torch_log")


def test_what_enumeration_keeps_of_dimensions():
    with EnumMessenger(-2) as messenger:
        pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    for name in ("_param_dims", "_value_dims"):
        assert "k" in getattr(messenger, name), f"Pyro changed EnumMessenger.{name}"
    same("EnumMessenger._value_dims", list(messenger._value_dims["k"]), [-2])
