"""The modules that a model refers to are found, by whatever name it has for them."""

import functools

import pyro.distributions as dist
import pytest
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

from pyroflows._pyro.models import modules_of

GLOBAL, UNUSED = nn.Identity(), nn.Identity()
NET = nn.Linear(1, 1)


def by_global(x):
    return [GLOBAL(y) for y in x]


def by_default(x, net=NET):
    return net(x)


def given(x, net):
    return net(x)


def by_closure(net=NET):
    return lambda x: (lambda y: net(y))(x)


class Holder:
    def __init__(self):
        self.net = NET

    def model(self, x):
        return self.net(x)

    def __call__(self, x):
        return self.net(x)


class Module(nn.Module):
    def model(self, x):
        return GLOBAL(x)


MODULE = Module()
WITH_NET = {"net": NET}


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (MODULE, {"": MODULE}),
        (MODULE.model, {"": MODULE, "GLOBAL": GLOBAL}),
        (Holder().model, WITH_NET),
        (Holder(), WITH_NET),
        (by_global, {"GLOBAL": GLOBAL}),
        (by_default, WITH_NET),
        (by_closure(), WITH_NET),
        (functools.partial(given, net=NET), WITH_NET),
        (functools.partial(given, NET), {"0": NET}),
        (poutine.block(poutine.scale(by_default, scale=2.0)), WITH_NET),
        (poutine.block(MODULE), {"": MODULE}),
        (config_enumerate(by_default), WITH_NET),
        (lambda x: by_global(x), {"by_global.GLOBAL": GLOBAL}),
        (dist.Normal, {}),
    ],
    ids=range(14),
)
def test_modules_that_a_model_refers_to(model, wanted):
    assert modules_of(model) == wanted


def test_a_variable_that_has_no_value_yet_and_a_function_that_calls_itself():
    def model(x):
        return model(later(x))

    assert modules_of(model) == {}
    later = nn.Identity()
    assert modules_of(model) == {"later": later}
