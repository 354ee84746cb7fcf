r"""What releases cost: events (noise multiplier, sample rate, count) -> epsilon at a delta.

An event is a Gaussian mechanism on a Poisson sample, of sensitivity 1 under adding or removing one
record, or one client where clients are the unit. Composition is exact in Renyi divergence at the
orders below (Mironov, 1702.07476; Mironov et al., 1908.10530; converted by Canonne et al.,
2004.00010), or numerical in the privacy loss (PRV: Gopi et al., 2106.02848).

Equal events are counted together first: the same epsilon, and a hundred times faster under PRV.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from .errors import ConfigError, unknown_name
from .opacus_import import import_opacus, rdp_formulas

Accountant = Literal["rdp", "prv"]
ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(11, 64),
    *(72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024),
)
LARGEST_COUNT = 2**40  # releases: more are no question of privacy any more
LEAST_NOISE, MOST_NOISE = 1e-9, 1e9  # of an event: beyond them the formulas overflow
LEAST_DIVERGENCE = 1e-11  # below it the formulas have less than five digits
NOISES = (0.1, 1e6)  # where a noise multiplier is looked for


class Event(NamedTuple):
    """``count`` releases of one kind.

    Attributes:
        noise_multiplier: standard deviation of the noise over the sensitivity, > 0.
        sample_rate: of the Poisson sample, in (0, 1].
        count: how many, >= 1.
    """

    noise_multiplier: float
    sample_rate: float
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, which nobody wants


Events = Sequence[Event]


def aggregated(events: Iterable[Event]) -> list[Event]:
    """Return the events with equal ones counted together, in a fixed order.

    >>> aggregated([Event(1.0, 0.1), Event(2.0, 0.1), Event(1.0, 0.1, 3)])
    [Event(noise_multiplier=1.0, sample_rate=0.1, count=4), Event(noise_multiplier=2.0, \
sample_rate=0.1, count=1)]
    """
    counts: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, count in events:
        key = (float(noise_multiplier), float(sample_rate))
        counts[key] = counts.get(key, 0) + count
    return [Event(*key, counts[key]) for key in sorted(counts)]


def schedule_of(events: Events) -> Events:
    """Return the shortest events whose repetition ``events`` are."""
    found = aggregated(events)
    times = reduce(math.gcd, (event.count for event in found), 0)
    return tuple(event._replace(count=event.count // times) for event in found)


def check_events(events: Iterable[Event]) -> None:
    """Raise ConfigError for an event that no accountant can take, naming the value."""
    for event in events:
        sigma, rate, count = event
        if not LEAST_NOISE <= sigma <= MOST_NOISE:
            raise ConfigError(
                f"noise_multiplier = {sigma!r}: must be a number above 0, from {LEAST_NOISE:g} to "
                f"{MOST_NOISE:g}"
            )
        if not 0 < rate <= 1:
            raise ConfigError(f"sample_rate = {rate!r}: must lie in (0, 1]")
        if isinstance(count, bool) or not (isinstance(count, int) and 1 <= count < LARGEST_COUNT):
            raise ConfigError(
                f"count = {count!r}: must be a whole number of at least 1, below {LARGEST_COUNT}"
            )


def check_delta(delta: float, name: str = "delta") -> None:
    """Raise ConfigError unless ``delta`` lies strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise ConfigError(f"{name} = {delta!r}: must lie between 0 and 1, well below 1 / records")


def rdp_of(events: Iterable[Event]) -> np.ndarray:
    """Return the Renyi divergence of all events at each of ``ORDERS``; 0 where there is none."""
    total = np.zeros(len(ORDERS))
    for noise_multiplier, sample_rate, count in events:
        total = total + count * _rdp_of_one(float(noise_multiplier), float(sample_rate))
    return total


