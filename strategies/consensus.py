r"""What several models say of the same public records, made one: pure functions on NumPy arrays.

    FedMD   z = mean_k z_k                   ``average_logits``    (Li, Wang, 1910.03581)
    FedDF   q = softmax(mean_k z_k)          ``ensemble_targets``  (Lin et al., 2006.07242)
    DS-FL   q = softmax((mean_k p_k) / T)    ``era``               (Itahara et al., 2008.06180)
    robust  z = the middle of the z_k        ``median``, ``trimmed_mean``

The arrays are (K, N, C): clients, records in one common order, classes; floating. Results are
(N, C) in the dtype that came in, computed in float64.

No weights by numbers of examples: a client with more records does not know more of the public ones,
and the number is its own claim.

Order: medians and trimmed means sort, so the order of the clients does not change one bit. Sums
round by their order: the caller sorts the clients (by partition, as the shell does).

What comes from clients may be anything: each function raises for NaN and infinity and names the
clients; ``sound`` gives the reasons, so that a caller can leave such clients out first.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, WireError, unknown_name
from .sound_outputs import Bools, Floats, check_shape, checked, drop_worst, sound

Name = Literal["mean", "median", "trimmed-mean"]

__all__ = [
    "average_logits",
    "average_probabilities",
    "check_temperature",
    "consensus_of",
    "drop_worst",
    "ensemble_targets",
    "era",
    "era_logits",
    "median",
    "sound",
    "trimmed_mean",
]

BLOCK = 2**20  # values in float64 at once, 8 MiB, where all clients' rows are needed together


def consensus_of(name: str, logits: Floats, *, trim: float = 0.2) -> Floats:
    """Return the consensus (N, C) of logits (K, N, C) by ``name``.

    Args:
        name: "mean", "median" or "trimmed-mean".
        logits: (K, N, C), K >= 1, finite.
        trim: share that "trimmed-mean" cuts at each end, in [0, 0.5); the others ignore it.

    Raises:
        ConfigError: the name is unknown, or ``trim`` outside its range.
        WireError: the arrays are no (K, N, C) finite numbers; the clients are named.
    """
    if name not in get_args(Name):
        raise unknown_name("consensus", name, get_args(Name))
    if name == "mean":
        return average_logits(logits)
    return median(logits) if name == "median" else trimmed_mean(logits, trim)


def average_logits(logits: Floats) -> Floats:
    """Return the unweighted mean over the clients, (K, N, C) -> (N, C); FedMD's consensus.

    >>> average_logits(np.array([[[4.0, 0.0]], [[0.0, 2.0]]]))
    array([[2., 1.]])
    """
    return _mean(checked(logits)).astype(logits.dtype)


def average_probabilities(probabilities: Floats, weights: npt.ArrayLike | None = None) -> Floats:
    """Return sum_k w_k p_k over the clients, (K, N, C) -> (N, C).

    Args:
        probabilities: (K, N, C), K >= 1, finite; that rows are distributions is ``sound``'s to say.
        weights: (K,) at least 0, of a sum above 0, scaled to the sum 1; None: 1/K each.

    Raises:
        WireError: the arrays are no (K, N, C) finite numbers.
        ConfigError: the weights do not fit.
    """
    return _mean(checked(probabilities), weights).astype(probabilities.dtype)


def era(probabilities: Floats, temperature: float = 0.1) -> Floats:
    """Return softmax(mean_k p_k / T), (K, N, C) -> (N, C): DS-FL's entropy reduction.

    The mean p lies in [0, 1], so two classes differ by a factor of exp(1 / T) at most.

    Args:
        probabilities: (K, N, C), K >= 1, finite.
        temperature: T, finite and above 0.

    Raises:
        ConfigError: the temperature is outside its range.
        WireError: the arrays are no (K, N, C) finite numbers.

    >>> era(np.array([[[0.5, 0.3, 0.2]]])).round(6)
    array([[0.843795, 0.114195, 0.04201 ]])
    """
    check_temperature(temperature)
    return _softmax(_mean(checked(probabilities)), temperature).astype(probabilities.dtype)


def era_logits(
    logits: Floats, temperature: float = 0.1, *, by: str = "mean", trim: float = 0.2
) -> Floats:
    """Return pbar / T with p_k = softmax(z_k), (K, N, C) -> (N, C): its softmax is ``era``'s.

    Args:
        logits: z, (K, N, C), K >= 1, finite.
        temperature: T, finite and above 0.
        by: how the p_k become pbar, a name of ``consensus_of``.
        trim: as there.

    Raises:
        ConfigError: the temperature is outside its range, or the name unknown.
        WireError: the arrays are no (K, N, C) finite numbers.
    """
    check_temperature(temperature)
    probabilities = np.stack([_softmax(own.astype(np.float64)) for own in checked(logits)])
    return (consensus_of(by, probabilities, trim=trim) / temperature).astype(logits.dtype)


def check_temperature(temperature: float) -> None:
    """Raise ConfigError unless the temperature of ``era`` is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ConfigError(
            f"temperature = {temperature!r}: must be a finite number above 0, since mean "
            "probabilities are divided by it; the paper's is 0.1"
        )


