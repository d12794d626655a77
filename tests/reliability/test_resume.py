"""A training stopped anywhere and picked up ends bit for bit as one in one go: every flow."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows.infer import plateau
from pyroflows.training.loop import Run

ROWS, BATCH, EPOCHS = 48, 12, 4  # 4 steps an epoch
STOPS = (1, 4, 7, 10, 15)  # steps that are done: in an epoch, and at its end


class Stopped(Exception):
    """A process that ends."""


def tensors_of(shape, context, support, bins):
    """Rows that a model can be trained on."""
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(ROWS, *context, generator=generator) if context else None
    if bins:
        return torch.randint(bins, (ROWS, *shape), generator=generator), c
    to_support = torch.distributions.biject_to(support)
    u = torch.randn(ROWS, *to_support.inverse_shape(torch.Size(shape)), generator=generator)
    return to_support(u), c


def makers():
    """All example flows, the quantised forms of images, and models that are integers by nature."""
    made = {name: (example.make, 0) for name, example in pf.flows.examples().items()}
    for name, (make, _) in list(made.items()):
        if len(make().event_shape) == 3:
            made[f"{name}, quantised"] = lambda make=make: pf.quantized(make(), bins=8), 8
    made["variational noise"] = (
        lambda: pf.quantized(pf.glow((1, 4, 4), levels=1), bins=8, dequantizer="variational"),
        8,
    )
    small = {"bins": 8, "channels": 8, "layers": 2, "mixture": 2}
    made["pixelcnn"] = lambda: pf.pixelcnn((1, 4, 4), **small), 8
    made["pixelcnn_classes"] = lambda: pf.pixelcnn((1, 4, 4), classes=3, **small), 8
    return made


MAKERS = makers()


def fitted(name, seed, **settings):
    """A flow trained in what might be a process of its own."""
    torch.manual_seed(seed)
    make, bins = MAKERS[name]
    model = make()
    x, context = tensors_of(model.event_shape, model.context_shape, model.support, bins)
    if "classes" in name:
        context = torch.arange(ROWS) % 3
    torch.manual_seed(3 if seed == 0 else 99)
    history = pf.fit(
        model,
        x,
        context,
        max_epochs=EPOCHS,
        batch_size=BATCH,
        val=(x[:8], None if context is None else context[:8]),
        dropout=0.0 if model.fast == "sample" else None,
        progress=False,
        **settings,
    )
    return model.state_dict(), history


def distilled(name, seed, **settings):
    """A student of a teacher with weights of its own."""
    torch.manual_seed(7)
    teacher = pf.flows.examples()[name].make()
    context = torch.randn(ROWS, *teacher.context_shape) if teacher.context_shape else None
    pf.testing.randomize(teacher)
    data = None if context is not None else torch.randn(ROWS, *teacher.event_shape)
    torch.manual_seed(seed)
    student = pf.student_of(teacher)
    objective = "mixed" if name in ("maf", "wavenet") else "auto"
    history = pf.distill(
        teacher,
        student,
        context=context,
        data=data,
        objective=objective,
        max_steps=100,
        batch_size=16,
        progress=False,
        **settings,
    )
    return student.state_dict(), history


def model(data=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    if data is not None:
        with pyro.plate("rows", 60, subsample_size=len(data)):
            pyro.sample("x", dist.Normal(z, 0.5 + scale[..., None]).to_event(1), obs=data)


def by_row(data):
    with pyro.plate("rows", 60, subsample_size=len(data)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=data)


def table():
    return torch.randn(60, 2, generator=torch.Generator().manual_seed(1))


def loader(size, **settings):
    return DataLoader(TensorDataset(table()), batch_size=size, shuffle=True, **settings)


def amortised():
    encoder = torch.nn.Linear(2, 3)
    return pf.AutoAmortizedFlow(by_row, encoder, layers=1, hidden=(4,))


GUIDES = {
    "AutoFlow": lambda: (model, pf.AutoFlow(model, layers=1, hidden=(4,)), {}),
    "AutoFlow on rows": lambda: (
        model,
        pf.AutoFlow(model, layers=1, hidden=(4,)),
        {"args": (table(),)},
    ),
    "AutoFlow, batches": lambda: (
        model,
        pf.AutoFlow(model, layers=1, hidden=(4,)),
        {"batches": loader(7)},
    ),
    "AutoFlow, a generator of its own": lambda: (
        model,
        pf.AutoFlow(model, layers=1, hidden=(4,)),
        {"batches": loader(7, generator=torch.Generator().manual_seed(4))},
    ),
    "AutoNormal, a pass is a window": lambda: (model, AutoNormal(model), {"batches": loader(6)}),
    "AutoMultivariateNormal": lambda: (model, AutoMultivariateNormal(model), {"objective": "elbo"}),
    "AutoAmortizedFlow": lambda: (by_row, amortised(), {"batches": loader(20)}),
}


def guided(name, seed, **settings):
    """A guide trained on windows of ten steps."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    target, guide, more = GUIDES[name]()
    torch.manual_seed(3 if seed == 0 else 99)
    history = pf.fit_guide(
        target,
        guide,
        *more.pop("args", ()),
        particles=2,
        max_steps=45,
        progress=False,
        **more,
        **settings,
    )
    return dict(pyro.get_param_store().named_parameters()), history


