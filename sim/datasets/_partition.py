"""Partitions of rows by flwr_datasets' partitioners, over a table of labels and row numbers only.

The images stay where they are: a partitioner sees two integer columns, so 60,000 rows take a tenth
of a second.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError

Rows = npt.NDArray[np.int64]


def partition_rows(
    partitioner: Any, labels: npt.NDArray[Any], *, column: str = "label"
) -> list[Rows]:
    """Return the row numbers of each partition that ``partitioner`` makes of ``labels``.

    Args:
        partitioner: one of flwr_datasets.partitioner, fresh, reading ``column``.
        labels: (n,) integers: classes, or whatever the partitioner divides by.
        column: what the partitioner calls the labels.

    Raises:
        ValueError: the partitioner cannot divide these labels so.
    """
    import datasets

    table = {"row": np.arange(len(labels)), column: np.asarray(labels)}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # Few clients leave classes out: asked for, so no warning. The progress bar is noise.
        warnings.filterwarnings("ignore", message="Classes: .* will NOT be used")
        partitioner.dataset = datasets.Dataset.from_dict(table)
        parts = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
        return [np.asarray(part["row"][:], dtype=np.int64) for part in parts]


def divide(
    dataset: str,
    make: Callable[[int], Any],
    labels: npt.NDArray[Any],
    *,
    num_clients: int,
    per_class: int = 1,
    remedy: str = "",
) -> list[Rows]:
    """Return the row numbers of each of ``num_clients`` clients.

    Args:
        dataset: name, for the error.
        make: gives a fresh partitioner for a number of clients.
        labels: (n,) classes.
        num_clients: at least 1.
        per_class: rows of each of its classes that a client should have. Fewer are no error here;
            the number of clients that an error recommends leaves so many.
        remedy: what a user can do beside lowering ``num_clients``, for the error.

    Raises:
        DataError: there are too few rows; names ``num_clients`` and the largest that works.
    """
    try:
        return partition_rows(make(num_clients), labels)
    except ValueError as err:
        largest = _largest(make, labels, below=num_clients, per_class=per_class)
        needed = f"{per_class} images of each class" if per_class > 1 else "2 images"
        works = f"The largest number that works, with {needed} for a client, is {largest}"
        advice = " or ".join(filter(None, ("lower num_clients" if largest else "", remedy)))
        raise DataError(
            f"data set {dataset!r} with num_clients = {num_clients}: its {len(labels)} images are "
            f"too few. {works if largest else f'No number works ({err})'}: {advice}"
        ) from err


def _largest(
    make: Callable[[int], Any], labels: npt.NDArray[Any], *, below: int, per_class: int
) -> int:
    """Return the largest number of clients that works, by bisection; 0 where none does."""

    def works(number: int) -> bool:
        try:
            parts = partition_rows(make(number), labels)
        except ValueError:
            return False
        counts = (np.unique(labels[rows], return_counts=True)[1] for rows in parts)
        return all(bool((count >= per_class).all()) for count in counts)

    low, high = 0, min(below - 1, len(labels) // 2)  # the largest lies in [low, high]
    middle = high  # few partitioners refuse this one
    while low < high:
        low, high = (middle, high) if works(middle) else (low, middle - 1)
        middle = (low + high + 1) // 2
    return low
