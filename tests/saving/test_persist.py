"""A saved flow is the same flow: every builder, students, guides, both dtypes; refusals."""

import copy
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import flows
from pyroflows._files import model_folder as stored
from pyroflows.flows import builder
from pyroflows.saving.values import BASES, decode, encode
from pyroflows.testing import randomize

EXAMPLES = flows.examples()


def context_of(flow, rows=5):
    shape = flow.context_shape
    return torch.randn(rows, *shape, dtype=next(flow.parameters()).dtype) if shape else None


def scores(flow, x, context):
    with torch.no_grad():
        return flow.log_prob(x.clone(), context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_builder_scores_bit_for_bit_the_same(name, dtype, tmp_path):
    flow = EXAMPLES[name].make().to(dtype)
    randomize(flow, 1.0, 0)
    flow.eval()
    context = context_of(flow)
    x = flow.sample(() if context is not None else (5,), context)
    before = torch.get_rng_state()
    same = pf.load(pf.save(flow, tmp_path / name))
    assert torch.equal(before, torch.get_rng_state())
    assert not same.training
    assert torch.equal(scores(same, x, context), scores(flow, x, context))
    for key, value in flow.state_dict().items():
        assert torch.equal(same.state_dict()[key], value), key
        assert same.state_dict()[key].dtype == value.dtype, key
    assert same.config["builder"] == flow.config["builder"]
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == [stored.CONFIG, stored.TENSORS]


def test_students_quantised_flows_and_pixelcnn(tmp_path):
    support = constraints.cat([constraints.positive, constraints.interval(-1.0, 2.0)], -1, [1, 2])
    student = pf.student_of(pf.maf(3, layers=1, hidden=(8,), support=support))
    same = pf.load(pf.save(student, tmp_path / "student"))
    x = student.sample((6,))
    assert torch.equal(scores(same, x, None), scores(student, x, None))
    assert same.fast == "sample"

    for noise in ("uniform", "variational", pf.iaf(4, 4, layers=1, hidden=(8,))):
        q = pf.quantized(pf.nice(4, layers=2, hidden=(8,)), 16, dequantizer=noise, logit=0.05)
        randomize(q, 1.0, 0)
        same = pf.load(pf.save(q, tmp_path / "quantized"))
        x = q.sample((3,))
        assert torch.equal(same(seed=1).log_prob(x), q(seed=1).log_prob(x))
        assert (same.bins, same.logit) == (16, 0.05)

    pixels = pf.pixelcnn((1, 3, 3), 2, bins=4, channels=8)
    same = pf.load(pf.save(pixels, tmp_path / "pixels"))
    x, label = torch.randint(0, 4, (2, 1, 3, 3)), torch.tensor([0, 1])
    assert torch.equal(same(label).log_prob(x), pixels(label).log_prob(x))


@pytest.mark.parametrize(
    "base",
    [
        dist.StudentT(torch.tensor([3.0, 4.0]), 0.5, 2.0).to_event(1),
        dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
        torch.distributions.Independent(torch.distributions.Laplace(torch.ones(2), 2.0), 1),
    ],
    ids=["student", "multivariate", "laplace"],
)
def test_base_distributions(base, tmp_path):
    flow = pf.nice(2, layers=2, hidden=(8,), base=base)
    same = pf.load(pf.save(flow, tmp_path))
    x = torch.randn(5, 2)
    assert torch.equal(scores(same, x, None), scores(flow, x, None))


@pytest.mark.parametrize(
    "support",
    [
        constraints.real,
        constraints.real_vector,
        constraints.positive,
        copy.deepcopy(constraints.unit_interval),
        constraints.greater_than(torch.tensor([0.1, 1.0], dtype=torch.float64)),
        constraints.interval(-1, 1 / 3),
        constraints.simplex,
        constraints.independent(constraints.positive, 1),
        constraints.cat([constraints.real, constraints.less_than(2.0)], dim=-1, lengths=[1, 3]),
        constraints.stack([constraints.real, constraints.positive], dim=-1),
        dist.constraints.softplus_positive,
        dist.constraints.positive_ordered_vector,
    ],
    ids=repr,
)
def test_supports_come_back_as_they_were(support):
    text = json.dumps(encode(support, "support"), allow_nan=False)
    again = decode(json.loads(text), "support")
    assert type(again) is type(support)
    assert encode(again, "support") == encode(support, "support")
    for name, value in vars(support).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value)


