r"""What a run will cost a client, before it starts, and the noise that a budget asks for.

Releases of a round with L local steps of K inner steps each:

| method | releases |
|---|---|
| reptile, dp-sgd | L |
| fomaml, meta-sgd (first order) | L (K + 1) |
| second-order | L (K + 1), and L K Hessian-vector products |

The worst case: one client takes part in every round of the plan, and nothing is gained from the
server's choice of clients, which the server knows.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .accounting import (
    Accountant,
    Budget,
    Event,
    aggregated,
    calibrated_noise,
    check_events,
    epsilon_of,
    rounded_up,
)
from .errors import ConfigError, unknown_name
from .keys import Scalar, key_of

Method = Literal["fomaml", "reptile", "dp-sgd", "meta-sgd", "second-order"]
PLAIN = ("reptile", "dp-sgd")  # no inner loop
STEPS = (1, 2, 5)  # that a plan is compared with
NOISY = 0.3  # above this ratio of noise to signal the second-order term is mostly noise
MOST_RELEASES = 1000  # of one round, where privacy.max-releases says nothing


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What one client releases over a run.

    Attributes:
        rounds: in which the client takes part, >= 1.
        method: a name of ``Method``.
        inner_steps: K >= 1; without effect on reptile and dp-sgd.
        local_steps: L >= 1, steps or meta-steps of a round.
        sample_rate: q in (0, 1], the chance of each record to be in a batch.
        hvp_ratio: sigma_h / sigma > 0, noise of Hessian-vector products over that of gradients.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    rounds: int
    method: str = "fomaml"
    inner_steps: int = 1
    local_steps: int = 1
    sample_rate: float = 0.1
    hvp_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise unknown_name("method", self.method, get_args(Method))
        for name in ("rounds", "inner_steps", "local_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} = {value!r}: must be a whole number of at least 1")
        if not 0 < self.hvp_ratio < math.inf:
            raise ConfigError(f"hvp_ratio = {self.hvp_ratio!r}: must be a finite number above 0")
        check_events(self.events(1.0))

    def hvp_noise(self, noise_multiplier: float) -> float:
        """Return sigma_h where gradients have ``noise_multiplier``, rounded up as a user sets it.

        >>> Schedule(rounds=1, hvp_ratio=1.5).hvp_noise(1.23456)
        1.8519
        """
        same = self.hvp_ratio == 1
        return noise_multiplier if same else rounded_up(self.hvp_ratio * noise_multiplier)

    def events_of_round(self, noise_multiplier: float) -> list[Event]:
        """Return the releases of one round; see the table above.

        >>> [tuple(e) for e in Schedule(rounds=9, method="second-order").events_of_round(1.0)]
        [(1.0, 0.1, 3)]
        """
        sigma, rate, local, inner = (
            noise_multiplier,
            self.sample_rate,
            self.local_steps,
            self.inner_steps,
        )
        if self.method in PLAIN:
            return [Event(sigma, rate, local)]
        events = [Event(sigma, rate, local * (inner + 1))]
        if self.method == "second-order":
            events.append(Event(self.hvp_noise(sigma), rate, local * inner))
        return aggregated(events)

    def events(self, noise_multiplier: float) -> list[Event]:
        """Return the releases of all rounds."""
        one = self.events_of_round(noise_multiplier)
        return [event._replace(count=event.count * self.rounds) for event in one]

    @property
    def releases(self) -> int:
        """How many releases there are over all rounds."""
        return sum(event.count for event in self.events(1.0))


@dataclass(frozen=True)
class Alternative:
    """Another choice beside a plan, by RDP: PRV takes a second for each number.

    Attributes:
        change: what differs from the plan, as a user says it, e.g. "rounds = 50"; "as planned" for
            the plan itself.
        schedule: the plan's with that change.
        noise_multiplier: what it asks for at the plan's epsilon; None: none is enough.
        epsilon: what it costs at the plan's noise.
    """

    change: str
    schedule: Schedule
    noise_multiplier: float | None
    epsilon: float


@dataclass(frozen=True)
class Plan:
    """The least noise at which a schedule stays within a budget, and what others would cost.

    Attributes:
        schedule: what is released.
        budget: the target.
        noise_multiplier: sigma, rounded up to four decimals.
        epsilon_rdp: of all releases at the budget's delta, by Renyi divergence.
        epsilon_prv: the same by the numerical accountant.
        alternatives: the plan itself first, to compare them with.
    """

    schedule: Schedule
    budget: Budget
    noise_multiplier: float
    epsilon_rdp: float
    epsilon_prv: float
    alternatives: tuple[Alternative, ...]

    @property
    def events(self) -> list[Event]:
        """All releases of the plan."""
        return self.schedule.events(self.noise_multiplier)

    @property
    def settings(self) -> dict[str, Scalar]:
        """The configuration keys of the plan; those of no method alone come first."""
        chosen: dict[str, Scalar] = {
            "privacy_noise_multiplier": self.noise_multiplier,
            "privacy_sample_rate": self.schedule.sample_rate,
            "privacy_target_epsilon": self.budget.epsilon,
            "privacy_target_delta": self.budget.delta,
        }
        if self.budget.accountant != "rdp":
            chosen["privacy_accountant"] = self.budget.accountant
        schedule, is_second = self.schedule, self.schedule.method == "second-order"
        if is_second:
            chosen["order"] = "exact"
            if schedule.hvp_ratio != 1:
                hvp_noise = schedule.hvp_noise(self.noise_multiplier)
                chosen["privacy_hvp_noise_multiplier"] = hvp_noise
        if schedule.method not in PLAIN and schedule.inner_steps > 1:
            chosen["inner_steps"] = schedule.inner_steps
        if schedule.local_steps > 1:
            chosen["local_steps"] = schedule.local_steps
        of_round = schedule.releases // schedule.rounds
        if of_round > MOST_RELEASES:
            chosen["privacy_max_releases"] = of_round
        return {key_of(name): value for name, value in chosen.items()}


def plan(
    *,
    epsilon: float,
    delta: float,
    rounds: int,
    method: str = "fomaml",
    inner_steps: int = 1,
    local_steps: int = 1,
    sample_rate: float = 0.1,
    hvp_ratio: float = 1.0,
    accountant: Accountant = "rdp",
) -> Plan:
    """Return the least noise at which a client can take part in ``rounds`` rounds.

    Args:
        epsilon: target, > 0.
        delta: target, in (0, 1).
        rounds: see ``Schedule``, as for the rest.
        method: "fomaml", "reptile", "dp-sgd", "meta-sgd" or "second-order".
        inner_steps: K >= 1.
        local_steps: L >= 1.
        sample_rate: in (0, 1].
        hvp_ratio: > 0.
        accountant: "rdp" or "prv", by which the client will stop.

    Raises:
        ConfigError: where a value is out of range, or no noise is enough.

    >>> made = plan(epsilon=3.0, delta=1e-5, rounds=1, method="reptile", sample_rate=1.0)
    >>> made.epsilon_rdp <= 3.0, made.settings["privacy.noise-multiplier"] < 2
    (True, True)
    """
    budget = Budget(epsilon, delta, accountant)
    schedule = Schedule(
        rounds=rounds,
        method=method,
        inner_steps=inner_steps,
        local_steps=local_steps,
        sample_rate=sample_rate,
        hvp_ratio=hvp_ratio,
    )
    sigma = calibrated_noise(schedule.events, epsilon=epsilon, delta=delta, accountant=accountant)
    found: dict[tuple[Event, ...], float | None] = {}  # choices that release the same cost the same

    def alternative(change: str, other: Schedule) -> Alternative:
        key = tuple(other.events(1.0))
        if key not in found:
            found[key] = least_noise(other, replace(budget, accountant="rdp"))
        cost = epsilon_of(other.events(sigma), delta, "rdp")
        return Alternative(change, other, found[key], cost)

    events = schedule.events(sigma)
    costs = epsilon_of(events, delta, "rdp"), epsilon_of(events, delta, "prv")
    choices = [("as planned", schedule), *neighbours(schedule)]
    others = tuple(alternative(*one) for one in choices)
    return Plan(schedule, budget, sigma, *costs, others)


def neighbours(schedule: Schedule) -> list[tuple[str, Schedule]]:
    """Return schedules that differ from ``schedule`` in one choice, each with what differs."""
    steps = "local_steps" if schedule.method in PLAIN else "inner_steps"
    rate, rounds = schedule.sample_rate, schedule.rounds
    choices: list[tuple[str, tuple[Scalar, ...]]] = [
        ("method", get_args(Method)),
        (steps, STEPS),
        ("sample_rate", (rate / 2, min(1.0, 2 * rate))),
        ("rounds", (max(1, rounds // 2), 2 * rounds)),
    ]
    return [
        (f"{key_of(name)} = {_told(value)}", replace(schedule, **{name: value}))  # type: ignore[arg-type]  # by name
        for name, values in choices
        for value in values
        if value != getattr(schedule, name)
    ]


def least_noise(schedule: Schedule, budget: Budget) -> float | None:
    """Return the least noise multiplier at which ``schedule`` stays within ``budget``.

    It is rounded up to four decimals; None where no noise is enough.
    """
    epsilon, delta, accountant = budget.epsilon, budget.delta, budget.accountant
    try:
        return calibrated_noise(
            schedule.events, epsilon=epsilon, delta=delta, accountant=accountant
        )
    except ConfigError:
        return None


def noise_to_signal(
    *,
    inner_lr: float,
    hvp_noise: float,
    hvp_max_norm: float,
    num_parameters: int,
    batch_size: float,
) -> float:
    """Return alpha sigma_h c_h sqrt(d) / b: the noise of one Hessian product over its direction.

    It is that of the private clients, for a plan that needs no torch.

    Args:
        inner_lr: alpha > 0.
        hvp_noise: sigma_h > 0.
        hvp_max_norm: c_h > 0.
        num_parameters: d >= 1.
        batch_size: b > 0, the expected one.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """
    given = {
        "inner_lr": inner_lr,
        "hvp_noise": hvp_noise,
        "hvp_max_norm": hvp_max_norm,
        "parameters": num_parameters,
        "batch_size": batch_size,
    }
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value!r}: must be a finite number above 0")
    return inner_lr * hvp_noise * hvp_max_norm * math.sqrt(num_parameters) / batch_size


def at_most(epsilon: float) -> str:
    """Return an upper bound as a short text that is never below it.

    >>> at_most(2.9301), at_most(3.0), at_most(0.00123), at_most(0.0), at_most(float("inf"))
    ('2.94', '3.00', '0.0013', '0', 'infinite')
    """
    if not 0 < epsilon < math.inf:
        return "infinite" if epsilon > 0 else "0"
    decimals = max(2, 1 - math.floor(math.log10(epsilon)))
    scale = 10.0**decimals
    return f"{math.ceil(epsilon * scale - 1e-9) / scale:.{decimals}f}"


def _told(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
