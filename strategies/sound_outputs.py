"""Which clients' outputs on public records can be used: finite, distributions, better than chance.

The arrays are (K, N, C): clients, records in one common order, classes; floating. What comes from
clients may be anything, so each answer names the client by its index.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, WireError

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

SUM_TOLERANCE = 1e-2  # of a row of probabilities: float16 rounds each by up to 5e-4


def drop_worst(logits: Floats, labels: npt.NDArray[np.integer[Any]]) -> Bools:
    """Return (K,): whether each client's accuracy on a validation set reaches chance, 1 / C.

    A row that is not finite counts as wrong. Where nobody reaches it, nobody is kept: what then
    happens is the caller's decision.

    Args:
        logits: (K, N, C) on the N >= 1 labelled records of the validation set.
        labels: (N,) integers in [0, C).

    Raises:
        WireError: the logits are no (K, N, C) floating numbers.
        ConfigError: the labels do not fit.

    >>> drop_worst(np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]), np.array([0, 1]))
    array([ True, False])
    """
    check_shape(logits)
    _, records, classes = logits.shape
    fits = np.issubdtype(labels.dtype, np.integer) and labels.shape == (records,)
    if not fits or not 0 <= labels.min() <= labels.max() < classes:
        raise ConfigError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}: one integer class in "
            f"[0, {classes}) for each of the {records} records is needed"
        )
    right = (logits.argmax(axis=2) == labels) & np.isfinite(logits).all(axis=2)  # (K, N)
    # In whole numbers: right / N >= 1 / C without the rounding of either.
    kept: Bools = right.sum(axis=1) * classes >= records
    return kept


def sound(values: Floats, *, probabilities: bool = False) -> list[str]:
    """Return for each client why its values cannot be used, "" where they can.

    Args:
        values: (K, N, C): logits, or probabilities.
        probabilities: rows must also be at least 0 and of sum 1, to within 0.01.

    Raises:
        WireError: the array is no (K, N, C) floating one.

    >>> sound(np.array([[[1.0, 2.0]], [[np.nan, 0.0]]]))
    ['', '1 of 1 rows hold NaN or infinity, row 0 first']
    """
    check_shape(values)
    return [_reason(own, probabilities) for own in values]


def _reason(own: Floats, probabilities: bool) -> str:
    """Return why one client's rows (N, C) cannot be used, or ""."""
    judged = [("hold NaN or infinity", ~np.isfinite(own).all(axis=1))]
    if probabilities:
        with np.errstate(over="ignore", invalid="ignore"):
            apart = np.abs(own.sum(axis=1, dtype=np.float64) - 1)
        judged.append(("hold negative probabilities", (own < 0).any(axis=1)))
        judged.append(("do not sum to 1", ~(apart <= SUM_TOLERANCE)))
    for what, bad in judged:
        if bad.any():
            return f"{bad.sum()} of {len(own)} rows {what}, row {bad.argmax()} first"
    return ""


def check_shape(values: Floats) -> None:
    """Raise WireError unless the array is a floating (K, N, C) with at least one of each."""
    if values.ndim != 3 or 0 in values.shape or not np.issubdtype(values.dtype, np.floating):
        raise WireError(
            f"the clients' outputs have shape {values.shape} and dtype {values.dtype}: floating "
            "(clients, records, classes) are needed, at least one of each"
        )


def checked(values: Floats, kept: Bools | None = None) -> Floats:
    """Return the outputs of the clients that are kept; raise WireError where one is not finite."""
    check_shape(values)
    if not np.isfinite(values if kept is None else values[kept]).all():
        reasons = [
            f"client {index}: {why}"
            for index, why in enumerate(sound(values))
            if why and (kept is None or kept[index])
        ]
        raise WireError(
            f"{len(reasons)} of {len(values)} clients sent outputs that are not finite, which "
            f"would spoil the consensus ({'; '.join(reasons)}): leave them out, sound() names them"
        )
    return values if kept is None else values[kept]
