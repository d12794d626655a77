"""Each guide has a name of its own in Pyro's store: numbered, asked for, copied, nested, loaded."""

import copy
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule
from torch import nn

import pyroflows as pf

SMALL = {"layers": 1, "hidden": (4,), "init": "init"}
X = torch.randn(5, 1)


def model():
    return pyro.sample("z", dist.Normal(0.0, 1.0))


def by_row(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample=x):
        pyro.sample("z", dist.Normal(a, 1.0))


def make(**changes):
    return pf.AutoFlow(model, **{**SMALL, **changes})


def amortised(**changes):
    return pf.AutoAmortizedFlow(by_row, nn.Linear(1, 3), layers=1, hidden=(4,), **changes)


def registered(guide, *args):
    """The guide, its tensors moved and in the store."""
    guide.setup(*args)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(torch.randn_like(p))
    guide(*args)
    return guide


def values(guide):
    return {name: p.detach().clone() for name, p in guide.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def pickled(guide):
    return pickle.loads(pickle.dumps(guide))


def test_guides_are_numbered_as_they_are_set_up():
    third, first, second = make(), make(), make()
    names = [guide.setup().pyro_name for guide in (first, second, third)]
    assert names == ["AutoFlow(z)", "AutoFlow(z)#2", "AutoFlow(z)#3"]


def test_a_guide_begins_anew_though_an_earlier_ones_parameters_are_still_in_the_store():
    registered(make())
    assert "AutoFlow(z).flow$$$transform.parts.0.net.last.bias" in pyro.get_param_store()
    assert make().setup().pyro_name == "AutoFlow(z)#2"


def test_names_begin_anew_in_a_cleared_store():
    registered(make()), registered(make())
    pyro.clear_param_store()
    assert make().setup().pyro_name == "AutoFlow(z)"


def test_a_guide_that_only_waits_for_the_collector_holds_no_name():
    guide = registered(make())
    guide.__dict__["circle"] = [guide]
    del guide
    pyro.clear_param_store()
    assert make().setup().pyro_name == "AutoFlow(z)"


def test_a_living_guide_keeps_its_name_in_a_cleared_store():
    guide = registered(make())
    kept = values(guide)
    pyro.clear_param_store()
    registered(make())
    guide()
    assert same(values(guide), kept)


def test_a_name_that_was_asked_for_is_no_other_guides():
    asked = make(name="AutoFlow(z)").setup()
    assert make().setup().pyro_name == "AutoFlow(z)#2"
    assert asked.pyro_name == "AutoFlow(z)"


def test_amortised_guides_of_one_name_share_all_their_parts():
    first, second = registered(amortised(name="q"), X), amortised(name="q").setup(X)
    second(X)
    assert second.global_guide.pyro_name == "q.global_guide(a)"
    assert same(values(first), values(second))


@pytest.mark.parametrize("name", ["", "a$$$b", 3, ["q"]])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="name: expected a word for Pyro's parameter store, got"):
        make(name=name)


@pytest.mark.parametrize("name", [None, "q"], ids=["own", "asked"])
@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    ("build", "args"), [(make, ()), (amortised, (X,))], ids=["AutoFlow", "AutoAmortizedFlow"]
)
def test_a_copy_keeps_its_values_and_has_a_name_of_its_own(build, args, how, name):
    guide = registered(build(name=name), *args)
    kept = values(guide)
    twin = how(guide)
    assert twin.pyro_name == f"{guide.pyro_name}#2"
    twin.sample_posterior(2, *args)
    assert same(values(twin), kept)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    twin.flow.sample((), *[twin.encoder(*a) for a in [args] if a])
    guide(*args)
    assert same(values(guide), kept)


def test_training_a_copy_leaves_the_original_alone():
    guide = make().setup()
    pf.fit_guide(model, guide, max_steps=5, particles=2, progress=False)
    kept, twin = values(guide), copy.deepcopy(guide)
    pf.fit_guide(model, twin, max_steps=5, particles=2, lr=0.1, progress=False)
    guide()
    assert same(values(guide), kept)
    assert not same(values(twin), kept)


def test_the_parts_of_a_copy_are_named_after_it():
    twin = copy.deepcopy(registered(amortised(), X))
    assert twin.pyro_name == "AutoAmortizedFlow(a, z)#2"
    assert twin.global_guide.pyro_name == "AutoAmortizedFlow(a, z)#2.global_guide(a)"