def test_numbers_and_families_come_back():
    family = pf.transforms.RationalQuadraticSpline(5, 3.0)
    values = {"a": (1, 0.1, float("inf"), None, True, "ü"), "b": family, "c": {"d": (2,)}}
    text = json.dumps(encode(values, "x"), allow_nan=False)
    assert decode(json.loads(text), "x") == values
    with pytest.raises(ValueError, match="activation: cannot write a .*function"):
        encode({"activation": torch.relu}, "activation")


def posterior(y):
    scale = pyro.sample("scale", dist.Uniform(0.1, torch.tensor(5.0)))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 2, dim=-1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.sample("skipped", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), dim=-1):
        mean = level.sum(-1, keepdim=True) + share[..., :1]
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def test_guides_load_without_running_the_model(tmp_path):
    y = torch.randn(6)
    guide = pf.AutoFlow(posterior, layers=1, hidden=(8,), hide=["skipped"]).setup(y)
    randomize(guide.flow, 0.3, 0)
    pf.save(guide, tmp_path)
    pyro.clear_param_store()
    alone, full = pf.load(tmp_path), pf.load(tmp_path, model=posterior)
    draws = []
    for each in (guide, alone, full):
        torch.manual_seed(3)
        draws.append(each.sample_posterior(7))
    assert {k: v.shape[1:] for k, v in draws[0].items()} == {
        "scale": (),
        "share": (3,),
        "level": (2,),
    }
    for other in draws[1:]:
        assert all(torch.equal(draws[0][k], other[k]) for k in draws[0])
        assert list(other) == list(draws[0])
    torch.manual_seed(3)
    trace = pyro.poutine.trace(alone).get_trace()
    assert trace.nodes["level"]["cond_indep_stack"][0].name == "groups"
    assert set(alone.quantiles([0.1, 0.9])) == {"scale", "share", "level"}
    with pytest.raises(ValueError, match=r"loaded without its model.*pf.load\(folder, model="):
        alone.model(y)
    # A guide saved from a loaded one is the same again.
    again = pf.load(pf.save(alone, tmp_path / "again"), model=posterior)
    assert torch.equal(again.flow.log_prob(torch.ones(1, 5)), guide.flow.log_prob(torch.ones(1, 5)))


def test_the_facts_of_guides_keep_their_format(tmp_path):
    """What earlier versions have written must go on loading."""

    def model(x):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))

    guide = pf.AutoAmortizedFlow(model, nn.Linear(1, 3), layers=1, hidden=(4,))
    pf.save(guide.setup(torch.zeros(5, 1)), tmp_path / "guide")
    config = json.loads((tmp_path / "guide" / "config.json").read_text())
    real = {"constraint": "independent", "base": {"constraint": "real"}, "dims": 1}
    assert config["guide"] == {
        "name": "AutoAmortizedFlow(scale, z)",
        "sites": [{"name": "z", "free_shape": [2], "support": real}],
        "plate": ["data", -1, 100],
        "context": 3,
    }
    assert config["amortized"]["globals"]["guide"] == {
        "name": "AutoAmortizedFlow(scale, z).global_guide(scale)",
        "sites": [
            {
                "name": "scale",
                "batch_shape": [],
                "event_shape": [],
                "free_shape": [],
                "support": {"constraint": "greater_than_eq", "lower_bound": 0.0},
                "plates": [],
            }
        ],
        "hide": [],
        "init": "init",
        "init_scale": 1.0,
        "plate_nesting": 0,
        "discrete": [],
        "moving": False,
        "modes": 1,
    }


def test_a_loaded_guide_trains_on(tmp_path):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0])
    guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup(torch.zeros(3))
    guide = pf.load(pf.save(guide, tmp_path), model=model)
    pf.fit_guide(model, guide, y, max_steps=300, progress=False)
    assert abs(guide.median()["loc"] - 1.5) < 0.15


