"""What every test starts from, and what it must leave as it was."""

import random
from collections.abc import Iterator

import numpy as np
import pyro
import pytest
import torch

# Tensors in tests are small, and workers that share cores only get in each other's way.
torch.set_num_threads(1)


def global_settings() -> dict[str, object]:
    from pyroflows._pyro.validation import validates_args

    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch.distributions' validation flag": validates_args(),
        "grad mode": torch.is_grad_enabled(),
        **{f"pyro.settings {key!r}": value for key, value in pyro.settings.get().items()},
    }


def restore(settings: dict[str, object]) -> None:
    torch.set_default_dtype(settings["torch's default dtype"])
    torch.set_grad_enabled(settings["grad mode"])
    prefix = "pyro.settings "
    for key, value in settings.items():
        if key.startswith(prefix):
            pyro.settings.set(**{key.removeprefix(prefix).strip("'"): value})
    torch.distributions.Distribution.set_default_validate_args(
        settings["torch.distributions' validation flag"]
    )


@pytest.fixture(autouse=True)
def fresh_start() -> None:
    """The same seed and an empty parameter store for every test."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries that tests call read the global state)
    torch.manual_seed(0)
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def no_global_change() -> Iterator[None]:
    """Fail a test that leaves a global setting changed, and put the setting back."""
    before = global_settings()
    yield
    after = global_settings()
    changed = [f"{k}: {v} -> {after[k]}" for k, v in before.items() if after[k] != v]
    if changed:
        restore(before)
        pytest.fail("the test left global state changed: " + "; ".join(changed), pytrace=False)
