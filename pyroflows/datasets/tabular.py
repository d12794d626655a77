"""The two tabular benchmarks of the density-estimation literature that fit in a small file."""

from __future__ import annotations

import numpy as np
import torch

from pyroflows.datasets.folder import find_file
from pyroflows.datasets.split import Split, resolved_dtype, seeded, shuffled_split, standardize


def miniboone(*, seed: int = 0, dtype: torch.dtype | None = None) -> Split:
    """Particle events of the MiniBooNE experiment, 43 features, already standardised.

    Reads ``miniboone/miniboone_val_test.npz`` in the folder that ``PYROFLOWS_DATA``
    names: float arrays ``val`` (3284, 43) and ``test`` (3648, 43), the validation and
    test splits of the masked-autoregressive-flow experiments. Their training split of
    29,556 rows is not in the file. The rows of ``val`` are therefore shuffled with
    ``seed`` and cut into 2,956 training rows and, from the end, 328 validation rows;
    the test split is the official one. Scores are comparable among models fitted on
    these rows, not with published scores of models fitted on all training rows.

    Source: "MiniBooNE particle identification" (B. Roe, UCI Machine Learning Repository,
    https://archive.ics.uci.edu/dataset/199), preprocessed by G. Papamakarios
    (https://zenodo.org/record/1161203); the two splits as arrays are in the GitHub
    repository vsimkus/variational-gibbs-inference, folder data/miniboone.
    Licence: CC BY 4.0.

    Args:
        seed: fixes the shuffle of the rows of ``val``.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 43)``: 2,956 training, 328 validation and 3,648 test.

    Raises:
        FileNotFoundError: if the variable is not set or the file is missing.
        TypeError: if ``dtype`` is not floating-point.

    Example::

        train, val, test = pf.datasets.miniboone()            # 43 columns
    """
    dtype = resolved_dtype(dtype)
    path = find_file(
        "miniboone/miniboone_val_test.npz",
        source=(
            "arrays val and test from data/miniboone of "
            "https://github.com/vsimkus/variational-gibbs-inference, "
            "or split by the MAF recipe from https://zenodo.org/record/1161203"
        ),
    )
    with np.load(path, allow_pickle=False) as arrays:
        val = torch.from_numpy(arrays["val"]).to(dtype)
        test = torch.from_numpy(arrays["test"]).to(dtype)
    val = val[torch.randperm(len(val), generator=seeded(seed))]
    cut = len(val) - len(val) // 10
    return Split(val[:cut], val[cut:], test)


def power(*, seed: int = 0, dtype: torch.dtype | None = None) -> Split:
    """Electric power used by one household, minute by minute, in six standardised columns.

    Reads ``power_subset/power_subset.npz`` in the folder that ``PYROFLOWS_DATA`` names:
    ``values`` (n, 7), ``minutes_since_2006_12_16`` (n,) and the names ``columns`` (7,)
    of the original table. The usual subset has 54,590 of the 2,075,259 minutes, most
    of them from one winter month, so scores are not comparable with published ones.

    The six columns are those of the masked-autoregressive-flow experiments: global
    active power, voltage, the three sub-meters and the minute of the day. Rows with a
    missing value are dropped (6 in the usual subset). Readings are rounded, so uniform
    noise as wide as their step (0.001, 0.01 and 1) is added, none to the time. The rows
    are shuffled, split 80/10/10 and standardised with the training mean and deviation.

    Source: "Individual household electric power consumption" (G. Hebrail and A. Berard,
    UCI Machine Learning Repository, https://archive.ics.uci.edu/dataset/235).
    Licence: CC BY 4.0.

    Args:
        seed: fixes the noise and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 6)``: 43,668 training, 5,458 validation and 5,458 test for
        the usual subset.

    Raises:
        FileNotFoundError: if the variable is not set or the file is missing.
        TypeError: if ``dtype`` is not floating-point.

    Example::

        days = pf.datasets.power().train                      # (n, 6)
    """
    dtype = resolved_dtype(dtype)
    generator = seeded(seed)
    path = find_file(
        "power_subset/power_subset.npz",
        source=(
            "arrays values, minutes_since_2006_12_16 and columns from any rows of "
            "https://archive.ics.uci.edu/dataset/235/individual+household+electric+power+consumption"
        ),
    )
    names = [
        "Global_active_power",
        "Voltage",
        "Sub_metering_1",
        "Sub_metering_2",
        "Sub_metering_3",
    ]
    with np.load(path, allow_pickle=False) as arrays:
        columns = arrays["columns"].tolist()
        readings = arrays["values"].astype(np.float64)
        minute = arrays["minutes_since_2006_12_16"] % (24 * 60)
    kept = ~np.isnan(readings).any(axis=1)
    chosen = readings[:, [columns.index(name) for name in names]]
    rows = torch.from_numpy(np.column_stack([chosen, minute])[kept])
    step = torch.tensor([0.001, 0.01, 1.0, 1.0, 1.0, 0.0], dtype=rows.dtype)
    rows = rows + step * torch.rand(rows.shape, generator=generator, dtype=rows.dtype)
    moved = standardize(shuffled_split(rows, generator))
    return Split(*(part.to(dtype) for part in moved))
