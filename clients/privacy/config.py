"""What a client gives away at most: the parameters of its releases, pinned on the client."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...accounting import Accountant, Budget, Event, check_events
from ...errors import ConfigError, RefusedError
from ...ledger import PrivacyLedger

ALL = "all"
USUAL_RECORDS = 100  # of a client, where nobody says
LEAST_NORM = 1e-6  # below it float32 has no room for noise of the right size
LEAST_RATE = 1e-5  # of a sample; drawn in steps of 6e-8

# What a server may wish for, in its train config, and which way is weaker.
WISHES = {
    "noise_multiplier": "lower",
    "max_grad_norm": "higher",
    "sample_rate": "higher",
    "target_epsilon": "higher",
    "target_delta": "higher",
    "hvp_noise_multiplier": "lower",
    "hvp_max_norm": "higher",
}


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    r"""Parameters of a client's releases, which no server can weaken.

    A release draws a fresh Poisson(q) batch B of the client's records and gives

        (1 / b) [ sum_{i in B} g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I) ].

    Attributes:
        noise_multiplier: sigma > 0.
        max_grad_norm: C > 0, L2 norm over all trainable parameters, of one record's gradient.
        sample_rate: q in (0, 1], the chance of each record to be in a batch.
        target_epsilon: > 0; nothing is released that would bring the ledger above it.
        target_delta: in (0, 1), well below 1 / (number of records).
        accountant: "rdp", or "prv": some percent tighter, for schedules that never change.
        expected_batch_size: b > 0, a public constant: q times a number of records that is known
            to all, NOT the client's own number. None: q times ``USUAL_RECORDS``; with
            ``public_counts``, q times the client's own.
        ledger: the file, or a PrivacyLedger; None: ``metabloom-ledgers/<client>.jsonl`` in the
            working directory.
        hvp_noise_multiplier: sigma_h > 0 of Hessian-vector products; None: ``noise_multiplier``.
        hvp_max_norm: c_h > 0: a record's product H_i v is clipped to c_h ||v||.
        public_counts: the number of records is no secret, and is sent as num-examples.
        unprotected_metrics: names of evaluation metrics that are sent as they are, without any
            privacy; ("all",) for all of them.
        max_releases: most releases of one round, >= 1, whatever number of steps a server asks for.
        seed: of noise and batches, for tests only: seeded noise protects nobody, and the ledger
            says that it was seeded. None: the operating system's entropy.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    target_epsilon: float
    target_delta: float
    accountant: Accountant = "rdp"
    expected_batch_size: float | None = None
    ledger: PrivacyLedger | Path | str | None = None
    hvp_noise_multiplier: float | None = None
    hvp_max_norm: float = 0.1
    public_counts: bool = False
    unprotected_metrics: tuple[str, ...] = ()
    max_releases: int = 1000
    seed: int | None = None

    def __post_init__(self) -> None:
        check_events([Event(self.noise_multiplier, self.sample_rate)])
        Budget(self.target_epsilon, self.target_delta, self.accountant)
        for name in (
            "max_grad_norm",
            "hvp_noise_multiplier",
            "hvp_max_norm",
            "expected_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and not LEAST_NORM <= value < math.inf:
                raise ConfigError(
                    f"{name} = {value!r}: must be a finite number of at least {LEAST_NORM:g}"
                )
        if self.sample_rate < LEAST_RATE:
            raise ConfigError(
                f"sample_rate = {self.sample_rate!r}: batches are drawn by numbers that are "
                f"multiples of 2^-24, too coarse below {LEAST_RATE:g}; take a higher one"
            )
        if not (isinstance(self.max_releases, int) and self.max_releases >= 1):
            raise ConfigError(
                f"max_releases = {self.max_releases!r}: must be a whole number of at least 1"
            )

    @property
    def budget(self) -> Budget:
        """What may be spent on the data set, over all time."""
        return Budget(self.target_epsilon, self.target_delta, self.accountant)

    @property
    def hvp_noise(self) -> float:
        """sigma_h, whichever way it was given."""
        own = self.hvp_noise_multiplier
        return self.noise_multiplier if own is None else own

    def batch_size(self, records: int) -> float:
        """Return b, for a client with so many records: they count where they are no secret."""
        if self.expected_batch_size is not None:
            return self.expected_batch_size
        return self.sample_rate * max(records if self.public_counts else USUAL_RECORDS, 1)

    def tells(self, metric: str) -> bool:
        """Return whether an evaluation metric may leave the client."""
        return ALL in self.unprotected_metrics or metric in self.unprotected_metrics

    def under(self, wishes: Mapping[str, object]) -> "PrivacyConfig":
        """Return these parameters with a server's wishes, which may only make them stronger.

        A wish is a key ``privacy.noise-multiplier`` (with hyphens, or as it is called here) of the
        server's train config; keys that are no parameters are left alone.

        Raises:
            RefusedError: where a wish is weaker than what is pinned here, or no number.
        """
        stronger: dict[str, float] = {}
        for name, weaker in WISHES.items():
            hyphenated = f"privacy.{name.replace('_', '-')}"
            for key in {hyphenated, name, name.replace("_", "-")} & set(wishes):
                wish, own = wishes[key], self._own(name)
                if not isinstance(wish, float) and not (type(wish) is int and abs(wish) < 2**63):
                    raise RefusedError(f"the server wishes {key} = {wish!r}: that is no number")
                is_weaker = wish < own if weaker == "lower" else wish > own
                if is_weaker or not 0 < wish < math.inf:
                    raise RefusedError(
                        f"the server wishes {key} = {float(wish):g}, this client has pinned "
                        f"{own:g}: a {weaker} one would protect less, so the round is refused"
                    )
                strongest = max if weaker == "lower" else min  # of its spellings
                stronger[name] = strongest(float(wish), stronger.get(name, float(wish)))
        try:
            return replace(self, **stronger)  # type: ignore[arg-type]  # these are floats
        except ConfigError as err:
            raise RefusedError(f"the server wishes for what cannot be: {err}") from err

    def _own(self, name: str) -> float:
        return self.hvp_noise if name == "hvp_noise_multiplier" else float(getattr(self, name))
