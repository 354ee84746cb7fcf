"""What a check of the privacy audit works with: the engine, a ledger in a folder, and a watcher."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ....accounting import Events
from ....ledger import PrivacyLedger
from ....streams import stream_seed
from ...data import Batch
from ...learner import Learner
from ...local_update import LocalUpdate
from ...maml import MAMLClient
from ...sgd import SGDClient
from ..config import PrivacyConfig
from ..noise import fresh_sources, seeded_sources
from ..releases import Releases
from ..updates import PrivateMetaGradient, private_meta_gradient, private_sgd_update
from .canaries import Canaries, Watched, linear, loss_of_kind
from .findings import (
    Finding,
    least_separation,
    ratio_tolerance,
    separation,
    share_tolerance,
)

DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What is audited: the real thing, unless a part of it is replaced.

    Attributes:
        releases: builds ``Releases``.
        meta_gradient: has the signature of ``private_meta_gradient``.
        sgd_update: has the signature of ``private_sgd_update``.
        ledger: opens the ledger of a file; called anew for each round, as a deployed client does.
        sgd_client: builds a client that trains by DP-SGD; called anew for each round.
        maml_client: the same, by FOMAML.
        noise_seed: None for the operating system's entropy; a number makes an audit reproducible.
    """

    releases: Callable[..., Releases] = Releases
    meta_gradient: Callable[..., PrivateMetaGradient] = private_meta_gradient
    sgd_update: Callable[..., LocalUpdate[Any, int]] = private_sgd_update
    ledger: Callable[[Path], PrivacyLedger] = PrivacyLedger
    sgd_client: Callable[..., Learner] = SGDClient
    maml_client: Callable[..., Learner] = MAMLClient
    noise_seed: int | None = None


@dataclass(frozen=True)
class Bench:
    """What one check works with.

    Attributes:
        name: of the check.
        seed: of coins.
        engine: what is audited.
        count: m, number of canaries.
        alpha: chance of a false alarm of "at most".
        folder: for ledgers; it is removed afterwards.
        privacy: parameters of its releases.
    """

    name: str
    seed: int
    engine: Engine
    count: int
    alpha: float
    folder: Path
    privacy: PrivacyConfig = field(
        default_factory=lambda: PrivacyConfig(
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            sample_rate=1.0,
            target_epsilon=1e9,
            target_delta=DELTA,
        )
    )

    @property
    def batch_size(self) -> float:
        """The expected one, b: on purpose not 1, for an error in it must show."""
        return self.count / 2

    @property
    def noise_seed(self) -> int | None:
        """The seed of this check's noise; None: it has none."""
        own = self.engine.noise_seed
        return None if own is None else stream_seed(own, self.name) % 2**31

    @property
    def ledger_file(self) -> Path:
        """The file of this check's ledger."""
        return self.folder / "ledger.jsonl"

    def canaries(self, kind: int) -> Canaries:
        """Return canaries, about half of them present."""
        return Canaries.tossed(self.seed, self.name, self.count, kind)

    def watched(self, records: Batch, events: Events) -> Watched:
        """Return releases over ``records`` for which ``events`` were reserved."""
        charge = self.engine.ledger(self.ledger_file).reserve(events)
        seed = self.noise_seed
        return Watched(
            self.engine.releases(
                linear(records[0].shape[1]),
                loss_of_kind,
                records,
                sample_rate=self.privacy.sample_rate,
                expected_batch_size=self.batch_size,
                charge=charge,
                sources=fresh_sources() if seed is None else seeded_sources(seed),
            )
        )

    @property
    def booked_mu(self) -> float:
        """The mu of all that the ledger holds; every sample rate in it is 1."""
        events = self.engine.ledger(self.ledger_file).events
        return math.sqrt(sum(count / sigma**2 for sigma, _, count in events))

    def standardised(self, releases: Watched) -> list[Tensor]:
        """Return each release over C / b: a canary's share is at most 1, the noise sigma."""
        return [one.value * (self.batch_size / one.bound) for one in releases.seen]

    def canary_finding(self, values: Tensor, is_in: Tensor, what: str) -> Finding:
        """Return what ``values`` (m,) tell of the canaries, against what was booked."""
        estimate = abs(separation(values, is_in))  # a wrong sign separates as well
        return Finding(
            check=self.name,
            what=what,
            unit="mu",
            estimate=estimate,
            measured=least_separation(estimate, is_in, self.alpha),
            claimed=self.booked_mu,
            bound_kind="at most",
            alpha=self.alpha,
        )

    def ratio_finding(self, ratio: float, freedom: int, what: str, pairs: int = 1) -> Finding:
        """Return what a ratio of standard deviations, the worst of ``pairs``, tells of noise."""
        return self._within(
            ratio, 1.0, ratio_tolerance(freedom, self.alpha / 100 / pairs), what, "std ratio"
        )

    def share_finding(
        self, share: float, claimed: float, records: int, what: str, pairs: int = 1
    ) -> Finding:
        """Return what a share of records, the worst of ``pairs``, tells of batches."""
        tolerance = share_tolerance(claimed, records, self.alpha / 100 / pairs)
        return self._within(share, claimed, tolerance, what, "share")

    def _within(
        self, value: float, claimed: float, tolerance: float, what: str, unit: str
    ) -> Finding:
        return Finding(
            check=self.name,
            what=what,
            unit=unit,
            estimate=value,
            measured=value,
            claimed=claimed,
            bound_kind="within",
            tolerance=tolerance,
            alpha=self.alpha / 100,
        )
