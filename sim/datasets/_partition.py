"""Partitions of rows by flwr_datasets' partitioners, over a table of labels and row numbers only.

The images stay where they are: a partitioner sees two integer
columns, so 60,000 rows take a tenth of a second.
"""

import contextlib
import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError

Rows = npt.NDArray[np.int64]


def partition_rows(
    dataset: str, partitioner: Any, labels: npt.NDArray[Any], *, column: str = "label"
) -> list[Rows]:
    """Return the row numbers of each partition that ``partitioner`` makes of ``labels``.

    Args:
        dataset: name, for the error.
        partitioner: one of flwr_datasets.partitioner, fresh, reading ``column``.
        labels: (n,) integers: classes, or whatever the partitioner divides by.
        column: what the partitioner calls the labels.

    Raises:
        DataError: the partitioner cannot divide these labels so.
    """
    import datasets

    table = {"row": np.arange(len(labels)), column: np.asarray(labels)}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # Few clients leave classes out: asked for, so no warning. The progress bar is noise.
        warnings.filterwarnings("ignore", message="Classes: .* will NOT be used")
        partitioner.dataset = datasets.Dataset.from_dict(table)
        try:
            parts = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
        except ValueError as err:
            raise DataError(
                f"data set {dataset!r} cannot be divided by {type(partitioner).__name__}: {err} "
                "Ask for fewer clients (num_clients) or use more images (limit)."
            ) from err
        return [np.asarray(part["row"][:], dtype=np.int64) for part in parts]
