"""Detached views share tensors and nothing else."""

import torch
from torch import nn

import pyroflows as pf
from pyroflows._pyro.memo import Kept
from pyroflows._pyro.views import detached_view


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.own = nn.Parameter(torch.ones(2))
        self.register_parameter("missing", None)
        self.register_buffer("constant", torch.ones(2))


def test_a_view_shares_tensors_and_has_no_parameters_that_train():
    module = Holder()
    view = detached_view(module)
    assert {n: p.data_ptr() for n, p in module.state_dict().items()} == {
        n: p.data_ptr() for n, p in view.state_dict().items()
    }
    assert view.constant is module.constant
    assert view.missing is None
    assert not view.own.requires_grad
    assert not view.inner.weight.requires_grad
    assert module.inner.weight.requires_grad
    with torch.no_grad():
        module.inner.weight.fill_(3.0)
    assert (view.inner.weight == 3.0).all()
    view.constant, view.inner.note = torch.zeros(2), 1
    assert (module.constant == 1).all()
    assert not hasattr(module.inner, "note")


def test_a_view_keeps_for_itself():
    module = Holder()
    module.kept = Kept()
    first = module.kept.get([module.constant], lambda: 2 * module.constant)
    view = detached_view(module)
    assert module.kept
    assert not view.kept
    view.kept.get([view.constant], lambda: 3 * view.constant)
    assert module.kept.get([module.constant], lambda: None) is first


def test_a_detached_flow_has_memories_of_its_own():
    flow = pf.maf(2, layers=1, hidden=(8,))
    flow.transform.inv(flow.sample(3))
    view = flow.detached()
    assert view.transform.inv is not flow.transform.inv
    assert view.transform.inv.inv is view.transform
    x = flow.rsample((3,))
    assert not view.log_prob(x.detach()).requires_grad
