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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroflows.datasets.folder import find_file

SOURCE = "https://github.com/stan-dev/posteriordb, a checkout named posteriordb"
ROOT = "posteriordb/posterior_database"
DRAWS = f"{ROOT}/reference_posteriors/draws/draws"


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
    entry = find_file(f"{ROOT}/posteriors/{name}.json", source=SOURCE)
    data_name = json.loads(entry.read_text())["data_name"]
    raw = _unzipped(find_file(f"{ROOT}/data/data/{data_name}.json.zip", source=SOURCE))
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in raw.items()}


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


def _unzipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(path.name.removesuffix(".zip")))
