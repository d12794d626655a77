"""The folder of a run: the flow, the facts of its table, and rows to score it on."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows._files.atomic import locked, write_atomically
from pyroflows._files.model_folder import CONFIG, checksum
from pyroflows._files.tensors import digest
from pyroflows.cli.columns import check_names, values_of
from pyroflows.cli.tables import Table
from pyroflows.distributions.flow import Flow
from pyroflows.saving.models import load, save

FACTS, ROWS = "table.json", "rows.npz"
TRAIN_ROWS, TEST_ROWS = 10_000, 2_000
AT_ONCE = 10_000


@dataclass
class Run:
    """A fitted flow and its table.

    Attributes:
        folder: where it is.
        flow: over rows of the columns in ``facts["columns"]``, in their units.
        facts: column names, counts, the course of training: plain values.
        train: up to 10,000 of the rows it was trained on.
        test: up to 2,000 rows it was never trained on.
    """

    folder: Path
    flow: Flow
    facts: dict[str, Any]
    train: np.ndarray
    test: np.ndarray

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return self.facts["columns"]

    @property
    def builder(self) -> str:
        """The name of what made the flow."""
        config = self.flow.config
        if config is None:
            return "a flow"
        return f"mirrored {config['builder']}" if "mirrored" in config else config["builder"]

    def write(self) -> None:
        """Write the folder; each file is replaced as a whole.

        The file that makes the folder a run comes last, with the checksums of all others: where
        the process is killed in between, there is no run, rather than a mixture of two. Of two
        that write into one folder the second waits for the first.
        """
        buffer = io.BytesIO()
        np.savez_compressed(buffer, train=self.train, held=self.test)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.parent):  # ``save`` locks the folder itself
            (self.folder / FACTS).unlink(missing_ok=True)
            save(self.flow, self.folder)
            write_atomically(self.folder / ROWS, buffer.getvalue())
            facts = {**self.facts, "files": _digests(self.folder)}
            facts["checksum"] = checksum(facts)
            text = json.dumps(facts, indent=1, ensure_ascii=False)
            write_atomically(self.folder / FACTS, text.encode())

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Log-density of each row in nats, NaN where a row is not finite."""
        found = np.full(len(values), np.nan)
        finite = np.isfinite(values).all(axis=1)
        if not finite.any():  # torch's vector constraints cannot check an empty tensor
            return found
        rows = self.tensor(values[finite])
        # A value may overflow in the flow's precision: infinitely far out.
        far = ~torch.isfinite(rows).all(dim=1) | ~self.flow.support.check(rows)
        scores = log_prob(self.flow, torch.where(far[:, None], self.tensor(self.train[:1]), rows))
        scores[far.numpy()] = -np.inf
        found[finite] = np.where(np.isnan(scores), -np.inf, scores)
        return found

    def draws(self, n: int) -> Iterator[np.ndarray]:
        """``n`` rows of the flow in batches, those that are not finite drawn anew.

        Raises:
            ValueError: hardly one in a hundred is finite.
        """
        done = drawn = 0
        while done < n:
            rows = self.flow.sample((min(AT_ONCE, n - done),))
            drawn += len(rows)
            rows = rows[torch.isfinite(rows).all(dim=1)]
            done += len(rows)
            # Not of a batch alone: the last may be a single row.
            if drawn > 100 * (done + 1):
                raise ValueError(f"{self.folder}: the flow's samples are not finite; fit again")
            yield rows.numpy()

    def tensor(self, values: np.ndarray) -> Tensor:
        """In the flow's dtype."""
        return torch.tensor(values, dtype=self.flow.dtype)


@torch.no_grad()
def log_prob(flow: Flow, rows: Tensor) -> np.ndarray:
    """Scores of ``(rows, features)``, as many at once as fit in memory."""
    parts = [flow(validate_args=False).log_prob(part).numpy() for part in rows.split(AT_ONCE)]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def read_run(folder: Path) -> Run:
    """What ``pyroflows fit`` wrote.

    Raises:
        ValueError: it is not such a folder, or broken.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: there is no such folder; expected one that pyroflows fit wrote"
        )
    flow = load(folder)
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        if facts["checksum"] != checksum(facts):
            raise ValueError(f"{FACTS} was changed after it was written")
        for name, found in _digests(folder).items():
            if facts["files"][name] != found:
                raise ValueError(f"{name} is not the one that {FACTS} was written with")
        with np.load(folder / ROWS, allow_pickle=False) as rows:
            train, test = rows["train"], rows["held"]
        fits = len(facts["columns"]) == flow.event_shape[0] == train.shape[1] == test.shape[1]
        if not (fits and isinstance(facts["header"], bool) and len(train) and len(test)):
            raise ValueError("its parts do not fit together")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder}: expected a folder that pyroflows fit wrote ({error}); fit again"
        ) from None
    return Run(folder, flow, facts, train, test)


def _digests(folder: Path) -> dict[str, str]:
    """Of the files beside the facts; that of the tensors stands in ``config.json``."""
    return {name: digest((folder / name).read_bytes()) for name in (CONFIG, ROWS)}


def check_out(folder: Path, overwrite: bool) -> None:
    """See, before hours of work, that a run can be written there; nothing is made.

    Raises:
        ValueError: something is there, or there is no right to write.
    """
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder}: is not empty; give another folder, or --overwrite")
    above = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"{folder}: cannot be made, {above} is not a folder one may write to")


def matched(run: Run, table: Table) -> np.ndarray:
    """The run's columns of another table: by name, by place where there are no names.

    Raises:
        ValueError: a column is not there, or holds words.
    """
    names: Sequence[str] = run.columns
    if not (table.header and run.facts["header"]):
        if len(table.names) != len(names):
            raise ValueError(
                f"expected the {len(names)} columns {', '.join(names)}, got {len(table.names)} "
                "without names"
            )
        names = table.names
    check_names(names, table.names)
    for name in names:
        if name in table.words:
            count, first = table.words[name]
            raise ValueError(f"column {name!r} has {count} cells that are no numbers ({first})")
    return values_of(table, names)