def test_guides_that_cannot_be_saved_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"guide: it has no parameters yet; call guide.setup"):
        pf.save(pf.AutoFlow(posterior), tmp_path)
    with pytest.raises(ValueError, match=r"guide: it has no parameters yet; call guide.setup"):
        pf.save(pf.AutoAmortizedFlow(posterior, nn.Linear(1, 2)), tmp_path)
    with pytest.raises(ValueError, match="mark the function that makes it with pf.flows.builder"):
        pf.save(pf.Flow(pf.transforms.LULinear(2), shape=2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_json_has_no_words_for_is_refused(tmp_path):
    class Mine(nn.Module):
        def forward(self):
            return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    with pytest.raises(ValueError, match=r"base: cannot write a .*Mine to config.json; write"):
        pf.save(pf.nice(2, layers=2, hidden=(8,), base=Mine()), tmp_path)


def test_a_flow_changed_by_hand_is_refused(tmp_path):
    flow = pf.nice(2, layers=2, hidden=(8,))
    flow.transform.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="not what its builder makes: 2 not expected"):
        pf.save(flow, tmp_path)


@builder
def shifted(features, context=0, *, by=1.0):
    inner = pf.nice(features, context, layers=2, hidden=(8,))
    return pf.Flow(pf.Chain([inner.transform, pf.transforms.DiagonalScale(features)]), shape=2)


@builder
def optioned(features, **options):
    return pf.nice(features, **options)


def test_options_of_an_own_builder_come_back(tmp_path):
    flow = optioned(2, layers=2, hidden=(8,))
    assert flow.config["arguments"] == {"features": 2, "layers": 2, "hidden": (8,)}
    same = pf.load(pf.save(flow, tmp_path), builder=optioned)
    x = torch.randn(3, 2)
    assert torch.equal(scores(same, x, None), scores(flow, x, None))
    for nameless in (lambda features, /: None, lambda features, *sizes: None):
        with pytest.raises(ValueError, match="has the argument .* without a name"):
            builder(nameless)


def test_a_flow_of_an_own_builder_may_be_an_argument(tmp_path):
    flow = pf.quantized(optioned(2, layers=2, hidden=(8,)), 4)
    pf.save(flow, tmp_path)
    with pytest.raises(ValueError, match="not part of pyroflows.*trust=True"):
        pf.load(tmp_path)
    x = flow.sample((3,))
    same = pf.load(tmp_path, builder=optioned)
    assert torch.equal(same(seed=1).log_prob(x), flow(seed=1).log_prob(x))


def test_own_builders_are_named_passed_or_trusted(tmp_path, monkeypatch):
    module = types.ModuleType("some_flows")
    module.shifted = shifted
    monkeypatch.setitem(sys.modules, "some_flows", module)
    flow = shifted(2)
    assert flow.config["builder"].endswith("test_persist:shifted")
    flow.config["builder"] = "some_flows:shifted"
    x = torch.randn(3, 2)
    pf.save(flow, tmp_path)
    with pytest.raises(ValueError, match="some_flows:shifted.*not part of pyroflows.*trust=True"):
        pf.load(tmp_path)
    for same in (pf.load(tmp_path, builder=shifted), pf.load(tmp_path, trust=True)):
        assert torch.equal(scores(same, x, None), scores(flow, x, None))
    monkeypatch.delitem(sys.modules, "some_flows")
    with pytest.raises(ValueError, match="cannot import 'some_flows:shifted'.*builder="):
        pf.load(tmp_path, trust=True)
    with pytest.raises(ValueError, match="do not fit config.json"):
        pf.load(tmp_path, builder=lambda features, context, by: pf.nice(2))


def killed_at(monkeypatch, number):
    """Let ``os.replace`` stop the process, as it were, at its ``number``-th call."""
    calls, replace = [], os.replace

    def stop(source, target):
        calls.append(target)
        if len(calls) == number:
            raise SystemExit
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_killed_save_leaves_the_old_or_the_new(number, tmp_path, monkeypatch):
    old, new = pf.nice(2, layers=2, hidden=(8,)), pf.nice(2, layers=2, hidden=(8,))
    randomize(old, 1.0, 1), randomize(new, 1.0, 2)
    pf.save(old, tmp_path)
    with monkeypatch.context() as patched:
        killed_at(patched, number)
        with pytest.raises(SystemExit):
            pf.save(new, tmp_path)
    x = torch.randn(4, 2)
    expected = old if number < 3 else new  # the second replace is the config's
    assert torch.equal(scores(pf.load(tmp_path), x, None), scores(expected, x, None))
    # A second save, killed at its start, loses nothing of the first.
    with monkeypatch.context() as patched:
        killed_at(patched, 2 if number == 3 else 1)
        with pytest.raises(SystemExit):
            pf.save(old, tmp_path)
    assert torch.equal(scores(pf.load(tmp_path), x, None), scores(expected, x, None))
    pf.save(new, tmp_path)
    assert torch.equal(scores(pf.load(tmp_path), x, None), scores(new, x, None))
    assert sorted(p.name for p in tmp_path.iterdir()) == [stored.CONFIG, stored.TENSORS]


def test_a_loaded_flow_is_newer_than_the_store(tmp_path):
    flow = pf.nice(2, layers=2, hidden=(8,))
    pf.save(flow, tmp_path)
    pyro.module("flow", flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1.0)
    same = pf.load(tmp_path)
    x = torch.randn(3, 2)
    expected = scores(same, x, None)
    pyro.module("flow", same)
    assert torch.equal(scores(same, x, None), expected)


def test_no_pickle_is_ever_read(tmp_path, monkeypatch):
    import pickle

    pf.save(pf.maf(2, layers=1, hidden=(8,)), tmp_path)
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(torch, "load", None)
    assert pf.load(tmp_path).event_shape == (2,)


class StandIn(types.ModuleType):
    """Folders in the place of the hub."""

    def __init__(self, root):
        super().__init__("huggingface_hub")
        self.root = Path(root)
        self.HfApi = self.signed_in
        self.tokens = []

    def signed_in(self, token):
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id, exist_ok):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.root / repo_id)

    def snapshot_download(self, repo_id, revision, allow_patterns):
        return str(self.root / repo_id)


