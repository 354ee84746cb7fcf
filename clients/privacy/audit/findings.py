r"""The statistics of the privacy audit: what was measured, held against what was claimed.

A mechanism is mu-GDP where nobody tells a record's presence better than N(mu, 1) from N(0, 1)
(Dong, Roth and Su, 1905.02383). Gaussian releases compose exactly, mu^2 = sum_j count_j / sigma_j^2
at sample rate 1, and mu is worth

    delta(eps, mu) = Phi(-eps / mu + mu / 2) - e^eps Phi(-eps / mu - mu / 2).

Many canaries in one run, each present by its own fair coin (Steinke, Nasr and Jagielski,
2305.08846), give with n_1 present and n_0 absent ones

    mu^ = (mean_1 - mean_0) / sd,   Var mu^ = 1 / n_1 + 1 / n_0 + mu^2 / (2 (n_1 + n_0 - 2)).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

BoundKind = Literal["at most", "within"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        what: one sentence on what was compared.
        unit: of the figures: "mu", "epsilon", "std ratio" or "share".
        estimate: the best guess.
        measured: what is held against the claim: the estimate where the kind is "within", its
            lower confidence bound where it is "at most".
        claimed: what the ledger, or the mechanism's definition, says.
        bound_kind: "at most": measured <= claimed; "within": |measured - claimed| <= tolerance.
        tolerance: of "within"; 0 for the other kind.
        alpha: the chance that an honest engine fails this comparison.
    """

    check: str
    what: str
    unit: str
    estimate: float
    measured: float
    claimed: float
    bound_kind: BoundKind
    tolerance: float = 0.0
    alpha: float

    @property
    def is_ok(self) -> bool:
        """Whether what was measured agrees with the claim; NaN never does."""
        if self.bound_kind == "at most":
            return self.measured <= self.claimed
        return abs(self.measured - self.claimed) <= self.tolerance


def separation(values: Tensor, is_in: Tensor) -> float:
    """Return mu^ of ``values`` (m,), some of which, ``is_in`` (m,), are of canaries present.

    Infinite where there is no noise and a difference, 0 where there is neither.
    """
    inside, outside = values[is_in].double(), values[~is_in].double()
    distance = float(inside.mean() - outside.mean())
    squares = (inside - inside.mean()).square().sum() + (outside - outside.mean()).square().sum()
    sd = math.sqrt(float(squares) / (len(values) - 2))
    if sd:
        return distance / sd
    return math.copysign(math.inf, distance) if distance else 0.0


def least_separation(estimate: float, is_in: Tensor, alpha: float) -> float:
    """Return what mu is at least, but for a chance of ``alpha``, by the normal bound above."""
    if math.isinf(estimate):
        return estimate
    present, total = int(is_in.sum()), len(is_in)
    variance = 1 / present + 1 / (total - present) + estimate**2 / (2 * (total - 2))
    return estimate - NormalDist().inv_cdf(1 - alpha) * math.sqrt(variance)


def delta_of(epsilon: float, mu: float) -> float:
    """Return delta(eps, mu) of a mu-GDP mechanism, for mu > 0.

    >>> round(delta_of(1.0, 1.0), 4)
    0.1269
    """
    far, near = (
        torch.tensor(x, dtype=torch.float64)
        for x in (-epsilon / mu - mu / 2, -epsilon / mu + mu / 2)
    )
    # e^eps alone would overflow where Phi underflows.
    return float(torch.special.ndtr(near) - torch.exp(epsilon + torch.special.log_ndtr(far)))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return epsilon at ``delta`` of a mu-GDP mechanism; 0 where it needs none.

    >>> round(epsilon_of_mu(1.0, 1e-5), 3)
    4.377
    """
    if math.isnan(mu) or math.isinf(mu):
        return mu if mu > 0 or math.isnan(mu) else 0.0
    if mu <= 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, mu * mu + mu * 40  # Phi(-40) is below every delta
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


def deviation_ratio(noise: Tensor, std: float) -> float:
    """Return the root mean square of ``noise`` over ``std``, which should be 1."""
    return float(noise.double().square().mean().sqrt()) / std


def ratio_tolerance(count: int, alpha: float) -> float:
    r"""Return how far from 1 the ratio of ``count`` degrees of freedom may be.

    sqrt(chi^2_k / k) is normal about 1 with variance 1 / (2 k) (Fisher); two-sided.
    """
    return NormalDist().inv_cdf(1 - alpha / 2) / math.sqrt(2 * count)


def share_tolerance(share: float, count: int, alpha: float) -> float:
    """Return how far from ``share`` that of ``count`` independent records may be; two-sided."""
    return NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(share * (1 - share) / count)
