"""The account of a run with user-level privacy: no noise, and no sample, that was not booked."""

from dataclasses import dataclass, replace
from logging import INFO, WARNING

import numpy as np
from flwr.common import log

from ...accounting import epsilon_of
from ...errors import BudgetExhaustedError, ConfigError, PrivacyError
from ...ledger import UNIT, Charge, PrivacyLedger
from ...streams import numpy_stream
from ..rules import Rule, State
from ..user_level import (
    ADDED,
    LEDGER,
    LEFT_OUT,
    UserLevelPrivacy,
    fresh_generator,
    norm_in,
    with_user_privacy,
)
from .firewall import Firewall

SPENT = "the user-level budget is spent"
MECHANISM = "user-level"


@dataclass(frozen=True)
class UserLevelSpent:
    """What the models tell of any one client, over all runs that the ledger has seen.

    Attributes:
        unit: what is protected.
        adjacency: "add or remove" one client, or "leave out": its answers are left out.
        epsilon: of all releases together.
        delta: at which epsilon was computed.
        target_epsilon: at which runs stop to train; None: never.
        noise_multiplier: z of this run.
        sample_rate: q of this run; None: samples of fixed size, no amplification.
        max_update_norm: C of the next round: what an adaptive one has come to.
        rounds: how many were booked, those that were played again after a resume among them.
        seeded: whether noise of a known seed was among it, so that it protects nobody.
    """

    unit: str
    adjacency: str
    epsilon: float
    delta: float
    target_epsilon: float | None
    noise_multiplier: float
    sample_rate: float | None
    max_update_norm: float
    rounds: int
    seeded: bool


class UserAccount:
    """Books each round, and gives out randomness for what is paid for.

    Args:
        privacy: the parameters, with the ledger.
    """

    def __init__(self, privacy: UserLevelPrivacy) -> None:
        self._privacy = privacy
        self._ledger = _ledger_of(privacy)
        self._charge: Charge | None = None
        self._has_told = False

    @classmethod
    def of(
        cls, privacy: UserLevelPrivacy | None, *, min_fit_replies: int, max_offences: int | None
    ) -> "UserAccount | None":
        """Return the account of a run; None where it has no user-level privacy.

        Raises:
            ConfigError: where a setting of the shell makes what becomes of one client's answers, or
                of the round, a matter of another client.
        """
        if privacy is None:
            return None
        if min_fit_replies > 1:
            raise ConfigError(
                f"min_fit_replies = {min_fit_replies} with user-level privacy: a round that is "
                "skipped for want of replies would tell who was there; leave it at 1"
            )
        if max_offences is not None and privacy.sample_rate is None:
            raise ConfigError(
                f"max_offences = {max_offences} with user-level privacy and samples of fixed size: "
                "another client would take an offender's place, and tell of it; leave it out, or "
                "set a sample rate, with which each client takes part by itself"
            )
        return cls(privacy)

    def private(self, rule: Rule) -> Rule:
        """Return the rule on the one noisy reply of each round that is paid for."""
        return with_user_privacy(rule, self._privacy, self.noise)

    @staticmethod
    def firewall(firewall: Firewall, privacy: UserLevelPrivacy | None) -> Firewall:
        """Return the firewall; with privacy without the rule by which one reply's fate is others'.

        That is the largest share of the weights, which user-level privacy ignores anyway.
        """
        return replace(firewall, max_share=1.0) if privacy else firewall

    def reserve(self, run: str, server_round: int, *, num_clients: int) -> bool:
        """Book a round for good; return False where the budget does not admit it.

        Args:
            run: identity of the run.
            server_round: number of the round.
            num_clients: how many could take part; for a warning alone.

        Raises:
            ConfigError: where the budget is below the cost of one round.
            LedgerError: where the ledger is damaged; nothing is released then.
        """
        privacy, self._charge = self._privacy, None
        self._tell(num_clients)
        try:
            self._charge = self._ledger.reserve(
                [privacy.event],
                budget=privacy.budget,
                mechanism=MECHANISM,
                run=run,
                server_round=server_round,
                seeded=privacy.seed is not None,
            )
        except BudgetExhaustedError:
            if not self._ledger.head.lines:
                cost = epsilon_of([privacy.event], privacy.target_delta)
                raise ConfigError(
                    f"one round costs epsilon = {cost:.2f} at user level, above target_epsilon = "
                    f"{privacy.target_epsilon}: raise noise_multiplier, or lower sample_rate"
                ) from None
            return False
        return True

    @property
    def is_paid(self) -> bool:
        """Whether the round in progress was booked."""
        return self._charge is not None

    def noise(self) -> np.random.Generator:
        """Return the generator of the round's noise, once for each round that was booked.

        Raises:
            PrivacyError: where the round was not booked, or has released already.
        """
        if self._charge is None:
            raise PrivacyError("user-level noise was not reserved in the ledger: no release")
        self._charge.take(self._privacy.event.noise_multiplier, self._privacy.event.sample_rate)
        return self._generator("user-level noise")

    def coins(self) -> np.random.Generator:
        """Return a generator of the round's Poisson sample, whose draws nobody may know."""
        return self._generator("user-level sample")

    def spent(self, state: State | None) -> UserLevelSpent:
        """Return what the ledger has come to.

        Args:
            state: of the rule after the last round; None where none was played.
        """
        privacy, ledger = self._privacy, self._ledger
        events = ledger.events
        # One round of a fixed size, in any run of the ledger, is enough for the weaker claim.
        sampled = all(rate < 1 for _, rate, _ in events) and privacy.sample_rate is not None
        return UserLevelSpent(
            unit=ADDED if sampled else LEFT_OUT,
            adjacency="add or remove" if sampled else "leave out",
            epsilon=ledger.epsilon(privacy.target_delta),
            delta=privacy.target_delta,
            target_epsilon=privacy.target_epsilon,
            noise_multiplier=privacy.noise_multiplier,
            sample_rate=privacy.sample_rate,
            max_update_norm=norm_in(state) if state else privacy.max_update_norm,
            rounds=sum(count for _, _, count in events),
            seeded=any(entry.seeded for entry in ledger.entries()),
        )

    def _generator(self, purpose: str) -> np.random.Generator:
        seed = self._privacy.seed
        if seed is None:
            return fresh_generator()
        return numpy_stream(seed, purpose, self._ledger.head.lines)  # no two rounds alike

    def _tell(self, num_clients: int) -> None:
        if self._has_told:
            return
        self._has_told = True
        privacy = self._privacy
        if privacy.sample_rate is not None:
            log(
                INFO,
                "user-level privacy: %.3g of %d clients take part in a round on average, sums are "
                "divided by %g",
                privacy.sample_rate * num_clients,
                num_clients,
                privacy.expected_clients,
            )
        if privacy.target_delta * num_clients >= 1:
            log(
                WARNING,
                "target_delta = %g is not below 1 / %d clients: one of them could be given away",
                privacy.target_delta,
                num_clients,
            )


def _ledger_of(privacy: UserLevelPrivacy) -> PrivacyLedger:
    ledger = privacy.ledger
    if not isinstance(ledger, PrivacyLedger):
        return PrivacyLedger(ledger or LEDGER, unit=privacy.unit)
    if ledger.unit in ("", UNIT):
        raise ConfigError(
            f"the ledger {str(ledger.path)!r} counts in {UNIT!r}: that of user-level "
            f"privacy counts in {privacy.unit!r}; give its path alone"
        )
    return ledger