def test_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pyroflows\[hub\]'"):
        pf.from_hub("me/flow")
    monkeypatch.setitem(sys.modules, "huggingface_hub", StandIn(tmp_path))
    flow = pf.iaf(2, layers=1, hidden=(8,))
    pf.push_to_hub(flow, "me/flow", token="secret")
    assert sys.modules["huggingface_hub"].tokens == ["secret"]
    x = torch.randn(3, 2)
    for same in (pf.from_hub("me/flow"), pf.load("hf://me/flow")):
        assert torch.equal(scores(same, x, None), scores(flow, x, None))


@pytest.mark.parametrize("kind", BASES)
def test_every_base_in_the_table_can_be_written(kind):
    given = {
        "StudentT": (3.0, 0.0, 2.0),
        "Exponential": (2.0,),
        "Dirichlet": (torch.tensor([1.0, 2.0]),),
        "MultivariateNormal": (torch.zeros(2), torch.eye(2)),
    }
    made = getattr(dist, kind)(*given.get(kind, (1.0, 2.0)))
    same = decode(encode(made, "base"), "base")
    x = made.sample((4,))
    assert torch.equal(same.log_prob(x), made.log_prob(x))


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("kind", ["scale", "covariance", "precision", "beta"])
def test_bases_of_several_parametrisations(tmp_path, kind, used):
    tril = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    normal = torch.distributions.MultivariateNormal
    base = {
        "scale": lambda: normal(torch.ones(2), scale_tril=tril),
        "covariance": lambda: normal(torch.ones(2), covariance_matrix=tril @ tril.mT),
        "precision": lambda: normal(torch.ones(2), precision_matrix=tril @ tril.mT),
        "beta": lambda: pyro.distributions.Beta(torch.ones(2), 3 * torch.ones(2)).to_event(1),
    }[kind]()
    x = base.sample((5,))
    if used:
        base.log_prob(x)
        getattr(base, "covariance_matrix", None), getattr(base, "precision_matrix", None)
    flow = pf.Flow(pf.transforms.Permute([0, 1]), shape=2, base=base)
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(x))
    if kind != "beta":
        flow = pf.maf(2, layers=1, hidden=(8,), base=base)
        pf.save(flow, tmp_path)
        assert torch.equal(pf.load(tmp_path).log_prob(x), flow.log_prob(x))
    made = decode(encode(base, "base"), "base")
    torch.testing.assert_close(made.log_prob(x), base.log_prob(x))