def epsilon_of(events: Iterable[Event], delta: float, accountant: Accountant = "rdp") -> float:
    """Return epsilon at ``delta`` of all events together; 0 where there is none.

    Args:
        events: which releases were made.
        delta: in (0, 1).
        accountant: "rdp", an upper bound at the best of ``ORDERS``; "prv", tighter by some percent
            and slower by a second, for schedules that were fixed before the first release.

    Raises:
        ConfigError: where a value is out of range, naming it.

    >>> round(epsilon_of([Event(1.0, 0.05, 1000)], 1e-5), 2)
    11.98
    """
    check_delta(delta)
    given = list(events)
    check_events(given)  # each one, before counts add up
    found = aggregated(given)
    if accountant not in get_args(Accountant):
        raise unknown_name("accountant", accountant, get_args(Accountant))
    if not found:
        return 0.0
    upper = _epsilon(rdp_of(found), delta)
    return min(upper, _prv_epsilon(tuple(found), delta)) if accountant == "prv" else upper


@dataclass(frozen=True)
class Budget:
    """What may be spent on one data set, over all time.

    Attributes:
        epsilon: > 0.
        delta: in (0, 1).
        accountant: "rdp" or "prv".

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    epsilon: float
    delta: float
    accountant: Accountant = "rdp"

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(
                f"target_epsilon = {self.epsilon!r}: must be a finite number above 0, e.g. 3"
            )
        check_delta(self.delta, "target_delta")
        if self.accountant not in get_args(Accountant):
            raise unknown_name("accountant", self.accountant, get_args(Accountant))

    def admits(self, spent: Events, more: Events, *, first: Events, is_fixed: bool) -> bool:
        """Return whether ``more`` may be released after ``spent``.

        Where all of it repeats one schedule, only the time to stop is open: the cost of the longest
        admitted run bounds every shorter one, so the best order, or PRV, may be looked for. Else
        parameters may have been chosen by what was released before, and a privacy filter is
        needed: one order, fixed in advance, at which divergences add up (Feldman and Zrnic,
        2008.11193; Lecuyer, 2103.01379).

        Args:
            spent: all releases so far.
            more: those that are asked for.
            first: the schedule that was first released, which decides the order of the filter.
            is_fixed: whether all releases, and ``more``, repeat it.
        """
        total = aggregated([*spent, *more])
        rdp = rdp_of(total)
        if not is_fixed:
            at = filter_order(tuple(first), self.epsilon, self.delta)
            return _epsilon(rdp, self.delta, slice(at, at + 1)) <= self.epsilon
        if _epsilon(rdp, self.delta) <= self.epsilon:
            return True
        is_prv = self.accountant == "prv"
        return is_prv and _prv_epsilon(tuple(total), self.delta) <= self.epsilon


@lru_cache(maxsize=256)
def filter_order(first: tuple[Event, ...], epsilon: float, delta: float) -> int:
    """Return the index in ``ORDERS`` that admits the most repetitions of ``first``.

    It depends on nothing that was released: on the first schedule and the budget alone.
    """
    return int(np.argmax((epsilon - _conversion(delta)) / rdp_of(first)))


def calibrated_noise(
    events_at: Callable[[float], Events],
    *,
    epsilon: float,
    delta: float,
    accountant: Accountant = "rdp",
) -> float:
    """Return the least noise multiplier sigma at which ``events_at(sigma)`` cost ``epsilon``.

    It is looked for in ``NOISES`` by dp_accounting's search, and rounded up to four digits.

    Args:
        events_at: the events of a whole plan as a function of sigma, mixed ones included; more
            noise must never cost more.
        epsilon: > 0.
        delta: in (0, 1).
        accountant: "rdp" or "prv"; see ``epsilon_of``.

    Raises:
        ConfigError: where a value is out of range, or no noise is enough.
    """
    from dp_accounting import ExplicitBracketInterval, calibrate_dp_mechanism

    Budget(epsilon, delta, accountant)

    def excess(sigma: float) -> float:
        return epsilon_of(events_at(sigma), delta, accountant) - epsilon

    low, high = NOISES
    if accountant == "prv":  # which is below RDP, and not far: a narrow bracket saves its seconds
        high = calibrated_noise(events_at, epsilon=epsilon, delta=delta)
        low = max(low, 0.7 * high)
    if excess(low) <= 0:
        return low
    if excess(high) > 0:
        raise ConfigError(
            f"epsilon = {epsilon!r} at delta = {delta!r}: no noise multiplier from {NOISES[0]:g} "
            f"to {NOISES[1]:g} gives it; ask for fewer rounds, a lower sample rate or a larger "
            "epsilon"
        )
    # By the logarithm of sigma: from 0.1 to 1e6 epsilon falls from 1e5 to 0.
    found = calibrate_dp_mechanism(
        lambda: _our_accountant(accountant, cap=4 * epsilon),
        lambda logarithm: _dp_event(events_at(math.exp(logarithm))),
        epsilon,
        delta,
        ExplicitBracketInterval(math.log(low), math.log(high)),
        tol=1e-5,
    )
    sigma = rounded_up(math.exp(found))
    while excess(sigma) > 0:  # an accountant that is numerical is not smooth to the last digit
        sigma = rounded_up(sigma + 1e-4)
    return sigma


def rounded_up(sigma: float) -> float:
    """Return a noise multiplier with four decimals, not below ``sigma`` by more than 1e-10."""
    return math.ceil(sigma * 1e4 - 1e-6) / 1e4


def _dp_event(events: Events) -> Any:
    import dp_accounting

    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)),
                count,
            )
            for sigma, rate, count in aggregated(events)
        ]
    )


def _our_accountant(accountant: Accountant, *, cap: float) -> Any:
    """Return ``epsilon_of`` as an accountant of dp_accounting, whose own is looser than Opacus'.

    Epsilon is told up to ``cap``: so a search does not follow a curve of five decades.
    """
    from dp_accounting import NeighboringRelation, PrivacyAccountant

    class Ours(PrivacyAccountant):  # type: ignore[misc]  # the library has no annotations
        def __init__(self) -> None:
            super().__init__(NeighboringRelation.ADD_OR_REMOVE_ONE)
            self._events: list[Event] = []

        def _maybe_compose(self, event: Any, count: int, do_compose: bool) -> None:
            if do_compose:
                self._events += [
                    Event(one.event.event.noise_multiplier, one.event.sampling_probability, n)
                    for one in event.events
                    if (n := one.count * count)
                ]

        def get_epsilon(self, target_delta: float) -> float:
            return min(epsilon_of(self._events, target_delta, accountant), cap)

    return Ours()


@lru_cache(maxsize=1024)
def _rdp_of_one(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    found = np.asarray(
        rdp_formulas().compute_rdp(
            q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS)
        ),
        dtype=np.float64,
    )
    # Opacus takes the logarithm of 1 + x, which loses a small x, and at 0 any number of releases
    # would be free: there it is the first term of its series in x.
    first = np.array(ORDERS) * sample_rate**2 * np.expm1(min(noise_multiplier**-2, 700.0)) / 2
    found = np.where(found < LEAST_DIVERGENCE, np.maximum(found, first), found)
    found.flags.writeable = False
    return found


def _epsilon(rdp: np.ndarray, delta: float, at: slice = slice(None)) -> float:
    """Return epsilon of the divergences at ``ORDERS[at]``: what the best of these orders gives."""
    return max(float((rdp[at] + _conversion(delta)[at]).min()), 0.0)


@lru_cache(maxsize=256)
def _conversion(delta: float) -> np.ndarray:
    """Return epsilon - divergence at each order (Canonne et al., proposition 12), as Opacus has it.

    Kept for each delta: epsilon is read in every round.
    """
    orders = np.array(ORDERS)
    offsets: np.ndarray = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return offsets


@lru_cache(maxsize=256)
def _prv_epsilon(events: tuple[Event, ...], delta: float) -> float:
    import_opacus()
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [tuple(event) for event in events]
    # At a sample rate of 1 it takes the logarithm of 0, and means it.
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        # It takes the divergence, at fewer orders than ours, for the width of its grid alone.
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        return float(accountant.get_epsilon(delta))
