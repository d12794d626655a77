"""What a guide's model has learned, kept with the guide: its parameters and its modules.

A model learns in ``pyro.param`` statements, whose values are in Pyro's store alone, and in modules.
Of the former a folder holds the unconstrained values and, in words, the constraints. Of the latter
it holds the whole state, by the name that the model has for the module; when that is loaded, what
the store holds of the module goes, so that Pyro takes the module's own tensors when it next runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from pyroflows._pyro.guides import Guide
from pyroflows._pyro.models import (
    drop_parameter,
    modules_of,
    put_parameter,
    stored_parameters,
)
from pyroflows.saving.bounds import bounded_by, check_numbers
from pyroflows.saving.fitting import cast, check_state, check_tensors
from pyroflows.saving.values import decode, encode

PREFIX = "model."  # what the names of its tensors start with in a folder
_PARAMETERS, _MODULES = "model.parameters.", "model.modules."


class Learned(NamedTuple):
    """What a model has learned, as a folder holds it.

    Attributes:
        words: ``parameters``, constraints by name, and ``modules``, for each the names that the
            store has for its parameters, and their own.
        tensors: by their names in the folder.
    """

    words: dict[str, Any]
    tensors: dict[str, Tensor]


def learned_by_model(guide: Guide) -> Learned | None:
    """What the model of a guide that was set up has learned; None if it learns nothing.

    Of a guide that was loaded without its model, what the folder held.

    Args:
        guide: to be saved.

    Raises:
        ValueError: what could not be loaded again: a constraint without words in JSON, a value that
            is not finite, a module whose state is not tensors.
    """
    if "kept_of_model" in vars(guide):
        return vars(guide)["kept_of_model"]
    # A guide that was pickled has no model.
    modules = modules_of(guide.model) if guide.has_model else {}
    stored = stored_parameters()
    homes = {
        id(parameter): (name, path)
        for name, module in modules.items()
        for path, parameter in module.named_parameters(remove_duplicate=False)
    }
    own = set(map(id, guide.parameters()))
    links: dict[str, dict[str, str]] = {"": {}} if "" in modules else {}
    constraints, tensors = {}, {}
    for name in filter(stored.__contains__, guide.model_parameters):
        value, constraint = stored[name]
        if id(value) in homes:
            home, path = homes[id(value)]
            links.setdefault(home, {})[name] = path
        elif id(value) not in own:
            constraints[name] = encode(constraint, f"model: parameter {name!r}")
            tensors[_PARAMETERS + name] = value
            _check_value(name, value, constraint)
    _warn_of_hidden_modules(constraints)
    for home in links:
        check_state(modules[home], f"model: module {home!r}")
        state = modules[home].state_dict()
        tensors |= {f"{_MODULES}{home}.{path}": value for path, value in state.items()}
    return Learned({"parameters": constraints, "modules": links}, tensors) if tensors else None


def _warn_of_hidden_modules(names: Iterable[str]) -> None:
    hidden = sorted({name.split("$$$")[0] for name in names if "$$$" in name})
    if hidden:
        warnings.warn(
            f"model: {', '.join(map(repr, hidden))}, registered by pyro.module, is no module that "
            "the model refers to by a name of its own, so pf.load puts its parameters into Pyro's "
            "store alone, and not its buffers; give pyro.module update_module_params=True, or let "
            "the model refer to the module by a variable",
            stacklevel=4,
        )


class Restoration:
    """What a folder holds of a model, looked at whole before anything is put in place.

    Args:
        words: of ``config.json``.
        tensors: of the folder, those of the model.
        model: to be given them; None to keep them for a later save.

    Raises:
        ValueError: they are damaged, do not fit the model, or the store holds other shapes.
    """

    def __init__(self, words: Any, tensors: dict[str, Tensor], model: Any) -> None:
        self.kept = Learned(words, tensors)
        check_numbers(words, tensors, "config.json: model")
        try:
            self.links: dict[str, dict[str, str]] = {
                k: dict(v) for k, v in words["modules"].items()
            }
            self.parameters = {
                name: (tensors[_PARAMETERS + name], decode(constraint, name))
                for name, constraint in words["parameters"].items()
            }
            self.states = {home: self._state_of(home) for home in self.links}
            shapes = {name: value.shape for name, (value, _) in self.parameters.items()} | {
                name: self.states[home][path].shape
                for home, paths in self.links.items()
                for name, path in paths.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"config.json: the model cannot be read ({error!r})") from None
        count = len(self.parameters) + sum(map(len, self.states.values()))
        if count != len(tensors):
            raise ValueError(
                f"config.json: expected {count} tensors of the model, the folder holds "
                f"{len(tensors)}"
            )
        with bounded_by(tensors):
            for name, (value, constraint) in self.parameters.items():
                _check_value(name, value, constraint)
        self.modules = {} if model is None else self._modules_for(model)
        if model is not None:
            _check_store(shapes)
        self.model = model

    def _state_of(self, home: str) -> dict[str, Tensor]:
        start = f"{_MODULES}{home}."
        tensors = self.kept.tensors.items()
        return {name.removeprefix(start): t for name, t in tensors if name.startswith(start)}

    def _modules_for(self, model: Any) -> dict[str, nn.Module]:
        """The model's modules to which the states belong."""
        found = modules_of(model)
        for home, state in self.states.items():
            what = f"module {home!r}" if home else "a module, or a method of one"
            if home not in found:
                raise ValueError(
                    f"model: expected {what}, as the saved guide's model had it, since the folder "
                    f"holds its state; found {sorted(found) or 'no module'}"
                )
            check_state(found[home], f"model: {what}")
            what = f"model: {what} is not built as the saved one was; of the tensors in the folder "
            check_tensors(found[home].state_dict(), state, what)
        return {home: found[home] for home in self.states}

    def put(self, guide: Guide) -> None:
        """Put all in place: in the model and in Pyro's store, or in the guide to keep.

        Args:
            guide: that was loaded.
        """
        if self.model is None:
            vars(guide)["kept_of_model"] = self.kept
            return
        for home, module in self.modules.items():
            cast(module, self.states[home])
            module.load_state_dict(self.states[home])
            own = dict(module.named_parameters(remove_duplicate=False))
            registered = {name.split("$$$")[0] for name in self.links[home] if "$$$" in name}
            for name, (value, _) in stored_parameters().items():
                path = self.links[home].get(name)
                if path is not None and own.get(path) is value:
                    continue
                if path is not None or name.split("$$$")[0] in registered:
                    drop_parameter(name)
        for name, (value, constraint) in self.parameters.items():
            put_parameter(name, value.clone(), constraint)
        names = [name for paths in self.links.values() for name in paths]
        guide.model_parameters = (*self.parameters, *names)


def _check_value(name: str, value: Tensor, constraint: Any) -> None:
    """A parameter's unconstrained value is one that its constraint takes, and finite."""
    what = f"model: parameter {name!r}"
    if not value.is_floating_point():
        raise ValueError(f"{what} is of {value.dtype}, expected a floating-point dtype")
    try:
        with torch.no_grad():
            stands_for = transform_to(constraint)(value)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError) as error:
        raise ValueError(f"{what} has no value under {constraint!r} ({error})") from None
    if not (value.isfinite().all() and stands_for.isfinite().all()):
        raise ValueError(f"{what} holds numbers that are not finite")


def _check_store(shapes: dict[str, torch.Size]) -> None:
    """What Pyro's store holds already under the names has the same shapes."""
    stored = stored_parameters()
    for name, shape in shapes.items():
        if name in stored and stored[name][0].shape != shape:
            raise ValueError(
                f"Pyro's parameter store holds {name!r} with shape {tuple(stored[name][0].shape)}, "
                f"but the folder's has shape {tuple(shape)}: another model used this name; call "
                "pyro.clear_param_store() before pf.load, or load in a process of its own"
            )