def test_a_copy_of_a_guide_that_was_not_set_up_is_numbered_when_it_is():
    guide = make()
    twin = copy.deepcopy(guide)
    assert twin.setup().pyro_name == "AutoFlow(z)"
    assert guide.setup().pyro_name == "AutoFlow(z)#2"


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
def test_a_loaded_guide_has_its_name_if_no_other_has_it(held, tmp_path):
    guide = registered(make())
    pf.save(guide, tmp_path)
    kept = values(guide)
    if not held:
        del guide
        pyro.clear_param_store()
    loaded = pf.load(tmp_path, model=model)
    assert loaded.pyro_name == ("AutoFlow(z)#2" if held else "AutoFlow(z)")
    loaded()
    assert same(values(loaded), kept)


def test_a_loaded_guide_leaves_what_a_loaded_store_holds_to_others(tmp_path):
    guide = registered(make())
    kept = values(guide)
    pyro.get_param_store().save(tmp_path / "store")
    with torch.no_grad():
        guide.flow.transform.parts[-2].loc.add_(1.0)
    pf.save(guide, tmp_path / "folder")
    del guide
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    loaded, fresh = pf.load(tmp_path / "folder", model=model), make().setup()
    loaded(), fresh()
    assert (loaded.pyro_name, fresh.pyro_name) == ("AutoFlow(z)#2", "AutoFlow(z)")
    assert same(values(fresh), kept)
    assert not same(values(loaded), kept)


class Both(PyroModule):
    """Two guides of one model in another module."""

    def __init__(self):
        super().__init__()
        self.one, self.two = make(), make()

    def forward(self):
        return self.one(), self.two()


def test_guides_in_modules_of_one_kind_are_each_their_own():
    first, second = Both(), Both()
    first(), second()
    assert (first.one.pyro_name, first.two.pyro_name) == ("one(z)", "two(z)")
    assert (second.one.pyro_name, second.two.pyro_name) == ("one(z)#2", "two(z)#2")
    registered(first.one)
    kept = values(first)
    second()
    first()
    assert same(values(first), kept)


@pytest.mark.parametrize(
    ("build", "args", "sites"), [(make, (), "(z)"), (amortised, (X,), "(a, z)")]
)
def test_guides_that_become_parts_after_they_were_set_up(build, args, sites):
    outer = PyroModule("outer")
    outer.inner = PyroModule()
    outer.inner.guide = build().setup(*args)
    guide = outer.inner.guide
    assert guide.pyro_name == f"outer.inner.guide{sites}"
    if args:
        assert guide.global_guide.pyro_name == f"outer.inner.guide{sites}.global_guide(a)"
    assert build().setup(*args).pyro_name == f"{type(guide).__name__}{sites}"


def test_guides_in_two_lists_of_pyros_are_each_their_own():
    names = []
    lists = []
    for _ in range(2):
        guide = AutoGuideList(model)
        guide.append(make())
        guide()
        lists.append(guide)
        names.append(guide[0].pyro_name)
    assert names == ["AutoGuideList.0(z)", "AutoGuideList.0(z)#2"]


NEW_PROCESS = """
import sys, pyro, torch
from test_guide_names import make
pyro.get_param_store().load(sys.argv[1])
guides = [make().setup(), make(name="q").setup(), make().setup()]
for guide in guides:
    guide()
print(*[guide.flow.transform.parts[-2].loc.item() for guide in guides])
"""


@pytest.mark.integration
def test_a_new_process_finds_each_guide_again_by_the_order_of_set_up(tmp_path):
    guides = [registered(guide) for guide in (make(), make(name="q"), make())]
    pyro.get_param_store().save(tmp_path / "store")
    run = [sys.executable, "-c", NEW_PROCESS, str(tmp_path / "store")]
    said = subprocess.run(
        run, cwd=__file__.rpartition("/")[0], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    expected = [guide.flow.transform.parts[-2].loc.item() for guide in guides]
    assert [float(word) for word in said.stdout.split()] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:The `random_module` primitive is deprecated")
def test_sites_of_a_lifted_module_make_a_name_too():
    priors = {"weight": dist.Normal(torch.zeros(1, 1), 1.0).to_event(2)}
    lifted = pyro.random_module("linear", torch.nn.Linear(1, 1, bias=False), priors)
    guide = pf.AutoFlow(lambda: lifted()(torch.ones(1)), layers=1, hidden=(4,)).setup()
    assert guide()["linear$$$weight"].shape == (1, 1)
    assert guide.pyro_name == "AutoFlow(linear.weight)"
