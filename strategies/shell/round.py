"""What is known of the round in progress."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common import log

from ...errors import BUDGET_EXHAUSTED
from .answers import bytes_in
from .exchange import Exchange
from .partial_sums import Part, Reduction, parts_of
from .reply_metrics import Metric, numbers_of, privacy_in
from .reports import ClientScore, RoundReport


@dataclass
class RoundInProgress:
    """The round in progress: what will be its report, and the messages that are under way.

    Where the grid sums replies, ``reduction`` will have the sums.
    """

    number: int = 0
    started: float = field(default_factory=time.perf_counter)
    clients: tuple[str, ...] = ()
    messages: list[Message] = field(default_factory=list)
    reduction: Reduction | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    exhausted: list[str] = field(default_factory=list)
    spent: list[tuple[str, float]] = field(default_factory=list)
    privacy_delta: float = 0.0
    train_metrics: dict[str, float] = field(default_factory=dict)
    validation: tuple[ClientScore, ...] = ()
    skipped: bool = False
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_to_train: int = 0  # of those that went down

    def note(self, exchange: Exchange, name_of: Callable[[int], str]) -> None:
        """Note and log the nodes that failed, were refused, are exhausted or lost."""
        for node_id, reason in (*exchange.failed, *exchange.lost):
            self.failures.append((name_of(node_id), reason))
            log(WARNING, "round %d: %s failed: %s", self.number, name_of(node_id), reason)
        for node_id, reason in exchange.refused:
            self.refuse(name_of(node_id), reason)
        for node_id in exchange.exhausted:
            self.exhausted.append(name_of(node_id))
            log(INFO, "round %d: %s: %s", self.number, name_of(node_id), BUDGET_EXHAUSTED)

    def refuse(self, name: str, reason: str) -> None:
        """Note and log a node whose reply is refused."""
        self.quarantined.append((name, reason))
        log(WARNING, "round %d: %s is quarantined: %s", self.number, name, reason)

    def received(self, replies: Iterable[Message]) -> tuple[list[Message], list[Part]]:
        """Return the replies, and the sums of those that have no arrays any more."""
        all_of_them = list(replies)  # only then the sums are complete
        self.bytes_to_train = self.bytes_down  # nothing else was sent yet
        reduction, self.reduction = self.reduction, None
        return all_of_them, parts_of(reduction)

    def note_training(
        self,
        contents: Iterable[tuple[str, RecordDict]],
        parts: Iterable[Part],
        metrics: Mapping[str, Metric],
    ) -> None:
        """Note what came of a training: the good replies by client, their sums, their metrics."""
        self.train_metrics = numbers_of(metrics)
        self.bytes_up += sum(part.num_bytes for part in parts)
        for name, content in contents:
            self.bytes_up += bytes_in(content)
            epsilon, delta = privacy_in(content)
            if epsilon:
                self.spent.append((name, epsilon))
                self.privacy_delta = max(self.privacy_delta, delta)

    def skip_for_want(self, good: int, needed: int) -> tuple[None, None]:
        """Mark the round as skipped for want of good replies."""
        few = f"{good} good replies of {len(self.clients)}, {needed} are needed"
        return self.skip(
            f"{few}; {len(self.exhausted)} budgets exhausted" if self.exhausted else few
        )

    def skip(self, reason: str) -> tuple[None, None]:
        """Mark the round as skipped, and return what Flower's loop takes for that."""
        self.skipped = True
        log(WARNING, "round %d is skipped, the model stays: %s", self.number, reason)
        return None, None

    @property
    def final(self) -> dict[str, Any]:
        """What a run's result has of the evaluation after the last round."""
        refused = tuple(self.quarantined)
        return {"final_failures": tuple(self.failures), "final_quarantined": refused}

    def report(self) -> RoundReport:
        """Return the report of the round, which ends now."""
        return RoundReport(
            round=self.number,
            clients=self.clients,
            failures=tuple(self.failures),
            train_metrics=self.train_metrics,
            validation=self.validation,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            seconds=time.perf_counter() - self.started,
            quarantined=tuple(self.quarantined),
            skipped=self.skipped,
            exhausted=tuple(self.exhausted),
            spent=tuple(self.spent),
            privacy_delta=self.privacy_delta,
            bytes_training=self.bytes_to_train + self.bytes_up,
        )
