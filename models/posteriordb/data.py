"""Data and reference draws of posteriordb, from the folder that ``PYROFLOWS_DATA`` names.

There, ``posteriordb/posterior_database`` is the folder of that name in the repository
github.com/stan-dev/posteriordb (BSD-3; Magnusson et al. 2024, arXiv:2407.04967). A posterior is
named after its data and its model, as in ``kidiq-kidscore_momiq``. Reference draws are ten chains
of 1,000, made by long runs of Stan and thinned to near independence.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroflows.datasets.folder import find_file

SOURCE = "https://github.com/stan-dev/posteriordb, a checkout named posteriordb"
ROOT = "posteriordb/posterior_database"
DRAWS = f"{ROOT}/reference_posteriors/draws/draws"
REFERENCES = Path(__file__).with_name("references.json")

Moments = dict[str, tuple[Tensor, Tensor]]


def names() -> list[str]:
    """The posteriors that have reference draws, in alphabetical order.

    Raises:
        FileNotFoundError: ``PYROFLOWS_DATA`` is not set, or its folder holds no posteriordb.
    """
    example = find_file(f"{DRAWS}/kidiq-kidscore_momiq.json.zip", source=SOURCE)
    return sorted(path.name.removesuffix(".json.zip") for path in example.parent.glob("*.zip"))


def load_data(name: str) -> dict[str, Tensor]:
    """What the Stan model of a posterior declares in its data block, all in float64.

    Args:
        name: a posterior, such as ``"kidiq-kidscore_momiq"``.

    Returns:
        Tensors by Stan's names; sizes are tensors of shape ``()``.

    Raises:
        FileNotFoundError: ``PYROFLOWS_DATA`` is not set, or its folder lacks the file.
    """
    raw = raw_data(name)
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in raw.items()}


def raw_data(name: str) -> dict[str, Any]:
    """The same as numbers and nested lists, integers as integers."""
    entry = find_file(f"{ROOT}/posteriors/{name}.json", source=SOURCE)
    data_name = json.loads(entry.read_text())["data_name"]
    return _unzipped(find_file(f"{ROOT}/data/data/{data_name}.json.zip", source=SOURCE))


def reference_draws(name: str) -> dict[str, Tensor]:
    """The reference draws of a posterior, on the parameters' own (constrained) scale.

    Args:
        name: a posterior, such as ``"kidiq-kidscore_momiq"``.

    Returns:
        For each parameter a tensor ``(10000, *shape)`` in float64, chain after chain.

    Raises:
        FileNotFoundError: ``PYROFLOWS_DATA`` is not set, or its folder lacks the file.
    """
    chains = _unzipped(find_file(f"{DRAWS}/{name}.json.zip", source=SOURCE))
    return grouped(
        {
            key: torch.tensor([chain[key] for chain in chains], dtype=torch.float64).flatten()
            for key in chains[0]
        }
    )


def references() -> dict[str, Any]:
    """What ``reference.py`` found, by posteriors' names."""
    return json.loads(REFERENCES.read_text())


def moments(name: str) -> Moments | None:
    """The reference's means and standard deviations of each parameter.

    Those of the reference draws or, where posteriordb has none, of long runs of NUTS, on the model
    itself or on the one that has the same effects the other way, centred or not.

    Args:
        name: a posterior.

    Returns:
        For each parameter two tensors of its shape, or None where there is no reference.
    """
    entry = json.loads(find_file(f"{ROOT}/posteriors/{name}.json", source=SOURCE).read_text())
    drawn = entry.get("reference_posterior_name")  # two models may have one posterior
    if drawn in names():
        draws = reference_draws(drawn)
        return {key: (value.mean(0), value.std(0)) for key, value in draws.items()}
    known = references()
    good = [known[n]["parameters"] for n in (name, _twin(name)) if "parameters" in known.get(n, ())]
    if not good:
        return None
    return {
        key: (
            torch.tensor(of["mean"], dtype=torch.float64),
            torch.tensor(of["sd"], dtype=torch.float64),
        )
        for key, of in good[0].items()
    }


def _twin(name: str) -> str:
    """The posterior of the same model with its effects centred, or not centred."""
    if name.endswith("_noncentered"):
        return name.replace("_noncentered", "_centered")
    return name.replace("_centered", "_noncentered")


def grouped(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the elements ``beta[1]``, ``beta[2]``, ... of a parameter into one tensor.

    Args:
        columns: tensors ``(draws,)`` by Stan's names, whose indices count from 1.

    Returns:
        Tensors ``(draws, *shape)`` by the parameters' names.

    Example:
        >>> two = {"beta[1]": torch.zeros(5), "beta[2]": torch.ones(5), "sigma": torch.ones(5)}
        >>> {name: tuple(value.shape) for name, value in grouped(two).items()}
        {'beta': (5, 2), 'sigma': (5,)}
    """
    parameters: dict[str, dict[tuple[int, ...], Tensor]] = defaultdict(dict)
    for column, values in columns.items():
        name, indices = re.fullmatch(r"(\w+)(?:\[([\d,]+)\])?", column).groups()
        place = tuple(int(i) for i in indices.split(",")) if indices else ()
        parameters[name][place] = values
    result = {}
    for name, elements in parameters.items():
        places = sorted(elements)  # row-major: the last index runs fastest
        stacked = torch.stack([elements[place] for place in places], dim=-1)
        result[name] = stacked.reshape(-1, *places[-1])
    return result


@lru_cache(maxsize=2)  # twelve posteriors share one file of 12,573 houses
def _unzipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(path.name.removesuffix(".zip")))