def check(monkeypatch, tmp_path, run, every, stops):
    """One run in one go, and one that stops at each of these steps and is picked up."""
    weights, expected = run(0)
    step, left = Run._step, [0]

    def counted(self, *args):
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        step(self, *args)

    for stop in stops:
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_step", counted)
            left[0] = stop
            with pytest.raises(Stopped):
                run(0, checkpoint=pf.Checkpoint(folder, every))
        again, history = run(5, checkpoint=pf.Checkpoint(folder, every, resume=True))
        for field in ("steps", "train", "val", "lr", "best", "curves", "stopped"):
            assert getattr(history, field) == getattr(expected, field), (stop, field)
        assert weights.keys() == again.keys()
        for name, value in weights.items():
            assert torch.equal(value, again[name]), (stop, name)


def cases(names, few):
    """All of them slowly; of a few, what one stop shows."""
    some = [pytest.param(name, STOPS[2:3], id=f"{name}, one stop") for name in few]
    return some + [pytest.param(name, STOPS, id=name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    ("name", "stops"), cases(MAKERS, ["maf", "multiscale_realnvp_image", "glow, quantised"])
)
def test_a_flow_is_picked_up(monkeypatch, tmp_path, name, stops):
    check(monkeypatch, tmp_path, lambda *a, **k: fitted(name, *a, **k), 0.25, stops)


STUDENTS = ["maf", "maf_conditional", "nsf_autoregressive", "wavenet", "maf_linear_rational"]


@pytest.mark.parametrize(("name", "stops"), cases(STUDENTS, []))
def test_a_student_is_picked_up(monkeypatch, tmp_path, name, stops):
    stops = [6 * stop for stop in stops]
    check(monkeypatch, tmp_path, lambda *a, **k: distilled(name, *a, **k), 0.1, stops)


@pytest.mark.parametrize(("name", "stops"), cases(GUIDES, ["AutoNormal, a pass is a window"]))
def test_a_guide_is_picked_up(monkeypatch, tmp_path, name, stops):
    monkeypatch.setattr(plateau, "WINDOW", 10)
    monkeypatch.setattr(plateau, "_NOTHING_LEFT", -1.0)  # it goes on to the last step
    stops = [2 * stop + 9 for stop in stops]  # the first checkpoint is after ten
    check(monkeypatch, tmp_path, lambda *a, **k: guided(name, *a, **k), 1, stops)


def test_a_guide_is_measured_on_the_same_batch_again(monkeypatch, tmp_path):
    monkeypatch.setattr(plateau, "WINDOW", 10)
    monkeypatch.setattr(plateau, "_NOTHING_LEFT", -1.0)  # it goes on to the last step
    found, finish = [], plateau.Plateau.finish

    def noted(self):
        found.append(self.task.firsts[0][0])
        finish(self)

    monkeypatch.setattr(plateau.Plateau, "finish", noted)
    for seed in (0, 5):  # the second goes on from the first
        guided("AutoFlow, batches", seed, checkpoint=pf.Checkpoint(tmp_path, resume=True))
    assert torch.equal(*found)
