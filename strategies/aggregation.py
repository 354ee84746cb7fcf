r"""Aggregations that resist bad clients, beside the plain ``mean`` of ``rules``.

    median        x_j = the middle of w_1j ... w_nj                     (Yin et al., 1803.01498)
    trimmed mean  x_j = mean of what is left of w_1j ... w_nj when the
                  k = floor(beta n) least and greatest are cut          (Yin et al., 1803.01498)
    Multi-Krum    x = sum p_i w_i over the m lowest score_i = sum of ||w_i - w_k||^2
                  over the n - f - 2 nearest others k        (Blanchard et al., 1703.02757)

Each is an ``Aggregation``: pure, float64 for floating arrays, the arrays of ``sent`` for others.
It takes one reply or more; one is given back as it is. NaN counts as greater than every number, so
few replies that are not finite do no harm.

Too few replies for a guarantee are no error here, the result is then as good as it can be: the
number that a guarantee needs stands in each docstring, and ``recipe.aggregation_of`` warns.

Memory: beyond the result, a few blocks of ``BLOCK`` float64 values (1 MiB each), however many
replies and however large arrays there are: they are worked through in slices of their columns.
Multi-Krum's last step is ``mean``, which holds two more arrays of the size of the one at hand.

Differences from the papers: they aggregate gradients; here it is models that clients trained, which
is the same for one local step. Multi-Krum weighs the models that it selects by ``weighting``.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..errors import ConfigError
from ..wire import NamedArrays
from .rules import Aggregation, Arrays, Reply, Weighting, is_floating, mean

BLOCK = 2**17  # values: fits in a processor's cache, which is what makes it fast


def median() -> Aggregation:
    """Return the coordinate-wise median; of an even number, the mean of the middle two.

    It ignores the weighting: a weight is a client's own claim. Bad replies, fewer than n / 2, leave
    each coordinate between the least and the greatest of the good ones; that takes n >= 3.
    """
    return _coordinate_wise(lambda n: (n - 1) // 2)


def trimmed_mean(beta: float = 0.2) -> Aggregation:
    """Return the mean of each coordinate without its floor(beta n) least and greatest values.

    It ignores the weighting, as the median does. Up to floor(beta n) bad replies leave each
    coordinate between the least and the greatest of the good ones; where beta n < 1 nothing is cut
    and it is the uniform mean.

    Raises:
        ConfigError: where beta is not in [0, 0.5).
    """
    if not 0 <= beta < 0.5:
        raise ConfigError(f"beta = {beta!r}: must be at least 0 and below 0.5")

    def cut(n: int) -> int:
        # 0.29 * 100 is 28.999999999999996: the user means 29. One value is always left.
        return min(math.floor(beta * n + 1e-9), (n - 1) // 2)

    return _coordinate_wise(cut)


def multi_krum(num_malicious: int = 1, num_selected: int = 0) -> Aggregation:
    """Return the mean, by the weighting, of the models that have near neighbours.

    Among equal scores the first replies are taken. Fewer replies than 2f + 3 give no guarantee:
    then at least one neighbour counts and at least one model is taken.

    Args:
        num_malicious: f >= 0, how many of a round's replies may be bad.
        num_selected: m >= 0, how many models are averaged; 0: n - f. 1 is Krum. More than n - f
            takes a bad one where there are f.

    Raises:
        ConfigError: where a number is negative.
    """
    for name, value in (("num_malicious", num_malicious), ("num_selected", num_selected)):
        if not value >= 0:
            raise ConfigError(f"{name} = {value!r}: must be at least 0")

    def aggregate(sent: NamedArrays, replies: Sequence[Reply], weighting: Weighting) -> Arrays:
        scores = krum_scores(sent, replies, num_malicious)
        count = num_selected or max(1, len(replies) - num_malicious)
        lowest = np.argsort(scores, kind="stable")[:count]
        return mean(sent, [replies[i] for i in sorted(lowest)], weighting)

    return aggregate


def krum_scores(sent: NamedArrays, replies: Sequence[Reply], num_malicious: int) -> np.ndarray:
    """Return (n,): summed squared distances to the n - f - 2 (at least 1) nearest others.

    Distances are over all floating arrays, in float64, from the differences of two models: the
    shorter ||x||^2 + ||y||^2 - 2xy would lose every digit of models that are close together.
    """
    n = len(replies)
    squared = np.zeros((n, n))
    with np.errstate(over="ignore", invalid="ignore"):  # a model that far away has distance inf
        for name in filter(lambda key: is_floating(sent[key]), sent):
            for _, block in _blocks(name, replies):
                for i in range(n - 1):
                    apart = block[i + 1 :] - block[i]  # (n - 1 - i, columns)
                    squared[i, i + 1 :] += np.einsum("kc,kc->k", apart, apart)
        squared += squared.T
        others = squared[~np.eye(n, dtype=bool)].reshape(n, n - 1)  # nobody neighbours itself
        others.sort(axis=1)
        scores: np.ndarray = others[:, : max(1, n - num_malicious - 2)].sum(axis=1)
    return scores


def _coordinate_wise(cut: Callable[[int], int]) -> Aggregation:
    """Return the mean of each coordinate without its ``cut(n)`` least and greatest values."""

    def aggregate(sent: NamedArrays, replies: Sequence[Reply], weighting: Weighting) -> Arrays:
        n, k = len(replies), cut(len(replies))
        result: Arrays = {}
        for name, value in sent.items():
            if not is_floating(value):
                result[name] = value
                continue
            flat = np.empty(value.size)
            for columns, block in _blocks(name, replies):
                # Sorted, so that the order of the replies does not even change rounding.
                block.sort(axis=0)
                flat[columns] = block[k : n - k].mean(axis=0)
            result[name] = flat.reshape(value.shape)
        return result

    return aggregate


def _blocks(name: str, replies: Sequence[Reply]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (columns, (n, columns) in float64) over the flattened array ``name`` of the replies."""
    flat = [reply.arrays[name].reshape(-1) for reply in replies]  # views
    width = max(1, BLOCK // len(flat))
    for begin in range(0, flat[0].size, width):
        columns = slice(begin, begin + width)
        yield columns, np.stack([one[columns] for one in flat], dtype=np.float64)