def ensemble_targets(logits: Floats, kept: Bools | None = None) -> Floats:
    """Return softmax(mean_k z_k), (K, N, C) -> (N, C): what FedDF's student learns.

    Logits are averaged, not probabilities: a model that is sure says more than one that is not.

    Args:
        logits: (K, N, C), K >= 1, finite for those that are kept.
        kept: (K,) of bool, from ``drop_worst``; None: all.

    Raises:
        WireError: the arrays are no (K, N, C) finite numbers, or nobody is kept.

    >>> ensemble_targets(np.array([[[4.0, 0.0]], [[0.0, 2.0]]])).round(4)
    array([[0.7311, 0.2689]])
    """
    check_shape(logits)
    if kept is not None:
        if kept.dtype != np.bool_ or kept.shape != logits.shape[:1]:
            raise ConfigError(
                f"kept has shape {kept.shape} and dtype {kept.dtype}: one bool for each of the "
                f"{len(logits)} clients is needed"
            )
        if not kept.any():
            raise WireError(
                f"none of the {len(logits)} clients is kept, so there is nothing to learn from: "
                "keep all, or leave the student as it is this round"
            )
    return _softmax(_mean(checked(logits, kept))).astype(logits.dtype)


def median(logits: Floats) -> Floats:
    """Return the coordinate-wise median, (K, N, C) -> (N, C); of an even K the mean of two.

    Bad clients, fewer than K / 2, leave each value between the least and the greatest of the
    others (Yin et al., 1803.01498).

    Raises:
        WireError: the arrays are no (K, N, C) finite numbers.
    """
    return _without_ends(logits, lambda count: (count - 1) // 2)


def trimmed_mean(logits: Floats, fraction: float = 0.2) -> Floats:
    """Return the mean of each value without its floor(fraction K) least and greatest.

    Up to so many bad clients leave each value between the least and the greatest of the others;
    where fraction K < 1 nothing is cut and it is the mean.

    Raises:
        ConfigError: the fraction is not in [0, 0.5).
        WireError: the arrays are no (K, N, C) finite numbers.
    """
    if not 0 <= fraction < 0.5:
        raise ConfigError(
            f"fraction = {fraction!r}: must be at least 0 and below 0.5, the share of the clients "
            "that is cut at each end"
        )
    # 0.29 * 100 is 28.999999999999996: the user means 29. One value is always left.
    return _without_ends(
        logits, lambda count: min(math.floor(fraction * count + 1e-9), (count - 1) // 2)
    )


def _mean(values: Floats, weights: npt.ArrayLike | None = None) -> npt.NDArray[np.float64]:
    """Return the mean over the first axis in float64, one client after another."""
    count = len(values)
    shares = np.full(count, 1.0) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != (count,) or not (
        np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0
    ):
        raise ConfigError(
            f"weights are {shares.tolist()}: {count} finite numbers >= 0, not all 0, are needed, "
            "one for each client"
        )
    total = np.zeros(values.shape[1:])  # float64
    for own, share in zip(values, shares / shares.sum(), strict=True):
        total += np.multiply(own, share, dtype=np.float64)  # no sum above the greatest value
    return total


def _softmax(logits: npt.NDArray[np.float64], temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Return softmax(z / T) over the last axis; the greatest exponent is 0."""
    powers = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _without_ends(logits: Floats, cut: Callable[[int], int]) -> Floats:
    """Return the mean of each value without its ``cut(K)`` least and greatest."""
    values = checked(logits)
    count, k = len(values), cut(len(values))
    result = np.empty(values.shape[1:], values.dtype)
    for rows in _row_blocks(values.shape):
        block = values[:, rows].astype(np.float64)  # (K, rows, C)
        block.sort(axis=0)  # so that the order of the clients does not even change rounding
        result[rows] = block[k : count - k].mean(axis=0)
    return result


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of the N records, so many that a block has about BLOCK values."""
    count, records, classes = shape
    height = max(1, BLOCK // (count * classes))
    for begin in range(0, records, height):
        yield slice(begin, begin + height)
